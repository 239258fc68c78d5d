package loader_test

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// family is where the servers of a group listen, and where a client calls from.
type family struct {
	name, network, listen string
	wire                  netip.Prefix
}

var families = []family{
	{"IPv4", "tcp4", "0.0.0.0:1194", testnet.WireIPv4},
	{"IPv6", "tcp6", "[::]:1194", testnet.WireIPv6},
	{"IPv4 on dual-stack", "tcp6", "[::]:1194", testnet.WireIPv4},
}

func (f family) options(name string) testnet.ServerOptions {
	return testnet.ServerOptions{Network: f.network, Addr: f.listen, ReusePort: true, Name: name}
}

// hold starts a server that accepts nothing until it is told to.
func (f family) hold(t *testing.T, ns *testnet.NetNS, name string) *testnet.Server {
	t.Helper()
	o := f.options(name)
	o.Hold = true
	return testnet.StartServer(t, ns, o)
}

// switchboard makes calls to port 1194 of a namespace.
type switchboard struct {
	t    *testing.T
	wire *testnet.Wire
	f    family
	port uint16
}

func newSwitchboard(t *testing.T, ns *testnet.NetNS, f family) *switchboard {
	t.Helper()
	stayOnOneCPU(t)
	return &switchboard{t: t, wire: testnet.NewWire(t, ns), f: f, port: 10000}
}

// stayOnOneCPU keeps what a test sends on one CPU. The timer that sends a SYN-ACK again
// is on the CPU that the SYN was on (net/ipv4/inet_connection_sock.c,
// reqsk_queue_hash_req: TIMER_PINNED). On another one the last ACK may come at the same
// moment; then both migrate the connection, and the one that is late gives way, but the
// program has run twice.
func stayOnOneCPU(t *testing.T) {
	t.Helper()
	testnet.Pin(t, testnet.CPUs(t)[0])
}

// calls makes n calls from one host, the n-th of the wire, as far as their SYN.
func (s *switchboard) calls(host byte, n int, data string) []*testnet.Call {
	s.t.Helper()
	server := s.f.wire.Addr()
	client := server.AsSlice()
	client[len(client)-1] = host
	from, _ := netip.AddrFromSlice(client)
	var list []*testnet.Call
	for range n {
		s.port++
		c := s.wire.Call(netip.AddrPortFrom(from, s.port), netip.AddrPortFrom(server, 1194))
		if err := c.SYN(data); err != nil {
			s.t.Fatalf("%v: %v", c.Client, err)
		}
		list = append(list, c)
	}
	return list
}

// open makes n calls that wait to be accepted.
func (s *switchboard) open(host byte, n int) []*testnet.Call {
	s.t.Helper()
	list := s.calls(host, n, "")
	acknowledge(list)
	return list
}

func acknowledge(list []*testnet.Call) {
	for _, c := range list {
		c.ACK()
	}
}

// acceptors is who accepted the calls.
func acceptors(list []*testnet.Call) []string {
	var answers []string
	for _, c := range list {
		answers = append(answers, c.Name())
	}
	return answers
}

// sysctl sets what a namespace has of its own.
func sysctl(t *testing.T, ns *testnet.NetNS, name, value string) {
	t.Helper()
	err := ns.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0) })
	if err != nil {
		t.Fatal(err)
	}
}

// listenerOf finds a process's only listener.
func listenerOf(t *testing.T, g *loader.Group, s *testnet.Server) loader.Listener {
	t.Helper()
	list := status(t, g).Listeners
	i := slices.IndexFunc(list, func(l loader.Listener) bool { return l.PID == s.PID() })
	if i < 0 {
		t.Fatalf("pid %d has no listener: %+v", s.PID(), list)
	}
	return list[i]
}

// migrated waits until so many runs of the program were for migrating connections.
func migrated(t *testing.T, g *loader.Group, n uint64) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		got := status(t, g).Counters.Migrated
		if got == n {
			return
		}
		if got > n || time.Now().After(deadline) {
			t.Fatalf("%d connections migrated, want %d", got, n)
		}
	}
}

// ends are the ways in which a listener ends.
var ends = map[string]func(*testnet.Server){
	"close":    func(s *testnet.Server) { s.Close(0) },
	"shutdown": func(s *testnet.Server) { s.Shutdown(0) },
	"kill":     (*testnet.Server).Kill,
}

