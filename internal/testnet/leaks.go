package testnet

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/rpsel/rpsel/sockets"
)

// leavePatience is how long what tests started may take to end after them. The test of
// that is less patient.
var leavePatience = patience

// Checked is the tests of a package as Main runs them, for a TestMain that has
// to give them to somebody else.
type Checked struct{ *testing.M }

// Run runs the tests, removes what Build made, and returns the exit code. If all
// passed it fails, and says what it is, when a goroutine still runs or a
// descriptor is open that was not before.
func (c Checked) Run() int {
	before, err := descriptors()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// The collector closes what was forgotten, and hides it. So it rests, but for
	// want of memory.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(512 << 20)
	code := c.M.Run()
	if err := os.RemoveAll(buildDir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code != 0 {
		return code // a test that fails may leave anything
	}
	sockets.Unload()
	if err := leaks(before, leavePatience); err != nil {
		fmt.Fprintln(os.Stderr, "after all tests:", err)
		return 1
	}
	return 0
}

// leaks waits, for so long at most, until no goroutine runs but the caller's
// and no descriptor is open but those of before. The error has what stays.
func leaks(before map[int]string, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for { // goleak by itself waits for less than a second
		err := goleak.Find()
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return err
		}
	}
	for ; ; time.Sleep(time.Millisecond) {
		now, err := descriptors()
		if err != nil {
			return err
		}
		maps.DeleteFunc(now, func(fd int, what string) bool { return before[fd] == what })
		if len(now) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			var lines []string
			for _, fd := range slices.Sorted(maps.Keys(now)) {
				lines = append(lines, fmt.Sprintf("\n%d: %s", fd, now[fd]))
			}
			return fmt.Errorf("%d open descriptors:%s", len(lines), strings.Join(lines, ""))
		}
	}
}

// descriptors lists the open descriptors of this process, and says of each what
// it is, of maps, programs and links also which.
func descriptors() (map[int]string, error) {
	// The runtime opens an epoll descriptor with the first file that can be
	// polled, and keeps it.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	r.Close()
	w.Close()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	open := make(map[int]string)
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			return nil, err
		}
		what, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err != nil {
			continue // the directory itself, or closed meanwhile
		}
		if strings.HasPrefix(what, "anon_inode:bpf") {
			info, err := os.ReadFile(filepath.Join("/proc/self/fdinfo", e.Name()))
			if err != nil {
				continue
			}
			what += " " + strings.Join(strings.Fields(string(info)), " ")
		}
		open[fd] = what
	}
	return open, nil
}
