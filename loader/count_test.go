package loader_test

import (
	"fmt"
	"net"
	"os"
	"slices"
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
		c.t.Errorf("%s: %s\nthe kernel counted %v", when, diff, c.ns.Counts(c.t))
	}
	want.Runs, want.Fallback, want.ParseError, want.TableFull, want.Evicted = 0, 0, 0, 0, 0
	if sum != want {
		c.t.Errorf("%s: listeners add up to %+v, want %+v", when, sum, want)
	}
}

// datagram is a header of 8 bytes and a payload of 4.
const datagram = 12

// tally is what the counters have to be, told from who answered what.
type tally struct {
	affinity loader.Affinity
	has      map[int]string // who has the flow of a client
	want     loader.Counters
}

// When flows are asked for in a way that not every one is tracked.
const (
	freely = iota
	frozen
	fullOfEstablished
	fullOfNew
	nobodyLeft
)

// ask asks from all clients, of which one listener may have died since.
func (x *tally) ask(t *testing.T, c *testnet.Clients, how int, dead string) {
	t.Helper()
	for i, name := range c.Ask() {
		client := c.Port(i)
		if x.affinity == loader.AffinityClient || x.affinity == allAlike {
			client = 0
		}
		has, tracked := x.has[client]
		switch {
		case name == "" || tracked && has != dead && has != name && how != nobodyLeft:
			t.Errorf("client %d is answered by %q, %s has it", i, name, has)
		case how == nobodyLeft:
			x.want.Fallback++
		case x.affinity == loader.AffinityNone:
			x.want.Untracked++
		case tracked && has == dead:
			x.want.Rehomed++
			x.has[client] = name
		case tracked:
			x.want.Hit++
		case how == frozen:
			x.want.Untracked++
		case how == fullOfEstablished:
			x.want.Untracked++
			x.want.TableFull++
		default:
			x.want.New++
			x.has[client] = name
			if how == fullOfNew {
				x.want.Evicted++
			}
		}
	}
}

const (
	allAlike = loader.Affinity("bytes:0,2")    // of every question the same
	tooShort = loader.Affinity("bytes:1000,4") // so that each is as with flow
)

var (
	allPolicies   = append(slices.Clone(choosing), loader.PolicyNewest)
	allAffinities = []loader.Affinity{loader.AffinityFlow, loader.AffinityClient, allAlike, tooShort, loader.AffinityNone}
)

// each runs a test with every policy and affinity, and with listeners and clients of
// one family or another.
func each(t *testing.T, test func(t *testing.T, o loader.Options, network, listen, remote string)) {
	for i, policy := range allPolicies {
		for j, affinity := range allAffinities {
			if testing.Short() && i > 0 && j > 0 {
				continue
			}
			c := cases[(i+j)%len(cases)]
			t.Run(fmt.Sprintf("%s %s %s from %s", policy, affinity, c.listen, c.remote), func(t *testing.T) {
				test(t, loader.Options{Flows: 1000, Settle: -1, IdleNew: time.Hour, Policy: policy, Affinity: affinity}, c.network, c.listen, c.remote)
			})
		}
	}
}

// P8: whatever happens, every run is exactly one outcome, and every counter has
// exactly the value that what happened gives it.
func TestEveryRunIsCountedOnce(t *testing.T) {
	count(t)
	each(t, func(t *testing.T, o loader.Options, network, listen, remote string) {
		const n = 200
		ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
		servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: network, Addr: listen, ReusePort: true})
		g := attach(t, root, ns, o)
		c, x := counted{t, ns, g}, tally{affinity: o.Affinity, has: map[int]string{}}
		check := func(when string) {
			t.Helper()
			c.check(when, x.want, datagram)
		}
		clients := testnet.NewClients(t, ns, n, remote)
		x.ask(t, clients, freely, "")
		check("first packets")
		x.ask(t, clients, freely, "")
		check("second packets")
		dead := "s1"
		for _, name := range x.has {
			dead = name // which may have all there is
		}
		servers.Close(slices.Index(servers.Names, dead))
		x.ask(t, clients, freely, dead)
		check("a listener died")
		x.ask(t, clients, freely, "")
		check("and once more")

		// While the table is copied new flows are not written to it.
		if err := g.Freeze(0); err != nil {
			t.Fatal(err)
		}
		x.ask(t, testnet.NewClients(t, ns, 100, remote), frozen, "")
		check("frozen")
		if err := g.Freeze(-1); err != nil {
			t.Fatal(err)
		}

		for _, full := range []struct {
			how   int
			state maps.State
		}{{fullOfEstablished, maps.Established}, {fullOfNew, maps.New}} {
			if err := g.Fill(maps.BucketSize*int(maps.BucketsFor(o.Flows)), full.state); err != nil {
				t.Fatal(err)
			}
			clear(x.has)
			x.ask(t, clients, full.how, "")
			check("full of flows that are " + full.state.String())
		}

		// All that are registered die.
		servers.Add()
		for i, name := range servers.Names[:4] {
			if name != dead {
				servers.Close(i)
			}
		}
		x.ask(t, clients, nobodyLeft, "")
		check("no listener is left")
		for name, got := range map[string]uint64{"hit": x.want.Hit, "new": x.want.New, "rehomed": x.want.Rehomed, "evicted": x.want.Evicted, "table_full": x.want.TableFull} {
			if got == 0 && o.Affinity != loader.AffinityNone {
				t.Errorf("%s is 0", name)
			}
		}
		if x.want.Untracked == 0 || x.want.Fallback != n {
			t.Errorf("counters %+v", x.want)
		}
	})
}

