package maps

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

func equalWeights(slots ...uint16) map[uint16]uint32 {
	weights := map[uint16]uint32{}
	for _, s := range slots {
		weights[s] = 1
	}
	return weights
}

func upTo(n int) (slots []uint16) {
	for i := range n {
		slots = append(slots, uint16(i))
	}
	return slots
}

func counts(t Table) map[uint16]int {
	n := map[uint16]int{}
	for _, slot := range t {
		n[slot]++
	}
	return n
}

// changes lists, by former owner, how many entries have another owner now.
func changes(before, after Table) map[uint16]int {
	n := map[uint16]int{}
	for k := range before {
		if before[k] != after[k] {
			n[before[k]]++
		}
	}
	return n
}

func TestKernelTableIsReciprocalScale(t *testing.T) {
	for n := range 300 {
		if n == 0 {
			continue
		}
		table := KernelTable(upTo(n), maxTable)
		for range 2000 {
			hash := rand.Uint32()
			got := table[Scale(hash, uint32(len(table)))]
			if want := uint16(Scale(hash, uint32(n))); got != want {
				t.Fatalf("n %d: hash %#x is picked by slot %d, the kernel says %d", n, hash, got, want)
			}
		}
		for _, hash := range []uint32{0, 1, ^uint32(0), ^uint32(0) - 1} {
			if got, want := table[Scale(hash, uint32(len(table)))], uint16(Scale(hash, uint32(n))); got != want {
				t.Fatalf("n %d: hash %#x is picked by slot %d, the kernel says %d", n, hash, got, want)
			}
		}
	}
}

func TestGrowMovesNothing(t *testing.T) {
	small := KernelTable(upTo(3), maxTable)
	large := slices.Clone(small).Grow(100, 1<<16)
	if len(large) < 100*shareEntries {
		t.Fatalf("grew to %d entries", len(large))
	}
	for range 100000 {
		hash := rand.Uint32()
		if a, b := small[Scale(hash, uint32(len(small)))], large[Scale(hash, uint32(len(large)))]; a != b {
			t.Fatalf("hash %#x moved from %d to %d", hash, a, b)
		}
	}
	if len(small.Grow(1000, uint32(len(small)))) != len(small) {
		t.Error("grew beyond the limit")
	}
}

func TestDealLeave(t *testing.T) {
	for _, n := range []int{2, 3, 4, 8, 64, 1000} {
		for _, gone := range []int{0, n / 2, n - 1} {
			t.Run(fmt.Sprintf("%d of %d", gone, n), func(t *testing.T) {
				before := KernelTable(upTo(n), maxTable)
				after := slices.Clone(before)
				left := slices.Delete(upTo(n), gone, gone+1)
				after.Deal(equalWeights(left...))
				for owner, moved := range changes(before, after) {
					if owner != uint16(gone) {
						t.Errorf("%d entries of slot %d moved", moved, owner)
					}
				}
				share := float64(len(after)) / float64(n-1)
				for slot, c := range counts(after) {
					if float64(c) < share-1 || float64(c) > share+1 {
						t.Errorf("slot %d has %d entries of %.1f", slot, c, share)
					}
				}
			})
		}
	}
}

func TestDealJoin(t *testing.T) {
	for _, n := range []int{1, 2, 3, 8, 64} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			before := KernelTable(upTo(n), maxTable)
			after := slices.Clone(before)
			joiner := uint16(n)
			after.Deal(equalWeights(upTo(n+1)...), joiner)
			got := counts(after)
			share := float64(len(after)) / float64(n+1)
			for slot, c := range got {
				if float64(c) < share-1 || float64(c) > share+1 {
					t.Errorf("slot %d has %d entries of %.1f", slot, c, share)
				}
			}
			total := 0
			for _, moved := range changes(before, after) {
				total += moved
			}
			if total != got[joiner] {
				t.Errorf("%d entries changed to give the joiner %d", total, got[joiner])
			}
		})
	}
}

