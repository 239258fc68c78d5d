package statedir

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/comm"
)

// Lock is the lock of a network namespace, held for as long as one change takes.
type Lock struct {
	dir *os.File
}

// Lock waits for the lock of a network namespace, given by its cookie, for so long at
// most. The directory must exist.
//
// Errors: ErrLocked, ErrNoBPFFS.
func (fs FS) Lock(netns uint64, patience time.Duration) (*Lock, error) {
	if err := fs.Writable(); err != nil {
		return nil, err
	}
	path := fs.NetNS(netns)
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
			return &Lock{dir}, nil
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

// Unlock gives the lock back.
func (l *Lock) Unlock() { l.dir.Close() }

// AwaitUnlocked waits, for so long at most, until no command changes a group in a
// network namespace, given by its cookie. It takes nothing: the next may be at
// it when AwaitUnlocked returns.
//
// Errors: ErrLocked.
func (fs FS) AwaitUnlocked(netns uint64, patience time.Duration) error {
	l, err := fs.Lock(netns, patience)
	if err == nil {
		l.Unlock()
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
				ErrLocked, LockHolder(dir), dir.Name(), patience)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// LockHolder names the process that has the directory locked (proc(5), locks).
func LockHolder(dir *os.File) string {
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
		return fmt.Sprintf("%s (pid %s)", comm.Printable(bytes.TrimSpace(command)), f[4])
	}
	return "another process"
}
