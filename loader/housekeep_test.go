package loader_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
)

// Expired flows are removed, so that none comes back when the clock wraps, or as
// here when flows may be silent for longer. Flows that have not expired stay where
// they are. The control is a table that is frozen, where nothing may be removed.
// All that is where the program has no timer to do it itself.
func TestHousekeepForgets(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 3, udpServer)
	restore := loader.NoTimer()
	g := attach(t, fs, ns, loader.Options{Flows: 1000, Settle: -1, IdleNew: time.Hour})
	restore()
	t.Parallel()
	count := func() (tracked, established int) {
		t.Helper()
		tracked, established, err := g.CountFlows()
		if err != nil {
			t.Fatal(err)
		}
		return tracked, established
	}
	talking := testnet.NewClients(t, ns, 100, fleetAddr)
	before := talking.Ask()
	for _, established := count(); established < 100; _, established = count() {
		talking.Ask()
	}
	testnet.NewClients(t, ns, 300, fleetAddr).Ask()
	attach(t, fs, ns, loader.Options{IdleNew: 3 * time.Second})
	for tracked, _ := count(); tracked > 100; tracked, _ = count() {
		time.Sleep(20 * time.Millisecond)
	}
	for _, c := range []struct {
		frozen          int // seconds since the table was; -1: it is not
		forgotten, left int
	}{{0, 0, 400}, {-1, 300, 100}, {-1, 0, 100}} {
		if err := g.Freeze(c.frozen); err != nil {
			t.Fatal(err)
		}
		if h, err := g.Housekeep(); err != nil || h != (loader.Housekept{Forgotten: c.forgotten}) {
			t.Errorf("frozen %d: housekept %+v, %v", c.frozen, h, err)
		}
		if err := g.Freeze(-1); err != nil {
			t.Fatal(err)
		}
		attach(t, fs, ns, loader.Options{IdleNew: time.Hour})
		if tracked, _ := count(); tracked != c.left {
			t.Errorf("frozen %d: %d flows are left, want %d", c.frozen, tracked, c.left)
		}
		attach(t, fs, ns, loader.Options{IdleNew: 3 * time.Second})
	}
	if moved := testnet.Moved(before, talking.Ask()); moved != 0 {
		t.Errorf("%d flows moved", moved)
	}
}

// A flow that comes back after it has expired is a new one, and in the entry that it
// had: in another it would have two. The control are flows that have none.
func TestComesBack(t *testing.T) {
	const n = 300
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 3, udpServer)
	restore := loader.NoTimer() // it would empty the entries
	g := attach(t, fs, ns, loader.Options{Flows: 1000, Settle: -1, IdleNew: time.Hour})
	restore()
	t.Parallel()
	clients := testnet.NewClients(t, ns, n, fleetAddr)
	clients.Ask()
	g.ExpireAfter(1, 1)
	for tracked := n; tracked > 0; time.Sleep(20 * time.Millisecond) {
		var err error
		if tracked, _, err = g.CountFlows(); err != nil {
			t.Fatal(err)
		}
	}
	clients.Ask()
	g.ExpireAfter(3600, 3600)
	if began, used := status(t, g).Counters.New, entries(t, g); began < 2*n || used != n {
		t.Errorf("%d flows began, want %d; %d entries, want %d", began, 2*n, used, n)
	}
	shown := map[netip.AddrPort]bool{}
	for f, err := range g.Flows() {
		if err != nil {
			t.Fatal(err)
		}
		shown[f.Client] = true
	}
	if len(shown) != n {
		t.Errorf("%d clients are shown, want %d: details are not beside their entries", len(shown), n)
	}
	testnet.NewClients(t, ns, n, fleetAddr).Ask()
	if used := entries(t, g); used != 2*n {
		t.Errorf("with others %d entries, want %d", used, 2*n)
	}
}

// It needs the lock only if there is something to do.
func TestHousekeepLock(t *testing.T) {
	defer loader.LosePatience()()
	ns, root := testnet.New(t), testnet.BPFFS(t)
	servers := testnet.StartGroup(t, ns, 3, udpServer)
	g := attach(t, loader.FS(root), ns, noSettle)
	dir, err := os.Open(filepath.Join(root, "rpsel", strconv.FormatUint(ns.Cookie(), 10)))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if h, err := g.Housekeep(); err != nil || h != (loader.Housekept{}) {
		t.Errorf("nothing to do: %+v, %v", h, err)
	}
	servers.Close(1)
	if _, err := g.Housekeep(); !errors.Is(err, loader.ErrLocked) {
		t.Errorf("a listener died: got %v, want %v", err, loader.ErrLocked)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if h, err := g.Housekeep(); err != nil || h != (loader.Housekept{Buried: 1, Repaired: true}) {
		t.Errorf("the lock is free: %+v, %v", h, err)
	}
}

// A weight that a killed command recorded is in force once house is kept.
func TestHousekeepWeight(t *testing.T) {
	const flows = 2000
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 2, udpServer)
	g := attach(t, fs, ns, noSettle)
	if err := g.RecordWeight(1, 4); err != nil {
		t.Fatal(err)
	}
	fresh := func() int {
		return testnet.Shares(testnet.NewClients(t, ns, flows, fleetAddr).Ask())["s1"]
	}
	if got := fresh(); got > flows*6/10 {
		t.Errorf("not dealt yet: s1 has %d of %d new flows", got, flows)
	}
	if h, err := g.Housekeep(); err != nil || !h.Repaired {
		t.Errorf("housekept %+v, %v", h, err)
	}
	if got := fresh(); got < flows*4/5*9/10 {
		t.Errorf("weight 4 of 5: s1 has %d of %d new flows", got, flows)
	}
	if h, err := g.Housekeep(); err != nil || h != (loader.Housekept{}) {
		t.Errorf("housekept again: %+v, %v", h, err)
	}
	if got := status(t, g).Listeners[1].Weight; got != 4 {
		t.Errorf("status says weight %d", got)
	}
}

// BenchmarkHousekeep looks after a group of 8 with a million flows: a tick on
// which nothing is to be done, and a sweep of the whole table.
func BenchmarkHousekeep(b *testing.B) {
	ns, fs := testnet.New(b), loader.FS(testnet.BPFFS(b))
	testnet.StartGroup(b, ns, 8, udpServer)
	g := attach(b, fs, ns, loader.Options{Settle: -1, Flows: 1 << 20})
	if err := g.Fill(1<<20, maps.Established); err != nil {
		b.Fatal(err)
	}
	b.Run("tick", func(b *testing.B) {
		for b.Loop() {
			if h, err := g.Housekeep(); err != nil || h != (loader.Housekept{}) {
				b.Fatal(h, err)
			}
		}
	})
	b.Run("whole", func(b *testing.B) {
		for b.Loop() {
			if err := g.SweepAll(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
