// Command packaging makes what is given to users: packages for Debian and Red Hat, the static
// binaries that are in them, a list of what those are made of, and checksums. The same
// sources, version, time and Go make the same bytes.
//
// It is a module of its own, so that rpsel does not depend on what it needs.
package main

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "packaging:", err)
		os.Exit(1)
	}
}

// release is what is made.
type release struct {
	source  string // the root of rpsel's module
	out     string
	version string    // as git describes it
	time    time.Time // of all files
}

func run() error {
	var r release
	var seconds int64
	var archs string
	flag.StringVar(&r.source, "source", "..", "the `directory` of rpsel's module")
	flag.StringVar(&r.out, "out", "dist", "the `directory` for all that; what an earlier run left there is removed")
	flag.StringVar(&r.version, "version", "", "the `version`, as git describe says it")
	flag.Int64Var(&seconds, "time", 0, "the time of all files, in `seconds` since 1970")
	flag.StringVar(&archs, "arch", "amd64,arm64", "the `architectures`; this machine's is one of them")
	flag.Parse()
	r.time = time.Unix(seconds, 0).UTC()
	list := strings.Split(archs, ",")
	if !slices.Contains(list, runtime.GOARCH) {
		return fmt.Errorf("-arch %s: manual and completion come from a binary that runs here: add %s", archs, runtime.GOARCH)
	}
	staged, err := os.MkdirTemp("", "rpsel-packaging-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(staged)
	if err := r.makeOut(); err != nil {
		return err
	}
	binaries := map[string]string{}
	for _, arch := range list {
		if binaries[arch], err = r.build(arch); err != nil {
			return err
		}
		if err := r.writeSBOM(binaries[arch], arch); err != nil {
			return err
		}
	}
	if err := r.stage(staged, binaries[runtime.GOARCH]); err != nil {
		return err
	}
	for _, arch := range list {
		for _, format := range []string{"deb", "rpm"} {
			if err := r.pack(format, arch, staged, binaries[arch]); err != nil {
				return fmt.Errorf("%s for %s: %w", format, arch, err)
			}
		}
	}
	return r.writeSums()
}

// makeOut makes the directory, without files of an earlier release.
func (r release) makeOut() error {
	for _, pattern := range []string{"rpsel_*", "rpsel-*", "SHA256SUMS"} {
		earlier, err := filepath.Glob(filepath.Join(r.out, pattern))
		if err != nil {
			return err
		}
		for _, path := range earlier {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	return os.MkdirAll(r.out, 0o755)
}

// path names a file of the release.
func (r release) path(arch, suffix string) string {
	return filepath.Join(r.out, fmt.Sprintf("rpsel_%s_linux_%s%s", packageVersion(r.version, r.time), arch, suffix))
}

// writeSums writes SHA256SUMS for sha256sum --check.
func (r release) writeSums() error {
	files, err := os.ReadDir(r.out)
	if err != nil {
		return err
	}
	var sums strings.Builder
	for _, f := range files {
		if !f.Type().IsRegular() {
			continue // somebody else's
		}
		sum := sha256.New()
		file, err := os.Open(filepath.Join(r.out, f.Name()))
		if err != nil {
			return err
		}
		_, err = io.Copy(sum, file)
		file.Close()
		if err != nil {
			return err
		}
		fmt.Fprintf(&sums, "%x  %s\n", sum.Sum(nil), f.Name())
	}
	return os.WriteFile(filepath.Join(r.out, "SHA256SUMS"), []byte(sums.String()), 0o644)
}
