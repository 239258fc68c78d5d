package loader_test

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
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

// P8: whatever happens, every run is exactly one outcome.
func TestEveryRunIsCountedOnce(t *testing.T) {
	testnet.Privileged(t)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()

	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: "udp6", Addr: "[::]:1194", ReusePort: true})
	g := attach(t, root, ns, loader.Options{Flows: 1000, Settle: -1})
	clients := testnet.NewClients(t, ns, 500, "127.0.0.1:1194")

	check := func(when string, want loader.Counters) {
		t.Helper()
		s := status(t, g)
		c := s.Counters
		if got := c.Hit + c.New + c.Rehomed + c.Untracked + c.Fallback + c.Migrated; got != c.Runs || c.Runs != runs(t, ns) {
			t.Errorf("%s: outcomes add up to %d, runs are %d, the kernel counts %d", when, got, c.Runs, runs(t, ns))
		}
		var sum loader.Counters
		for _, l := range s.Listeners {
			sum.Hit += l.Hit
			sum.New += l.New
			sum.Rehomed += l.Rehomed
			sum.Untracked += l.Untracked
			if got := l.Hit + l.New + l.Rehomed + l.Untracked; l.Bytes != got*12 {
				t.Errorf("%s: slot %d: %d runs of a header of 8 bytes and 4 of payload, %d bytes", when, l.Slot, got, l.Bytes)
			}
		}
		want.Runs = c.Runs
		if diff := cmp.Diff(want, c); diff != "" {
			t.Errorf("%s: %s", when, diff)
		}
		if sum.Hit != c.Hit || sum.New != c.New || sum.Rehomed != c.Rehomed || sum.Untracked != c.Untracked {
			t.Errorf("%s: listeners add up to %+v of %+v", when, sum, c)
		}
	}
	clients.Ask()
	check("first packets", loader.Counters{New: 500})
	before := clients.Ask()
	check("second packets", loader.Counters{New: 500, Hit: 500})
	servers.Close(1)
	orphans := uint64(testnet.Shares(before)["s1"])
	after := clients.Ask()
	check("a listener died", loader.Counters{New: 500, Hit: 1000 - orphans, Rehomed: orphans})
	if diff := cmp.Diff(after, clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
	check("and once more", loader.Counters{New: 500, Hit: 1500 - orphans, Rehomed: orphans})
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
