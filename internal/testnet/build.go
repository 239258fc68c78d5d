package testnet

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

var buildDir string // set by build, removed by Main

var build = sync.OnceValues(func() (path string, err error) {
	if buildDir, err = os.MkdirTemp("", "rpsel-build-"); err != nil {
		return "", err
	}
	path = filepath.Join(buildDir, "rpsel")
	if out, err := exec.Command("go", "build", "-o", path, "github.com/rpsel/rpsel/cmd/rpsel").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build rpsel: %w\n%s", err, out)
	}
	return path, nil
})

// Build builds the command, once for all tests of a package whose TestMain is
// Main, and returns its path.
func Build(t testing.TB) string {
	t.Helper()
	path, err := build()
	must(t, err)
	return path
}
