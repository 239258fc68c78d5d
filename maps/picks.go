package maps

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// The sizes of pick tables. A dead listener's entries are mended one by one at
// random, so that shares are the more even the more entries there are.
const (
	shareEntries = 128 // entries per listener, at least
	plentyTable  = 32768
	maxTable     = shareEntries * Slots
)

// TableSize returns the size of the table of a group that starts with n
// members: a multiple of n, so that entry k*n/size is the kernel's own pick.
func TableSize(n int) uint32 {
	n = max(n, 1)
	return uint32(max(shareEntries, plentyTable/n) * n)
}

// PickPairs returns how many elements the pick map of a group needs that
// starts with n members: two tables side by side, with room to grow.
func PickPairs(n int) uint32 {
	return min(max(2*plentyTable, 2*TableSize(n)), maxTable)
}

// Table is a pick table: who gets the new flows that fall on an entry.
type Table []uint16

// KernelTable is the table, of at most limit entries, by which a program picks
// exactly what the kernel would without it: order holds the slots of the
// group's members in the kernel's own order, NoSlot for one that has none.
func KernelTable(order []uint16, limit uint32) Table {
	size := TableSize(len(order))
	if size > limit {
		size = limit / uint32(len(order)) * uint32(len(order))
	}
	t := make(Table, size)
	for k := range t {
		t[k] = NoSlot
		if len(order) > 0 {
			t[k] = order[uint64(k)*uint64(len(order))/uint64(len(t))]
		}
	}
	return t
}

// Grow multiplies the table by whole numbers until there are shareEntries for
// each of n members, as far as it stays within limit. No pick changes: hash *
// 2M >> 32 falls on one of the two copies of hash * M >> 32.
func (t Table) Grow(n int, limit uint32) Table {
	for len(t) < n*shareEntries && uint32(2*len(t)) <= limit {
		double := make(Table, 2*len(t))
		for k := range double {
			double[k] = t[k/2]
		}
		t = double
	}
	return t
}

// Deal repairs the table, and changes no more of it than it must. Entries of
// slots that are not in weights go to those that have less than their share;
// the slots in level are brought to their share exactly, from or to the others.
// Weights count relative to each other; a slot of weight zero keeps what it
// has, and gets nothing.
func (t Table) Deal(weights map[uint16]uint32, level ...uint16) {
	hands, loose := t.hands(weights)
	if !slices.ContainsFunc(hands, func(h *hand) bool { return h.share > 0 }) {
		for _, k := range loose {
			t[k] = NoSlot
		}
		return
	}
	var leveled []*hand
	for _, slot := range level {
		if i, ok := slices.BinarySearchFunc(hands, slot, (*hand).compare); ok {
			leveled = append(leveled, hands[i])
		}
	}
	need := 0
	for _, h := range leveled {
		// More than its share: its weight was lowered.
		loose = h.cut(loose, h.has-h.share)
		need += h.share - h.has
	}
	loose = levy(loose, hands, need-len(loose))
	// Deal in turns, so that neighbours do not all get the same heir.
	deal := func(receivers []*hand) {
		for dealt := true; dealt; {
			dealt = false
			for _, h := range receivers {
				if len(loose) > 0 && h.has < h.share {
					t[loose[0]] = h.slot
					loose = loose[1:]
					h.has++
					dealt = true
				}
			}
		}
	}
	deal(leveled)
	deal(hands)
	// Slots without weight hold on to theirs, so that shares are too large to be
	// met: everybody may have more.
	for _, h := range hands {
		if h.share > 0 {
			h.share = len(t)
		}
	}
	deal(hands)
}

// hand is what a slot has of a table.
type hand struct {
	slot    uint16
	share   int     // how many entries it is due
	has     int     // how many it has
	entries []int32 // which it had at first
}

func (h *hand) compare(slot uint16) int { return cmp.Compare(h.slot, slot) }

// hands sorts the entries out: what each slot in weights has, by slot, and what
// is of no such slot.
func (t Table) hands(weights map[uint16]uint32) (hands []*hand, loose []int32) {
	share := t.Shares(weights)
	var of [Slots]*hand
	for _, slot := range slices.Sorted(maps.Keys(weights)) {
		of[slot] = &hand{slot: slot, share: share[slot]}
		hands = append(hands, of[slot])
	}
	for _, slot := range t {
		if slot < Slots && of[slot] != nil {
			of[slot].has++
		}
	}
	room := make([]int32, len(t))
	for _, h := range hands {
		h.entries, room = room[:0:h.has], room[h.has:]
	}
	loose = room[:0]
	for k, slot := range t {
		if slot < Slots && of[slot] != nil {
			of[slot].entries = append(of[slot].entries, int32(k))
		} else {
			loose = append(loose, int32(k))
		}
	}
	return hands, loose
}

