package loader_test

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// runs counts the runs of the namespace's selection program as the kernel does.
func runs(t *testing.T, ns *testnet.NetNS) uint64 {
	t.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: 1194})
	if err != nil || len(groups) != 1 {
		t.Fatalf("groups %v, %v", groups, err)
	}
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(groups[0].Program))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	stats, err := p.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return stats.RunCount
}

// counted is a group whose counts are compared with the kernel's.
type counted struct {
	t  *testing.T
	ns *testnet.NetNS
	g  *loader.Group
}

// count makes the kernel count runs from now on.
func count(t *testing.T) {
	t.Helper()
	testnet.Privileged(t)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stats.Close() })
}

// check compares every counter, and sums over outcomes, listeners and runs. With
// datagrams is 12 what each has of header and payload; else 0.
func (c counted) check(when string, want loader.Counters, bytes uint64) {
	c.t.Helper()
	s := status(c.t, c.g)
	got := s.Counters
	if sum := got.Hit + got.New + got.Rehomed + got.Untracked + got.Fallback + got.Migrated; sum != got.Runs || got.Runs != runs(c.t, c.ns) {
		c.t.Errorf("%s: outcomes add up to %d, runs are %d, the kernel counts %d", when, sum, got.Runs, runs(c.t, c.ns))
	}
	var sum loader.Counters
	for _, l := range s.Listeners {
		sum.Hit += l.Hit
		sum.New += l.New
		sum.Rehomed += l.Rehomed
		sum.Untracked += l.Untracked
		sum.Migrated += l.Migrated
		if n := l.Hit + l.New + l.Rehomed + l.Untracked; bytes != 0 && l.Bytes != n*bytes {
			c.t.Errorf("%s: slot %d: %d runs of %d bytes of header and payload, %d bytes", when, l.Slot, n, bytes, l.Bytes)
		}
	}
	want.Runs = got.Runs
	if diff := cmp.Diff(want, got); diff != "" {
		c.t.Errorf("%s: %s", when, diff)
	}
	want.Runs, want.Fallback, want.ParseError, want.TableFull, want.Evicted = 0, 0, 0, 0, 0
	if sum != want {
		c.t.Errorf("%s: listeners add up to %+v, want %+v", when, sum, want)
	}
}

// datagram is a header of 8 bytes and a payload of 4.
const datagram = 12

// P8: whatever happens, every run is exactly one outcome, and every counter has
// exactly the value that what happened gives it.
func TestEveryRunIsCountedOnce(t *testing.T) {
	count(t)
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: "udp6", Addr: "[::]:1194", ReusePort: true})
	g := attach(t, root, ns, loader.Options{Flows: 1000, Settle: -1})
	c := counted{t, ns, g}
	clients := testnet.NewClients(t, ns, 500, "127.0.0.1:1194")
	clients.Ask()
	c.check("first packets", loader.Counters{New: 500}, datagram)
	before := clients.Ask()
	c.check("second packets", loader.Counters{New: 500, Hit: 500}, datagram)
	servers.Close(1)
	orphans := uint64(testnet.Shares(before)["s1"])
	after := clients.Ask()
	c.check("a listener died", loader.Counters{New: 500, Hit: 1000 - orphans, Rehomed: orphans}, datagram)
	if diff := cmp.Diff(after, clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
	want := loader.Counters{New: 500, Hit: 1500 - orphans, Rehomed: orphans}
	c.check("and once more", want, datagram)

	// While the table is copied new flows are not written to it.
	if err := g.Freeze(0); err != nil {
		t.Fatal(err)
	}
	testnet.NewClients(t, ns, 100, "127.0.0.1:1194").Ask()
	want.Untracked = 100
	c.check("frozen", want, datagram)
	if err := g.Freeze(-1); err != nil {
		t.Fatal(err)
	}

	// All that are registered die.
	servers.Add()
	for _, i := range []int{0, 2, 3} {
		servers.Close(i)
	}
	clients.Ask()
	testnet.NewClients(t, ns, 100, "127.0.0.1:1194").Ask()
	want.Fallback = 600
	c.check("no listener is left", want, datagram)
}

// Of flows that find no room: with a table that is full of established ones, and
// with one full of new ones.
func TestFullTableIsCounted(t *testing.T) {
	for state, want := range map[maps.State]loader.Counters{
		maps.Established: {Untracked: 100, TableFull: 100},
		maps.New:         {New: 100, Evicted: 100},
	} {
		t.Run(state.String(), func(t *testing.T) {
			count(t)
			ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
			testnet.StartGroup(t, ns, 4, udpServer)
			g := attach(t, root, ns, loader.Options{Flows: 1000, Settle: -1})
			if err := g.Fill(maps.BucketSize*int(maps.BucketsFor(1000)), state); err != nil {
				t.Fatal(err)
			}
			testnet.NewClients(t, ns, 100, fleetAddr).Ask()
			counted{t, ns, g}.check("first packets", want, datagram)
		})
	}
}

// Of packets that cannot be read. There are none that get this far, so the program
// is one that fails to.
func TestParseErrorIsCounted(t *testing.T) {
	defer loader.Unreadable()()
	count(t)
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 4, udpServer)
	g := attach(t, root, ns, noSettle)
	clients := testnet.NewClients(t, ns, 100, fleetAddr)
	if diff := cmp.Diff(clients.Ask(), clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
	counted{t, ns, g}.check("unreadable", loader.Counters{Untracked: 200, ParseError: 200}, datagram)
}

