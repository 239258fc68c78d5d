package bench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func TestMain(m *testing.M) { testnet.Main(m) }

func must(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkBindToFirstFlow is the time from the order to another process to
// bind a socket to its first new flow, in ms, while the agent runs, or in its
// place only what it does about an event. All other listeners drain, so that the
// first new flow after the registration is the joiner's. A flow is tried every
// 100 us or so, on the same CPUs.
//
// The parts, where there is no agent: until the event is there, the search and
// the borrowing, the registration, and the flow.
func BenchmarkBindToFirstFlow(b *testing.B) {
	for _, processes := range []int{100, 2000} {
		b.Run(fmt.Sprintf("processes=%d/agent", processes), func(b *testing.B) {
			ns, servers := serve(b, processes)
			bpffs := testnet.BPFFS(b)
			startAgent(b, bpffs, ns)
			drainFirst(b, loader.FS(bpffs), ns, servers)
			var all []time.Duration
			for b.Loop() {
				start, end := join(b, ns, servers)
				all = append(all, end.Sub(start))
				leave(b, ns, servers)
			}
			b.ReportMetric(0, "ns/op") // with what comes between the joins
			report(b, "all", all, 50, 90, 99)
		})
		b.Run(fmt.Sprintf("processes=%d/parts", processes), func(b *testing.B) {
			ns, servers := serve(b, processes)
			fs := loader.FS(testnet.BPFFS(b))
			attach(b, fs, ns)
			registered := register(b, drainFirst(b, fs, ns, servers))
			var event, borrowed, done, flow, all []time.Duration
			for b.Loop() {
				start, end := join(b, ns, servers)
				r := <-registered
				must(b, r.err)
				event = append(event, r.event.Sub(start))
				borrowed = append(borrowed, r.borrowed.Sub(r.event))
				done = append(done, r.done.Sub(r.borrowed))
				flow = append(flow, end.Sub(r.done))
				all = append(all, end.Sub(start))
				leave(b, ns, servers)
			}
			b.ReportMetric(0, "ns/op")
			report(b, "event", event, 50, 99)
			report(b, "borrow", borrowed, 50, 99)
			report(b, "register", done, 50, 99)
			report(b, "flow", flow, 50, 99)
			report(b, "all", all, 50, 90, 99)
		})
	}
}

const addr = "127.0.0.1:1194"

// serve starts a server among idle processes.
func serve(b *testing.B, processes int) (*testnet.NetNS, *testnet.Server) {
	b.Helper()
	testnet.Idle(b, processes)
	ns := testnet.New(b)
	return ns, testnet.StartGroup(b, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
}

// drainFirst opens the group and drains the only listener that it has.
func drainFirst(b *testing.B, fs loader.FS, ns *testnet.NetNS, servers *testnet.Server) *loader.Group {
	b.Helper()
	group, err := fs.Open(loader.Key{NetNS: ns.Cookie(), Proto: loader.UDP, Addr: servers.Addr})
	must(b, err)
	b.Cleanup(func() { group.Close() })
	must(b, group.Drain(0))
	return group
}

// join binds one more socket and asks until that one answers.
func join(b *testing.B, ns *testnet.NetNS, servers *testnet.Server) (start, end time.Time) {
	b.Helper()
	start = time.Now()
	name := servers.Add()
	for testnet.NewClients(b, ns, 1, addr).Ask()[0] != name {
		if time.Since(start) > time.Minute {
			b.Fatalf("%s never gets a new flow", name)
		}
	}
	return start, time.Now()
}

// leave closes the last socket, and waits until it is gone: whoever has borrowed
// it keeps it alive for another moment, in which nobody reads what it gets.
func leave(b *testing.B, ns *testnet.NetNS, servers *testnet.Server) {
	b.Helper()
	servers.Close(len(servers.Names) - 1)
	for deadline := time.Now().Add(time.Minute); ; {
		var bound []uint64
		must(b, ns.Do(func() (err error) {
			bound, err = sockets.Bound(sockets.UDP, servers.Addr.Port())
			return err
		}))
		if len(bound) == 1 {
			return
		}
		if time.Now().After(deadline) {
			b.Fatalf("%d sockets are left", len(bound))
		}
	}
}

// report reports percentiles in ms.
func report(b *testing.B, name string, took []time.Duration, percentiles ...int) {
	slices.Sort(took)
	for _, p := range percentiles {
		at := took[(len(took)-1)*p/100]
		b.ReportMetric(float64(at.Microseconds())/1000, fmt.Sprintf("%s-p%d-ms", name, p))
	}
}

// startAgent starts the command as an agent and returns when it has attached
// the group.
func startAgent(b *testing.B, bpffs string, ns *testnet.NetNS) {
	b.Helper()
	config := filepath.Join(b.TempDir(), "rpsel.toml")
	service := fmt.Sprintf("[[service]]\nport = 1194\nnetns = %q\nsettle = \"0s\"\n", ns.Path())
	must(b, os.WriteFile(config, []byte(service), 0o600))

	cmd := exec.Command(testnet.Build(b), "agent", "--bpffs", bpffs, "--config", config)
	stderr, err := cmd.StderrPipe()
	must(b, err)
	must(b, cmd.Start())
	said := bufio.NewReader(stderr)
	drained := make(chan struct{})
	b.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		<-drained
		cmd.Wait()
	})
	for line := ""; !strings.Contains(line, "msg=ready"); {
		if line, err = said.ReadString('\n'); err != nil {
			close(drained)
			b.Fatalf("the agent ended: %q, %v", line, err)
		}
	}
	go func() {
		io.Copy(io.Discard, said)
		close(drained)
	}()
}

// registration is when something happened, in the agent's place.
type registration struct {
	event, borrowed, done time.Time
	err                   error
}

// register registers what is told of, as the agent does.
func register(b *testing.B, group *loader.Group) <-chan registration {
	key := group.Key()
	w, err := watch.Open("")
	must(b, err)
	must(b, w.SetPorts([]watch.Port{{Proto: key.Proto, Port: key.Addr.Port()}}))
	registered := make(chan registration, 1)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- w.Run(ctx, func(events []watch.Event) {
			for _, e := range events {
				if e.NetNS != key.NetNS {
					continue
				}
				r := registration{event: time.Now()}
				var conn *sockets.Conn
				if conn, r.err = borrow(e); r.err == nil {
					r.borrowed = time.Now()
					_, r.err = group.Register(conn)
					r.done = time.Now()
					conn.Close()
				}
				registered <- r
			}
		})
	}()
	b.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			b.Error(err)
		}
		w.Close()
	})
	return registered
}

func borrow(e watch.Event) (*sockets.Conn, error) {
	groups, err := sockets.Find(sockets.Query{NetNS: e.NetNS, Proto: e.Proto, Port: e.Addr.Port(), PID: e.PID})
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		for _, m := range g.Members {
			if m.Cookie == e.Cookie {
				return m.Take()
			}
		}
	}
	return nil, sockets.ErrGone
}

// attach makes the only group of a namespace sticky.
func attach(b *testing.B, fs loader.FS, ns *testnet.NetNS) {
	attachWith(b, fs, ns, loader.Options{Settle: -1})
}

func attachWith(b *testing.B, fs loader.FS, ns *testnet.NetNS, o loader.Options) {
	b.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie()})
	must(b, err)
	conn, err := sockets.TakeMember(groups[0])
	must(b, err)
	defer conn.Close()
	group, err := fs.Attach(conn, o)
	must(b, err)
	group.Close()
}
