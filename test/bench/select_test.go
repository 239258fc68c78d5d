package bench

import (
	"fmt"
	"strings"
	"testing"
)

// What packets cost the selection program, in ns by the kernel's own statistics,
// net of a program that is empty: of each kind the least and the median of rounds
// in which every group has its turn. An access is a load from anywhere in the flow
// table, of which the next one depends.
//
// Packets have sources at random out of all flows, so that those of a large table
// are in no cache.

func isAccess(name string) bool { return strings.HasPrefix(name, "access/") }

// BenchmarkFlowCount is for tables of a thousand to four million flows, and for
// the kernel's LRU_HASH in place of ours.
func BenchmarkFlowCount(b *testing.B) {
	f := newField(b)
	f.keepStatistics()
	empty, hashOnly := f.empty(), f.hashOnly(4)
	var ours []*sticky
	var theirs []*lru
	counts := []int{1000, 100_000, 1_000_000, 4_000_000}
	if testing.Short() {
		counts = counts[:3]
	}
	for _, flows := range counts {
		g := f.rpsel(4, "udp4", flows)
		ours = append(ours, g)
		theirs = append(theirs, f.lru(g))
	}
	rounds := 0
	for b.Loop() {
		rounds++
		f.took.add("empty", empty.hits())
		f.took.add("hash-only", hashOnly.hits())
		for i, g := range ours {
			name := func(what string) string { return fmt.Sprintf("%s/%d", what, g.flows) }
			f.took.add(name("access"), g.access())
			f.took.add(name("hit/rpsel"), g.hits())
			f.took.add(name("refresh/rpsel"), g.refresh())
			f.took.add(name("new/rpsel"), g.newFlow())
			f.took.add(name("rehome/rpsel"), g.rehome())
			f.took.add(name("hit-on-all-cpus/rpsel"), g.perPacketOnAll(g.some(steady, packets)))
			f.took.add(name("hit/lru"), theirs[i].hits())
			f.took.add(name("new/lru"), theirs[i].newFlow())
			f.took.add(name("hit-on-all-cpus/lru"), theirs[i].perPacketOnAll(theirs[i].some(steady, packets)))
		}
	}
	for i, g := range ours {
		g.measuredWhatItSays(rounds)
		b.ReportMetric(float64(g.bytes())/float64(room(g.flows)), fmt.Sprintf("memory/rpsel/%d/B", g.flows))
		b.ReportMetric(float64(memoryOf(b, theirs[i].maps.Flows))/float64(room(g.flows)), fmt.Sprintf("memory/lru/%d/B", g.flows))
	}
	f.took.report(b)
}

// BenchmarkListeners is for groups of two listeners to 4096.
func BenchmarkListeners(b *testing.B) {
	f := newField(b)
	f.keepStatistics()
	empty := f.empty()
	var groups []*sticky
	var hashOnly []*group
	for _, listeners := range []int{2, 16, 128, 1024, 4096} {
		groups, hashOnly = append(groups, f.rpsel(listeners, "udp4", 1000)), append(hashOnly, f.hashOnly(listeners))
	}
	for b.Loop() {
		f.took.add("empty", empty.hits())
		for i, g := range groups {
			f.took.add(fmt.Sprintf("hash-only/listeners/%d", len(g.conns)), hashOnly[i].hits())
			f.took.add(fmt.Sprintf("hit/listeners/%d", len(g.conns)), g.hits())
			f.took.add(fmt.Sprintf("new/listeners/%d", len(g.conns)), g.newFlow())
		}
	}
	f.took.report(b)
}

// BenchmarkFamilies is for IPv4 and IPv6.
func BenchmarkFamilies(b *testing.B) {
	f := newField(b)
	f.keepStatistics()
	empty, hashOnly := f.empty(), f.hashOnly(4)
	groups := map[string]*sticky{"ipv4": f.rpsel(4, "udp4", 1000), "ipv6": f.rpsel(4, "udp6", 1000)}
	for b.Loop() {
		f.took.add("empty", empty.hits())
		f.took.add("hash-only", hashOnly.hits())
		for name, g := range groups {
			f.took.add("hit/"+name, g.hits())
			f.took.add("new/"+name, g.newFlow())
			f.took.add("rehome/"+name, g.rehome())
		}
	}
	f.took.report(b)
}

// measuredWhatItSays compares the program's own counts with what the rounds are
// said to have measured: a "hit" that is a new flow would be another figure. The
// loopback may have lost some packets when the table was filled.
func (g *sticky) measuredWhatItSays(rounds int) {
	g.b.Helper()
	var hit, new, rehomed uint64
	now := g.status()
	for _, l := range now.Listeners {
		hit, new, rehomed = hit+l.Hit, new+l.New, rehomed+l.Rehomed
	}
	for _, l := range g.before.Listeners {
		hit, new, rehomed = hit-l.Hit, new-l.New, rehomed-l.Rehomed
	}
	few := min(packets, g.flows/kinds)
	for _, c := range []struct {
		name string
		got  uint64
		want int
	}{{"hits", hit, rounds * (3*packets + few)}, {"new flows", new, rounds * packets}, {"moves", rehomed, rounds * 2 * few}} {
		if got := float64(c.got) / float64(c.want); got < 0.98 || got > 1.02 {
			g.b.Fatalf("%d flows: %d %s, want %d: the figures are of something else", g.flows, c.got, c.name, c.want)
		}
	}
}
