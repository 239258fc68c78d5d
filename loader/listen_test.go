package loader_test

import (
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// who says who accepts new connections from one address, the first 127.0.0.1.
func who(t *testing.T, ns *testnet.NetNS, n int) map[string]int {
	t.Helper()
	return testnet.Shares(testnet.NewTCPClients(t, ns, n, "127.0.0.1:1194").Ask())
}

// A TCP socket that ends listening leaves the group, and joins it again when it
// listens again: as who it was, with its slot, its weight and, if it drains, that.
// Before it is registered it gets nothing, since it is no member of the table.
func TestListenAgain(t *testing.T) {
	for _, f := range []family{families[0], families[2]} {
		for _, drains := range []bool{false, true} {
			t.Run(f.name+map[bool]string{true: ", draining"}[drains], func(t *testing.T) {
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				a := testnet.StartServer(t, ns, f.options("a"))
				testnet.StartServer(t, ns, f.options("b"))
				testnet.StartServer(t, ns, f.options("c"))
				g := attach(t, fs, ns, noSettle)
				was := listenerOf(t, g, a)
				if err := g.SetWeight(was.Slot, 4); err != nil {
					t.Fatal(err)
				}
				if drains {
					if err := g.Drain(was.Slot); err != nil {
						t.Fatal(err)
					}
				} else if shares := who(t, ns, 300); shares["a"] < 150 {
					t.Errorf("weights 4, 1 and 1: accepted by %v", shares)
				}
				a.Shutdown(0)
				if shares := who(t, ns, 100); shares["b"]+shares["c"] != 100 {
					t.Errorf("a does not listen: accepted by %v", shares)
				}
				a.Listen(0, 512)
				if shares := who(t, ns, 100); shares["b"]+shares["c"] != 100 || len(status(t, g).Unregistered) != 1 {
					t.Errorf("a listens, and is not registered: accepted by %v", shares)
				}
				if joined := attach(t, fs, ns, loader.Options{}).Joined(); !slices.Equal(joined, []int{was.Slot}) {
					t.Errorf("joined %v, want %d", joined, was.Slot)
				}
				is := listenerOf(t, g, a)
				state, weight := "active", 4
				if drains {
					state, weight = "draining", 0
				}
				if is.State != state || is.Weight != weight || is.Generation != was.Generation || is.Cookie != was.Cookie {
					t.Errorf("it is %+v", is)
				}
				if shares := who(t, ns, 300); drains && shares["a"] != 0 || !drains && shares["a"] < 150 || shares[""] != 0 {
					t.Errorf("registered again: accepted by %v", shares)
				}
				if err := g.Resume(was.Slot); err != nil {
					t.Fatal(err)
				}
				if shares := who(t, ns, 300); shares["a"] < 150 {
					t.Errorf("resumed: accepted by %v", shares)
				}
			})
		}
	}
}

// The last listener takes the program with it when it ends listening: the kernel
// gives it a new group when it listens again (reuseport_resurrect).
func TestListenAgainAlone(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	a := testnet.StartServer(t, ns, families[0].options("a"))
	g := attach(t, fs, ns, noSettle)
	a.Shutdown(0)
	if shares := who(t, ns, 10); shares[""] != 10 {
		t.Errorf("nobody listens: accepted by %v", shares)
	}
	a.Listen(0, 512)
	if shares := who(t, ns, 10); shares["a"] != 10 || status(t, g).Attached {
		t.Errorf("a listens again: accepted by %v", shares)
	}
	attach(t, fs, ns, noSettle)
	late := families[0].options("b")
	testnet.StartServer(t, ns, late)
	attach(t, fs, ns, noSettle)
	if shares := who(t, ns, 100); shares["a"] < 20 || shares["b"] < 20 || !status(t, g).Attached {
		t.Errorf("attached again: accepted by %v", shares)
	}
}

// A client whose listener ended listening for a moment, in which the client opened
// nothing, has it still.
func TestListenAgainAffinity(t *testing.T) {
	const hosts = 60
	f := families[0]
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	a := testnet.StartServer(t, ns, f.options("a"))
	testnet.StartServer(t, ns, f.options("b"))
	testnet.StartServer(t, ns, f.options("c"))
	attach(t, fs, ns, loader.Options{Affinity: loader.AffinityClient, Settle: -1})
	board := newSwitchboard(t, ns, f)
	ask := func() (answers []string) {
		for host := range byte(hosts) {
			answers = append(answers, acceptors(board.open(2+host, 1))...)
		}
		return answers
	}
	before := ask()
	a.Shutdown(0)
	a.Listen(0, 512)
	attach(t, fs, ns, loader.Options{})
	if moved := testnet.Moved(before, ask()); moved != 0 || testnet.Shares(before)["a"] == 0 {
		t.Errorf("%d of %d clients have another listener: %v", moved, hosts, testnet.Shares(before))
	}
}

// To listen once more, with another backlog, changes nothing else.
func TestListenTwice(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	a := testnet.StartServer(t, ns, families[0].options("a"))
	testnet.StartServer(t, ns, families[0].options("b"))
	g := attach(t, fs, ns, noSettle)
	clients := testnet.NewTCPClients(t, ns, 200, "127.0.0.1:1194")
	before := clients.Ask()
	a.Listen(0, 1024)
	if moved := testnet.Moved(before, clients.Ask()); moved != 0 || len(status(t, g).Unregistered) != 0 {
		t.Errorf("%d connections go elsewhere, status %+v", moved, status(t, g))
	}
}

// A socket that is bound, but does not listen, is in no group, and in nobody's way.
func TestBoundBeforeItListens(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	o := families[0].options("early")
	o.Bound = true
	early := testnet.StartServer(t, ns, o)
	testnet.StartServer(t, ns, families[0].options("a"))
	g := attach(t, fs, ns, noSettle)
	if s := status(t, g); len(s.Listeners) != 1 || len(s.Unregistered) != 0 {
		t.Errorf("status %+v", s)
	}
	if shares := who(t, ns, 50); shares["a"] != 50 {
		t.Errorf("accepted by %v", shares)
	}
	early.Listen(0, 512)
	attach(t, fs, ns, loader.Options{})
	if shares := who(t, ns, 100); shares["a"] < 20 || shares["early"] < 20 {
		t.Errorf("accepted by %v", shares)
	}
}

// A listener lives as long as any process holds it: a worker that has it from a
// parent that died serves on, and is who has it then.
func TestSeveralHolders(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	parent := testnet.StartServer(t, ns, families[0].options("parent"))
	testnet.StartServer(t, ns, families[0].options("b"))
	g := attach(t, fs, ns, noSettle)
	was := listenerOf(t, g, parent)

	o := families[0].options("worker")
	conn := memberOf(t, ns, parent.PID())
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		copied, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		o.Socket = os.NewFile(uintptr(copied), "listener")
	})
	conn.Close()
	worker := testnet.StartServer(t, ns, o)
	o.Socket.Close()
	parent.Kill()
	if shares := who(t, ns, 100); shares["worker"] < 20 || shares["worker"]+shares["b"] != 100 {
		t.Errorf("accepted by %v", shares)
	}
	if is := listenerOf(t, g, worker); is.Slot != was.Slot || is.State != "active" {
		t.Errorf("it is %+v", is)
	}
	if err := g.Drain(was.Slot); err != nil {
		t.Fatal(err)
	}
	if shares := who(t, ns, 100); shares["b"] != 100 {
		t.Errorf("the worker drains: accepted by %v", shares)
	}
}

