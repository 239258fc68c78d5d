package loader_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/layout1"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// P6: an upgrade under traffic. Nobody waits in vain for an answer, and no
// tracked flow moves, although one member died before, so that the kernel's hash
// would send them elsewhere.
func TestUpgrade(t *testing.T) {
	for _, from := range []int{1, maps.ABI} {
		for _, flows := range []int{0, 4000, 500} {
			for _, c := range some(cases) {
				t.Run(fmt.Sprintf("layout %d, %d flows, %s from %s", from, flows, c.listen, c.remote), func(t *testing.T) {
					ns, root := testnet.New(t), testnet.BPFFS(t)
					servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true})
					clients := testnet.NewClients(t, ns, 400, c.remote)
					key := attachFrom(t, root, ns, from, 1000)
					clients.Ask()
					servers.Close(0)
					before := clients.Ask()
					layout1.PickOnly(t, root, key, 1)

					u := upgradeAsking(t, root, key, flows, clients, before)
					capacity := flows
					if flows == 0 {
						capacity = 1000
					}
					if u.UpToDate || !u.Program || u.FromLayout != from || u.Layout != maps.ABI || u.FromCapacity != 1000 || u.Capacity != capacity || u.Flows != 400 {
						t.Errorf("upgraded %+v", u)
					}
					// Known all the while: nobody was taken for a new flow.
					if s := status(t, open(t, root, key)); s.Counters.New != 400 || s.Counters.Untracked != 0 || s.Counters.Fallback != 0 {
						t.Errorf("counters %+v", s.Counters)
					}
				})
			}
		}
	}
}

// Tables of another size again and again, while flows begin and listeners die.
// New flows keep the listener they got, whether they were tracked at once or
// came while the flows were frozen; orphans are rehomed once.
func TestUpgradeAgainAndAgain(t *testing.T) {
	const rounds = 12
	ns, root := testnet.New(t), testnet.BPFFS(t)
	servers := testnet.StartGroup(t, ns, 8, udpServer)
	known := testnet.NewClients(t, ns, 2000, "127.0.0.1:1194")
	key := attachFrom(t, root, ns, 1, 10000)
	now := known.Ask()
	var fresh []*testnet.Clients
	var served [][]string
	total := 2000
	for round := range rounds {
		done := make(chan error)
		go func() {
			_, err := loader.FS(root).Upgrade(key, loader.UpgradeOptions{Flows: 5000 + 1000*(round%3)})
			done <- err
		}()
		var gone []string
		if round%4 == 3 {
			gone = []string{servers.Names[round/4]}
			servers.Close(round / 4)
		}
		for asked, upgraded := 0, false; !upgraded || asked < 2; asked++ {
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				upgraded = true
			default:
			}
			if gone == nil && asked < 4 {
				fresh = append(fresh, testnet.NewClients(t, ns, 50, "127.0.0.1:1194"))
				served = append(served, fresh[len(fresh)-1].Ask())
				total += 50
			}
			then := known.Ask()
			if moved := testnet.Moved(now, then, gone...); moved != 0 || testnet.Shares(then)[""] != 0 {
				t.Fatalf("round %d: %d flows moved, answers from %v", round, moved, testnet.Shares(then))
			}
			now, gone = then, nil
		}
		for i, clients := range fresh {
			then := clients.Ask()
			if moved := testnet.Moved(served[i], then, servers.Names[:(round+1)/4]...); moved != 0 || testnet.Shares(then)[""] != 0 {
				t.Fatalf("round %d: %d of the flows that began under way moved, answers from %v", round, moved, testnet.Shares(then))
			}
			served[i] = then
		}
	}
	s := status(t, open(t, root, key))
	if s.Tracked != total || s.Counters.Fallback != 0 || s.Capacity != 7000 {
		t.Errorf("%d flows, status %+v", total, s)
	}
	t.Logf("%d of %d new flows came while the table was frozen", s.Counters.Untracked, total-2000)
}

