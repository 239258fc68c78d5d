package bench

import (
	"errors"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkEndToEnd is how many requests and replies over the loopback per second
// of processor time a group serves with rpsel, compared with what it serves by the
// kernel's own hash. One thread does all of it: it asks from as many sockets as
// there are flows, answers as each listener, and reads the answers.
func BenchmarkEndToEnd(b *testing.B) {
	const flows, passes = 500, 4
	f := newField(b)
	plain, ours := f.listen(4, "udp4"), f.rpsel(4, "udp4", 1000).group
	clients := make([]int, flows)
	must(b, f.ns.Do(func() (err error) {
		for i := range clients {
			if clients[i], err = client(i); err != nil {
				return err
			}
		}
		return nil
	}))
	b.Cleanup(func() {
		for _, fd := range clients {
			unix.Close(fd)
		}
	})
	for _, g := range []*group{plain, ours} {
		for _, c := range g.conns {
			must(b, c.SetReadBuffer(1<<20))
		}
		for g.serve() > 0 { // what the table was filled with
		}
	}

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	packet := make([]byte, 64)
	rate := func(g *group) float64 {
		to := &unix.SockaddrInet4{Addr: g.target.Addr().As4(), Port: int(g.target.Port())}
		answered := 0
		begin := processorTime(b)
		for range passes {
			for _, fd := range clients {
				must(b, unix.Sendto(fd, packet, 0, to))
			}
			for served := 0; served < flows; {
				n := g.serve()
				if n == 0 {
					b.Fatalf("%d of %d requests arrived", served, flows)
				}
				served += n
			}
			for _, fd := range clients {
				if _, _, err := unix.Recvfrom(fd, packet, unix.MSG_DONTWAIT); err != nil {
					b.Fatal("an answer is missing: ", err)
				}
				answered++
			}
		}
		return float64(answered) / (processorTime(b) - begin).Seconds()
	}
	// The two take turns within a round, each first as often as the other.
	var with, without, ratios []float64
	for round := 0; b.Loop(); round++ {
		var p, o float64
		if round%2 == 0 {
			p, o = rate(plain), rate(ours)
		} else {
			o, p = rate(ours), rate(plain)
		}
		without, with, ratios = append(without, p), append(with, o), append(ratios, o/p)
	}
	slices.Sort(ratios)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(slices.Max(without), "plain/best-per-s")
	b.ReportMetric(slices.Max(with), "rpsel/best-per-s")
	b.ReportMetric(slices.Max(with)/slices.Max(without), "rpsel/plain/best-ratio")
	b.ReportMetric(ratios[len(ratios)/2], "rpsel/plain/median-ratio")
}

// serve answers what has arrived at the group's sockets, and returns how much.
func (g *group) serve() (n int) {
	g.b.Helper()
	packet := make([]byte, 64)
	for _, c := range g.conns {
		raw, err := c.SyscallConn()
		must(g.b, err)
		must(g.b, raw.Control(func(fd uintptr) {
			for {
				size, from, err := unix.Recvfrom(int(fd), packet, unix.MSG_DONTWAIT)
				if errors.Is(err, unix.EAGAIN) {
					return
				}
				must(g.b, err)
				n++
				unix.Sendto(int(fd), packet[:size], unix.MSG_DONTWAIT, from) // a spoofed source may be nowhere
			}
		}))
	}
	return n
}
