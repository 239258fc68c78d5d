package maps

import (
	"math/bits"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// What layout 1 was, as far as it differs from the present one. This file can
// go when no group of that layout is left.

// Config1 is struct config of layout 1.
type Config1 struct {
	Table               uint64
	Abi, Frozen         uint32
	Settled, Settling   uint32
	Idle, IdleNew       uint32
	Policy, Affinity    uint32
	Confirm, Capacity   uint32
	Attached, ClockMult uint32
}

// Live1 is struct live of layout 1.
type Live1 struct {
	Active, Draining uint64
}

// Listener1 is struct listener of layout 1.
type Listener1 struct {
	Cookie             uint64
	Base               SlotCounters
	Weight, Generation uint32
	Pid, Joined        uint32
	Died, Dead         uint32
	Command            [16]uint8
}

// ReadConfig1 reads a configuration of layout 1 as one of the present layout.
func ReadConfig1(m *ebpf.Map) (bpf.SelectConfig, error) {
	old, err := mapArray[Config1](m)
	if err != nil {
		return bpf.SelectConfig{}, err
	}
	defer old.Close()
	v := old.values[0]
	waiting := NotWaiting
	if v.Settling != 0 {
		waiting = Settling
	}
	return bpf.SelectConfig{
		Table: v.Table, Abi: ABI,
		Until: v.Settled, Waiting: uint32(waiting), Settled: v.Settled,
		Idle: v.Idle, IdleNew: v.IdleNew,
		Policy: v.Policy, Affinity: v.Affinity, Confirm: v.Confirm,
		Capacity: v.Capacity, Attached: v.Attached, ClockMult: v.ClockMult,
		Ruled: v.Attached, Generation: 1, Serving: 1, // there was but one
	}, nil
}

// Read1 takes over who is live and who is in which slot from the maps of layout
// 1, and returns how many are active. Their program may run meanwhile, but nobody
// else may change them.
func (l *Listeners) Read1(live, records *ebpf.Map) (active int, err error) {
	old, err := mapArray[Live1](live)
	if err != nil {
		return 0, err
	}
	defer old.Close()
	for i := range old.values {
		ranks := &l.live.values[i].Ranks
		ranks[RankFirst] = atomic.LoadUint64(&old.values[i].Active)
		active += bits.OnesCount64(ranks[RankFirst])
		ranks[RankDraining] = atomic.LoadUint64(&old.values[i].Draining)
	}
	var slot uint32
	var r Listener1
	entries := records.Iterate()
	for entries.Next(&slot, &r) {
		err := l.Record(slot, Listener{
			Cookie: r.Cookie, Base: r.Base, Weight: r.Weight, Generation: r.Generation,
			Pid: r.Pid, Joined: r.Joined, Died: r.Died, Dead: r.Dead, Command: r.Command,
		})
		if err != nil {
			return 0, err
		}
	}
	return active, entries.Err()
}