// Shares returns how many entries each slot with a weight is due: whole
// numbers that add up to the table, the largest remainders rounded up. Slots
// that are due none are left out.
func (t Table) Shares(weights map[uint16]uint32) map[uint16]int {
	var total uint64
	for _, w := range weights {
		total += uint64(w)
	}
	share := make(map[uint16]int)
	if total == 0 {
		return share
	}
	type remainder struct {
		slot uint16
		rest uint64
	}
	var rests []remainder
	left := len(t)
	for slot, w := range weights {
		if w == 0 {
			continue
		}
		n := uint64(len(t)) * uint64(w)
		share[slot] = int(n / total)
		left -= share[slot]
		rests = append(rests, remainder{slot, n % total})
	}
	slices.SortFunc(rests, func(a, b remainder) int {
		return cmp.Or(cmp.Compare(b.rest, a.rest), cmp.Compare(a.slot, b.slot))
	})
	for i := range left {
		share[rests[i].slot]++
	}
	maps.DeleteFunc(share, func(_ uint16, n int) bool { return n == 0 })
	return share
}

// levy takes n entries from those that have more than their share, each giving
// in proportion to its surplus, and adds them to taken.
func levy(taken []int32, hands []*hand, n int) []int32 {
	total := 0
	for _, h := range hands {
		total += max(0, h.has-h.share)
	}
	end := len(taken) + max(0, min(n, total))
	n = end - len(taken)
	for _, h := range hands {
		if surplus := h.has - h.share; surplus > 0 {
			give := min(surplus, (surplus*n+total-1)/total)
			taken = h.cut(taken, min(give, end-len(taken)))
		}
	}
	return taken
}

// cut takes n entries, evenly spaced, from what a slot has, and adds them to
// taken. A hand is cut once.
func (h *hand) cut(taken []int32, n int) []int32 {
	if n <= 0 {
		return taken
	}
	for i, k := range h.entries {
		if (i+1)*n/len(h.entries) > i*n/len(h.entries) {
			taken = append(taken, k)
		}
	}
	h.has -= n
	return taken
}

// Picks is the pick map: room for two tables, of which the configuration names
// the one in force. A new table is written beside it and switched to by one
// store, so that the program never sees half of it.
//
// Only the holder of the namespace's lock writes; the program itself mends
// entries of dead listeners in place.
type Picks struct {
	pairs  mapped[bpf.SelectPickPair]
	config *Config
}

// OpenPicks maps the tables. It keeps config; the caller closes both.
func OpenPicks(m *ebpf.Map, config *Config) (*Picks, error) {
	pairs, err := mapArray[bpf.SelectPickPair](m)
	if err != nil {
		return nil, err
	}
	return &Picks{pairs, config}, nil
}

// Close unmaps the tables.
func (p *Picks) Close() error { return p.pairs.Close() }

// Limit is the size of the largest table that fits twice.
func (p *Picks) Limit() uint32 { return uint32(len(p.pairs.values)) }

func (p *Picks) entry(k uint32) *uint32 { return &p.pairs.values[k/2].Entries[k%2] }

// Load returns the table in force, as it is while the group waits and as it is
// after that.
//
// Errors: ErrDamaged.
func (p *Picks) Load() (waiting, after Table, err error) {
	table := atomic.LoadUint64(&p.config.Values().Table)
	first, size := uint32(table>>32), uint32(table)
	if size == 0 || uint64(first)+uint64(size) > 2*uint64(p.Limit()) {
		return nil, nil, fmt.Errorf("the pick table is said to be where there is none: %w", ErrDamaged)
	}
	waiting, after = make(Table, size), make(Table, size)
	for k := range size {
		e := atomic.LoadUint32(p.entry(first + k))
		waiting[k], after[k] = uint16(e), uint16(e>>16)
	}
	return waiting, after, nil
}

// Store puts a table of the same size in force, in both its aspects.
func (p *Picks) Store(waiting, after Table) error {
	size := uint32(len(after))
	if len(waiting) != len(after) || size == 0 || size > p.Limit() {
		return errors.New("pick table does not fit its map")
	}
	first := uint32(0)
	if inForce := atomic.LoadUint64(&p.config.Values().Table); uint32(inForce) != 0 && inForce>>32 == 0 {
		first = p.Limit()
	}
	for k := range size {
		atomic.StoreUint32(p.entry(first+k), uint32(after[k])<<16|uint32(waiting[k]))
	}
	atomic.StoreUint64(&p.config.Values().Table, uint64(first)<<32|uint64(size))
	return nil
}
