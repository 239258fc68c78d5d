package loader_test

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// choosing are the policies that choose among all active listeners.
var choosing = []loader.Policy{loader.PolicyHash, loader.PolicyLeast, loader.PolicyRR, loader.PolicyRandom, loader.PolicyCPU}

// loadsMatch checks that the counts by which policy least goes are those of the
// flow table.
func loadsMatch(t *testing.T, g *loader.Group) {
	t.Helper()
	for _, l := range status(t, g).Listeners {
		if got := g.Load(l.Slot); l.State != "dead" && got != l.Flows {
			t.Errorf("slot %d: the program counts %d flows, the table has %d", l.Slot, got, l.Flows)
		}
	}
}

// The share of each listener in 10 000 new flows. The table of all of them is in
// the log.
func TestShares(t *testing.T) {
	flows := quarter(10000)
	table := fmt.Sprintf("%-8s %-18s %-20s %-20s %s\n", "POLICY", "LISTENERS", "FLOWS", "DUE", "OFF BY AT MOST")
	for _, c := range []struct {
		name    string
		weights []int
		late    int // how many flows there are before the last listener joins
	}{
		{"1:1", []int{1, 1}, 0},
		{"1:2:4", []int{1, 2, 4}, 0},
		{"1:1:1, one late", []int{1, 1, 1}, flows / 4},
	} {
		for _, policy := range append(choosing, loader.PolicyNewest) {
			t.Run(fmt.Sprint(c.name, " ", policy), func(t *testing.T) {
				n := len(c.weights)
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				early := n
				if c.late > 0 {
					early--
				}
				servers := testnet.StartGroup(t, ns, early, udpServer)
				g := attach(t, fs, ns, loader.Options{Settle: -1, IdleNew: time.Hour, Policy: policy})
				shares := map[string]int{}
				ask := func(flows int) {
					for name, n := range testnet.Shares(testnet.NewClients(t, ns, flows, fleetAddr).Ask()) {
						shares[name] += n
					}
				}
				if c.late > 0 {
					ask(c.late)
					servers.Add()
					attach(t, fs, ns, loader.Options{})
				}
				total := 0
				for slot, weight := range c.weights {
					total += weight
					if err := g.SetWeight(slot, weight); err != nil {
						t.Fatal(err)
					}
				}
				ask(flows - c.late)

				got, want, off := make([]int, n), make([]int, n), 0.0
				for i, name := range servers.Names {
					got[i] = shares[name]
					due := float64(flows-c.late) * float64(c.weights[i]) / float64(total)
					if policy == loader.PolicyLeast {
						due = float64(flows) * float64(c.weights[i]) / float64(total) // it catches up
					} else if i < early {
						due += float64(c.late) / float64(early)
					}
					want[i] = int(math.Round(due))
					missed := math.Abs(float64(got[i]) - due)
					off = max(off, missed/due)
					allowed := due / 100
					if policy != loader.PolicyLeast && policy != loader.PolicyRR {
						allowed += chance(flows, due/float64(flows), 1) // it is drawn, and a row is rounded
					}
					if missed > allowed {
						t.Errorf("%s has %d flows, due are %.0f", name, got[i], due)
					}
				}
				table += fmt.Sprintf("%-8s %-18s %-20s %-20s %.1f %%\n", policy, c.name, fmt.Sprint(got), fmt.Sprint(want), 100*off)
				s := status(t, g)
				if s.Policy != policy.String() || s.Counters.Fallback+s.Counters.Untracked != 0 || s.Tracked != flows {
					t.Errorf("status %+v", s)
				}
				if policy == loader.PolicyLeast {
					loadsMatch(t, g)
				}
			})
		}
	}
	t.Log("\n" + table)
}

