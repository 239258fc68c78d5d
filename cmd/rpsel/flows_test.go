package main

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// Flows are listed IPv4 before IPv6, by address, port and group.
func TestSortFlows(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var l flowList
	for range 10_000 {
		// Of few values each, so that the next one decides, too.
		few := func() uint64 { return random.Uint64N(4) << (8 * random.UintN(8)) }
		r := flowRow{low: 0xffff<<32 | few()>>32, port: uint16(few()), group: uint16(few())}
		if random.UintN(2) == 0 {
			r.high, r.low, r.is6 = few(), few(), true
		}
		l.rows = append(l.rows, r)
	}
	want := slices.Clone(l.rows)
	slices.SortFunc(want, func(a, b flowRow) int {
		if c := a.client().Compare(b.client()); c != 0 {
			return c
		}
		return int(a.group) - int(b.group)
	})
	l.sort()
	if !slices.Equal(l.rows, want) {
		t.Error("the rows are in another order")
	}
	empty := flowList{}
	empty.sort()
}