// Several that join at once have their share each, also in the place of others
// that died.
func TestDealJoinTogether(t *testing.T) {
	for _, c := range []struct{ before, dead, joiners int }{{1, 0, 3}, {8, 0, 2}, {8, 0, 16}, {8, 3, 2}, {8, 2, 5}, {8, 8, 4}} {
		t.Run(fmt.Sprintf("%d and %d for %d", c.before, c.joiners, c.dead), func(t *testing.T) {
			before := KernelTable(upTo(c.before), maxTable)
			after := slices.Clone(before)
			joiners := upTo(c.before + c.joiners)[c.before:]
			after.Deal(equalWeights(upTo(c.before + c.joiners)[c.dead:]...), joiners...)
			share := float64(len(after)) / float64(c.before-c.dead+c.joiners)
			for slot, n := range counts(after) {
				if float64(n) < share-1 || float64(n) > share+1 {
					t.Errorf("slot %d has %d entries of %.1f", slot, n, share)
				}
			}
			for k := range after {
				if before[k] != after[k] && int(before[k]) >= c.dead && int(after[k]) < c.before {
					t.Fatalf("an entry went from %d to %d, neither of which joined or died", before[k], after[k])
				}
			}
		})
	}
}

func TestDealKeepsWhatIsMended(t *testing.T) {
	// The program mends entries of dead listeners unevenly; a later leave must
	// not be taken as a reason to even that out at the cost of live entries.
	before := KernelTable(upTo(4), maxTable)
	for k, slot := range before {
		if slot == 3 {
			before[k] = 0
		}
	}
	after := slices.Clone(before)
	after.Deal(equalWeights(0, 1))
	for owner, moved := range changes(before, after) {
		if owner != 2 {
			t.Errorf("%d entries of slot %d moved", moved, owner)
		}
	}
}

func TestDealWeights(t *testing.T) {
	table := KernelTable(upTo(3), maxTable)
	table.Deal(map[uint16]uint32{0: 1, 1: 2, 2: 4}, 0, 1, 2)
	got := counts(table)
	for slot, weight := range []float64{1, 2, 4} {
		if want := float64(len(table)) * weight / 7; float64(got[uint16(slot)]) < want-1 || float64(got[uint16(slot)]) > want+1 {
			t.Errorf("slot %d has %d entries of %.1f", slot, got[uint16(slot)], want)
		}
	}
	before := slices.Clone(table)
	table.Deal(map[uint16]uint32{0: 1, 1: 2, 2: 1}, 2)
	for owner, moved := range changes(before, table) {
		if owner != 2 {
			t.Errorf("lowering slot 2 moved %d entries of slot %d", moved, owner)
		}
	}
}

func TestDealCorners(t *testing.T) {
	t.Run("nobody", func(t *testing.T) {
		table := KernelTable(upTo(2), maxTable)
		table.Deal(nil)
		if c := counts(table)[NoSlot]; c != len(table) {
			t.Errorf("%d of %d entries have no slot", c, len(table))
		}
		table.Deal(equalWeights(7))
		if c := counts(table)[7]; c != len(table) {
			t.Errorf("the first to come has %d of %d entries", c, len(table))
		}
	})
	t.Run("zero weight keeps", func(t *testing.T) {
		before := KernelTable(upTo(3), maxTable)
		after := slices.Clone(before)
		after.Deal(map[uint16]uint32{0: 0, 1: 1}) // 2 is dead, 0 drains
		got := counts(after)
		if got[0] != counts(before)[0] || got[2] != 0 || got[1]+got[0] != len(after) {
			t.Errorf("shares %v", got)
		}
	})
	t.Run("random", func(t *testing.T) {
		// Whatever happens, living slots own the whole table and only the
		// entries change that must.
		table := KernelTable(upTo(5), maxTable)
		alive := equalWeights(upTo(5)...)
		for step := range 500 {
			before := slices.Clone(table)
			slot := uint16(rand.IntN(12))
			if _, ok := alive[slot]; ok {
				delete(alive, slot)
				table.Deal(alive)
				for owner, moved := range changes(before, table) {
					if owner != slot && owner != NoSlot {
						t.Fatalf("step %d: %d left, %d entries of %d moved", step, slot, moved, owner)
					}
				}
			} else {
				alive[slot] = uint32(1 + rand.IntN(3))
				table.Deal(alive, slot)
				for k := range table {
					if before[k] != table[k] && table[k] != slot {
						t.Fatalf("step %d: %d joined, an entry went from %d to %d", step, slot, before[k], table[k])
					}
				}
			}
			for owner := range counts(table) {
				if _, ok := alive[owner]; !ok && len(alive) > 0 {
					t.Fatalf("step %d: slot %d is gone and has entries", step, owner)
				}
			}
		}
	})
}
