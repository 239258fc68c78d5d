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
	word  uint64
	begun uint32
	quiet bool
}

// Count reads it.
func (c *Conns) Count(slot uint32) Count {
	v := &c.values[slot]
	ended := atomic.LoadUint32(&v.Ended)
	n := Count{begun: atomic.LoadUint32(&v.Begun)}
	n.word, n.quiet = atomic.LoadUint64(&v.Word), n.begun == ended
	return n
}

// Correct sets a count right that the sockets contradict: those of this owner are
// n. It is left as it is if it has changed since it was was, or was about to.
func (c *Conns) Correct(was Count, owner uint64, n int) {
	slot := OwnerSlot(owner)
	right := uint64(n)<<connsOpenShift | uint64(uint32(owner))
	if now := c.Count(slot); now == was && now.quiet && now.word != right && uint32(now.word) == uint32(owner) {
		atomic.CompareAndSwapUint64(&c.values[slot].Word, now.word, right)
	}
}
