package testnet

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// Builds are the programs that tests build, by name: the arguments of go build.
var Builds = map[string][]string{
	"rpsel":        {"github.com/rpsel/rpsel/cmd/rpsel"},
	"rpsel-faults": {"-tags", "faults", "github.com/rpsel/rpsel/cmd/rpsel"},
	"force-server": {"github.com/rpsel/rpsel/internal/force/testdata/server"},
}

// EnvBuilt names a directory with Builds that are ready, for machines without a
// go command.
const EnvBuilt = "RPSEL_TEST_BUILT"

// BuildAt builds one of Builds, statically.
func BuildAt(path, name string) error {
	if dir, ok := os.LookupEnv(EnvBuilt); ok {
		program, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		return os.WriteFile(path, program, 0o755)
	}
	cmd := exec.Command("go", append([]string{"build", "-o", path}, Builds[name]...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", name, err, out)
	}
	return nil
}

var buildDir string // set by build, removed by Main

var build = sync.OnceValues(func() (path string, err error) {
	if buildDir, err = os.MkdirTemp("", "rpsel-build-"); err != nil {
		return "", err
	}
	path = filepath.Join(buildDir, "rpsel")
	return path, BuildAt(path, "rpsel")
})

// Build builds the command, once for all tests of a package whose TestMain is
// Main, and returns its path.
func Build(t testing.TB) string {
	t.Helper()
	path, err := build()
	must(t, err)
	return path
}
