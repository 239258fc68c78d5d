package cgroup

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/capability"
)

// prefix starts the names of all cgroups that Create makes.
const prefix = "rpsel-run-"

// Dir is a cgroup directory held open. Its methods may be called concurrently,
// but not after Close.
type Dir struct {
	path string
	file *os.File
}

// self is a path to the directory that stays right when path does not, such as
// one by way of another process's root. It must not be cleaned.
func (d *Dir) self() string { return fmt.Sprintf("/proc/self/fd/%d", d.file.Fd()) }

// Open opens an existing cgroup. The caller closes it.
//
// Errors: ErrNotCgroup2.
func Open(path string) (*Dir, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		f.Close()
		return nil, fmt.Errorf("%s: %w: name one below the mount point of cgroup2", path, ErrNotCgroup2)
	}
	return &Dir{path, f}, nil
}

// handleID is the type of a file handle that is a cgroup's id
// (include/linux/exportfs.h FILEID_KERNFS).
const handleID = 0xfe

// OpenID opens a cgroup by its id, wherever it was moved or renamed to. The
// caller closes it.
//
// Errors: ErrRemoved, ErrNoCgroup2, ErrOutside, ErrPermission.
func OpenID(id uint64) (*Dir, error) {
	root, err := Root()
	if err != nil {
		return nil, err
	}
	mount, err := Open(root)
	if err != nil {
		return nil, err
	}
	defer mount.Close()
	handle := unix.NewFileHandle(handleID, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(int(mount.file.Fd()), handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	switch {
	case errors.Is(err, unix.EPERM):
		return nil, capability.Denied(fmt.Sprintf("open cgroup %d", id), capability.ReadSearch)
	case errors.Is(err, unix.ESTALE):
		return nil, fmt.Errorf("cgroup %d: %w: restart the server", id, ErrRemoved)
	case err != nil:
		return nil, fmt.Errorf("open cgroup %d: %w", id, err)
	}
	d := &Dir{root, os.NewFile(uintptr(fd), root)}
	// Both paths are those of the mount's own namespace, which root may only lead to.
	top, err := os.Readlink(mount.self())
	if err == nil {
		var path string
		path, err = os.Readlink(d.self())
		d.path = filepath.Join(root, strings.TrimPrefix(path, top))
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// FromFile takes over the descriptor of a cgroup directory, which its path need
// not lead to any more but for the last element.
func FromFile(f *os.File, path string) *Dir { return &Dir{path, f} }

// Create makes a cgroup below parent and locks it. As long as a copy of its
// descriptor is open, in any process, Sweep leaves it alone. The caller closes
// it, and removes it by Remove.
//
// Errors: ErrReadOnly, ErrPermission.
func Create(parent string) (*Dir, error) {
	// Another pid namespace may have our pid as well, and a sweeper may take
	// what was just made for abandoned.
	for n := 0; ; n++ {
		path := filepath.Join(parent, fmt.Sprintf("%s%d-%d", prefix, os.Getpid(), n))
		err := os.Mkdir(path, 0o755)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return nil, fileError("create cgroup "+path, parent, withoutPath(err))
		}
		f, err := lock(path)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = makeThreaded(path)
		}
		if err != nil {
			return nil, errors.Join(fileError("prepare cgroup "+path, parent, withoutPath(err)), remove(path))
		}
		return &Dir{path, f}, nil
	}
}

// withoutPath spares a message the path, which it names already.
func withoutPath(err error) error {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// lock opens and locks a directory. EWOULDBLOCK: somebody else has the lock;
// ErrNotExist: it was removed before it could be locked.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	var held, now os.FileInfo
	if err == nil {
		held, err = f.Stat()
	}
	if err == nil {
		now, err = os.Stat(path)
	}
	if err == nil && !os.SameFile(held, now) {
		err = os.ErrNotExist
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// makeThreaded makes a child of a threaded cgroup usable. It must be of its
// parent's kind, and is of none at first (Documentation/admin-guide/cgroup-v2.rst,
// Threads).
func makeThreaded(path string) error {
	file := filepath.Join(path, "cgroup.type")
	kind, err := os.ReadFile(file)
	if err != nil || strings.TrimSpace(string(kind)) != "domain invalid" {
		return err
	}
	return os.WriteFile(file, []byte("threaded"), 0)
}

// Path is the directory's path.
func (d *Dir) Path() string { return d.path }

// File is the open directory. It belongs to the Dir.
func (d *Dir) File() *os.File { return d.file }

// Close gives the descriptor back, and the lock with it. The cgroup stays.
func (d *Dir) Close() error { return d.file.Close() }

// Enter moves the calling process, with all its threads, into the cgroup.
//
// Errors: ErrReadOnly, ErrPermission.
func (d *Dir) Enter() error {
	if err := os.WriteFile(d.self()+"/cgroup.procs", []byte("0"), 0); err != nil {
		return fileError("move to cgroup "+d.path, d.path, withoutPath(err))
	}
	return nil
}

// AwaitEmpty waits until no process is left in the cgroup or below, or until
// the cgroup is gone. It returns the context's error if that ends first.
func (d *Dir) AwaitEmpty(ctx context.Context) error {
	return d.await(ctx, -1, func(populated bool) bool { return !populated })
}

// AwaitRemoval waits until the cgroup is gone, which it notices within a
// second. It returns the context's error if that ends first.
func (d *Dir) AwaitRemoval(ctx context.Context) error {
	// The kernel wakes nobody who polls a file that it removes, and kernfs
	// directories tell inotify nothing of their own end.
	return d.await(ctx, 1000, func(bool) bool { return false })
}

// await waits until the cgroup is gone or satisfies done, and looks at it when
// cgroup.events has changed and every so many milliseconds.
func (d *Dir) await(ctx context.Context, every int, done func(populated bool) bool) error {
	events, err := os.Open(d.self() + "/cgroup.events")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return err
	}
	defer events.Close()

	wake, stop, err := os.Pipe()
	if err != nil {
		return err
	}
	defer wake.Close()
	defer stop.Close()
	defer context.AfterFunc(ctx, func() { stop.Write([]byte{0}) })()

	for {
		// kernfs says that the file changed since it was last read.
		text, err := io.ReadAll(io.NewSectionReader(events, 0, 4096))
		if errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err != nil {
			return err
		}
		if done(strings.Contains(string(text), "populated 1")) {
			return nil
		}
		fds := []unix.PollFd{
			{Fd: int32(events.Fd()), Events: unix.POLLPRI},
			{Fd: int32(wake.Fd()), Events: unix.POLLIN},
		}
		if _, err := unix.Poll(fds, every); err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// Remove removes a cgroup in which no process is left, and the cgroups that its
// processes made below. One that is gone is fine. It does not close d.
//
// Errors: ErrBusy.
func (d *Dir) Remove() error { return remove(d.self() + "/../" + filepath.Base(d.path)) }

func remove(path string) error {
	// Most have none below, and a full directory is told by the same error as
	// one with processes.
	err := rmdir(path)
	if !errors.Is(err, ErrBusy) {
		return err
	}
	entries, readErr := os.ReadDir(path)
	if readErr != nil {
		return err
	}
	below := false
	for _, e := range entries {
		if e.IsDir() {
			below = true
			if err := remove(path + "/" + e.Name()); err != nil {
				return err
			}
		}
	}
	if !below {
		return err
	}
	return rmdir(path)
}

func rmdir(path string) error {
	err := unix.Rmdir(path)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
		return nil
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOTEMPTY):
		return fmt.Errorf("remove %s: %w", path, ErrBusy)
	}
	return fileError("remove cgroup "+path, path, err)
}

// Sweep removes what Create made in dir and in the cgroups above, and which was
// left by a process that was killed. What has processes in it is left alone.
func Sweep(dir string) error {
	var errs []error
	for ; isCgroup2(dir); dir = filepath.Dir(dir) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, e := range entries {
			if e.IsDir() && strings.HasPrefix(e.Name(), prefix) {
				errs = append(errs, sweep(filepath.Join(dir, e.Name())))
			}
		}
	}
	return errors.Join(errs...)
}

func sweep(path string) error {
	f, err := lock(path)
	if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) {
		return nil // in use, or another sweeper was faster
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := remove(path); !errors.Is(err, ErrBusy) {
		return err
	}
	return nil
}
