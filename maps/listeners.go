package maps

import (
	"errors"
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

// SetState changes the state, and with it whether the slot may be searched for
// when the pick table has no live listener.
func (l *Listeners) SetState(slot uint32, s SlotState) {
	atomic.StoreUint32(&l.slots.values[slot].State, uint32(s))
	live, bit := &l.live.values[slot/64], uint64(1)<<(slot%64)
	setBit(&live.Active, bit, s == SlotActive)
	setBit(&live.Draining, bit, s == SlotDraining)
}

// Bury takes a dead listener out of the search. Its state stays, to be told.
func (l *Listeners) Bury(slot uint32) {
	live, bit := &l.live.values[slot/64], uint64(1)<<(slot%64)
	setBit(&live.Active, bit, false)
	setBit(&live.Draining, bit, false)
}

func setBit(word *uint64, bit uint64, on bool) {
	if on {
		atomic.OrUint64(word, bit)
	} else {
		atomic.AndUint64(word, ^bit)
	}
}

// Records returns the records of all slots that have one, by slot.
func (l *Listeners) Records() (map[uint32]Listener, error) {
	records := make(map[uint32]Listener)
	var slot uint32
	var record Listener
	entries := l.records.Iterate()
	for entries.Next(&slot, &record) {
		records[slot] = record
	}
	return records, entries.Err()
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