// Whatever the policy: no tracked flow moves when it is changed, when a listener
// joins, drains or dies; a draining one gets nothing new; orphans find another.
func TestPolicies(t *testing.T) {
	const flows = 600
	for _, policy := range choosing {
		t.Run(policy.String(), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 4, udpServer)
			clients := testnet.NewClients(t, ns, flows, fleetAddr)
			now := clients.Ask()
			// Not seen yet: while the group settles they stay where they are.
			g := attach(t, fs, ns, loader.Options{IdleNew: time.Hour, Policy: policy})
			stay := func(when string, without ...string) {
				t.Helper()
				then := clients.Ask()
				if moved := testnet.Moved(now, then, without...); moved != 0 {
					t.Errorf("%s: %d flows moved", when, moved)
				}
				now = then
			}
			stay("settling")
			attach(t, fs, ns, loader.Options{Settle: -1})
			for _, other := range append(choosing, loader.PolicyNewest, policy) {
				attach(t, fs, ns, loader.Options{Policy: other})
				if got := status(t, g).Policy; got != other.String() {
					t.Errorf("policy %s, want %s", got, other)
				}
				stay("changed to " + other.String())
			}
			fresh := func() map[string]int {
				t.Helper()
				return testnet.Shares(testnet.NewClients(t, ns, flows, fleetAddr).Ask())
			}
			if err := g.Drain(3); err != nil {
				t.Fatal(err)
			}
			if got := fresh(); got["s3"] != 0 || got["s0"] < flows/5 || got["s1"] < flows/5 || got["s2"] < flows/5 {
				t.Errorf("s3 drains: new flows %v", got)
			}
			stay("s3 drains")
			servers.Close(1)
			if got := fresh(); got["s3"]+got["s1"]+got[""] != 0 || got["s0"] < flows/4 || got["s2"] < flows/4 {
				t.Errorf("s1 died: new flows %v", got)
			}
			orphans := testnet.Shares(now)["s1"]
			was := testnet.Shares(now)["s3"]
			stay("s1 died", "s1")
			if got := testnet.Shares(now); got["s3"] != was || got["s1"]+got[""] != 0 || orphans == 0 {
				t.Errorf("s1 died: %v", got)
			}
			name := servers.Add()
			attach(t, fs, ns, loader.Options{})
			stay(name + " joined")
			if got := fresh(); got[name] < flows/5 {
				t.Errorf("%s joined: new flows %v", name, got)
			}
			if c := status(t, g).Counters; c.Fallback != 0 {
				t.Errorf("counters %+v", c)
			}
			if policy == loader.PolicyLeast {
				loadsMatch(t, g)
				if _, err := g.Flush(func(f loader.Flow) bool { return f.Slot == 0 }); err != nil {
					t.Fatal(err)
				}
				loadsMatch(t, g)
			}
		})
	}
}

// When the table has no room, flows that look new may have been left untracked:
// they go by the table, whatever the policy, and so find the listener they had.
// What the policy had placed before may move once, when it has to give way.
func TestPolicyTableFull(t *testing.T) {
	for _, policy := range choosing {
		t.Run(policy.String(), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			testnet.StartGroup(t, ns, 3, udpServer)
			attach(t, fs, ns, loader.Options{Flows: 64, Settle: -1, Policy: policy})
			clients := testnet.NewClients(t, ns, 2000, fleetAddr)
			entries := 64 * 3 / 2
			if policy == loader.PolicyHash {
				entries = 0
			}
			before, moved := clients.Ask(), 0
			for range 4 {
				after := clients.Ask()
				moved += testnet.Moved(before, after)
				before = after
			}
			if moved > entries {
				t.Errorf("%d flows moved while nothing happened", moved)
			}
		})
	}
}

// The policy holds again when established flows of the time without room have
// expired, and still does when the seconds have wrapped.
func TestPolicyAfterFull(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 2, udpServer)
	g := attach(t, fs, ns, loader.Options{Settle: -1, Policy: loader.PolicyLeast})
	const idle = uint32(loader.DefaultIdle / time.Second)
	for ago, holds := range map[uint32]bool{1: false, idle - 100: false, idle + 1: true, 1<<23 + 1: true, 1<<24 - idle - 100: true} {
		if err := g.FoundNoRoom(ago); err != nil {
			t.Fatal(err)
		}
		g.SetLoad(0, 10000) // least gives it hardly any
		shares := testnet.Shares(testnet.NewClients(t, ns, 100, fleetAddr).Ask())
		if got := shares[servers.Names[0]] < 15; got != holds {
			t.Errorf("no room %d s ago: shares %v", ago, shares)
		}
	}
}

// Each connection goes by the policy. With rr the dead one's turns are dealt by
// chance, 200 of them: 48 connections off are seven standard deviations.
func TestPolicyTCP(t *testing.T) {
	const connections = 600
	for _, policy := range choosing {
		t.Run(policy.String(), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "tcp4", Addr: fleetAddr, ReusePort: true})
			g := attach(t, fs, ns, loader.Options{Settle: -1, Policy: policy})
			servers.Close(1)
			got := testnet.Shares(testnet.NewTCPClients(t, ns, connections, fleetAddr).Ask())
			low := connections / 3
			if policy == loader.PolicyRR {
				low = connections * 42 / 100
			}
			if got["s1"]+got[""] != 0 || got["s0"] < low || got["s2"] < low {
				t.Errorf("connections %v", got)
			}
			if c := status(t, g).Counters; c.Fallback != 0 {
				t.Errorf("counters %+v", c)
			}
		})
	}
}

// Ten flows of two listeners are even already: the second candidate is another
// listener than the first. Were it drawn once, every other flow would have no choice.
func TestLeastOfFew(t *testing.T) {
	const rounds, flows = 100, 10
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 2, udpServer)
	g := attach(t, fs, ns, loader.Options{Settle: -1, Policy: loader.PolicyLeast})
	uneven := 0
	for range rounds {
		shares := testnet.Shares(testnet.NewClients(t, ns, flows, fleetAddr).Ask())
		if n := shares[servers.Names[0]]; n != flows/2 {
			uneven++
		}
		if n, err := g.Flush(func(loader.Flow) bool { return true }); err != nil || n != flows {
			t.Fatalf("%d flows flushed: %v", n, err)
		}
	}
	if uneven > rounds/10 {
		t.Errorf("of %d times %d flows %d were uneven", rounds, flows, uneven)
	}
}

