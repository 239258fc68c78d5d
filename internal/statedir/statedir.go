// Package statedir is where rpsel's state is: on a BPF file system, which it mounts if
// there is none, in the directory rpsel, with a directory for each network namespace and
// a lock on it. What the directories hold is others' business: package loader's, and
// internal/force's.
package statedir

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/rpsel/rpsel/internal/capability"
)

// Usual is where a bpffs usually is.
const Usual FS = "/sys/fs/bpf"

// FS is the mount point of a BPF file system. The empty string is Usual; where "ip netns
// exec" or the like hides that below a new /sys, it is reached by way of the root of an
// ancestor process.
type FS string

// Why there is no state. All are wrapped with what they are about and the way out.
var (
	// ErrNoBPFFS: there is no BPF file system and none could be mounted.
	ErrNoBPFFS = errors.New("no bpf file system")
	// ErrLocked: another rpsel command held a namespace's lock for too long.
	ErrLocked = errors.New("locked by another rpsel command")
	// ErrPermission: a capability is missing.
	ErrPermission = capability.ErrPermission
)

// Root is the directory with all that is rpsel's.
func (fs FS) Root() string { return filepath.Join(fs.Mount(), "rpsel") }

// NetNS is the directory of a network namespace, given by its cookie.
func (fs FS) NetNS(cookie uint64) string {
	return filepath.Join(fs.Root(), strconv.FormatUint(cookie, 10))
}

// Make makes a directory in the root, and before it the root, and mounts the bpffs if
// it is missing.
//
// Errors: ErrPermission, ErrNoBPFFS.
func (fs FS) Make(dir string) error {
	if err := fs.MakeMount(); err != nil {
		return err
	}
	dirs := []string{fs.Root(), dir}
	for i := 0; i < len(dirs); i++ {
		err := os.Mkdir(dirs[i], 0o700)
		switch {
		case err == nil, errors.Is(err, os.ErrExist):
		case errors.Is(err, os.ErrNotExist) && i > 0:
			i = -1 // the last to leave has removed the outer one meanwhile
		case errors.Is(err, os.ErrPermission):
			return fmt.Errorf("make %s: %w: run as root", dirs[i], ErrPermission)
		default:
			return fmt.Errorf("make %s: %w", dirs[i], err)
		}
	}
	return nil
}

// Remove removes a directory in the root if it holds nothing any more, and then the
// root if that does not either.
func (fs FS) Remove(dir string) {
	if os.Remove(dir) == nil {
		os.Remove(fs.Root())
	}
}

// NetNSes lists the network namespaces, by their cookies, that have a directory.
// Where there is no bpffs there are none.
func (fs FS) NetNSes() ([]uint64, error) {
	if !fs.mounted() {
		return nil, nil
	}
	entries, err := os.ReadDir(fs.Root())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, ReadError(err)
	}
	var cookies []uint64
	for _, e := range entries {
		if cookie, err := strconv.ParseUint(e.Name(), 10, 64); err == nil && e.IsDir() {
			cookies = append(cookies, cookie)
		}
	}
	slices.Sort(cookies)
	return cookies, nil
}

// ReadError says what it means that a directory could not be read.
func ReadError(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("read rpsel state: %w: run as root", ErrPermission)
	}
	return fmt.Errorf("read rpsel state: %w", err)
}
