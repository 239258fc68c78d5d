package loader_test

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/internal/layout1"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// The rule of generations, for processes that have no listener yet.
func TestGenerationRule(t *testing.T) {
	for _, c := range []struct {
		name            string
		newest, members uint32
		alive           int
		ago             uint64 // seconds since the last of the newest joined
		want            uint32
	}{
		{"the first of all", 0, 0, 0, 1000, 1},
		{"the first of all, just after boot", 0, 0, 0, 0, 1},
		{"at once after another", 1, 1, 1, 0, 1},
		{"5 seconds after: they may not have passed in full", 1, 4, 4, 5, 1},
		{"6 seconds after", 1, 4, 4, 6, 2},
		{"much later", 7, 4, 4, 100000, 8},
		{"in a gap", 1, 4, 3, 100000, 1},
		{"in the last of many gaps", 1, 8, 7, 6, 1},
		{"all have died", 3, 8, 0, 6, 3},
		{"more than there ever were", 1, 4, 5, 6, 2},
		{"a generation whose only member died before it was complete", 2, 1, 0, 2, 2},
		{"a generation that was closed", 2, 0, 4, 1000, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := loader.Joiner(c.newest, c.members, c.alive, c.ago); got != c.want {
				t.Errorf("generation %d, want %d", got, c.want)
			}
		})
	}
}

// fleet is a group whose processes come and go.
type fleet struct {
	t     *testing.T
	ns    *testnet.NetNS
	fs    loader.FS
	group *loader.Group
}

const fleetAddr = "127.0.0.1:1194"

func newFleet(t *testing.T) *fleet {
	return &fleet{t: t, ns: testnet.New(t), fs: loader.FS(testnet.BPFFS(t))}
}

// start starts n processes with one socket each, named by prefix and number.
func (f *fleet) start(prefix string, n int) map[string]*testnet.Server {
	f.t.Helper()
	servers := map[string]*testnet.Server{}
	for i := range n {
		name := fmt.Sprint(prefix, i)
		servers[name] = testnet.StartServer(f.t, f.ns, testnet.ServerOptions{Network: "udp4", Addr: fleetAddr, ReusePort: true, Name: name})
	}
	return servers
}

// attach registers what is new.
func (f *fleet) attach(o loader.Options) {
	f.t.Helper()
	g := attach(f.t, f.fs, f.ns, o)
	if f.group == nil {
		f.group = g
	}
}

func (f *fleet) try(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

// later lets the newest generation be complete, and soon has it incomplete.
func (f *fleet) later() { f.t.Helper(); f.try(f.group.JoinedAgo(6)) }
func (f *fleet) soon()  { f.t.Helper(); f.try(f.group.JoinedAgo(0)) }

// hold keeps the group waiting for as long as the test may take, and turn ends
// the wait by the program's clock.
func (f *fleet) hold() { f.t.Helper(); f.try(f.group.WaitUntil(1000)) }
func (f *fleet) turn() { f.t.Helper(); f.try(f.group.WaitUntil(0)) }

// fresh says who gets new flows, and that nobody else of want does.
func (f *fleet) fresh(when string, want ...string) {
	f.t.Helper()
	shares := testnet.Shares(testnet.NewClients(f.t, f.ns, 60*len(want), fleetAddr).Ask())
	got := slices.Sorted(maps.Keys(shares))
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		f.t.Errorf("%s: new flows (-want +got):\n%s", when, diff)
	}
}

// generations lists how many live listeners there are of each.
func (f *fleet) generations() map[int]int {
	f.t.Helper()
	n := map[int]int{}
	for _, l := range status(f.t, f.group).Listeners {
		if l.State != "dead" {
			n[l.Generation]++
		}
	}
	return n
}

func (f *fleet) want(when string, want map[int]int) {
	f.t.Helper()
	if diff := cmp.Diff(want, f.generations()); diff != "" {
		f.t.Errorf("%s: live listeners by generation (-want +got):\n%s", when, diff)
	}
}

