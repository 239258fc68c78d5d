package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/capability"
)

// ErrUnsupported: the kernel lacks a feature. The message names it.
var ErrUnsupported = errors.New("not supported by this kernel")

// notCompiled is ENOTSUPP, of the kernel's compiler for BPF.
const notCompiled = unix.Errno(524)

// Refused says what err means, with which programs could not be loaded: that one
// of the capabilities is missing (capability.ErrPermission) which all programs need
// or which these do, or that the kernel is too old (ErrUnsupported), or neither.
func Refused(programs string, err error, also ...capability.Capability) error {
	needs := append([]capability.Capability{capability.BPF, capability.Perfmon}, also...)
	switch {
	// Without CAP_BPF the library speaks of MEMLOCK. Without CAP_PERFMON the verifier does
	// not know some helpers, or refuses to let the program spill what it takes for pointers
	// (6.1), or meets a bug of its own (6.18): EINVAL, EACCES, EFAULT.
	case errors.Is(err, unix.EPERM), len(capability.Missing(needs...)) > 0:
		return capability.Denied("load "+programs, needs...)
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL), errors.Is(err, notCompiled):
		return fmt.Errorf("load %s: %w: Linux 5.14 or later is needed, on arm64 5.18: %w", programs, ErrUnsupported, err)
	}
	return fmt.Errorf("load %s: %w", programs, err)
}
