package loader_test

import (
	"flag"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

func TestMain(m *testing.M) {
	flag.Set("test.parallel", "8") // those that are parallel wait for seconds to pass
	testnet.Main(m)
}

// Every combination of listener and client family.
var cases = []struct{ network, listen, remote string }{
	{"udp4", "127.0.0.1:1194", "127.0.0.1:1194"},
	{"udp4", "0.0.0.0:1194", "127.0.0.1:1194"},
	{"udp6", "[::1]:1194", "[::1]:1194"},
	{"udp6", "[::]:1194", "[::1]:1194"},
	{"udp6", "[::]:1194", "127.0.0.1:1194"},
}

// some are the cases of a short run: the first and the last.
func some[T any](cases []T) []T {
	if testing.Short() {
		return []T{cases[0], cases[len(cases)-1]}
	}
	return cases
}

// noSettle ends settling at once: what looks like a new flow is one. However slow the
// machine is, no flow expires.
var noSettle = loader.Options{Settle: -1, IdleNew: time.Hour}

// chance is how far from n*p the number of those of n may be that each are drawn with
// probability p: six standard deviations, which chance passes once in 10^8 or less.
// Where they are drawn together, so many at a time, that is more.
func chance(n int, p, together float64) float64 {
	return 6 * math.Sqrt(float64(n)*p*(1-p)*together)
}

// member borrows a socket of the namespace's group on port 1194.
func member(t testing.TB, ns *testnet.NetNS) *sockets.Conn {
	t.Helper()
	return borrow(t, sockets.Query{NetNS: ns.Cookie(), Port: 1194})
}

// borrow borrows a socket of the one group that is asked for, until the test ends.
func borrow(t testing.TB, q sockets.Query) *sockets.Conn {
	t.Helper()
	groups, err := sockets.Find(q)
	if err != nil || len(groups) != 1 {
		t.Fatalf("%+v: groups %v, %v", q, groups, err)
	}
	conn, err := sockets.TakeMember(groups[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// attach attaches the group on port 1194, and gives the borrowed socket back.
func attach(t testing.TB, fs loader.FS, ns *testnet.NetNS, o loader.Options) *loader.Group {
	t.Helper()
	conn := member(t, ns)
	g, err := fs.Attach(conn, o)
	conn.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

func status(t *testing.T, g *loader.Group) loader.Status {
	t.Helper()
	s, err := g.Status()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// quarter is how many flows a short run has.
func quarter(flows int) int {
	if testing.Short() {
		return flows / 4
	}
	return flows
}

// sizes are how many listeners a group has.
func sizes() []int {
	if testing.Short() {
		return []int{1, 3, 8}
	}
	return []int{1, 2, 3, 4, 8, 64}
}

// P0: attaching moves no flow, also after closes have put members into holes of
// the kernel's order, and detaching brings back the kernel's hash.
func TestAttachMovesNothing(t *testing.T) {
	for _, c := range some(cases) {
		for _, n := range sizes() {
			t.Run(fmt.Sprintf("%s from %s, %d", c.listen, c.remote, n), func(t *testing.T) {
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				servers := testnet.StartGroup(t, ns, n+2, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true})
				servers.Close(0)
				servers.Close(1 + n/2)
				clients := testnet.NewClients(t, ns, 1000, c.remote)
				before := clients.Ask()

				g := attach(t, fs, ns, loader.Options{})
				if diff := cmp.Diff(before, clients.Ask()); diff != "" {
					t.Fatalf("flows moved at the attach: %s", diff)
				}
				// A second attach has nothing to do.
				again := attach(t, fs, ns, loader.Options{})
				if again.Fresh() || len(again.Joined()) != 0 {
					t.Errorf("attach again: fresh %v, joined %v", again.Fresh(), again.Joined())
				}
				if diff := cmp.Diff(before, clients.Ask()); diff != "" {
					t.Fatalf("flows moved at the second attach: %s", diff)
				}
				s := status(t, g)
				if !s.Attached || len(s.Listeners) != n || s.Tracked != 1000 || s.Counters.Hit != 1000 || s.Counters.New != 1000 || s.Counters.Runs != 2000 {
					t.Errorf("status %+v", s)
				}

				forecast, err := g.DetachForecast()
				if want := (loader.Forecast{Flows: 1000}); err != nil || forecast != want {
					t.Errorf("forecast %+v, %v, want %+v", forecast, err, want)
				}
				d, err := fs.Detach(g.Key())
				if want := (loader.Detached{Key: g.Key(), Program: true, Listeners: n, Flows: 1000}); err != nil || d != want {
					t.Errorf("detached %+v, %v, want %+v", d, err, want)
				}
				if diff := cmp.Diff(before, clients.Ask()); diff != "" {
					t.Fatalf("flows moved at the detach: %s", diff)
				}
				// Detached for good: the sockets are free for another array.
				attach(t, fs, ns, loader.Options{})
				if diff := cmp.Diff(before, clients.Ask()); diff != "" {
					t.Fatalf("flows moved when attached once more: %s", diff)
				}
			})
		}
	}
}

// P1, P2 and P3: one by one every listener closes and another joins. The same
// without the program is the control, that sees flows of others move.
func TestCloseAndJoin(t *testing.T) {
	const flows = 600
	for _, sticky := range []bool{true, false} {
		for _, c := range some(cases) {
			for _, n := range sizes() {
				if !sticky && n < 3 {
					continue // nobody else to be harmed
				}
				t.Run(fmt.Sprintf("sticky %v, %s from %s, %d", sticky, c.listen, c.remote, n), func(t *testing.T) {
					ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
					servers := testnet.StartGroup(t, ns, n, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true})
					clients := testnet.NewClients(t, ns, flows, c.remote)
					if sticky {
						attach(t, fs, ns, noSettle)
					}
					now := clients.Ask()
					moved := 0
					for index := range n {
						if !sticky && moved >= flows/5 {
							break // the control has shown what it is for
						}
						if n > 1 {
							gone := servers.Names[index]
							servers.Close(index)
							then := clients.Ask()
							moved += testnet.Moved(now, then, gone)
							if testnet.Shares(then)[gone]+testnet.Shares(then)[""] != 0 {
								t.Fatalf("after %s closed: %v", gone, testnet.Shares(then))
							}
							now = then
						}
						name := servers.Add()
						if sticky {
							attach(t, fs, ns, noSettle)
						}
						then := clients.Ask()
						moved += testnet.Moved(now, then)
						now = then
						// The joiner gets its share of new flows: thirty, on average.
						if !sticky || index%max(1, n/8) != 0 {
							continue
						}
						fresh := testnet.Shares(testnet.NewClients(t, ns, 30*(n+1), c.remote).Ask())
						if fresh[name] == 0 || fresh[""] != 0 {
							t.Fatalf("%s joined, new flows went to %v", name, fresh)
						}
					}
					switch {
					case sticky && moved != 0:
						t.Errorf("%d flows of healthy listeners moved", moved)
					case !sticky && moved < flows/5:
						t.Errorf("control: only %d flows moved without rpsel", moved)
					}
				})
			}
		}
	}
}

// P2: orphans are spread evenly, and once.
func TestOrphansAreSpread(t *testing.T) {
	for i, n := range some([]int{2, 3, 4, 8}) {
		c := cases[1+i] // each once
		t.Run(fmt.Sprintf("%s from %s, %d", c.listen, c.remote, n), func(t *testing.T) {
			flows := quarter(20000)
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, n, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true})
			clients := testnet.NewClients(t, ns, flows, c.remote)
			g := attach(t, fs, ns, noSettle)
			before := clients.Ask()
			servers.Close(0)
			after := clients.Ask()
			orphans := map[string]int{}
			total := 0
			for i := range before {
				if before[i] == servers.Names[0] {
					orphans[after[i]]++
					total++
				}
			}
			if len(orphans) != n-1 {
				t.Errorf("orphans went to %v, want %d listeners", orphans, n-1)
			}
			// The heir is drawn for an entry of the table.
			even, entries := 1/float64(n-1), float64(maps.TableSize(n))/float64(n)
			for name, got := range orphans {
				if off := math.Abs(float64(got) - float64(total)*even); off > chance(total, even, 1+float64(total)/entries) {
					t.Errorf("%s got %d of %d orphans", name, got, total)
				}
			}
			if s := status(t, g); s.Counters.Rehomed != uint64(total) || s.Counters.Fallback != 0 {
				t.Errorf("%d orphans, counters %+v", total, s.Counters)
			}
			if diff := cmp.Diff(after, clients.Ask()); diff != "" {
				t.Errorf("orphans moved twice: %s", diff)
			}
		})
	}
}

// With no process of rpsel at all, half and seven eighths of the listeners die.
// New flows and orphans spread evenly over the rest, none by the kernel's hash.
func TestManyDie(t *testing.T) {
	for i, c := range []struct{ n, dead int }{{8, 4}, {8, 7}, {16, 8}, {16, 14}, {64, 56}} {
		if testing.Short() && c.n > 8 {
			break
		}
		at := cases[i]
		t.Run(fmt.Sprintf("%d of %d, %s from %s", c.dead, c.n, at.listen, at.remote), func(t *testing.T) {
			flows := quarter(24000)
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, c.n, testnet.ServerOptions{Network: at.network, Addr: at.listen, ReusePort: true})
			tracked := testnet.NewClients(t, ns, flows, at.remote)
			g := attach(t, fs, ns, noSettle)
			before := tracked.Ask()
			dead := []string{}
			for i := range c.dead {
				// Spread over the order, the first bound among them.
				servers.Close(i * c.n / c.dead)
				dead = append(dead, servers.Names[i*c.n/c.dead])
			}
			after := tracked.Ask()
			if moved := testnet.Moved(before, after, dead...); moved != 0 {
				t.Errorf("%d flows of healthy listeners moved", moved)
			}
			even := func(what string, shares map[string]int) {
				t.Helper()
				// Those on entries of the dead are drawn by the entry.
				p, together := 1/float64(c.n-c.dead), 1+float64(flows*c.dead)/float64(c.n)/float64(maps.TableSize(c.n))
				if len(shares) != c.n-c.dead {
					t.Errorf("%s: went to %d of %d survivors", what, len(shares), c.n-c.dead)
				}
				for name, got := range shares {
					if off := math.Abs(float64(got) - float64(flows)*p); off > chance(flows, p, together) {
						t.Errorf("%s: %s has %d, even would be %.0f", what, name, got, float64(flows)*p)
					}
				}
			}
			even("orphans", testnet.Shares(after))
			even("new flows", testnet.Shares(testnet.NewClients(t, ns, flows, at.remote).Ask()))
			if s := status(t, g); s.Counters.Fallback != 0 {
				t.Errorf("%d packets were left to the kernel's hash", s.Counters.Fallback)
			}
		})
	}
}

// P4: a draining listener keeps its flows and gets no other, also when one dies;
// when all drain, new flows are served all the same.
func TestDrain(t *testing.T) {
	for _, c := range some(cases) {
		t.Run(c.listen+" from "+c.remote, func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true})
			clients := testnet.NewClients(t, ns, 1000, c.remote)
			g := attach(t, fs, ns, noSettle)
			before := clients.Ask()

			fresh := func() map[string]int {
				return testnet.Shares(testnet.NewClients(t, ns, 400, c.remote).Ask())
			}
			if fresh()["s0"] == 0 {
				t.Fatal("s0 gets no new flow before it drains: the test cannot tell")
			}
			for range 2 { // twice is fine
				if err := g.Drain(0); err != nil {
					t.Fatal(err)
				}
			}
			if got := fresh(); got["s0"] != 0 || len(got) != 3 {
				t.Errorf("s0 drains, new flows went to %v", got)
			}
			servers.Close(1)
			after := clients.Ask()
			if moved := testnet.Moved(before, after, "s1"); moved != 0 {
				t.Errorf("%d flows moved", moved)
			}
			if before, after := testnet.Shares(before)["s0"], testnet.Shares(after)["s0"]; before != after {
				t.Errorf("s0 drains and had %d flows, then %d", before, after)
			}
			if got := fresh(); got["s0"] != 0 {
				t.Errorf("s0 drains and s1 died, new flows went to %v", got)
			}
			for _, slot := range []int{2, 3} {
				if err := g.Drain(slot); err != nil {
					t.Fatal(err)
				}
			}
			if got := fresh(); got[""] != 0 || got["s0"] == 0 || got["s2"] == 0 {
				t.Errorf("all drain, new flows went to %v", got)
			}
			if s := status(t, g); !s.AllDraining || s.Counters.Fallback != 0 {
				t.Errorf("all drain: %+v", s)
			}
			if err := g.Resume(3); err != nil {
				t.Fatal(err)
			}
			if got := fresh(); got["s3"] != 400 {
				t.Errorf("s3 resumed alone, new flows went to %v", got)
			}
			if diff := cmp.Diff(after, clients.Ask()); diff != "" {
				t.Errorf("flows moved: %s", diff)
			}
		})
	}
}

