package testnet

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// BPFFS mounts a BPF file system for this test alone and returns its
// directory. It is unmounted when the test ends.
func BPFFS(t testing.TB) string {
	t.Helper()
	Privileged(t)
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(os.NewSyscallError("mount bpf", err))
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(os.NewSyscallError("unmount "+dir, err))
		}
	})
	return dir
}
