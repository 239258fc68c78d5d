package cgroup

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/sockets"
)

// Errors that callers may want to tell apart. All are wrapped with what they
// are about and the way out.
var (
	// ErrNoCgroup2: no cgroup2 file system is mounted.
	ErrNoCgroup2 = errors.New("cgroup2 is not mounted")
	// ErrOutside: cgroup2 is mounted, but the caller's cgroup is not below a
	// mount point: its cgroup namespace and the mount do not fit together.
	ErrOutside = errors.New("cgroup is not visible in any cgroup2 mount")
	// ErrBeside: a process that can be seen is in no cgroup of this namespace.
	ErrBeside = errors.New("it is outside of this cgroup namespace")
	// ErrReadOnly: cgroup2 is mounted read-only, as in most containers.
	ErrReadOnly = errors.New("cgroup2 is mounted read-only")
	// ErrNotCgroup2: a path is not a directory of a cgroup2 file system.
	ErrNotCgroup2 = errors.New("not a cgroup2 directory")
	// ErrOccupied: another tool's program on the cgroup, or above, leaves no
	// place for ours. The message names both.
	ErrOccupied = errors.New("another program is in the way")
	// ErrRemoved: the cgroup was removed, though sockets of it may be left.
	ErrRemoved = errors.New("the cgroup was removed")
	// ErrBusy: processes are left in the cgroup.
	ErrBusy = errors.New("cgroup is in use")
	// ErrPermission: a capability or file permission is missing.
	ErrPermission = sockets.ErrPermission
)

// fileError translates what the cgroup file system says to a change.
func fileError(doing, dir string, err error) error {
	switch {
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%s: %w: remount it (mount -o remount,rw), or give the container a writable cgroup mount", doing, ErrReadOnly)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w: run as root, or in a delegated cgroup (systemd-run --scope -p Delegate=yes)", doing, ErrPermission)
	case errors.Is(err, unix.EAGAIN):
		return fmt.Errorf("%s: the limit is reached: raise cgroup.max.descendants or cgroup.max.depth of %s or above", doing, dir)
	}
	return fmt.Errorf("%s: %w", doing, err)
}