// waiting are connections that have come differently far.
type waiting struct{ queued, early, ack, timer []*testnet.Call }

func (s *switchboard) waiting(n int) waiting {
	return waiting{
		queued: s.open(2, n),
		early:  s.calls(3, n, "early"), // TCP Fast Open: in the queue, and not acknowledged yet
		ack:    s.calls(4, n, ""),
		timer:  s.calls(5, n, ""),
	}
}

// Whatever a connection has come to when its listener ends, in whatever way, it is
// accepted by another one: in the accept queue, also by TCP Fast Open, before its
// last ACK, and before its SYN-ACK is sent again. Each migrates once.
func TestMigration(t *testing.T) {
	const n = 32
	for _, f := range families {
		for name, end := range ends {
			t.Run(f.name+" "+name, func(t *testing.T) {
				count(t)
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				sysctl(t, ns, "tcp_fastopen", "0x602") // for servers, without cookie, on all listeners
				a, b, c := f.hold(t, ns, "a"), f.hold(t, ns, "b"), f.hold(t, ns, "c")
				g := attach(t, fs, ns, noSettle)
				w := newSwitchboard(t, ns, f).waiting(n)
				had := listenerOf(t, g, a).Untracked
				end(a)
				acknowledge(w.early)
				acknowledge(w.ack)
				migrated(t, g, had) // also those that have to be asked again
				acknowledge(w.timer)
				b.Accept()
				c.Accept()
				for path, calls := range map[string][]*testnet.Call{"accept queue": w.queued, "fast open": w.early, "last ACK": w.ack, "timer": w.timer} {
					shares := testnet.Shares(acceptors(calls))
					if shares["b"]+shares["c"] != n || shares["b"] == 0 || shares["c"] == 0 {
						t.Errorf("%s: accepted by %v", path, shares)
					}
				}
				counted{t, ns, g}.check("ended", loader.Counters{Untracked: 4 * n, Migrated: had}, 0)
				if had < n/4 {
					t.Errorf("a had %d of %d", had, 4*n)
				}
			})
		}
	}
}

// What stayOnOneCPU keeps from the other tests: two CPUs migrate a connection at the same moment,
// here for two copies of the last ACK. Whether or not the program runs twice for that, one
// server accepts the connection, and every run is counted.
func TestMigrationOnTwoCPUs(t *testing.T) {
	const n = 512
	count(t)
	f, cpus := families[0], testnet.CPUs(t)
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	a, b, c := f.hold(t, ns, "a"), f.hold(t, ns, "b"), f.hold(t, ns, "c")
	g := attach(t, fs, ns, noSettle)
	calls := newSwitchboard(t, ns, f).calls(2, n, "")
	had := listenerOf(t, g, a).Untracked
	a.Kill()
	var sending sync.WaitGroup
	var sent [2]atomic.Int64
	for me := range sent {
		sending.Go(func() {
			defer sent[me].Store(n) // also if one cannot be sent: the other waits for it
			testnet.Pin(t, cpus[me%len(cpus)])
			for i, call := range calls {
				for sent[me].Store(int64(i)); sent[1-me].Load() < int64(i); {
				}
				call.ACK()
			}
		})
	}
	sending.Wait()
	b.Accept()
	c.Accept()
	if shares := testnet.Shares(acceptors(calls)); shares["b"]+shares["c"] != n || had == 0 {
		t.Errorf("a had %d, accepted by %v", had, shares)
	}
	got := status(t, g).Counters.Migrated
	if got < had {
		t.Errorf("%d runs for %d connections that migrate", got, had)
	}
	counted{t, ns, g}.check("ended", loader.Counters{Untracked: n, Migrated: got}, 0)
	t.Logf("%d of %d connections had two runs", got-had, had)
}