func TestWeights(t *testing.T) {
	const flows = 7000
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	clients := testnet.NewClients(t, ns, 1000, "127.0.0.1:1194")
	g := attach(t, fs, ns, noSettle)
	before := clients.Ask()
	for slot, weight := range []int{1, 2, 4} {
		if err := g.SetWeight(slot, weight); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
	got := testnet.Shares(testnet.NewClients(t, ns, flows, "127.0.0.1:1194").Ask())
	for name, weight := range map[string]int{"s0": 1, "s1": 2, "s2": 4} {
		p := float64(weight) / 7
		if off := math.Abs(float64(got[name]) - flows*p); off > chance(flows, p, 1) {
			t.Errorf("%s has weight %d and %d new flows, want about %.0f", name, weight, got[name], flows*p)
		}
	}
}

// A joiner waits for its share until the group has settled, since until then
// flows that look new may be old ones: those stay where the kernel had them.
func TestSettling(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	silent := testnet.NewClients(t, ns, 1000, "127.0.0.1:1194")
	before := silent.Ask()
	attach(t, fs, ns, loader.Options{})
	name := servers.Add()
	g := attach(t, fs, ns, loader.Options{})
	if s := status(t, g); s.Settling == 0 || len(s.Listeners) != 4 {
		t.Fatalf("status %+v", s)
	}
	// Not one of them was seen between the attach and the join.
	if moved := testnet.Moved(before, silent.Ask()); moved != 0 {
		t.Errorf("%d untracked flows moved while the group settles", moved)
	}
	attach(t, fs, ns, noSettle)
	if got := testnet.Shares(testnet.NewClients(t, ns, 400, "127.0.0.1:1194").Ask())[name]; got == 0 {
		t.Error("settled, and the joiner gets no new flow")
	}
	if moved := testnet.Moved(before, silent.Ask()); moved != 0 {
		t.Errorf("%d flows moved when settling ended", moved)
	}
}

// P7: with no live listener registered, the kernel picks, and that is counted.
func TestFallback(t *testing.T) {
	for _, c := range some(cases) {
		t.Run(c.listen+" from "+c.remote, func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true})
			clients := testnet.NewClients(t, ns, 200, c.remote)
			g := attach(t, fs, ns, noSettle)
			clients.Ask()
			stranger := servers.Add() // not registered
			servers.Close(0)
			servers.Close(1)
			for range 2 {
				if got := testnet.Shares(clients.Ask()); got[stranger] != 200 {
					t.Fatalf("only %s is left, answers came from %v", stranger, got)
				}
			}
			s := status(t, g)
			if s.Counters.Fallback != 400 || s.Counters.Runs != 600 {
				t.Errorf("counters %+v", s.Counters)
			}
			if len(s.Unregistered) != 1 || s.Unregistered[0].Reason != nil {
				t.Errorf("unregistered %+v", s.Unregistered)
			}
			// The next command mends all.
			attach(t, fs, ns, noSettle)
			if got := testnet.Shares(clients.Ask()); got[stranger] != 200 {
				t.Errorf("answers came from %v", got)
			}
			if s := status(t, g); s.Counters.Fallback != 400 || s.Counters.Rehomed != 200 {
				t.Errorf("counters %+v", s.Counters)
			}
		})
	}
}