func slotOf(t *testing.T, g *loader.Group, pid int) int {
	t.Helper()
	for _, l := range status(t, g).Listeners {
		if l.PID == pid {
			return l.Slot
		}
	}
	t.Fatalf("pid %d has no listener", pid)
	return 0
}

func names(sets ...map[string]*testnet.Server) (all []string) {
	for _, set := range sets {
		for name := range set {
			all = append(all, name)
		}
	}
	return all
}

var newest = loader.Options{Policy: loader.PolicyNewest, Settle: -1}

// A new version takes all new flows once it is as large as the old one, and takes
// none of the old one's. With policy hash, the control, both have new flows.
func TestNewest(t *testing.T) {
	for _, policy := range []loader.Policy{loader.PolicyHash, loader.PolicyNewest} {
		t.Run(policy.String(), func(t *testing.T) {
			f := newFleet(t)
			old := f.start("a", 3)
			f.attach(loader.Options{Policy: policy, Settle: -1})
			clients := testnet.NewClients(t, f.ns, 600, fleetAddr)
			before := clients.Ask()
			f.later()
			young := f.start("b", 2)
			f.attach(loader.Options{})
			f.hold()
			turning := status(t, f.group).Turning
			if policy == loader.PolicyNewest {
				f.fresh("2 of 3 have joined", names(old)...)
			}
			for name, s := range f.start("b2", 1) {
				young[name] = s
			}
			f.soon()
			f.attach(loader.Options{})
			f.want("a new version", map[int]int{1: 3, 2: 3})
			if policy == loader.PolicyNewest {
				if turning == 0 || status(t, f.group).Turning != 0 {
					t.Errorf("turning %v, then %v", turning, status(t, f.group).Turning)
				}
				f.fresh("all have joined", names(young)...)
			} else {
				f.fresh("control", names(old, young)...)
			}
			if diff := cmp.Diff(before, clients.Ask()); diff != "" {
				t.Errorf("flows moved: %s", diff)
			}
			// The old one ends: its flows find the new one.
			for _, s := range old {
				s.Kill()
			}
			for name := range testnet.Shares(clients.Ask()) {
				if young[name] == nil {
					t.Errorf("a flow went to %q", name)
				}
			}
		})
	}
}

// A smaller version takes over by the program's clock, with no process of rpsel
// alive, and what died then finds the newest. Whoever changes the group next puts
// the ranks right.
func TestTurnByClock(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	old := f.start("a", 3)
	f.attach(newest)
	f.later()
	young := f.start("b", 2)
	f.attach(loader.Options{})
	for status(t, f.group).Turning > 0 { // the program's clock, no help
		time.Sleep(20 * time.Millisecond)
	}
	f.fresh("after the turn", names(young)...)
	young["b0"].Kill()
	f.fresh("b0 died after the turn", "b1")
	h, err := f.group.Housekeep()
	if err != nil || h.Buried != 1 || !h.Repaired {
		t.Errorf("housekept %+v, %v", h, err)
	}
	f.fresh("ranked", "b1")
	young["b1"].Kill()
	f.fresh("all of the newest died", names(old)...)
	if h, err = f.group.Housekeep(); err != nil || h.Buried != 1 {
		t.Errorf("housekept %+v, %v", h, err)
	}
	f.fresh("and were buried", names(old)...)
	if h, err = f.group.Housekeep(); err != nil || h != (loader.Housekept{}) {
		t.Errorf("housekept again: %+v, %v", h, err)
	}
}

// One of eight is killed and started again: it fills the gap and does not take
// all new flows. The control is a ninth, which does.
func TestRestartOneOfEight(t *testing.T) {
	for _, killed := range []bool{true, false} {
		t.Run(fmt.Sprint("killed ", killed), func(t *testing.T) {
			f := newFleet(t)
			servers := f.start("a", 8)
			f.attach(newest)
			f.later()
			if killed {
				servers["a3"].Kill()
				delete(servers, "a3")
			}
			again := f.start("again", 1)
			f.attach(loader.Options{})
			if !killed {
				f.want("a ninth", map[int]int{1: 8, 2: 1})
				f.turn()
				f.fresh("a ninth", names(again)...)
				return
			}
			f.want("killed and started again", map[int]int{1: 8})
			f.fresh("killed and started again", names(servers, again)...)
			f.turn()
			f.fresh("and later", names(servers, again)...)
		})
	}
}