// The control: who detaches and attaches instead moves flows.
func TestUpgradeControl(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	servers := testnet.StartGroup(t, ns, 4, udpServer)
	clients := testnet.NewClients(t, ns, 400, "127.0.0.1:1194")
	key := attachFrom(t, root, ns, 1, 1000)
	clients.Ask()
	servers.Close(0)
	before := clients.Ask()
	if _, err := loader.FS(root).Detach(key); err != nil {
		t.Fatal(err)
	}
	attach(t, loader.FS(root), ns, loader.Options{})
	if moved := testnet.Moved(before, clients.Ask()); moved < 40 {
		t.Errorf("only %d flows moved: the other tests of upgrades cannot tell", moved)
	}
}

// upgradeAsking upgrades a group while the clients ask: they get the same answers
// all the while.
func upgradeAsking(t *testing.T, root string, key sockets.Key, flows int, clients *testnet.Clients, before []string) (u loader.Upgraded) {
	t.Helper()
	done := make(chan error)
	go func() {
		var err error
		u, err = loader.FS(root).Upgrade(key, loader.UpgradeOptions{Flows: flows})
		done <- err
	}()
	for asked, upgraded := 0, false; !upgraded || asked < 2; asked++ {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			upgraded = true
		default:
		}
		if diff := cmp.Diff(before, clients.Ask()); diff != "" {
			t.Fatalf("answers changed: %s", diff)
		}
	}
	return u
}

// TCP connections are made all the while, and each is accepted.
func TestUpgradeTCP(t *testing.T) {
	for _, from := range []int{1, maps.ABI} {
		t.Run(fmt.Sprintf("layout %d", from), func(t *testing.T) {
			ns, root := testnet.New(t), testnet.BPFFS(t)
			testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "tcp6", Addr: "[::]:1194", ReusePort: true})
			clients := testnet.NewTCPClients(t, ns, 100, "127.0.0.1:1194")
			key := attachFrom(t, root, ns, from, 1000)
			before := clients.Ask()
			for _, flows := range []int{2000, 0, 500} {
				// Not tracked, but the pick table answers as before.
				upgradeAsking(t, root, key, flows, clients, before)
			}
			g := open(t, root, key)
			if s := status(t, g); !s.Attached || s.Affinity != "none" || s.Capacity != 500 || s.Counters.Fallback != 0 {
				t.Errorf("status %+v", s)
			}
		})
	}
}