// Of TCP: a SYN each, and each connection that waits in a listener that closes.
func TestMigratedIsCounted(t *testing.T) {
	count(t)
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	var listeners []*net.TCPListener
	err := ns.Do(func() (err error) {
		if err := os.WriteFile("/proc/sys/net/ipv4/tcp_migrate_req", []byte("1"), 0); err != nil {
			return err
		}
		listeners, err = sockets.Listen(t.Context(), 3, "tcp4", "127.0.0.1:1194")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, l := range listeners {
			l.Close()
		}
	})
	g := attach(t, root, ns, noSettle)
	err = ns.Do(func() error {
		for range 100 {
			conn, err := net.Dial("tcp4", "127.0.0.1:1194")
			if err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() })
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	c := counted{t, ns, g}
	c.check("connected", loader.Counters{Untracked: 100}, 0)
	slots, err := g.Slots()
	if err != nil {
		t.Fatal(err)
	}
	cookie, err := sockets.Cookie(listeners[1])
	if err != nil {
		t.Fatal(err)
	}
	waiting := status(t, g).Listeners[slots[cookie]].Untracked
	listeners[1].Close()
	c.check("one closed", loader.Counters{Untracked: 100, Migrated: waiting}, 0)
	if waiting == 0 || waiting == 100 {
		t.Errorf("%d of 100 connections waited", waiting)
	}
}

// Why a flow has its listener: what is told of each of them.
func TestFlowRules(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 3, udpServer)
	g := attach(t, fs, ns, loader.Options{})
	type rule struct{ Settling, Earlier, Rehomed bool }
	rules := func() map[rule]int {
		t.Helper()
		n := map[rule]int{}
		for f, err := range g.Flows() {
			if err != nil {
				t.Fatal(err)
			}
			n[rule{f.Settling, f.Earlier, f.Rehomed}]++
		}
		return n
	}
	check := func(when string, want map[rule]int) {
		t.Helper()
		if diff := cmp.Diff(want, rules()); diff != "" {
			t.Errorf("%s: %s", when, diff)
		}
	}
	// The rules are told apart by the second.
	tick := func() {
		t.Helper()
		for before, _ := g.Now(); ; time.Sleep(10 * time.Millisecond) {
			if now, err := g.Now(); err != nil || now != before {
				return
			}
		}
	}
	clients := testnet.NewClients(t, ns, 100, fleetAddr)
	clients.Ask()
	check("settling", map[rule]int{{Settling: true}: 100})
	tick()
	attach(t, fs, ns, noSettle)
	check("attached again without settling", map[rule]int{{Earlier: true}: 100})
	late := testnet.NewClients(t, ns, 100, fleetAddr)
	answers := late.Ask()
	check("settled", map[rule]int{{Earlier: true}: 100, {}: 100})
	tick()
	attach(t, fs, ns, loader.Options{Policy: loader.PolicyNewest})
	testnet.NewClients(t, ns, 100, fleetAddr).Ask()
	check("another policy", map[rule]int{{Earlier: true}: 200, {}: 100})

	// In the second in which they came, too.
	servers.Close(0)
	orphans := testnet.Shares(answers)["s0"]
	late.Ask()
	check("a listener died", map[rule]int{{Earlier: true}: 200 - orphans, {Earlier: true, Rehomed: true}: orphans, {}: 100})
	before := rules()
	fresh := testnet.NewClients(t, ns, 100, fleetAddr)
	orphans = testnet.Shares(fresh.Ask())["s1"]
	servers.Close(1)
	fresh.Ask()
	before[rule{}] += 100 - orphans
	before[rule{Rehomed: true}] = orphans
	check("at once", before)
}

// When the table has no room, flows are served untracked, the same way each
// time, and a joiner takes no more of them than its share.
func TestTableFull(t *testing.T) {
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	g := attach(t, root, ns, loader.Options{Flows: 64, Settle: -1})
	clients := testnet.NewClients(t, ns, 4000, "127.0.0.1:1194")
	before := clients.Ask()
	for range 2 {
		if diff := cmp.Diff(before, clients.Ask()); diff != "" {
			t.Fatalf("flows moved while nothing happened: %s", diff)
		}
	}
	s := status(t, g)
	if s.Tracked > 96 || s.Counters.Evicted == 0 || s.Counters.Fallback != 0 {
		t.Errorf("status %+v", s)
	}
	name := servers.Add()
	attach(t, root, ns, loader.Options{})
	after := clients.Ask()
	if moved, joined := testnet.Moved(before, after), testnet.Shares(after)[name]; moved != joined || moved > 4000/3 {
		t.Errorf("%s joined and has %d flows, %d moved", name, joined, moved)
	}
	// An entry from before the join may keep a flow until it is evicted.
	if _, err := g.Flush(nil); err != nil {
		t.Fatal(err)
	}
	after = clients.Ask()
	servers.Close(0)
	if moved := testnet.Moved(after, clients.Ask(), "s0"); moved != 0 {
		t.Errorf("s0 died and %d untracked flows of others moved", moved)
	}
}