// Without rpsel they are lost on each of these ways: on plain Linux, after a
// detach, and with a program that is not asked about connections that migrate.
func TestMigrationControl(t *testing.T) {
	const n = 64
	type control struct {
		name string
		make func(*testing.T, *testnet.NetNS)
	}
	controls := []control{{"plain", func(*testing.T, *testnet.NetNS) {}}, {"detached", func(t *testing.T, ns *testnet.NetNS) {
		fs := loader.FS(testnet.BPFFS(t))
		if _, err := fs.Detach(attach(t, fs, ns, noSettle).Key()); err != nil {
			t.Fatal(err)
		}
	}}, {"another program", func(t *testing.T, ns *testnet.NetNS) {
		conn := member(t, ns)
		defer conn.Close()
		foreign(t, conn)
	}}}
	for _, f := range families {
		for name, end := range ends {
			for _, c := range controls {
				t.Run(f.name+" "+name+" "+c.name, func(t *testing.T) {
					ns := testnet.New(t)
					sysctl(t, ns, "tcp_fastopen", "0x602")
					a := f.hold(t, ns, "a")
					testnet.StartServer(t, ns, f.options("b"))
					testnet.StartServer(t, ns, f.options("c"))
					c.make(t, ns)
					w := newSwitchboard(t, ns, f).waiting(n)
					end(a)
					for path, calls := range map[string][]*testnet.Call{"accept queue": w.queued, "fast open": w.early, "last ACK": append(w.ack, w.timer...)} {
						acknowledge(calls)
						shares := testnet.Shares(acceptors(calls))
						if shares[""] == 0 || shares["b"] == 0 || shares["c"] == 0 {
							t.Errorf("%s: accepted by %v, want some to be lost", path, shares)
						}
					}
				})
			}
		}
	}
}

// held is a group of three that accept no connection yet, with some in their
// queues. A server that sleeps would not find those that migrate on every kernel.
type held struct {
	fs      loader.FS
	g       *loader.Group
	board   *switchboard
	ns      *testnet.NetNS
	a, b, c *testnet.Server
	calls   []*testnet.Call
	had     uint64 // how many calls a has
}

// hold lets n connections be made. Options come before the attach, prepare after.
func hold(t *testing.T, n int, o loader.Options, prepare func(*held)) *held {
	t.Helper()
	f := families[0]
	h := &held{ns: testnet.New(t), fs: loader.FS(testnet.BPFFS(t))}
	h.a, h.b, h.c = f.hold(t, h.ns, "a"), f.hold(t, h.ns, "b"), f.hold(t, h.ns, "c")
	h.g = attach(t, h.fs, h.ns, o)
	h.board = newSwitchboard(t, h.ns, f)
	h.calls = h.board.open(2, n)
	h.had = listenerOf(t, h.g, h.a).Untracked
	if prepare != nil {
		prepare(h)
	}
	return h
}

// check ends a, and counts who accepts its connections.
func (h *held) check(t *testing.T) map[string]int {
	t.Helper()
	before := map[string]uint64{"b": listenerOf(t, h.g, h.b).Untracked, "c": listenerOf(t, h.g, h.c).Untracked}
	h.a.Kill()
	migrated(t, h.g, h.had)
	h.b.Accept()
	h.c.Accept()
	shares := testnet.Shares(acceptors(h.calls))
	for name, had := range before {
		shares[name] -= int(had)
	}
	for name, s := range map[string]*testnet.Server{"b": h.b, "c": h.c} {
		if got := listenerOf(t, h.g, s).Migrated; got != uint64(shares[name]) {
			t.Errorf("%s: accepted %d of them, counted %d", name, shares[name], got)
		}
	}
	if shares["b"]+shares["c"] != int(h.had) {
		t.Errorf("of %d: accepted %v", h.had, shares)
	}
	return shares
}

// Connections migrate to whom the policy chooses for new ones, by weight where that
// counts before the table is dealt anew, and to nobody who drains while another one
// lives.
func TestMigrationPolicies(t *testing.T) {
	const n = 600
	try := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	third := func(h *held) { try(h.g.SetWeight(slotOf(t, h.g, h.c.PID()), 3)) }
	for policy, weighed := range map[loader.Policy]bool{
		loader.PolicyHash: false, loader.PolicyLeast: false, // the entries of the dead are spread evenly
		loader.PolicyRR: true, loader.PolicyRandom: true,
	} {
		t.Run(policy.String(), func(t *testing.T) {
			prepare, n := third, 3*n
			if !weighed {
				prepare, n = nil, n/3
			}
			got := hold(t, n, loader.Options{Policy: policy, Settle: -1}, prepare).check(t)
			if weighed && (10*got["c"] < 13*got["b"] || got["c"] > 7*got["b"]) {
				t.Errorf("weights 1 and 3: accepted %v", got)
			}
			if !weighed && (got["b"] > 3*got["c"] || got["c"] > 3*got["b"]) {
				t.Errorf("equal weights: accepted %v", got)
			}
		})
	}
	t.Run("drains", func(t *testing.T) {
		h := hold(t, n, noSettle, func(h *held) { try(h.g.Drain(slotOf(t, h.g, h.b.PID()))) })
		if got := h.check(t); got["b"] != 0 {
			t.Errorf("b drains: accepted %v", got)
		}
	})
	t.Run("all drain", func(t *testing.T) {
		h := hold(t, n, noSettle, func(h *held) {
			try(h.g.Drain(slotOf(t, h.g, h.b.PID())))
			try(h.g.Drain(slotOf(t, h.g, h.c.PID())))
		})
		if got := h.check(t); got["b"] == 0 || got["c"] == 0 {
			t.Errorf("b and c drain: accepted %v", got)
		}
	})
}

