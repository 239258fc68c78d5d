package testnet

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// envElsewhere says that machines of test/vm run what cannot run here.
const envElsewhere = "RPSEL_TEST_ELSEWHERE"

// Unavailable is why a test cannot run here. It is fatal to the test when the
// environment says CI=true, unless another machine runs it, and skips it
// elsewhere.
type Unavailable struct {
	What string // what is missing
	Err  error
}

func (u *Unavailable) Error() string { return u.What + ": " + u.Err.Error() }

func (u *Unavailable) Unwrap() error { return u.Err }

// Skip skips the test for a typed reason, or fails it when CI=true.
func (u *Unavailable) Skip(t testing.TB) {
	t.Helper()
	if !maySkip() {
		t.Fatal("in CI this must not be skipped: ", u)
	}
	t.Skip(u)
}

// SkipHere skips a test for which a machine may lack a module of the kernel's. CI
// runs it in the machines of test/vm too, which have them all: there it fails.
func (u *Unavailable) SkipHere(t testing.TB) {
	t.Helper()
	if os.Getenv(EnvBuilt) != "" {
		t.Fatal("a machine of test/vm lacks ", u)
	}
	t.Skip(u)
}

func maySkip() bool { return os.Getenv("CI") != "true" || os.Getenv(envElsewhere) != "" }

// Privileged skips the test if this process may not create network namespaces
// or load selection programs, and fails it when CI=true. It looks once per
// process; an error that is not about permission always fails the test.
func Privileged(t testing.TB) {
	t.Helper()
	err := privileged()
	if u, ok := errors.AsType[*Unavailable](err); ok {
		u.Skip(t)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Usable reports why this process may not create network namespaces or load
// selection programs: an *Unavailable, unless something else is wrong.
func Usable() error { return privileged() }

var privileged = sync.OnceValue(func() error {
	created := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		created <- unix.Unshare(unix.CLONE_NEWNET)
	}()
	if err := <-created; errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		return &Unavailable{"network namespaces", err}
	} else if err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.SkReuseport,
		AttachType:   ebpf.AttachSkReuseportSelectOrMigrate,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		License:      "Dual MIT/GPL",
	})
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) {
		return &Unavailable{"selection programs", err}
	} else if err != nil {
		return fmt.Errorf("load a program: %w", err)
	}
	return prog.Close()
})
