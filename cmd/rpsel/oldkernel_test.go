package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// On a kernel that is too old each command says so, by what is missing, with the
// exit code for that, and leaves nothing behind. It runs where "make vm" boots
// such a kernel.
func TestOldKernel(t *testing.T) {
	kernel, err := newKernel()
	if err != nil {
		t.Fatal(err)
	}
	if kernel.atLeast(5, 14) {
		t.Skipf("Linux %s is not too old", kernel.release)
	}
	server, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(server)
	if err := unix.SetsockoptInt(server, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(server, &unix.SockaddrInet4{Port: 1194, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "rpsel.toml")
	if err := os.WriteFile(config, []byte("[[service]]\nport = 1194\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check"},
		{"check", "--port", "1194"},
		{"attach", "--port", "1194"},
		{"attach", "--port", "1194", "--adopt"},
		{"run", "--port", "1194", "--", "cat", "/dev/null"},
		{"status", "--port", "1194"},
		{"agent", "--config", config},
	} {
		t.Run(strings.Join(args[:min(len(args), 4)], " "), func(t *testing.T) {
			code, _, talk := rpsel(args...)
			if code != exitUnsupported {
				t.Errorf("exit code %d, want %d", code, exitUnsupported)
			}
			if !strings.Contains(talk, "Linux 5.14") || strings.Count(talk, "\n") != 1 {
				t.Errorf("said %q, want one line that names Linux 5.14", talk)
			}
			t.Logf("%s", talk)
			if left, err := filepath.Glob("/sys/fs/bpf/*"); err != nil || len(left) > 0 {
				t.Errorf("left %v (%v)", left, err)
			}
		})
	}
}