// What the group is at meanwhile keeps no connection from migrating, and lets none
// go to who drains.
func TestMigrationMeanwhile(t *testing.T) {
	const n = 200
	for _, c := range []struct {
		name    string
		options loader.Options
		prepare func(*held) error
		nothing string // who gets nothing
	}{
		{"settling", loader.Options{}, func(h *held) error { return nil }, ""},
		{"settling, b drains", loader.Options{}, func(h *held) error { return h.g.Drain(slotOf(h.board.t, h.g, h.b.PID())) }, "b"},
		{"frozen", noSettle, func(h *held) error { return h.g.Freeze(0) }, ""},
		{"upgraded", noSettle, func(h *held) error {
			defer loader.OtherProgram()()
			u, err := h.fs.Upgrade(h.g.Key(), loader.UpgradeOptions{Flows: 1000})
			if err == nil && !u.Program {
				err = errors.New("it is the same program")
			}
			return err
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := hold(t, n, c.options, func(h *held) {
				if err := c.prepare(h); err != nil {
					t.Fatal(err)
				}
			})
			got := h.check(t)
			for _, name := range []string{"b", "c"} {
				if (got[name] == 0) != (name == c.nothing) {
					t.Errorf("accepted %v", got)
				}
			}
		})
	}
}

// With policy newest connections migrate within the generation that has new flows:
// while the next one is awaited to the old one, after that to the new one.
func TestMigrationNewest(t *testing.T) {
	const n = 100
	for _, over := range []bool{false, true} {
		t.Run(map[bool]string{false: "turning", true: "turned"}[over], func(t *testing.T) {
			f := families[0]
			fl := newFleet(t)
			a, b := f.hold(t, fl.ns, "a"), f.hold(t, fl.ns, "b")
			fl.attach(newest)
			board := newSwitchboard(t, fl.ns, f)
			calls := board.open(2, n)
			had := listenerOf(t, fl.group, a).Untracked
			fl.later()
			c := f.hold(t, fl.ns, "c")
			fl.attach(newest)
			fl.want("before", map[int]int{1: 2, 2: 1})
			heir := "b"
			if fl.hold(); over {
				heir = "c"
				fl.turn()
			}
			a.Kill()
			migrated(t, fl.group, had)
			b.Accept()
			c.Accept()
			shares := testnet.Shares(acceptors(calls))
			want := map[string]int{"b": n - int(had)}
			if want[heir] += int(had); had == 0 || len(shares) != len(want) || shares[heir] != want[heir] {
				t.Errorf("of %d of a's: accepted %v, want %v", had, shares, want)
			}
		})
	}
}