// Of packets that cannot be read. There are none that get this far, so the program
// is one that fails to. They go by the pick table, whatever the policy.
func TestParseErrorIsCounted(t *testing.T) {
	defer loader.Unreadable()()
	count(t)
	each(t, func(t *testing.T, o loader.Options, network, listen, remote string) {
		ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
		testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: network, Addr: listen, ReusePort: true})
		g := attach(t, root, ns, o)
		clients := testnet.NewClients(t, ns, 100, remote)
		want := loader.Counters{Untracked: 200, ParseError: 200}
		moved := testnet.Moved(clients.Ask(), clients.Ask())
		if o.Affinity == loader.AffinityNone {
			want.ParseError, moved = 0, 0 // nothing is read
		}
		if moved != 0 {
			t.Errorf("%d flows moved", moved)
		}
		counted{t, ns, g}.check("unreadable", want, datagram)
	})
}

// Of TCP: a SYN each, and each connection that waits in a listener that closes.
func TestMigratedIsCounted(t *testing.T) {
	count(t)
	for i, policy := range allPolicies {
		for j, affinity := range []loader.Affinity{loader.AffinityNone, loader.AffinityClient} {
			network, addr := "tcp4", "127.0.0.1:1194"
			if (i+j)%2 == 1 {
				network, addr = "tcp6", "[::1]:1194"
			}
			t.Run(fmt.Sprintf("%s %s %s", policy, affinity, network), func(t *testing.T) {
				countMigrated(t, loader.Options{Settle: -1, Policy: policy, Affinity: affinity}, network, addr)
			})
		}
	}
}

func countMigrated(t *testing.T, o loader.Options, network, addr string) {
	const n = 60
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	var listeners []*net.TCPListener
	err := ns.Do(func() (err error) {
		if err := os.WriteFile("/proc/sys/net/ipv4/tcp_migrate_req", []byte("1"), 0); err != nil {
			return err
		}
		listeners, err = sockets.Listen(t.Context(), 3, network, addr)
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
	g := attach(t, root, ns, o)
	err = ns.Do(func() error {
		for range n {
			conn, err := net.Dial(network, addr)
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
	c, want := counted{t, ns, g}, loader.Counters{Untracked: n}
	if o.Affinity == loader.AffinityClient {
		want = loader.Counters{New: 1, Hit: n - 1}
	}
	c.check("connected", want, 0)
	slots, err := g.Slots()
	if err != nil {
		t.Fatal(err)
	}
	// The first that any wait in.
	for i, l := range listeners {
		cookie, err := sockets.Cookie(l)
		if err != nil {
			t.Fatal(err)
		}
		its := status(t, g).Listeners[slots[cookie]]
		if want.Migrated = its.Untracked + its.New + its.Hit; want.Migrated != 0 {
			(&tcpd{t: t, ns: ns, addr: addr, listeners: listeners}).close(i)
			break
		}
	}
	c.check("one closed", want, 0)
	if o.Affinity == loader.AffinityNone && want.Migrated == n {
		t.Errorf("all %d connections waited in one listener", n)
	}
}

// Why a flow has its listener: what is told of each of them.
func TestFlowRules(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 3, udpServer)
	g := attach(t, fs, ns, loader.Options{IdleNew: time.Hour})
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

// The rule is told as well when the group was attached, or its policy changed, so
// long ago that the seconds have wrapped, or nearly so.
func TestFlowRulesLongAgo(t *testing.T) {
	const day = 24 * 60 * 60
	for _, days := range []uint32{96, 98, 150, 193} {
		ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
		testnet.StartGroup(t, ns, 2, udpServer)
		g := attach(t, fs, ns, loader.Options{Settle: time.Minute})
		g.AttachedAgo(days * day)
		if err := g.WaitUntil(0); err != nil {
			t.Fatal(err)
		}
		for _, policy := range []loader.Policy{loader.PolicyHash, loader.PolicyRR} {
			attach(t, fs, ns, loader.Options{Policy: policy})
			testnet.NewClients(t, ns, 20, fleetAddr).Ask()
			settling, told := 0, 0
			for f, err := range g.Flows() {
				if err != nil {
					t.Fatal(err)
				}
				if f.Settling {
					settling++
				}
				if !f.Earlier {
					told++
				}
			}
			if settling > 0 || told < 20 {
				t.Errorf("%d days, policy %s: of %d flows it is told, %d settling", days, policy, told, settling)
			}
		}
		if s := status(t, g); s.Age < time.Duration(days)*day*time.Second {
			t.Errorf("%d days: attached %v ago", days, s.Age)
		}
	}
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
