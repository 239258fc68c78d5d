package force

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/fault"
)

// Command is a command to run.
type Command struct {
	// Args are the command and its arguments. The command is looked for in
	// PATH unless it has a slash.
	Args []string
	// User is the name or the number of the user to become, "" for the
	// caller's. The command then has that user's groups and, unless it is root,
	// no capabilities; the environment stays. Its sockets belong to that user,
	// and a reuseport group takes in sockets of one user only.
	User string
	// Settings say what is forced.
	Settings Settings
	// Reaper are the arguments with which this executable calls Reap. Run adds
	// the ones Reap takes.
	Reaper []string
	// Stderr tells that the reaper keeps standard error. Otherwise it keeps
	// nothing that the caller may wait for.
	Stderr bool
}

// Run executes the command in the calling process, which keeps its pid, its
// parent, its descriptors and its cgroup limits. It returns only if that
// fails, and then the process can do no better than end: it may have another
// user and cgroup by now, which the reaper removes.
//
// Errors: ErrNotFound, ErrNotExecutable, ErrNoUser, ErrNoDevice,
// ErrUnsupported, ErrPermission, and those of package cgroup.
func (c *Command) Run() error {
	path, err := lookPath(c.Args[0])
	if err != nil {
		return err
	}
	become, err := lookupUser(c.User)
	if err != nil {
		return err
	}
	if err := c.Settings.check(); err != nil {
		return err
	}
	reaper, err := c.enclose()
	if err != nil {
		return err
	}
	defer reaper.Close() // also done by exec; the reaper waits for it
	if err := become(); err != nil {
		return err
	}
	return execute(path, c.Args)
}

// enclose moves the process into a cgroup that has the programs and a reaper,
// and gives the connection to the reaper.
func (c *Command) enclose() (reaper io.Closer, err error) {
	own, err := cgroup.Own()
	if err != nil {
		return nil, err
	}
	// What others left behind is no reason to fail.
	_ = cgroup.Sweep(own)

	objects, err := c.Settings.load()
	if err != nil {
		return nil, err
	}
	defer objects.Close() // the cgroup and the reaper hold what they need
	dir, err := cgroup.Create(own)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fault.Point("cgroup made")
	if err := dir.Attach(c.Settings.programs(objects)); err != nil {
		return nil, errors.Join(err, dir.Remove())
	}
	fault.Point("bind programs attached")
	reaper, err = c.startReaper(dir, objects.Events)
	if err != nil {
		return nil, errors.Join(err, dir.Remove())
	}
	fault.Point("reaper started")
	if err := dir.Enter(); err != nil {
		return nil, errors.Join(err, reaper.Close())
	}
	fault.Point("cgroup entered")
	return reaper, nil
}

// lookPath finds a command as execvp(3) does, also in the current directory.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	switch {
	case err == nil, errors.Is(err, exec.ErrDot):
		return path, nil
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("%s: %w: permission denied", name, ErrNotExecutable)
	case strings.Contains(name, "/") && !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("%s: %w: %v", name, ErrNotExecutable, errors.Unwrap(err))
	}
	return "", fmt.Errorf("%s: %w", name, ErrNotFound)
}

// execute becomes the command. Like execvp(3) it gives a script that does not
// name its interpreter to the shell.
func execute(path string, args []string) error {
	err := syscall.Exec(path, args, os.Environ())
	if errors.Is(err, unix.ENOEXEC) {
		err = syscall.Exec("/bin/sh", append([]string{"sh", path}, args[1:]...), os.Environ())
	}
	if errors.Is(err, fs.ErrNotExist) {
		// It was there: what is missing is its interpreter.
		return fmt.Errorf("%s: %w: no such file, or no such interpreter", path, ErrNotFound)
	}
	return fmt.Errorf("%s: %w: %v", path, ErrNotExecutable, err)
}

// lookupUser finds a user by name or number and gives the function that makes
// the process one of that user's.
func lookupUser(name string) (become func() error, err error) {
	if name == "" {
		return func() error { return nil }, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		u, err = user.LookupId(name)
	}
	if err != nil {
		return nil, fmt.Errorf("%q: %w: use a name or number of the user database", name, ErrNoUser)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return nil, fmt.Errorf("%q: uid %q: %w", name, u.Uid, err)
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return nil, fmt.Errorf("%q: gid %q: %w", name, u.Gid, err)
	}
	ids, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("%q: groups: %w", name, err)
	}
	var groups []int
	for _, id := range ids {
		n, err := strconv.Atoi(id)
		if err != nil {
			return nil, fmt.Errorf("%q: group %q: %w", name, id, err)
		}
		groups = append(groups, n)
	}
	return func() error {
		// The user last: it takes the capability to change the others.
		err := syscall.Setgroups(groups)
		if err == nil {
			err = syscall.Setgid(gid)
		}
		if err == nil {
			err = syscall.Setuid(uid)
		}
		doing := "become user " + u.Username
		switch {
		case errors.Is(err, unix.EPERM):
			return capability.Denied(doing, capability.SetUID, capability.SetGID)
		case err != nil:
			return fmt.Errorf("%s: %w", doing, err)
		}
		return nil
	}, nil
}
