package testnet

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
)

// BPFFS mounts a BPF file system for this test alone and returns its
// directory. It is unmounted when the test ends, and the run directory of agents
// that kept it is removed.
func BPFFS(t testing.TB) string {
	t.Helper()
	Privileged(t)
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(os.NewSyscallError("mount bpf", err))
	}
	run, err := agent.Dir(dir)
	if err != nil {
		t.Error(err)
	}
	t.Cleanup(func() {
		os.RemoveAll(run)
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(os.NewSyscallError("unmount "+dir, err))
		}
	})
	return dir
}
