package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// ErrInUse is returned for a socket that is in a socket array already, this one
// or another, or whose sk_user_data the kernel uses (reuseport_array_update_check
// in kernel/bpf/reuseport_array.c).
var ErrInUse = errors.New("socket is in use by another BPF map or a kernel tunnel")

// ErrUnfit is returned for a socket that cannot be in a socket array: not UDP or
// TCP, MPTCP, not bound or listening, or bound without SO_REUSEPORT.
var ErrUnfit = errors.New("socket cannot be put into a socket array")

// Sockets is the group's REUSEPORT_SOCKARRAY: who is in which slot.
type Sockets struct {
	m *ebpf.Map
}

// NewSockets wraps the array, which the caller closes.
func NewSockets(m *ebpf.Map) *Sockets { return &Sockets{m} }

// Cookie returns the cookie of the slot's socket, or zero if the slot is empty:
// the kernel empties it when the socket closes.
func (s *Sockets) Cookie(slot uint32) (uint64, error) {
	var cookie uint64
	err := s.m.Lookup(slot, &cookie)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look up slot %d: %w", slot, err)
	}
	return cookie, nil
}

// Count returns how many slots are not empty.
func (s *Sockets) Count() (n int, err error) {
	for slot := range uint32(Slots) {
		cookie, err := s.Cookie(slot)
		if err != nil {
			return 0, err
		}
		if cookie != 0 {
			n++
		}
	}
	return n, nil
}

// Insert puts a socket into an empty slot. It returns ErrInUse or ErrUnfit for
// sockets the kernel refuses, and ebpf.ErrKeyExist if the slot is not empty.
func (s *Sockets) Insert(slot uint32, fd int) error {
	err := s.m.Update(slot, uint64(fd), ebpf.UpdateNoExist)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("slot %d: %w", slot, ErrInUse)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.Errno(524)):
		return fmt.Errorf("slot %d: %w: %v", slot, ErrUnfit, err)
	default:
		return fmt.Errorf("slot %d: %w", slot, err)
	}
}

// Remove empties the slot, if it is not empty already.
func (s *Sockets) Remove(slot uint32) error {
	if err := s.m.Delete(slot); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("empty slot %d: %w", slot, err)
	}
	return nil
}
