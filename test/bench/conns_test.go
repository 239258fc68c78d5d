package bench

import (
	"context"
	"io"
	"math"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// BenchmarkCountConnections is what it costs to count the connections of a TCP
// group: the group's own, and those of a server that it knows nothing of. Each
// connection is opened, closed by the server and then by the client, in us, the
// least of many rounds in which all have their turn; and a run of the program that
// counts, in ns by the kernel's own statistics, whose clock counts too.
func BenchmarkCountConnections(b *testing.B) {
	const connections, group, unrelated = 500, "127.0.0.1:5000", "127.0.0.1:5001"
	testnet.Privileged(b)
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	must(b, err)
	defer stats.Close()
	ns, bpffs := testnet.New(b), testnet.BPFFS(b)
	fs := loader.FS(bpffs)
	serveAndClose(b, ns, group)
	serveAndClose(b, ns, unrelated)
	rounds := func(addr string) time.Duration {
		var took time.Duration
		must(b, ns.Do(func() error {
			start := time.Now()
			for range connections {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					return err
				}
				io.Copy(io.Discard, c)
				c.Close()
			}
			took = time.Since(start)
			return nil
		}))
		return took
	}
	least := map[string]float64{}
	keep := func(unit string, value float64) {
		if old, ok := least[unit]; !ok || value < old {
			least[unit] = value
		}
	}
	for b.Loop() {
		keep("us/unrelated-without", rounds(unrelated).Seconds()*1e6/connections)
		keep("us/group-without", rounds(group).Seconds()*1e6/connections)

		groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: 5000})
		must(b, err)
		conn, err := sockets.TakeMember(groups[0])
		must(b, err)
		g, err := fs.Attach(conn, loader.Options{Settle: -1})
		must(b, err)
		conn.Close()
		pins, err := filepath.Glob(filepath.Join(bpffs, "rpsel", "*", "*", "count"))
		must(b, err)
		program, err := ebpf.LoadPinnedProgram(pins[0], nil)
		must(b, err)
		for addr, name := range map[string]string{unrelated: "unrelated", group: "group"} {
			before, runs := spent(b, program)
			keep("us/"+name+"-with", rounds(addr).Seconds()*1e6/connections)
			after, ran := spent(b, program)
			keep("ns/run-"+name, float64(after-before)/math.Max(1, float64(ran-runs)))
			keep("runs/connection", math.Round(float64(ran-runs)/connections))
		}
		program.Close()
		g.Close()
		_, err = fs.Detach(groups[0].Key)
		must(b, err)
	}
	b.ReportMetric(0, "ns/op")
	for unit, value := range least {
		b.ReportMetric(value, unit)
	}
}

// serveAndClose accepts connections with SO_REUSEPORT, and closes each.
func serveAndClose(b *testing.B, ns *testnet.NetNS, addr string) {
	b.Helper()
	must(b, ns.Do(func() error {
		l, err := sockets.Listen(context.Background(), 1, "tcp4", addr)
		if err != nil {
			return err
		}
		b.Cleanup(func() { l[0].Close() })
		go func() {
			for {
				c, err := l[0].Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		return nil
	}))
}
