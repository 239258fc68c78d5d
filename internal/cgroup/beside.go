package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Everybody tells whether programs on a directory, which Root gave, run for all
// processes that can be seen. They do not where these are in other cgroup
// namespaces, as the containers of a pod are that shares its process namespace.
//
// Errors: ErrBeside, which names one that is outside.
func Everybody(root string) error {
	// The root of the hierarchy is the only one without it.
	if _, err := os.Stat(filepath.Join(root, "cgroup.events")); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	texts, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return err
	}
	for _, path := range texts {
		text, err := os.ReadFile(path)
		if err == nil && outside(string(text)) {
			return fmt.Errorf("process %s: %w: mount the machine's cgroup2 hierarchy, so that the kernel tells of its sockets",
				filepath.Base(filepath.Dir(path)), ErrBeside)
		}
	}
	return nil
}

// outside tells whether a process with this /proc/PID/cgroup is in no cgroup of
// the reader's namespace.
func outside(cgroups string) bool {
	for line := range strings.Lines(cgroups) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.HasPrefix(path, "/..")
		}
	}
	return false
}
