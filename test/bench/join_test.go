package bench

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
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
// bind a socket to its first new flow, in ms. All other listeners drain, so that
// the first new flow after the registration is the joiner's. A flow is tried
// every 100 us or so, on the same CPUs.
//
// The parts: until the event is there, the search and the borrowing, the
// registration, and the flow.
func BenchmarkBindToFirstFlow(b *testing.B) {
	for _, processes := range []int{100, 2000} {
		b.Run(fmt.Sprintf("processes=%d", processes), func(b *testing.B) {
			idle(b, processes)
			ns, fs := testnet.New(b), loader.FS(testnet.BPFFS(b))
			const addr = "127.0.0.1:1194"
			servers := testnet.StartGroup(b, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
			group := attach(b, fs, ns)
			must(b, group.Drain(0))
			registered := register(b, group)

			var parts [5][]time.Duration // the last is the sum
			for b.Loop() {
				start := time.Now()
				name := servers.Add()
				for testnet.NewClients(b, ns, 1, addr).Ask()[0] != name {
				}
				end := time.Now()
				r := <-registered
				must(b, r.err)
				for i, d := range []time.Duration{
					r.event.Sub(start), r.borrowed.Sub(r.event), r.done.Sub(r.borrowed), end.Sub(r.done), end.Sub(start),
				} {
					parts[i] = append(parts[i], d)
				}
				servers.Close(len(servers.Names) - 1)
			}
			b.ReportMetric(0, "ns/op") // with what comes between the joins
			for i, name := range []string{"event", "borrow", "register", "flow", "all"} {
				slices.Sort(parts[i])
				for _, p := range []int{50, 90, 99} {
					if name == "all" || p != 90 {
						at := parts[i][(len(parts[i])-1)*p/100]
						b.ReportMetric(float64(at.Microseconds())/1000, fmt.Sprintf("%s-p%d-ms", name, p))
					}
				}
			}
		})
	}
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
				return sockets.Take(m.Holders[0], m.Cookie)
			}
		}
	}
	return nil, sockets.ErrGone
}

// attach makes the only group of a namespace sticky.
func attach(b *testing.B, fs loader.FS, ns *testnet.NetNS) *loader.Group {
	b.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie()})
	must(b, err)
	m := groups[0].Members[0]
	conn, err := sockets.Take(m.Holders[0], m.Cookie)
	must(b, err)
	defer conn.Close()
	group, err := fs.Attach(conn, loader.Options{Settle: -1})
	must(b, err)
	b.Cleanup(func() { group.Close() })
	return group
}

// idle starts processes that do nothing until the benchmark ends. They are not
// this process's children, of which it would have a descriptor each.
func idle(b *testing.B, n int) {
	b.Helper()
	const script = `exec 3<&0; i=0; while [ $i -lt "$1" ]; do cat <&3 & i=$((i+1)); done; echo started; wait`
	cmd := exec.Command("sh", "-c", script, "sh", fmt.Sprint(n))
	stdin, err := cmd.StdinPipe()
	must(b, err)
	stdout, err := cmd.StdoutPipe()
	must(b, err)
	must(b, cmd.Start())
	b.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	if _, err := stdout.Read(make([]byte, 16)); err != nil {
		b.Fatal(err)
	}
}