// memberOf borrows the socket that a process has in the namespace's group.
func memberOf(t *testing.T, ns *testnet.NetNS, pid int) *sockets.Conn {
	t.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: 1194, PID: pid})
	if err != nil || len(groups) != 1 {
		t.Fatalf("groups of pid %d: %v, %v", pid, groups, err)
	}
	i := slices.IndexFunc(groups[0].Members, func(m sockets.Socket) bool { return len(m.Holders) > 0 })
	conn, err := groups[0].Members[i].Take()
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// What a listener has waiting is what it has not accepted, and what it dropped are
// the packets of connections for which its queue had no room.
func TestAcceptQueue(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	a := families[0].hold(t, ns, "a")
	g := attach(t, fs, ns, noSettle)
	a.Listen(0, 4) // and one, as the kernel counts
	board := newSwitchboard(t, ns, families[0])
	calls := board.calls(2, 10, "")
	acknowledge(calls[:3])
	if l := listenerOf(t, g, a); l.RxQueue != 3 || l.Drops != 0 {
		t.Errorf("3 of 5 wait: %+v", l)
	}
	acknowledge(calls[3:])
	if l := listenerOf(t, g, a); l.RxQueue != 5 || l.Drops == 0 {
		t.Errorf("5 of 5 wait: %+v", l)
	}
	a.Accept()
	if shares := testnet.Shares(acceptors(calls)); shares["a"] != 10 {
		t.Errorf("accepted by %v", shares)
	}
	if l := listenerOf(t, g, a); l.RxQueue != 0 {
		t.Errorf("all accepted: %+v", l)
	}
}