// A new version was tried and stopped. Of the old one two crash later: what is
// started then comes in their place, and does not take all new flows. The control
// is the new version that is tried again while none of the old lacks.
func TestRestartAfterRollback(t *testing.T) {
	for _, killed := range []bool{true, false} {
		t.Run(fmt.Sprint("killed ", killed), func(t *testing.T) {
			f := newFleet(t)
			servers := f.start("a", 4)
			f.attach(newest)
			f.later()
			tried := f.start("tried", 1)
			f.attach(loader.Options{})
			f.later()
			tried["tried0"].Kill()
			f.attach(loader.Options{}) // notes when
			f.try(f.group.DiedEarlier(2))
			if !killed {
				again := f.start("again", 1)
				f.attach(loader.Options{})
				f.want("tried again", map[int]int{1: 4, 2: 1})
				f.turn()
				f.fresh("tried again", names(again)...)
				return
			}
			for _, name := range []string{"a1", "a3"} {
				servers[name].Kill()
				delete(servers, name)
			}
			f.attach(loader.Options{})
			first := f.start("first", 1)
			f.attach(loader.Options{})
			f.later()
			f.want("one is back", map[int]int{1: 3})
			second := f.start("second", 1)
			f.attach(loader.Options{})
			f.later()
			f.want("both are back", map[int]int{1: 4})
			f.turn()
			f.fresh("both are back", names(servers, first, second)...)
			f.start("new", 1)
			f.attach(loader.Options{})
			f.want("a new version", map[int]int{1: 4, 2: 1})
		})
	}
}

// All of the newest died, and more than there were are started: they are one
// generation, and so is a group of which nobody was left. The control is one that
// lives, whose generation lacks just one.
func TestRestartAll(t *testing.T) {
	for _, c := range []struct {
		name       string
		kill       int // of two
		generation map[int]int
		fresh      string
	}{
		{"all", 2, map[int]int{1: 4}, "b0 b1 b2 b3"},
		{"one", 1, map[int]int{1: 2, 2: 3}, "b1 b2 b3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFleet(t)
			a := f.start("a", 2)
			f.attach(newest)
			f.later()
			for _, name := range []string{"a0", "a1"}[:c.kill] {
				a[name].Kill()
			}
			f.start("b", 4)
			f.attach(loader.Options{Settle: -1})
			f.want("started again", c.generation)
			f.fresh("started again", strings.Fields(c.fresh)...)
		})
	}
}

// Three generations overlap. When the newest is gone the one before serves, and
// who comes back to the newest waits for the others, as at first.
func TestThreeGenerations(t *testing.T) {
	f := newFleet(t)
	clients := testnet.NewClients(t, f.ns, 600, fleetAddr)
	a := f.start("a", 2)
	f.attach(newest)
	before := clients.Ask()
	f.later()
	b := f.start("b", 2)
	f.attach(loader.Options{})
	f.fresh("two of two", names(b)...)
	f.later()
	c := f.start("c", 1)
	f.attach(loader.Options{})
	f.hold()
	f.want("three generations", map[int]int{1: 2, 2: 2, 3: 1})
	f.fresh("the third is not complete", names(b)...)
	// While it turns, those that serve die: with nobody to help, the older serve
	// before the next, and it takes over when somebody looks.
	b["b0"].Kill()
	f.fresh("b0 died", "b1")
	b["b1"].Kill()
	f.fresh("b died, nobody looked", names(a)...)
	if _, err := f.group.Housekeep(); err != nil {
		t.Fatal(err)
	}
	f.fresh("b died, c serves", "c0")
	if diff := cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
	f.later()
	c["c0"].Kill()
	f.fresh("c died", names(a)...)
	again := f.start("again", 1)
	f.attach(loader.Options{})
	f.hold()
	f.want("c is back", map[int]int{1: 2, 3: 1})
	f.fresh("c is back, with less than a has", names(a)...)
	f.turn()
	f.fresh("c is back for good", names(again)...)
	if diff := cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
}