// A count of least that is wrong is right again after some rounds of the timer, with
// no process of ours, while flows come.
func TestLeastHeals(t *testing.T) {
	needTimer(t)
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 3, udpServer)
	g := attach(t, fs, ns, loader.Options{Flows: 1000, Settle: -1, IdleNew: time.Hour, Policy: loader.PolicyLeast})
	key := g.Key()
	testnet.NewClients(t, ns, 100, fleetAddr).Ask()
	loadsMatch(t, g)
	g.SetLoad(0, 1<<20)
	if got := testnet.Shares(testnet.NewClients(t, ns, 100, fleetAddr).Ask()); got["s0"] > 100/4 {
		t.Errorf("control: s0 seems to be loaded, new flows %v", got)
	}
	g.Close()
	await(t, fs, key, "the count heals", func(g *loader.Group) bool {
		testnet.NewClients(t, ns, 1, fleetAddr).Ask()
		flows := 0
		for _, l := range status(t, g).Listeners {
			if l.Slot == 0 {
				flows = l.Flows
			}
		}
		return g.Load(0) == flows
	})
	// The next ones make up for it.
	testnet.NewClients(t, ns, 600, fleetAddr).Ask()
	g = attach(t, fs, ns, loader.Options{})
	loadsMatch(t, g)
	for _, l := range status(t, g).Listeners {
		if total := status(t, g).Tracked; l.Flows < total*32/100 {
			t.Errorf("slot %d has %d of %d flows", l.Slot, l.Flows, total)
		}
	}
}

// pin makes a process run on one CPU, or (negative) on all it had at first.
func pin(t *testing.T, pid, cpu int) {
	t.Helper()
	var set unix.CPUSet
	for c := range runtime.NumCPU() {
		if cpu < 0 || c == cpu {
			set.Set(c)
		}
	}
	// A thread that is about to run there may have started another one meanwhile.
	for pinned := map[int]bool{}; ; {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			t.Fatal(err)
		}
		before := len(pinned)
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.SchedSetaffinity(tid, &set); err != nil && err != unix.ESRCH {
				t.Fatal(err)
			}
			pinned[tid] = true
		}
		if len(pinned) == before {
			return
		}
	}
}

// Policy cpu gives a flow to a listener that ran on the CPU its packet came to; and
// to any, where none did. The control is policy hash.
func TestPolicyCPU(t *testing.T) {
	testnet.Privileged(t)
	if online, err := os.ReadFile("/sys/devices/system/cpu/online"); err != nil || !strings.HasPrefix(string(online), "0-") {
		(&testnet.Unavailable{What: "two CPUs", Err: fmt.Errorf("online are %s (%v)", online, err)}).Skip(t)
	}
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := map[string]*testnet.Server{}
	for name, cpu := range map[string]string{"a": "0", "b": "0", "c": "1"} {
		o := udpServer
		o.Name, o.Wrap = name, []string{"taskset", "-c", cpu}
		servers[name] = testnet.StartServer(t, ns, o)
	}
	g := attach(t, fs, ns, loader.Options{Settle: -1, Policy: loader.PolicyCPU})
	defer pin(t, os.Getpid(), -1)
	// from tells who gets new flows that come in on a CPU: loopback stays on it.
	from := func(cpu int) map[string]int {
		t.Helper()
		pin(t, os.Getpid(), cpu)
		defer pin(t, os.Getpid(), -1)
		return testnet.Shares(testnet.NewClients(t, ns, 300, fleetAddr).Ask())
	}
	if got := from(0); got["c"] != 0 || got["a"] < 90 || got["b"] < 90 {
		t.Errorf("CPU 0: %v", got)
	}
	if got := from(1); got["c"] != 300 {
		t.Errorf("CPU 1: %v", got)
	}
	servers["c"].Kill()
	if got := from(1); got[""] != 0 || got["a"] < 90 || got["b"] < 90 {
		t.Errorf("CPU 1, c died: %v", got)
	}
	pin(t, servers["b"].PID(), 1)
	for deadline := time.Now().Add(time.Minute); ; {
		// It has to run there, and the agent to look.
		testnet.NewClients(t, ns, 10, fleetAddr).Ask()
		if _, err := g.Housekeep(); err != nil {
			t.Fatal(err)
		}
		got := from(1)
		if got["b"] == 300 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("CPU 1, b went there: %v", got)
		}
	}
	attach(t, fs, ns, loader.Options{Policy: loader.PolicyHash})
	if got := from(1); got["a"] < 90 {
		t.Errorf("control: CPU 1 with policy hash: %v", got)
	}
}
