package maps

import (
	"fmt"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// mapped is the memory of a BPF_F_MMAPABLE array of T.
type mapped[T any] struct {
	memory []byte
	values []T
}

// mapArray maps an array whose values are laid out as T, without a gap.
func mapArray[T any](m *ebpf.Map) (mapped[T], error) {
	var zero T
	if size := uint32(unsafe.Sizeof(zero)); m.ValueSize() != size || m.Flags()&unix.BPF_F_MMAPABLE == 0 {
		return mapped[T]{}, fmt.Errorf("map %v: values of %d bytes, want mmapable ones of %d", m, m.ValueSize(), size)
	}
	n := int(m.MaxEntries())
	page := unix.Getpagesize()
	size := (n*int(m.ValueSize()) + page - 1) / page * page
	memory, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return mapped[T]{}, fmt.Errorf("mmap %v: %w", m, err)
	}
	return mapped[T]{memory, unsafe.Slice((*T)(unsafe.Pointer(&memory[0])), n)}, nil
}

// Close unmaps the memory. It is idempotent.
func (m *mapped[T]) Close() error {
	if m.memory == nil {
		return nil
	}
	memory := m.memory
	m.memory, m.values = nil, nil
	return unix.Munmap(memory)
}
