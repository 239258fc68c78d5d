package maps

import (
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// SlotCounters counts the runs of the program that selected a slot, by outcome.
type SlotCounters = bpf.SelectSlotCounters

// GroupCounters counts what is not of a slot.
type GroupCounters = bpf.SelectCounters

// Counters sums the per-CPU counters. It only reads.
type Counters struct {
	slots, group *ebpf.Map
}

// NewCounters wraps the maps, which the caller closes.
func NewCounters(slots, group *ebpf.Map) *Counters { return &Counters{slots, group} }

// Slot returns the counts of a slot, over all its listeners.
func (c *Counters) Slot(slot uint32) (SlotCounters, error) {
	var perCPU []SlotCounters
	if err := c.slots.Lookup(slot, &perCPU); err != nil {
		return SlotCounters{}, fmt.Errorf("read counters of slot %d: %w", slot, err)
	}
	var sum SlotCounters
	for _, n := range perCPU {
		sum.Hit += n.Hit
		sum.Bytes += n.Bytes
		sum.New += n.New
		sum.Rehomed += n.Rehomed
		sum.Untracked += n.Untracked
		sum.Migrated += n.Migrated
	}
	return sum, nil
}

// Group returns the counts of the group.
func (c *Counters) Group() (GroupCounters, error) {
	var perCPU []GroupCounters
	if err := c.group.Lookup(uint32(0), &perCPU); err != nil {
		return GroupCounters{}, fmt.Errorf("read counters: %w", err)
	}
	var sum GroupCounters
	for _, n := range perCPU {
		sum.Fallback += n.Fallback
		sum.ParseError += n.ParseError
		sum.TableFull += n.TableFull
		sum.Evicted += n.Evicted
	}
	return sum, nil
}