// A process is told from an earlier one with the same pid by when it started. The
// control is the process itself.
func TestPIDReused(t *testing.T) {
	for _, reused := range []bool{true, false} {
		t.Run(fmt.Sprint("reused ", reused), func(t *testing.T) {
			f := newFleet(t)
			one := testnet.StartGroup(t, f.ns, 1, testnet.ServerOptions{Network: "udp4", Addr: fleetAddr, ReusePort: true, Name: "a"})
			f.attach(newest)
			f.later()
			f.start("b", 1)
			f.attach(loader.Options{})
			f.later()
			slot := slotOf(t, f.group, one.PID())
			one.Close(0)
			if reused {
				f.try(f.group.AnotherProcess(uint32(slot)))
			}
			one.Add()
			f.attach(loader.Options{})
			if reused {
				f.want("reused", map[int]int{2: 1, 3: 1})
				f.fresh("reused", "a1")
			} else {
				f.want("the same", map[int]int{1: 1, 2: 1})
				f.fresh("the same", "b0")
			}
		})
	}
}

// A process keeps its generation when it binds again, also after a new one took
// over, and has one with all its sockets.
func TestGenerationsBelongToProcesses(t *testing.T) {
	f := newFleet(t)
	o := testnet.ServerOptions{Network: "udp4", Addr: fleetAddr, ReusePort: true, Name: "a"}
	one := testnet.StartGroup(t, f.ns, 1, o)
	o.Name = "b"
	two := testnet.StartGroup(t, f.ns, 1, o)
	f.attach(newest)
	f.later()
	c := f.start("c", 2)
	f.attach(loader.Options{})
	f.fresh("a new version", names(c)...)
	f.later()
	// As at SIGUSR1, and both at once: they must not take each other's place.
	one.Close(0)
	two.Close(0)
	if _, err := f.group.Housekeep(); err != nil {
		t.Fatal(err)
	}
	two.Add()
	f.attach(loader.Options{})
	one.Add()
	f.attach(loader.Options{})
	f.want("bound again", map[int]int{1: 2, 2: 2})
	f.fresh("bound again", names(c)...)
	one.Add()
	f.attach(loader.Options{})
	f.want("one more socket", map[int]int{1: 3, 2: 2})
	f.fresh("one more socket", names(c)...)
	// Who binds for the first time meanwhile does not take its place.
	two.Close(1)
	if _, err := f.group.Housekeep(); err != nil {
		t.Fatal(err)
	}
	e := f.start("e", 2)
	f.attach(loader.Options{})
	two.Add()
	f.attach(loader.Options{})
	f.want("bound again, after others", map[int]int{1: 3, 2: 2, 3: 2})
	f.fresh("bound again, after others", names(e)...)
	for _, s := range e {
		s.Kill()
	}
	if _, err := f.group.Housekeep(); err != nil {
		t.Fatal(err)
	}
	// Another process is another matter.
	two.Kill()
	d := f.start("d", 2)
	f.attach(loader.Options{})
	f.want("in the places of the newest", map[int]int{1: 2, 2: 2, 3: 2})
	f.fresh("in the places of the newest", names(d)...)
}

