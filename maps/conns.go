package maps

import (
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// Conns is how many connections each TCP listener has open (struct conns in
// bpf/rpsel.h). The programs of bpf/conns.c keep it up.
type Conns struct {
	mapped[bpf.SelectConns]
}

// OpenConns maps the counts. The caller keeps the map and may close it.
func OpenConns(m *ebpf.Map) (*Conns, error) {
	memory, err := mapArray[bpf.SelectConns](m)
	if err != nil {
		return nil, err
	}
	return &Conns{memory}, nil
}

const connsOpenShift = 32

// Owner names a listener in the storage of its sockets (OWNER_SLOT_SHIFT).
func Owner(slot, incarnation uint32) uint64 { return uint64(slot)<<32 | uint64(incarnation) }

// OwnerSlot is the slot of an Owner.
func OwnerSlot(owner uint64) uint32 { return uint32(owner >> 32) }

// Begin makes a slot count the connections of another listener, from none on.
func (c *Conns) Begin(slot, incarnation uint32) {
	atomic.StoreUint64(&c.values[slot].Word, uint64(incarnation))
}

// Open returns how many connections the listener in a slot has open. While several
// CPUs are at it, it may be below zero for a moment.
func (c *Conns) Open(slot uint32) int {
	return int(int32(atomic.LoadUint64(&c.values[slot].Word) >> connsOpenShift))
}

// Count is what a slot's count was at one time.
type Count struct {
	word         uint64
	begun, ended uint32
}

// Count reads it.
func (c *Conns) Count(slot uint32) Count {
	v := &c.values[slot]
	ended := atomic.LoadUint32(&v.Ended)
	return Count{word: atomic.LoadUint64(&v.Word), begun: atomic.LoadUint32(&v.Begun), ended: ended}
}

// Correct sets a count right that the sockets contradict: those of this owner are
// n. As much as the changes since it was was may account for, and those that were
// about to be made, it may be wrong afterwards; without any it is right.
func (c *Conns) Correct(was Count, owner uint64, n int) {
	slot := OwnerSlot(owner)
	for range correctTries {
		now := c.Count(slot)
		wrong := int32(n) - int32(now.word>>connsOpenShift)
		changes := int32(c.Count(slot).begun - was.ended)
		if uint32(now.word) != uint32(owner) || uint32(was.word) != uint32(owner) || max(wrong, -wrong) <= changes {
			return
		}
		right := now.word + uint64(wrong)<<connsOpenShift
		if atomic.CompareAndSwapUint64(&c.values[slot].Word, now.word, right) {
			return
		}
	}
}

// correctTries bounds how often Correct loses to programs that count.
const correctTries = 8
