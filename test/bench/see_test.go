package bench

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
)

// BenchmarkFlows is how long the command takes to list and to count a million
// flows, in ms, with the start of the process; the least of the rounds, too, and how
// much processor time that was.
func BenchmarkFlows(b *testing.B) {
	const flows = 1 << 20
	ns, bpffs := testnet.New(b), testnet.BPFFS(b)
	servers := testnet.StartGroup(b, ns, 8, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
	fs := loader.FS(bpffs)
	attachWith(b, fs, ns, loader.Options{Settle: -1, Flows: flows})
	group, err := fs.Open(loader.Key{NetNS: ns.Cookie(), Proto: loader.UDP, Addr: servers.Addr})
	must(b, err)
	defer group.Close()
	fill(b, bpffs, ns, flows)
	built := filepath.Join(b.TempDir(), "rpsel")
	out, err := exec.Command("go", "build", "-o", built, "../../cmd/rpsel").CombinedOutput()
	if err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	for _, c := range []struct {
		name string
		args []string
	}{
		{"list", []string{"-j"}},
		{"table", nil},
		{"slot", []string{"--slot", "3", "-j"}},
		{"client", []string{"--client", "10.0.0.0/24", "-j"}},
		{"count", []string{"--count"}},
		{"count-established", []string{"--state", "established", "--count"}},
		{"count-slot", []string{"--slot", "3", "--count"}},
	} {
		b.Run(c.name, func(b *testing.B) {
			least, busy := time.Hour, time.Hour
			for b.Loop() {
				start := time.Now()
				cmd := exec.Command(built, append([]string{"flows", "--port", "1194", "--bpffs", bpffs}, c.args...)...)
				cmd.Stdout, cmd.Stderr = io.Discard, io.Discard
				must(b, ns.Start(cmd))
				must(b, cmd.Wait())
				least = min(least, time.Since(start))
				busy = min(busy, cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime())
			}
			b.ReportMetric(float64(least.Microseconds())/1000, "least-ms")
			b.ReportMetric(float64(busy.Microseconds())/1000, "processor-ms")
			b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// fill writes flows into the pinned table.
func fill(b *testing.B, bpffs string, ns *testnet.NetNS, n int) {
	b.Helper()
	dirs, err := filepath.Glob(filepath.Join(bpffs, "rpsel", strconv.FormatUint(ns.Cookie(), 10), "udp_*"))
	if err != nil || len(dirs) != 1 {
		b.Fatal(dirs, err)
	}
	open := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dirs[0], name), nil)
		must(b, err)
		b.Cleanup(func() { m.Close() })
		return m
	}
	clock, err := ebpf.LoadPinnedProgram(filepath.Join(dirs[0], "clock"), nil)
	must(b, err)
	defer clock.Close()
	now, _, err := clock.Test(make([]byte, 64))
	must(b, err)
	entries := open(bpf.SelectMapFlows)
	memory, err := entries.Memory()
	must(b, err)
	details, err := open(bpf.SelectMapDetails).Memory()
	must(b, err)
	for i := range n {
		at := i + i/2 // two of three entries are taken
		word := maps.MakeWord(uint32(i%8), 1, maps.Established, now, uint32(i))
		entry := binary.NativeEndian.AppendUint64(nil, maps.Identity(uint32(i), uint16(i)))
		_, err := memory.WriteAt(binary.NativeEndian.AppendUint64(entry, uint64(word)), int64(16*at))
		must(b, err)
		client := binary.BigEndian.AppendUint64(nil, 0)
		client = binary.BigEndian.AppendUint64(client, 0xffff_0a000000+uint64(i*7919%flowsMask))
		row := binary.NativeEndian.AppendUint64(client, uint64(i&0xffff)<<48|uint64(now)<<24|uint64(now))
		_, err = details.WriteAt(row, int64(24*at))
		must(b, err)
	}
}

// flowsMask keeps addresses within 10.0.0.0/8.
const flowsMask = 1 << 24

// BenchmarkReader is what a hit and a new flow cost, by the kernel's run
// statistics, in ns, without and with somebody who reads the group's events: the
// least of rounds that take turns.
func BenchmarkReader(b *testing.B) {
	const flows = 2000
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	must(b, err)
	defer stats.Close()
	ns, fs := testnet.New(b), loader.FS(testnet.BPFFS(b))
	servers := testnet.StartGroup(b, ns, 4, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
	attachWith(b, fs, ns, loader.Options{Settle: -1})
	group, err := fs.Open(loader.Key{NetNS: ns.Cookie(), Proto: loader.UDP, Addr: servers.Addr})
	must(b, err)
	defer group.Close()
	program, err := ebpf.LoadPinnedProgram(programPin(b, fs, ns), nil)
	must(b, err)
	defer program.Close()
	clients := testnet.NewClients(b, ns, flows, addr)
	ask := func() float64 {
		before, err := program.Stats()
		must(b, err)
		clients.Ask()
		after, err := program.Stats()
		must(b, err)
		return float64((after.Runtime - before.Runtime).Nanoseconds()) / float64(after.RunCount-before.RunCount)
	}
	least := map[string]float64{}
	for b.Loop() {
		for _, who := range []string{"alone", "read"} {
			end := func() {}
			if who == "read" {
				end = read(b, group)
			}
			_, err := group.Flush(nil)
			must(b, err)
			for _, what := range []string{"new", "hit"} {
				name, ns := fmt.Sprintf("ns/%s-%s", what, who), ask()
				if old, ok := least[name]; !ok || ns < old {
					least[name] = ns
				}
			}
			end()
		}
	}
	for name, ns := range least {
		b.ReportMetric(ns, name)
	}
}

// read reads a group's events until the returned function is called.
func read(b *testing.B, g *loader.Group) (end func()) {
	ctx, stop := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- g.Watch(ctx, func() { close(ready) }, func([]loader.Event) error { return nil })
	}()
	select {
	case <-ready:
	case <-time.After(time.Minute):
		b.Fatal("nobody reads")
	}
	return func() {
		stop()
		must(b, <-done)
	}
}

func programPin(b *testing.B, fs loader.FS, ns *testnet.NetNS) string {
	b.Helper()
	pins, err := filepath.Glob(filepath.Join(string(fs), "rpsel", strconv.FormatUint(ns.Cookie(), 10), "udp_*", "prog"))
	if err != nil || len(pins) != 1 {
		b.Fatal(pins, err)
	}
	return pins[0]
}