// With affinity client the connections of a client that migrate stay together, with
// those that it opens next: they go by its flow. Without affinity, the control, they
// are scattered. A prefix makes one client of all hosts.
func TestMigrationAffinity(t *testing.T) {
	const hosts, each = 24, 6
	client := loader.Options{Affinity: loader.AffinityClient, Settle: -1}
	prefix := client
	prefix.ClientPrefix = loader.ClientPrefix{V4: 24, V6: 64}
	for _, f := range families {
		for name, o := range map[string]loader.Options{"client": client, "prefix": prefix, "none": noSettle} {
			t.Run(f.name+" "+name, func(t *testing.T) {
				count(t)
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				server := f.options("")
				server.Hold = true
				var servers []*testnet.Server
				for _, server.Name = range []string{"a", "b", "c", "d"} {
					servers = append(servers, testnet.StartServer(t, ns, server))
				}
				g := attach(t, fs, ns, o)
				board := newSwitchboard(t, ns, f)
				calls := make([][]*testnet.Call, hosts)
				for i := range calls {
					calls[i] = append(board.open(byte(2+i), each/2), board.calls(byte(2+i), each/2, "")...)
				}
				// The one with the most.
				slices.SortFunc(servers, func(x, y *testnet.Server) int {
					return int(listenerOf(t, g, y).Bytes) - int(listenerOf(t, g, x).Bytes)
				})
				l := listenerOf(t, g, servers[0])
				had := l.New + l.Hit + l.Untracked
				before := status(t, g).Counters
				servers[0].Kill()
				for _, list := range calls {
					acknowledge(list[each/2:])
				}
				migrated(t, g, had)
				before.Migrated = had
				counted{t, ns, g}.check("ended", before, 0)
				for i := range calls {
					calls[i] = append(calls[i], board.open(byte(2+i), 1)...)
				}
				for _, s := range servers[1:] {
					s.Accept()
				}
				scattered, all := 0, map[string]int{}
				for _, list := range calls {
					shares := testnet.Shares(acceptors(list))
					if len(shares) > 1 {
						scattered++
					}
					for name, n := range shares {
						all[name] += n
					}
				}
				if all[""] != 0 || (scattered > 0) != (name == "none") || name == "prefix" && len(all) != 1 || name == "client" && len(all) == 1 {
					t.Errorf("%d of %d clients have several listeners, accepted %v", scattered, hosts, all)
				}
			})
		}
	}
}

// With affinity client, too, nobody's connections migrate to who drains.
func TestMigrationAffinityDrains(t *testing.T) {
	const hosts = 40
	f := families[0]
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	a, b, c := f.hold(t, ns, "a"), f.hold(t, ns, "b"), f.hold(t, ns, "c")
	g := attach(t, fs, ns, loader.Options{Affinity: loader.AffinityClient, Settle: -1})
	if err := g.Drain(slotOf(t, g, b.PID())); err != nil {
		t.Fatal(err)
	}
	board := newSwitchboard(t, ns, f)
	var calls []*testnet.Call
	for host := range byte(hosts) {
		calls = append(calls, board.open(2+host, 1)...)
	}
	had := listenerOf(t, g, a).New
	a.Kill()
	migrated(t, g, had)
	b.Accept()
	c.Accept()
	if shares := testnet.Shares(acceptors(calls)); had == 0 || shares["c"] != hosts {
		t.Errorf("of %d of a's: accepted by %v", had, shares)
	}
}

// With SYN cookies a connection is none until its last ACK, which runs the program
// once more: if its listener has ended by then, any other one takes the cookie. So
// nothing migrates, and nothing is lost; on plain Linux, too.
func TestSyncookies(t *testing.T) {
	const n = 60
	for _, f := range families {
		for _, affinity := range []loader.Affinity{loader.AffinityNone, loader.AffinityClient} {
			t.Run(f.name+" "+string(affinity), func(t *testing.T) {
				count(t)
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				sysctl(t, ns, "tcp_syncookies", "2")
				a := testnet.StartServer(t, ns, f.options("a"))
				testnet.StartServer(t, ns, f.options("b"))
				testnet.StartServer(t, ns, f.options("c"))
				g := attach(t, fs, ns, loader.Options{Affinity: affinity, Settle: -1})
				board := newSwitchboard(t, ns, f)
				var calls []*testnet.Call
				for host := range byte(n) {
					calls = append(calls, board.calls(2+host, 1, "")...)
				}
				l := listenerOf(t, g, a)
				had := l.New + l.Untracked
				a.Kill()
				acknowledge(calls)
				if shares := testnet.Shares(acceptors(calls)); shares["b"]+shares["c"] != n || had == 0 {
					t.Errorf("accepted by %v", shares)
				}
				want := loader.Counters{Untracked: 2 * n}
				if affinity == loader.AffinityClient {
					want = loader.Counters{New: n, Hit: n - had, Rehomed: had}
				}
				counted{t, ns, g}.check("two runs each", want, 0)
			})
		}
	}
}

