package maps

import (
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// Loads is how many flows each listener has, which the program keeps up with
// PolicyLeast alone.
type Loads struct {
	mapped[bpf.SelectLoad]
}

// OpenLoads maps the counts. The caller keeps the map and may close it.
func OpenLoads(m *ebpf.Map) (*Loads, error) {
	memory, err := mapArray[bpf.SelectLoad](m)
	if err != nil {
		return nil, err
	}
	return &Loads{memory}, nil
}

// Set makes n the number of flows of the listener in a slot.
func (l *Loads) Set(slot, n uint32) { atomic.StoreUint32(&l.values[slot].Flows, n) }

// Get returns the number of flows of the listener in a slot. While several CPUs
// are at it, it may be below zero for a moment.
func (l *Loads) Get(slot uint32) int { return int(int32(atomic.LoadUint32(&l.values[slot].Flows))) }
