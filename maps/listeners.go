package maps

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// Slots is how many listeners a group may have.
const Slots = 4096

// NoSlot stands in a pick table where there is no listener.
const NoSlot = 0xffff

// SlotState is what a slot is for (enum slot_state in bpf/rpsel.h).
type SlotState uint32

// The states of a slot. That a listener is dead is not among them: its place
// in the socket array is empty.
const (
	SlotFree     SlotState = iota
	SlotJoining            // numbered, perhaps registered, without a share yet
	SlotActive             // gets its share of new flows
	SlotDraining           // keeps its flows, gets no new one
)

// Listener is what is kept of the listener in a slot.
type Listener = bpf.SelectListener

// Undealt in a listener's weight tells that the pick table may not have it yet
// (WEIGHT_UNDEALT in bpf/rpsel.h).
const Undealt = 1 << 31

// Listeners joins what the program reads of slots, and the records of who is
// in them. Only the holder of the namespace's lock changes it.
type Listeners struct {
	slots   mapped[bpf.SelectSlot]
	live    mapped[bpf.SelectLive]
	records *ebpf.Map
}

// OpenListeners maps slots and live. It keeps records, which the caller closes
// after the Listeners.
func OpenListeners(slots, live, records *ebpf.Map) (*Listeners, error) {
	s, err := mapArray[bpf.SelectSlot](slots)
	if err != nil {
		return nil, err
	}
	l, err := mapArray[bpf.SelectLive](live)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return &Listeners{s, l, records}, nil
}

// Close unmaps the memory.
func (l *Listeners) Close() error { return errors.Join(l.slots.Close(), l.live.Close()) }

// Incarnation returns the number of the slot's present listener.
func (l *Listeners) Incarnation(slot uint32) uint32 {
	return atomic.LoadUint32(&l.slots.values[slot].Incarnation)
}

// NextIncarnation makes all flows of the slot orphans: the listener that is
// registered next is another one.
func (l *Listeners) NextIncarnation(slot uint32) {
	atomic.AddUint32(&l.slots.values[slot].Incarnation, 1)
}

// State returns the state of the slot.
func (l *Listeners) State(slot uint32) SlotState {
	return SlotState(atomic.LoadUint32(&l.slots.values[slot].State))
}

// Rank is the order in which live listeners are searched when the pick table
// has none (enum rank in bpf/rpsel.h).
type Rank int

// The ranks. With policy newest a rank of the active is a generation, else all
// of them are of the first.
const (
	RankNext     Rank = iota // the generation that is about to take over
	RankFirst                // gets new flows
	RankSecond               // the generation before
	RankOlder                // all before that
	RankDraining             // only when nobody else lives
)

// SetState changes the state. A draining slot has RankDraining at once, an
// active one the rank it is given; any other is out of the search for live
// listeners.
func (l *Listeners) SetState(slot uint32, s SlotState) {
	atomic.StoreUint32(&l.slots.values[slot].State, uint32(s))
	switch s {
	case SlotActive:
	case SlotDraining:
		l.SetRank(slot, RankDraining)
	default:
		l.Bury(slot)
	}
}

// HasRank reports whether the slot is searched with those of the rank, and with
// no others.
func (l *Listeners) HasRank(slot uint32, r Rank) bool {
	bit := uint64(1) << (slot % 64)
	for other := range l.live.values[slot/64].Ranks {
		has := atomic.LoadUint64(&l.live.values[slot/64].Ranks[other])&bit != 0
		if has != (Rank(other) == r) {
			return false
		}
	}
	return true
}

// SetRank puts a slot into the search for live listeners, with others of its
// rank. The new bit is set before the old one goes.
func (l *Listeners) SetRank(slot uint32, r Rank) {
	ranks, bit := &l.live.values[slot/64].Ranks, uint64(1)<<(slot%64)
	atomic.OrUint64(&ranks[r], bit)
	for other := range ranks {
		if Rank(other) != r {
			atomic.AndUint64(&ranks[other], ^bit)
		}
	}
}

// Bury takes a listener out of the search. Its state stays, to be told.
func (l *Listeners) Bury(slot uint32) {
	ranks, bit := &l.live.values[slot/64].Ranks, uint64(1)<<(slot%64)
	for r := range ranks {
		atomic.AndUint64(&ranks[r], ^bit)
	}
}

// recordsAtOnce is how many records Records asks for. The kernel gives those of
// a hash bucket together, so it must be more than ever meet in one.
const recordsAtOnce = 64

// Records returns the records of all slots that have one, by slot.
//
// Errors: ErrDamaged.
func (l *Listeners) Records() (map[uint32]Listener, error) {
	records := make(map[uint32]Listener)
	slots, values := make([]uint32, recordsAtOnce), make([]Listener, recordsAtOnce)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := l.records.BatchLookup(&cursor, slots, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("read listeners: %w", err)
		}
		for i := range n {
			if slots[i] >= Slots {
				return nil, fmt.Errorf("a listener is said to be in slot %d: %w", slots[i], ErrDamaged)
			}
			records[slots[i]] = values[i]
		}
		if err != nil {
			return records, nil // these were the last
		}
	}
}

// Record stores the record of a slot.
func (l *Listeners) Record(slot uint32, record Listener) error {
	return l.records.Put(slot, record)
}

// Unrecord removes the record of a slot, if there is one.
func (l *Listeners) Unrecord(slot uint32) error {
	if err := l.records.Delete(slot); !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}