// A client that sends its SYN again, since its listener has ended, is answered. That
// is a run of its own, which moves nothing yet.
func TestMigrationSYNAgain(t *testing.T) {
	const n = 60
	f := families[0]
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	a := testnet.StartServer(t, ns, f.options("a"))
	testnet.StartServer(t, ns, f.options("b"))
	g := attach(t, fs, ns, noSettle)
	calls := newSwitchboard(t, ns, f).calls(2, n, "")
	had := listenerOf(t, g, a).Untracked
	a.Kill()
	for _, c := range calls {
		if err := c.SYNAgain(); err != nil {
			t.Errorf("%v: %v", c.Client, err)
		}
	}
	acknowledge(calls)
	if shares := testnet.Shares(acceptors(calls)); shares["b"] != n || had == 0 {
		t.Errorf("accepted by %v", shares)
	}
	// Once, if all this took so long that the SYN-ACK was due again.
	if m := status(t, g).Counters.Migrated; m < had || m > 2*had {
		t.Errorf("%d runs for %d connections", m, had)
	}
}

// Where no listener that is left is registered, connections migrate as plain Linux
// would have them, by hash: that is no worse, and counted as such.
func TestMigrationFallback(t *testing.T) {
	const n = 60
	f := families[0]
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	a := f.hold(t, ns, "a")
	g := attach(t, fs, ns, noSettle)
	calls := newSwitchboard(t, ns, f).open(2, n)
	late := f.hold(t, ns, "late")
	a.Kill()
	late.Accept()
	if shares := testnet.Shares(acceptors(calls)); shares["late"] != n {
		t.Errorf("accepted by %v", shares)
	}
	if c := status(t, g).Counters; c.Fallback != n || c.Migrated != 0 {
		t.Errorf("%+v", c)
	}
}

// Listeners come and go while clients connect as fast as they can, each from a new
// port, so that every step of a handshake meets the end of its listener: none, or
// next to none, of the connections is lost. On plain Linux, the control, many are.
func TestMigrationUnderLoad(t *testing.T) {
	const rounds, callers = 60, 6
	for _, attached := range []bool{true, false} {
		t.Run(map[bool]string{true: "rpsel", false: "plain"}[attached], func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 3, families[0].options("s"))
			var g *loader.Group
			if attached {
				g = attach(t, fs, ns, noSettle)
			}
			stop := make(chan struct{})
			var served, lost atomic.Int64
			var done sync.WaitGroup
			for range callers {
				done.Go(func() {
					err := ns.Do(func() error {
						for {
							select {
							case <-stop:
								return nil
							default:
							}
							if name, err := callOnce(); err != nil {
								return err
							} else if name == "" {
								lost.Add(1)
							} else {
								served.Add(1)
							}
						}
					})
					if err != nil {
						t.Error(err)
					}
				})
			}
			// What is to be seen comes within some rounds; on a slow machine it may take more.
			seen := func() bool {
				if attached {
					return status(t, g).Counters.Migrated > 0
				}
				return lost.Load() > 0
			}
			for i := 0; i < rounds || !seen() && i < 20*rounds; i++ {
				servers.Add()
				if attached {
					attach(t, fs, ns, loader.Options{})
				}
				servers.Close(i)
			}
			// Who sleeps with a connection that came by the last close is woken by the next ones.
			for want, deadline := served.Load()+20*callers, time.Now().Add(time.Minute); served.Load() < want && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			close(stop)
			done.Wait()
			t.Logf("%d served, %d lost", served.Load(), lost.Load())
			if attached {
				// The kernel has a moment of its own, see ARCHITECTURE.md.
				if lost.Load()*1000 > served.Load() {
					t.Errorf("%d lost", lost.Load())
				}
			}
			if !seen() {
				t.Error(map[bool]string{true: "none migrated", false: "none is lost without rpsel"}[attached])
			}
		})
	}
}

// callOnce connects to port 1194, and returns who accepted, "" if the connection was
// refused or reset.
func callOnce() (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	// Closing resets the connection, so that ports do not run out.
	err = errors.Join(unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 30}))
	if err != nil {
		return "", err
	}
	buf := make([]byte, 64)
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: 1194, Addr: [4]byte{127, 0, 0, 1}})
	n := 0
	for err == nil || errors.Is(err, unix.EINTR) { // read waits for the connection, too
		if n, err = unix.Read(fd, buf); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if n <= 0 || err != nil {
		return "", nil
	}
	return string(buf[:n]), nil
}
