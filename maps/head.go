package maps

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// Head is the part of the configuration that is at the same place in every
// layout: what has to be known of a group whose layout is not.
type Head struct {
	memory []byte
	fields *head
}

// head is how struct config begins.
type head struct {
	Table  uint64
	Abi    uint32
	Frozen uint32
}

// The beginning of struct config is for ever.
var (
	_ = [1]struct{}{}[unsafe.Offsetof(bpf.SelectConfig{}.Abi)-unsafe.Offsetof(head{}.Abi)]
	_ = [1]struct{}{}[unsafe.Offsetof(bpf.SelectConfig{}.Frozen)-unsafe.Offsetof(head{}.Frozen)]
)

// OpenHead maps the head of a configuration of any layout. The caller keeps the
// map and may close it.
func OpenHead(config *ebpf.Map) (*Head, error) {
	if config.ValueSize() < uint32(unsafe.Sizeof(head{})) {
		return nil, fmt.Errorf("map %v: %d bytes are no configuration", config, config.ValueSize())
	}
	memory, err := mapMemory(config)
	if err != nil {
		return nil, err
	}
	return &Head{memory, (*head)(unsafe.Pointer(&memory[0]))}, nil
}

// Close unmaps the head. It is idempotent.
func (h *Head) Close() error { return unmap(&h.memory) }

// Layout is the group's layout (RPSEL_ABI in the bpf/rpsel.h of the rpsel that
// made it).
func (h *Head) Layout() uint32 { return atomic.LoadUint32(&h.fields.Abi) }

// FreezeSeconds is how long a freeze lasts that nobody renews
// (RPSEL_FREEZE_SECONDS in bpf/rpsel.h).
const FreezeSeconds = 10

const frozen = 1 << 31 // FROZEN in bpf/rpsel.h

// Freeze keeps the program from writing to the flow table from this second on,
// for FreezeSeconds: it creates, refreshes and rehomes nothing. Runs that have
// begun before may still write.
func (h *Head) Freeze(now uint32) { atomic.StoreUint32(&h.fields.Frozen, frozen|now&secondMask) }

// Thaw ends a freeze.
func (h *Head) Thaw() { atomic.StoreUint32(&h.fields.Frozen, 0) }
