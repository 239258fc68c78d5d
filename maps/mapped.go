package maps

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// ErrDamaged: a map holds what neither this package nor the program writes, so somebody
// else did.
var ErrDamaged = errors.New("somebody else wrote to it: detach the group, and attach it again")

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
	memory, err := mapMemory(m)
	if err != nil {
		return mapped[T]{}, err
	}
	return mapped[T]{memory, unsafe.Slice((*T)(unsafe.Pointer(&memory[0])), m.MaxEntries())}, nil
}

// Close unmaps the memory. It is idempotent.
func (m *mapped[T]) Close() error {
	m.values = nil
	return unmap(&m.memory)
}

// mapMemory maps all of a BPF_F_MMAPABLE array.
func mapMemory(m *ebpf.Map) ([]byte, error) {
	page := unix.Getpagesize()
	size := (int(m.MaxEntries())*int(m.ValueSize()) + page - 1) / page * page
	memory, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap %v: %w", m, err)
	}
	return memory, nil
}

// unmap gives back what mapMemory returned, once.
func unmap(memory *[]byte) error {
	if *memory == nil {
		return nil
	}
	m := *memory
	*memory = nil
	return unix.Munmap(m)
}