func open(t *testing.T, root string, key sockets.Key) *loader.Group {
	t.Helper()
	g, err := loader.FS(root).Open(key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// Whatever a status tells, of listeners, flows and counts, is the same after an
// upgrade, and what can be done with a group can be done with this one.
func TestUpgradeKeeps(t *testing.T) {
	for _, flows := range []int{0, 2000} {
		t.Run(fmt.Sprintf("%d flows", flows), func(t *testing.T) {
			ns, root := testnet.New(t), testnet.BPFFS(t)
			servers := testnet.StartGroup(t, ns, 4, udpServer)
			clients := testnet.NewClients(t, ns, 600, "127.0.0.1:1194")
			key := layout1.Attach(t, root, ns, 1194, layout1.Options{Flows: 1000, Settle: 600, Weights: []uint32{1, 5}})[0]
			clients.Ask()
			// What layout 1 knew is read by its counters, which stay.
			upgraded, err := loader.FS(root).Upgrade(key, loader.UpgradeOptions{Flows: flows})
			if want := 600; err != nil || upgraded.Flows != want {
				t.Fatalf("%+v, %v, want %d flows", upgraded, err, want)
			}
			g := open(t, root, key)
			s := status(t, g)
			if !s.Attached || s.Tracked != 600 || s.Settling < 500*time.Second || s.Idle != 300*time.Second || s.IdleNew != time.Hour || s.Policy != "hash" {
				t.Errorf("status %+v", s)
			}
			if s.Counters.New != 600 || s.Counters.Runs != 600 {
				t.Errorf("counters %+v, want those of before", s.Counters)
			}
			for i, l := range s.Listeners {
				weight := map[bool]int{true: 5, false: 1}[i == 1]
				if l.State != "active" || l.PID != servers.PID() || l.Weight != weight || l.Flows == 0 || l.New == 0 || l.Command == "" {
					t.Errorf("listener %+v", l)
				}
			}
			listed := 0
			for f, err := range g.Flows() {
				if err != nil || f.Client.Addr().String() != "127.0.0.1" || f.Client.Port() < uint16(clients.Port(0)) || f.Client.Port() > uint16(clients.Port(599)) {
					t.Fatalf("%+v, %v", f, err)
				}
				listed++
			}
			if listed != 600 {
				t.Errorf("%d flows listed", listed)
			}

			// Upgraded again from its own layout, and once more: up to date.
			for i, want := range []bool{false, true} {
				u, err := loader.FS(root).Upgrade(key, loader.UpgradeOptions{Flows: 1500})
				if err != nil || u.UpToDate != want {
					t.Errorf("upgrade %d: %+v, %v", i, u, err)
				}
			}
			again := status(t, g)
			if again.Capacity != 1500 || again.Tracked != 600 || again.Settling < 500*time.Second {
				t.Errorf("status %+v", again)
			}
			s.Capacity = 1500
			for _, s := range []*loader.Status{&s, &again} {
				s.Settling, s.Age = 0, 0
				for i := range s.Listeners {
					s.Listeners[i].Joined, s.Listeners[i].Recent = 0, 0
				}
			}
			if diff := cmp.Diff(s, again, cmp.AllowUnexported(sockets.Key{}), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("status changed: %s", diff)
			}

			before := clients.Ask()
			if err := g.Drain(3); err != nil {
				t.Fatal(err)
			}
			name := servers.Add()
			attach(t, loader.FS(root), ns, noSettle)
			servers.Close(2)
			after := clients.Ask()
			if moved := testnet.Moved(before, after, "s2"); moved != 0 || testnet.Shares(after)[""]+testnet.Shares(after)["s2"] != 0 {
				t.Errorf("%d flows moved, answers from %v", moved, testnet.Shares(after))
			}
			fresh := testnet.Shares(testnet.NewClients(t, ns, 400, "127.0.0.1:1194").Ask())
			if fresh[name] == 0 || fresh["s3"]+fresh["s2"]+fresh[""] != 0 {
				t.Errorf("s3 drains, s2 is gone, %s joined, and new flows went to %v", name, fresh)
			}
		})
	}
}

// A table that is too small for the flows there are is refused, and nothing is
// changed.
func TestUpgradeTooSmall(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	testnet.StartGroup(t, ns, 2, udpServer)
	clients := testnet.NewClients(t, ns, 300, "127.0.0.1:1194")
	g := attach(t, loader.FS(root), ns, noSettle)
	before := clients.Ask()
	pins, groups := tree(t, root), find(t, ns)
	for _, dryRun := range []bool{true, false} {
		_, err := loader.FS(root).Upgrade(g.Key(), loader.UpgradeOptions{Flows: 299, DryRun: dryRun})
		if !errors.Is(err, loader.ErrTooSmall) || !strings.Contains(err.Error(), "flows 299: ") || !strings.Contains(err.Error(), "300 are tracked") {
			t.Errorf("got %v, want %v and both numbers", err, loader.ErrTooSmall)
		}
	}
	if diff := cmp.Diff(pins, tree(t, root)) + cmp.Diff(groups, find(t, ns)) + cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("changed: %s", diff)
	}
	// As many as are tracked fit.
	u, err := loader.FS(root).Upgrade(g.Key(), loader.UpgradeOptions{Flows: 300})
	if err != nil || u.Flows != 300 {
		t.Fatalf("%+v, %v", u, err)
	}
	if diff := cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
}

// An attempt that fails when the flows are frozen already thaws them.
func TestUpgradeFailsFrozen(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	servers := testnet.StartGroup(t, ns, 2, udpServer)
	clients := testnet.NewClients(t, ns, 300, "127.0.0.1:1194")
	g := attach(t, loader.FS(root), ns, noSettle)
	before := clients.Ask()
	pins := tree(t, root)
	defer loader.NoRoom()()
	_, err := loader.FS(root).Upgrade(g.Key(), loader.UpgradeOptions{Flows: 1000})
	if !errors.Is(err, loader.ErrTooSmall) || !strings.Contains(err.Error(), "of 300 flows find their buckets full") {
		t.Errorf("got %v, want %v", err, loader.ErrTooSmall)
	}
	if diff := cmp.Diff(pins, tree(t, root)); diff != "" {
		t.Errorf("pins changed: %s", diff)
	}
	servers.Close(0)
	if moved := testnet.Moved(before, clients.Ask(), "s0"); moved != 0 {
		t.Errorf("%d flows moved", moved)
	}
	if s := status(t, g); s.Counters.Rehomed == 0 || s.Counters.Untracked != 0 {
		t.Errorf("still frozen: counters %+v", s.Counters)
	}
}

// Without a socket left the state is upgraded all the same, for the next ones.
func TestUpgradeLeftState(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	servers := testnet.StartGroup(t, ns, 2, udpServer)
	key := attachFrom(t, root, ns, 1, 1000)
	servers.Kill()
	if u, err := loader.FS(root).Upgrade(key, loader.UpgradeOptions{}); err != nil || u.UpToDate || u.Program {
		t.Errorf("%+v, %v", u, err)
	}
	testnet.StartGroup(t, ns, 2, udpServer)
	if s := status(t, attach(t, loader.FS(root), ns, loader.Options{})); !s.Attached || len(s.Listeners) != 2 || s.Capacity != 1000 {
		t.Errorf("status %+v", s)
	}
}

// A handle that was opened before an upgrade, or a detach and an attach, goes on
// with the state in force: a change of what is not would be lost.
func TestHandleFollows(t *testing.T) {
	for name, replace := range map[string]func(*testing.T, loader.FS, *testnet.NetNS, sockets.Key){
		"upgrade": func(t *testing.T, root loader.FS, _ *testnet.NetNS, key sockets.Key) {
			if _, err := root.Upgrade(key, loader.UpgradeOptions{Flows: 2000}); err != nil {
				t.Fatal(err)
			}
		},
		"attached anew": func(t *testing.T, root loader.FS, ns *testnet.NetNS, key sockets.Key) {
			if _, err := root.Detach(key); err != nil {
				t.Fatal(err)
			}
			attach(t, root, ns, loader.Options{Flows: 2000, Settle: -1})
		},
	} {
		t.Run(name, func(t *testing.T) {
			ns, root := testnet.New(t), testnet.BPFFS(t)
			servers := testnet.StartGroup(t, ns, 2, udpServer)
			g := attach(t, loader.FS(root), ns, loader.Options{Flows: 1000, Settle: -1})
			other := open(t, root, g.Key())
			replace(t, loader.FS(root), ns, g.Key())
			joiner := servers.Add()
			conn := memberAt(t, ns, 2)
			if slot, err := g.Register(conn); slot != 2 || err != nil {
				t.Errorf("register: slot %d, %v", slot, err)
			}
			conn.Close()
			if err := other.Drain(0); err != nil {
				t.Error(err)
			}
			if got := testnet.Shares(testnet.NewClients(t, ns, 300, "127.0.0.1:1194").Ask()); got["s0"] != 0 || got[joiner] == 0 {
				t.Errorf("new flows went to %v", got)
			}
			for _, g := range []*loader.Group{g, other} {
				if s := status(t, g); !s.Attached || s.Capacity != 2000 || len(s.Listeners) != 3 || s.Tracked != 300 {
					t.Errorf("status %+v", s)
				}
				if tracked, _, err := g.CountFlows(); tracked != 300 || err != nil {
					t.Errorf("%d flows, %v", tracked, err)
				}
			}
			if n, err := g.Flush(nil); n != 300 || err != nil {
				t.Errorf("flushed %d, %v", n, err)
			}
		})
	}
}

// A handle may be used from all sides while its group is upgraded, and what it
// tells is right all the while.
func TestHandleFollowsUnderWay(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	testnet.StartGroup(t, ns, 3, udpServer)
	g := attach(t, loader.FS(root), ns, loader.Options{Flows: 1000, Settle: -1, IdleNew: time.Hour})
	testnet.NewClients(t, ns, 200, "127.0.0.1:1194").Ask()
	upgraded, changed := make(chan struct{}), make(chan struct{}, 1)
	var using sync.WaitGroup
	for name, use := range map[string]func() error{
		"status": func() error {
			s, err := g.Status()
			if err == nil && (!s.Attached || s.Tracked != 200 || len(s.Listeners) != 3 || s.Counters.New != 200) {
				err = fmt.Errorf("%+v", s)
			}
			return err
		},
		"flows": func() error {
			n := 0
			for _, err := range g.Flows() {
				if err != nil {
					return err
				}
				n++
			}
			if n != 200 {
				return fmt.Errorf("%d flows", n)
			}
			return nil
		},
		"change": func() error {
			err := errors.Join(g.Drain(1), g.Resume(1))
			select {
			case changed <- struct{}{}:
			default:
			}
			return err
		},
		"housekeep": func() error { _, err := g.Housekeep(); return err },
	} {
		using.Go(func() {
			for {
				select {
				case <-upgraded:
					return
				default:
				}
				if err := use(); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
	for i := range 6 {
		if _, err := loader.FS(root).Upgrade(g.Key(), loader.UpgradeOptions{Flows: 1000 + 100*(i%2)}); err != nil {
			t.Error(err)
		}
		<-changed // flock(2) is not fair: the change has its turn
	}
	close(upgraded)
	using.Wait()
}

// memberAt borrows a socket by its place in the kernel's order.
func memberAt(t *testing.T, ns *testnet.NetNS, i int) *sockets.Conn {
	t.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: 1194})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := sockets.Take(groups[0].Members[i].Holders[0], groups[0].Members[i].Cookie)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// Killed between attach and exchange, or just there: whoever reads sees the state
// whose program runs, and puts it in place, or leaves that to who has the lock.
func TestSupersededState(t *testing.T) {
	for _, locked := range []bool{false, true} {
		t.Run(fmt.Sprintf("locked %v", locked), func(t *testing.T) {
			ns, root := testnet.New(t), testnet.BPFFS(t)
			testnet.StartGroup(t, ns, 2, udpServer)
			clients := testnet.NewClients(t, ns, 100, "127.0.0.1:1194")
			key := attachFrom(t, root, ns, 1, 1000)
			before := clients.Ask()
			dir := filepath.Join(root, "rpsel", fmt.Sprint(ns.Cookie()))
			usual, aside := filepath.Join(dir, "udp_7f000001_1194"), filepath.Join(dir, "tmp_1_udp_7f000001_1194")
			// As it was in the middle: the old state in place, the new one aside.
			old := filepath.Join(dir, "old")
			if err := os.Mkdir(old, 0o700); err != nil {
				t.Fatal(err)
			}
			for _, name := range pinNames {
				repin(t, filepath.Join(usual, name), filepath.Join(old, name))
			}
			if _, err := loader.FS(root).Upgrade(key, loader.UpgradeOptions{}); err != nil {
				t.Fatal(err)
			}
			for _, rename := range [][2]string{{usual, aside}, {old, usual}} {
				if err := os.Rename(rename[0], rename[1]); err != nil {
					t.Fatal(err)
				}
			}
			if locked {
				defer loader.LosePatience()()
				lock, err := os.Open(dir)
				if err != nil {
					t.Fatal(err)
				}
				defer lock.Close()
				if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
					t.Fatal(err)
				}
			}
			g := open(t, root, key)
			if s := status(t, g); !s.Attached || s.Tracked != 100 || len(s.Listeners) != 2 {
				t.Errorf("status %+v", s)
			}
			if _, err := os.Stat(aside); errors.Is(err, os.ErrNotExist) == locked {
				t.Errorf("aside: %v", err)
			}
			if diff := cmp.Diff(before, clients.Ask()); diff != "" {
				t.Errorf("flows moved: %s", diff)
			}
			if locked {
				return
			}
			if err := g.Drain(0); err != nil {
				t.Error(err)
			}
			if s := status(t, open(t, root, key)); s.Listeners[0].State != "draining" {
				t.Errorf("status %+v", s)
			}
		})
	}
}

var pinNames = []string{"clock", "config", "counters", "details", "flows", "listeners", "live", "picks", "prog", "slot_counters", "slots", "socks"}

// repin pins what is pinned once more.
func repin(t *testing.T, from, to string) {
	t.Helper()
	if m, err := ebpf.LoadPinnedMap(from, nil); err == nil {
		defer m.Close()
		c, err := m.Clone()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.Pin(to); err != nil {
			t.Fatal(err)
		}
		return
	}
	p, err := ebpf.LoadPinnedProgram(from, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c, err := p.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Pin(to); err != nil {
		t.Fatal(err)
	}
}

// State of a newer rpsel is left alone, that of an older one is for upgrade and
// detach alone, and either is named.
func TestOtherLayouts(t *testing.T) {
	for _, c := range []struct {
		layout  uint32
		want    error
		message string
		mayEnd  bool // by upgrade and detach
	}{
		{1, loader.ErrOlder, `udp 127.0.0.1:1194: state of an older rpsel (layout 1, this one speaks 2): "rpsel upgrade" brings it up to date`, true},
		{3, loader.ErrNewer, `udp 127.0.0.1:1194: state of a newer rpsel (layout 3, this one speaks 2): use that one`, false},
	} {
		t.Run(fmt.Sprintf("layout %d", c.layout), func(t *testing.T) {
			ns, dir := testnet.New(t), testnet.BPFFS(t)
			root := loader.FS(dir)
			testnet.StartGroup(t, ns, 2, udpServer)
			clients := testnet.NewClients(t, ns, 100, "127.0.0.1:1194")
			var held *loader.Group
			var key sockets.Key
			if c.layout == 1 {
				key = attachFrom(t, dir, ns, 1, 1000)
			} else {
				held = attach(t, root, ns, loader.Options{})
				key = held.Key()
				// A newer one need not have what this one knows of.
				config := filepath.Join(dir, "rpsel", fmt.Sprint(ns.Cookie()), "udp_7f000001_1194", "config")
				setLayout(t, config, c.layout)
				if err := os.Remove(filepath.Join(filepath.Dir(config), "picks")); err != nil {
					t.Fatal(err)
				}
			}
			before := clients.Ask()
			conn := member(t, ns)
			pins, groups := tree(t, dir), find(t, ns)
			attempts := map[string]func() error{
				"open":   func() error { _, err := root.Open(key); return err },
				"plan":   func() error { _, err := root.Plan(conn, loader.Options{}); return err },
				"attach": func() error { _, err := root.Attach(conn, loader.Options{}); return err },
			}
			if !c.mayEnd {
				attempts["upgrade"] = func() error { _, err := root.Upgrade(key, loader.UpgradeOptions{}); return err }
				attempts["detach"] = func() error { _, err := root.Detach(key); return err }
			}
			for name, f := range attempts {
				if err := f(); !errors.Is(err, c.want) || err.Error() != c.message {
					t.Errorf("%s: got %v, want %s", name, err, c.message)
				}
			}
			if diff := cmp.Diff(pins, tree(t, dir)) + cmp.Diff(groups, find(t, ns)) + cmp.Diff(before, clients.Ask()); diff != "" {
				t.Errorf("changed: %s", diff)
			}
			if !c.mayEnd {
				return
			}
			d, err := root.Detach(key)
			if want := (loader.Detached{Key: key, Program: true, Listeners: 2, Flows: 100}); err != nil || d != want {
				t.Errorf("detached %+v, %v, want %+v", d, err, want)
			}
			if groups := find(t, ns); strings.Contains(groups, "HasProgram:true") || len(tree(t, dir)) != 0 {
				t.Errorf("left: %s, %s", groups, tree(t, dir))
			}
		})
	}
}

// setLayout writes a layout into a pinned configuration.
func setLayout(t *testing.T, config string, layout uint32) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(config, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		t.Fatal(err)
	}
	binary.NativeEndian.PutUint32(value[8:], layout)
	if err := m.Put(uint32(0), value); err != nil {
		t.Fatal(err)
	}
}

// attachFrom attaches the group on port 1194 with an older program.
func attachFrom(t *testing.T, root string, ns *testnet.NetNS, layout, flows int) sockets.Key {
	t.Helper()
	if layout == 1 {
		return layout1.Attach(t, root, ns, 1194, layout1.Options{Flows: flows})[0]
	}
	defer loader.OtherProgram()()
	return attach(t, loader.FS(root), ns, loader.Options{Flows: flows, Settle: -1}).Key()
}