// Members of old generations drain and resume without getting new flows; when all
// of the newest drain, the one before serves; when all do, all serve.
func TestNewestAndDrain(t *testing.T) {
	f := newFleet(t)
	a := f.start("a", 2)
	f.attach(newest)
	f.later()
	b := f.start("b", 2)
	f.attach(loader.Options{})
	slots := map[int][]int{} // by generation
	for _, l := range status(t, f.group).Listeners {
		slots[l.Generation] = append(slots[l.Generation], l.Slot)
	}
	act := func(what func(int) error, slots ...int) {
		t.Helper()
		for _, slot := range slots {
			f.try(what(slot))
		}
	}
	clients := testnet.NewClients(t, f.ns, 300, fleetAddr)
	before := clients.Ask()
	act(f.group.Drain, slots[1][0])
	f.fresh("one of the old drains", names(b)...)
	act(f.group.Resume, slots[1][0])
	f.fresh("and resumes", names(b)...)
	act(f.group.Drain, slots[2][0])
	if got := testnet.Shares(testnet.NewClients(t, f.ns, 60, fleetAddr).Ask()); len(got) != 1 || got["b0"]+got["b1"] != 60 {
		t.Errorf("one of the newest drains, new flows went to %v", got)
	}
	act(f.group.Drain, slots[2][1])
	f.fresh("all of the newest drain", names(a)...)
	act(f.group.Drain, slots[1]...)
	if s := status(t, f.group); !s.AllDraining {
		t.Errorf("status %+v", s)
	}
	f.fresh("all drain", names(a, b)...)
	act(f.group.Resume, slots[2]...)
	f.fresh("the newest resume", names(b)...)
	act(f.group.Resume, slots[1]...)
	f.fresh("all resume", names(b)...)
	if diff := cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
}

// P4: while a generation is awaited, a draining listener of the one that serves
// gets no new flow.
func TestDrainWhileTurning(t *testing.T) {
	f := newFleet(t)
	a := f.start("a", 3)
	f.attach(newest)
	f.later()
	f.start("b", 1)
	f.attach(loader.Options{})
	f.hold()
	f.fresh("all of the old serve", "a0", "a1", "a2")
	f.try(f.group.Drain(slotOf(t, f.group, a["a0"].PID())))
	f.fresh("a0 drains", "a1", "a2")
	if status(t, f.group).Turning == 0 {
		t.Error("it does not turn: the test cannot tell")
	}
}

// P3: a generation that comes while the group settles waits for that: flows from
// before the attach, none of them seen yet, stay.
func TestTurnWaitsForSettling(t *testing.T) {
	f := newFleet(t)
	a := f.start("a", 2)
	silent := testnet.NewClients(t, f.ns, 500, fleetAddr)
	before := silent.Ask()
	f.attach(loader.Options{Policy: loader.PolicyNewest})
	f.later()
	b := f.start("b", 1)
	f.attach(loader.Options{})
	if s := status(t, f.group); s.Settling == 0 || s.Turning < s.Settling || s.Generation != 2 {
		t.Fatalf("status %+v", s)
	}
	if moved := testnet.Moved(before, silent.Ask()); moved != 0 {
		t.Errorf("%d untracked flows moved while the group settles", moved)
	}
	f.fresh("settling", names(a)...)
	c := f.start("c", 1)
	f.soon()
	f.attach(loader.Options{})
	f.fresh("settling, and it is as large", names(a)...)
	f.turn()
	f.fresh("settled", names(b, c)...)
	if moved := testnet.Moved(before, silent.Ask()); moved != 0 {
		t.Errorf("%d flows moved when settling ended", moved)
	}
}

// Weights count within the generation that serves.
func TestWeightsWithinGeneration(t *testing.T) {
	f := newFleet(t)
	f.start("a", 2)
	f.attach(newest)
	f.later()
	f.start("b", 2)
	f.attach(loader.Options{})
	for _, l := range status(t, f.group).Listeners {
		weight := 100 // of the old ones, to no effect
		if l.Generation == 2 {
			weight = 1 + 3*(l.Slot%2)
		}
		if err := f.group.SetWeight(l.Slot, weight); err != nil {
			t.Fatal(err)
		}
	}
	const flows = 4000
	got := testnet.Shares(testnet.NewClients(t, f.ns, flows, fleetAddr).Ask())
	light, heavy := min(got["b0"], got["b1"]), max(got["b0"], got["b1"])
	if light+heavy != flows || math.Abs(float64(light)-flows/5) > chance(flows, 0.2, 1) {
		t.Errorf("weights 1 and 4, new flows %v", got)
	}
}

