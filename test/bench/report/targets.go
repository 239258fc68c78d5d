package main

import (
	"fmt"
	"strings"
)

// target is what design and docs promise to measure.
type target struct {
	what, aim string
	measured  func(get func(benchmark, metric string) float64) (said string, met bool)
}

const flowCount = "FlowCount"

var all = []target{
	{"hit, 1 thousand flows", "2.5x hash-only", func(get func(string, string) float64) (string, bool) {
		hit, hash := get(flowCount, "hit/rpsel/1000/ns"), get(flowCount, "hash-only/ns")
		return fmt.Sprintf("%.0f ns, %.1fx", hit, hit/hash), hit <= 2.5*hash
	}},
	hitOfMillions(1),
	{"the same on LRU_HASH, 1 million flows", "3x of ours", func(get func(string, string) float64) (string, bool) {
		hit, lru := get(flowCount, "hit/rpsel/1000000/ns"), get(flowCount, "hit/lru/1000000/ns")
		return fmt.Sprintf("%.0f ns, %.1fx", lru, lru/hit), lru >= 3*hit
	}},
	{"new flow, 1 thousand flows", "5x hash-only", func(get func(string, string) float64) (string, bool) {
		fresh, hash := get(flowCount, "new/rpsel/1000/ns"), get(flowCount, "hash-only/ns")
		return fmt.Sprintf("%.0f ns, %.1fx", fresh, fresh/hash), fresh <= 5*hash
	}},
	{"new flow, 1 million flows", "that and 4 accesses", func(get func(string, string) float64) (string, bool) {
		fresh, most := get(flowCount, "new/rpsel/1000000/ns"), 5*get(flowCount, "hash-only/ns")+4*get(flowCount, "access/1000000/ns")
		return fmt.Sprintf("%.0f ns of %.0f", fresh, most), fresh <= most
	}},
	hitOfMillions(4),
	{"hit, 4096 listeners instead of 2", "what hash-only takes more, and 2 accesses of 100 thousand flows", func(get func(string, string) float64) (string, bool) {
		more := func(what string) float64 {
			return get("Listeners", what+"/listeners/4096/ns") - get("Listeners", what+"/listeners/2/ns")
		}
		most := more("hash-only") + 2*get(flowCount, "access/100000/ns")
		return fmt.Sprintf("%.0f ns of %.0f more", more("hit"), most), more("hit") <= most
	}},
	{"requests and replies per second, of plain reuseport", "0.97", func(get func(string, string) float64) (string, bool) {
		ratio := get("EndToEnd", "rpsel/plain/median-ratio")
		return fmt.Sprintf("%.3f", ratio), ratio >= 0.97
	}},
	{"memory per flow of capacity", "64 bytes", func(get func(string, string) float64) (string, bool) {
		// Of a million; the rest of a group is 1.1 MiB on two CPUs, whatever its size.
		bytes := get(flowCount, "memory/rpsel/1000000/B")
		return fmt.Sprintf("%.1f bytes", bytes), bytes <= 64
	}},
	{"attach 100 listeners among 2000 processes", "100 ms", func(get func(string, string) float64) (string, bool) {
		took, busy := get("Attach/listeners=100", "least-ms"), get("Attach/listeners=100", "processor-ms")
		return fmt.Sprintf("%.0f ms; processor time %.0f", took, busy), took < 100
	}},
	{"agent at rest, 4 groups of 8 listeners", "0.5 % of a core, 40 MiB", func(get func(string, string) float64) (string, bool) {
		core, memory := get("AgentAtRest", "%core"), get("AgentAtRest", "MiB-VmRSS")
		return fmt.Sprintf("%.2f %%, %.0f MiB", core, memory), core <= 0.5 && memory <= 40
	}},
	{"bind() to the first flow, agent running", "10 ms, 99 %", func(get func(string, string) float64) (string, bool) {
		took := get("BindToFirstFlow/processes=2000/agent", "all-p99-ms")
		return fmt.Sprintf("%.1f ms (median %.1f)", took, get("BindToFirstFlow/processes=2000/agent", "all-p50-ms")), took < 10
	}},
	{"list 1 million flows", "1 s", func(get func(string, string) float64) (string, bool) {
		took, busy := get("Flows/list", "least-ms"), get("Flows/list", "processor-ms")
		return fmt.Sprintf("%.0f ms; processor time %.0f", took, busy), took < 1000
	}},
	{"count 1 million flows", "50 ms", func(get func(string, string) float64) (string, bool) {
		took, busy := get("Flows/count", "least-ms"), get("Flows/count", "processor-ms")
		return fmt.Sprintf("%.0f ms; processor time %.0f", took, busy), took < 50
	}},
}

func hitOfMillions(n int) target {
	return target{fmt.Sprintf("hit, %d million flows", n), "that of 1 thousand and 2 accesses", func(get func(string, string) float64) (string, bool) {
		hit := get(flowCount, fmt.Sprintf("hit/rpsel/%d000000/ns", n))
		most := get(flowCount, "hit/rpsel/1000/ns") + 2*get(flowCount, fmt.Sprintf("access/%d000000/ns", n))
		return fmt.Sprintf("%.0f ns of %.0f", hit, most), hit <= most
	}}
}

// targets is a table of them in Markdown. What was not measured is left open.
func (r *results) targets() string {
	var text strings.Builder
	text.WriteString("| what | at most, or at least | measured | met |\n|---|---|---|---|\n")
	for _, t := range all {
		known := true
		said, met := t.measured(func(name, metric string) float64 {
			value, ok := r.of(name, metric)
			known = known && ok
			return value
		})
		verdict := map[bool]string{true: "yes", false: "no"}[met]
		if !known {
			said, verdict = "-", "not measured"
		}
		fmt.Fprintf(&text, "| %s | %s | %s | %s |\n", t.what, t.aim, said, verdict)
	}
	return text.String()
}
