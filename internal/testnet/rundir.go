package testnet

import (
	"os"
	"testing"
)

// RunDir makes an agent's run directory, which every user may pass through. It
// is removed when the test ends.
func RunDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rpsel-run-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	must(t, os.Chmod(dir, 0o755))
	return dir
}