// Changing the policy moves no tracked flow, whatever generations there are.
func TestPolicyChange(t *testing.T) {
	f := newFleet(t)
	a := f.start("a", 2)
	f.attach(noSettle)
	f.later()
	b := f.start("b", 1)
	f.attach(loader.Options{})
	f.want("policy hash", map[int]int{1: 2, 2: 1})
	clients := testnet.NewClients(t, f.ns, 600, fleetAddr)
	before := clients.Ask()
	f.fresh("policy hash", names(a, b)...)
	change := func(p loader.Policy) {
		t.Helper()
		f.attach(loader.Options{Policy: p})
		if got := status(t, f.group).Policy; got != p.String() {
			t.Errorf("policy %s, want %s", got, p)
		}
		if diff := cmp.Diff(before, clients.Ask()); diff != "" {
			t.Errorf("flows moved when the policy became %s: %s", p, diff)
		}
	}
	f.soon()
	change(loader.PolicyNewest)
	f.hold()
	f.fresh("the newest is not complete", names(a)...)
	f.turn()
	f.fresh("policy newest", names(b)...)
	change(loader.PolicyHash)
	f.fresh("policy hash again", names(a, b)...)
	f.later()
	change(loader.PolicyNewest)
	f.fresh("the newest is complete", names(b)...)
	f.attach(loader.Options{}) // no policy: as it is
	f.fresh("attached again", names(b)...)
}

// --generation new opens another although the newest lacks a member, or is not
// complete; also for who joins later.
func TestNewGeneration(t *testing.T) {
	f := newFleet(t)
	a := f.start("a", 2)
	f.attach(newest)
	f.start("b", 2)
	f.attach(loader.Options{NewGeneration: true})
	f.want("now", map[int]int{1: 2, 2: 2})
	f.later()
	a["a0"].Kill()
	f.attach(loader.Options{NewGeneration: true})
	c := f.start("c", 2)
	f.attach(loader.Options{})
	f.want("later", map[int]int{1: 1, 2: 2, 3: 2})
	f.fresh("later", names(c)...)
}

// TCP: a generation is awaited also while a group of connections settles, for
// which that means nothing.
func TestNewestTCP(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	o := testnet.ServerOptions{Network: "tcp4", Addr: fleetAddr, ReusePort: true, Name: "a"}
	testnet.StartGroup(t, ns, 2, o)
	g := attach(t, fs, ns, loader.Options{Policy: loader.PolicyNewest})
	if err := g.JoinedAgo(6); err != nil {
		t.Fatal(err)
	}
	o.Name = "b"
	young := testnet.StartGroup(t, ns, 1, o)
	attach(t, fs, ns, loader.Options{})
	if err := g.WaitUntil(1000); err != nil {
		t.Fatal(err)
	}
	clients := testnet.NewTCPClients(t, ns, 100, fleetAddr)
	if got := testnet.Shares(clients.Ask()); got["a0"] == 0 || got["a1"] == 0 || got["b0"]+got[""] != 0 {
		t.Errorf("not complete: connections went to %v", got)
	}
	young.Add()
	attach(t, fs, ns, loader.Options{})
	if got := testnet.Shares(clients.Ask()); got["b0"] == 0 || got["b1"] == 0 || got["b0"]+got["b1"] != 100 {
		t.Errorf("complete: connections went to %v", got)
	}
}

// A group of before layout 2, which knew no generations, has one after an
// upgrade: who starts again fills its gap.
func TestRestartAfterUpgrade(t *testing.T) {
	f := newFleet(t)
	servers := f.start("a", 3)
	key := layout1.Attach(t, string(f.fs), f.ns, 1194, layout1.Options{Flows: 1000})[0]
	if _, err := f.fs.Upgrade(key, loader.UpgradeOptions{}); err != nil {
		t.Fatal(err)
	}
	f.attach(newest)
	f.later()
	servers["a1"].Kill()
	delete(servers, "a1")
	again := f.start("again", 1)
	f.attach(loader.Options{})
	f.want("killed and started again", map[int]int{1: 3})
	f.fresh("killed and started again", names(servers, again)...)
	f.later()
	young := f.start("b", 3)
	f.attach(loader.Options{})
	f.want("a new version", map[int]int{1: 3, 2: 3})
	f.fresh("a new version", names(young)...)
}