// The group's last socket closes, and with it the kernel's group and the
// program. The server comes back, and so does the stickiness.
func TestGroupComesBack(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	o := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true}
	servers := testnet.StartGroup(t, ns, 3, o)
	clients := testnet.NewClients(t, ns, 1000, "127.0.0.1:1194")
	g := attach(t, fs, ns, noSettle)
	clients.Ask()
	servers.Kill()
	if s := status(t, g); s.Attached || len(s.Listeners) != 3 || s.Listeners[0].State != "dead" {
		t.Errorf("status %+v", s)
	}
	o.Name = "t"
	servers = testnet.StartGroup(t, ns, 3, o)
	before := clients.Ask()
	attach(t, fs, ns, loader.Options{})
	if diff := cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("flows moved when attached again: %s", diff)
	}
	servers.Close(0)
	if moved := testnet.Moved(before, clients.Ask(), "t0"); moved != 0 {
		t.Errorf("%d flows moved", moved)
	}
}

// TCP connections are sticky by themselves; what the program adds is that the
// choice for new ones changes no more than it must.
func TestTCP(t *testing.T) {
	for _, c := range []struct{ network, listen, remote string }{
		{"tcp4", "127.0.0.1:1194", "127.0.0.1:1194"},
		{"tcp6", "[::]:1194", "[::1]:1194"},
		{"tcp6", "[::]:1194", "127.0.0.1:1194"},
	} {
		t.Run(fmt.Sprintf("%s from %s", c.listen, c.remote), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true})
			clients := testnet.NewTCPClients(t, ns, 500, c.remote)
			before := clients.Ask()
			g := attach(t, fs, ns, noSettle)
			if diff := cmp.Diff(before, clients.Ask()); diff != "" {
				t.Fatalf("the attach changed who gets connections: %s", diff)
			}
			servers.Close(0)
			after := clients.Ask()
			if moved := testnet.Moved(before, after, "s0"); moved != 0 || testnet.Shares(after)[""] != 0 {
				t.Errorf("s0 closed: %d of the others' moved, answers from %v", moved, testnet.Shares(after))
			}
			if s := status(t, g); s.Affinity != "none" || s.Counters.Untracked != s.Counters.Runs || s.Tracked != 0 {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// While the group is frozen nothing is tracked or rehomed, and all are served.
// What a killed command left frozen thaws by itself.
func TestFrozen(t *testing.T) {
	for _, c := range []struct {
		ago    int // seconds, or -1: not frozen
		frozen bool
	}{{-1, false}, {0, true}, {60, false}} {
		t.Run(fmt.Sprint(c.ago), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
			clients := testnet.NewClients(t, ns, 300, "127.0.0.1:1194")
			g := attach(t, fs, ns, noSettle)
			before := clients.Ask()
			freeze := func() {
				if err := g.Freeze(c.ago); err != nil {
					t.Fatal(err)
				}
			}
			freeze()
			servers.Close(0)
			freeze() // it thaws after ten seconds
			after := clients.Ask()
			freeze()
			strangers := testnet.NewClients(t, ns, 300, "127.0.0.1:1194").Ask()
			if testnet.Moved(before, after, "s0") != 0 || testnet.Shares(after)[""]+testnet.Shares(strangers)[""] != 0 {
				t.Errorf("before %v, after %v, new flows %v", testnet.Shares(before), testnet.Shares(after), testnet.Shares(strangers))
			}
			s := status(t, g)
			if frozen := s.Counters.Rehomed == 0 && s.Counters.New == 300 && s.Counters.Untracked > 300; frozen != c.frozen {
				t.Errorf("frozen %v, counters %+v", frozen, s.Counters)
			}
		})
	}
}
