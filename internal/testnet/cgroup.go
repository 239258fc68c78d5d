package testnet

import (
	"fmt"
	"os"
	"testing"
)

// Cgroup makes a cgroup below another, for servers that are started after it, and
// removes it with the test.
func Cgroup(t testing.TB, parent string) string {
	t.Helper()
	dir, err := os.MkdirTemp(parent, fmt.Sprintf("rpsel-test-%d-", os.Getpid()))
	must(t, err)
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
