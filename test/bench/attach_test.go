package bench

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// BenchmarkAttach is how long it takes to attach a group of running listeners, with
// the search for them among 2000 idle processes, in ms; and how much of that is
// processor time, which other work on the machine changes less.
func BenchmarkAttach(b *testing.B) {
	testnet.Privileged(b)
	testnet.Idle(b, 2000)
	counts := []int{100, 1000, 4096}
	if testing.Short() {
		counts = counts[:1]
	}
	for _, listeners := range counts {
		b.Run(fmt.Sprintf("listeners=%d", listeners), func(b *testing.B) {
			ns, fs := testnet.New(b), loader.FS(testnet.BPFFS(b))
			servers := testnet.StartGroup(b, ns, listeners, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
			var all, busy []time.Duration
			for b.Loop() {
				start, before := time.Now(), used(b)
				attach(b, fs, ns)
				all, busy = append(all, time.Since(start)), append(busy, used(b)-before)
				_, err := fs.Detach(loader.Key{NetNS: ns.Cookie(), Proto: sockets.UDP, Addr: servers.Addr})
				must(b, err)
			}
			b.ReportMetric(0, "ns/op")
			slices.Sort(all)
			b.ReportMetric(float64(all[0].Microseconds())/1000, "least-ms")
			b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, "median-ms")
			b.ReportMetric(float64(slices.Min(busy).Microseconds())/1000, "processor-ms")
		})
	}
}

// used is the processor time of this process.
func used(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
