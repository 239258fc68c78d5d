package loader

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/sockets"
)

// lockPatience is how long a command waits for another one. Tests are less
// patient.
var lockPatience = 10 * time.Second

// lock takes the lock of a network namespace, for as long as one change takes.
type lock struct {
	dir *os.File
}

// lock waits for at most lockPatience. The directory must exist.
func (fs FS) lock(netns uint64) (*lock, error) { return fs.lockWithin(netns, lockPatience) }

func (fs FS) lockWithin(netns uint64, patience time.Duration) (*lock, error) {
	if err := fs.writable(); err != nil {
		return nil, err
	}
	path := fs.netnsDir(netns)
	deadline := time.Now().Add(patience)
	for {
		dir, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		err = flockUntil(dir, deadline, patience)
		if err != nil {
			dir.Close()
			return nil, err
		}
		held, err1 := dir.Stat()
		now, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(held, now) {
			return &lock{dir}, nil
		}
		// The directory was replaced while we waited: the lock is worth nothing.
		dir.Close()
		if err1 != nil {
			return nil, err1
		}
		if err2 != nil {
			return nil, err2
		}
	}
}

func (l *lock) unlock() { l.dir.Close() }

// lockNew is lock for a namespace whose directory may have to be made, or be
// removed by a detach while it waits.
func (fs FS) lockNew(netns uint64) (*lock, error) {
	for {
		if err := fs.prepare(netns); err != nil {
			return nil, err
		}
		l, err := fs.lock(netns)
		if !errors.Is(err, os.ErrNotExist) {
			return l, err
		}
	}
}

// AwaitUnlocked waits, for so long at most, until no command changes a group in a
// network namespace, given by its cookie. It takes nothing: the next may be at
// it when AwaitUnlocked returns.
//
// Errors: ErrLocked.
func (fs FS) AwaitUnlocked(netns uint64, patience time.Duration) error {
	l, err := fs.lockWithin(netns, patience)
	if err == nil {
		l.unlock()
	}
	if errors.Is(err, ErrLocked) {
		return err
	}
	return nil // whoever wants to change something is told of the rest
}

// flockUntil polls, since flock(2) knows no deadline.
func flockUntil(dir *os.File, deadline time.Time, patience time.Duration) error {
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return os.NewSyscallError("flock", err)
		case time.Now().After(deadline):
			return fmt.Errorf("%w: %s holds %s for more than %v: try again, or look what it waits for",
				ErrLocked, lockHolder(dir), dir.Name(), patience)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// lockHolder names the process that has the directory locked (proc(5), locks).
func lockHolder(dir *os.File) string {
	var stat unix.Stat_t
	table, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Fstat(int(dir.Fd()), &stat) != nil {
		return "another process"
	}
	for line := range strings.Lines(string(table)) {
		// 1: FLOCK  ADVISORY  WRITE 4711 00:1b:12345 0 EOF
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" || !strings.HasSuffix(f[5], ":"+strconv.FormatUint(stat.Ino, 10)) {
			continue
		}
		command, _ := os.ReadFile("/proc/" + f[4] + "/comm")
		return fmt.Sprintf("%s (pid %s)", sockets.CommandName(bytes.TrimSpace(command)), f[4])
	}
	return "another process"
}
