package bench

import (
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/metrics"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// BenchmarkScrape is how long the agent takes to answer Prometheus, in ms, of a group
// with a million flows among a hundred listeners, and how much processor time that
// is; with 2000 idle processes, whose files are searched for sockets.
func BenchmarkScrape(b *testing.B) {
	testnet.Privileged(b)
	const flows, listeners = 1 << 20, 100
	for _, processes := range []int{0, 2000} {
		b.Run(fmt.Sprintf("processes=%d", processes), func(b *testing.B) {
			testnet.Idle(b, processes)
			ns, bpffs := testnet.New(b), testnet.BPFFS(b)
			testnet.StartGroup(b, ns, listeners, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
			attachWith(b, loader.FS(bpffs), ns, loader.Options{Settle: -1, Flows: flows})
			fill(b, bpffs, ns, flows)
			c := metrics.New("bench", metrics.Reader(loader.FS(bpffs)), nil)
			var all, busy []time.Duration
			for b.Loop() {
				start, before := time.Now(), used(b)
				must(b, metrics.WriteText(io.Discard, c))
				all, busy = append(all, time.Since(start)), append(busy, used(b)-before)
			}
			b.ReportMetric(0, "ns/op")
			slices.Sort(all)
			b.ReportMetric(float64(all[0].Microseconds())/1000, "least-ms")
			b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, "median-ms")
			b.ReportMetric(float64(slices.Min(busy).Microseconds())/1000, "processor-ms")
		})
	}
}
