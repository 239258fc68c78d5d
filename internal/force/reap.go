package force

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/cgroup"
)

// What the reaper inherits, from descriptor 3 on, through the process between.
const (
	eventsFD  = 3 + iota // the ring buffer
	cgroupFD             // the command's cgroup: its lock
	commandFD            // says whether the reaper is ready, and ends with exec
)

// DetachFlag is the argument that makes the reaper leave its parent.
const DetachFlag = "--detach"

// ready is what the reaper says when it is.
const ready = "ready"

// execPath is this executable, even after an update has replaced its file.
const execPath = "/proc/self/exe"

// startReaper starts the reaper in the caller's cgroup, and waits until it is
// ready. The reaper removes the cgroup when the connection is closed and the
// cgroup is empty.
func (c *Command) startReaper(dir *cgroup.Dir, events *ebpf.Map) (_ io.Closer, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start reaper: %w", err)
		}
	}()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	stderr := null
	if c.Stderr {
		stderr = os.Stderr
	}
	ring, err := fileOf(events)
	if err != nil {
		return nil, err
	}
	defer ring.Close()
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ours.Close()
		}
	}()

	// Twice, so that the reaper is nobody's child: the command must not find
	// one it has not started. And in a session of its own, so that no signal
	// from the terminal ends it.
	p, err := os.StartProcess(execPath, slices.Concat([]string{"rpsel"}, c.Reaper, []string{DetachFlag, dir.Path()}), &os.ProcAttr{
		Dir:   "/",
		Files: []*os.File{null, null, stderr, ring, dir.File(), theirs},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	theirs.Close()
	if err != nil {
		return nil, err
	}
	if _, err := p.Wait(); err != nil {
		return nil, err
	}
	answer := make([]byte, 4096)
	n, err := ours.Read(answer)
	if errors.Is(err, io.EOF) {
		return nil, errors.New("it ended early")
	}
	if err != nil {
		return nil, err
	}
	if text := string(answer[:n]); text != ready {
		return nil, errors.New(text)
	}
	return ours, nil
}

func fileOf(m *ebpf.Map) (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(m.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "events"), nil
}

// socketpair makes two connected descriptors that exec closes.
func socketpair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "reaper"), os.NewFile(uintptr(fds[1]), "command"), nil
}

// Detach is the process between Command.Run and Reap: it starts its own command
// line again, without DetachFlag, and passes on nothing that it has inherited
// but what the reaper needs.
func Detach() (err error) {
	command := os.NewFile(commandFD, "command")
	defer func() {
		if err != nil {
			fmt.Fprint(command, err)
		}
	}()
	if err := unix.CloseRange(eventsFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return os.NewSyscallError("close_range", err)
	}
	args := slices.DeleteFunc(slices.Clone(os.Args), func(arg string) bool { return arg == DetachFlag })
	_, err = os.StartProcess(execPath, args, &os.ProcAttr{
		Files: []*os.File{
			os.Stdin, os.Stdout, os.Stderr,
			os.NewFile(eventsFD, "events"), os.NewFile(cgroupFD, "cgroup"), command,
		},
	})
	return err
}

// Reap is the reaper of the command in the cgroup at path. It tells of the
// command's sockets, and returns after it has removed the cgroup, which it does
// when the last process has left it, or at SIGTERM: then the cgroup stays as
// long as there are processes in it, and the next Run after that removes it.
func Reap(path string, h Handler) error {
	command := os.NewFile(commandFD, "command")
	dir := cgroup.FromFile(os.NewFile(cgroupFD, "cgroup"), path)
	defer dir.Close()
	ring, events, err := openEvents()
	if err != nil {
		fmt.Fprint(command, err)
		return err
	}
	defer ring.Close()

	// Else it goes by the name of execPath.
	_ = os.WriteFile("/proc/self/comm", []byte("rpsel"), 0)
	// Whoever reads what it says may go before it does.
	signal.Ignore(unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()

	handled := make(chan error, 1)
	go func() { handled <- h.handle(ctx, events) }()
	if _, err := fmt.Fprint(command, ready); err != nil {
		return err
	}
	// Until the connection ends the command is not in the cgroup yet.
	if _, err := io.Copy(io.Discard, command); err != nil {
		return err
	}
	for {
		err := dir.AwaitEmpty(ctx)
		if err != nil && ctx.Err() == nil {
			return err
		}
		err = dir.Remove()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, cgroup.ErrBusy):
			continue // somebody moved in
		}
		stop()
		return errors.Join(err, <-handled)
	}
}

// openEvents opens the ring buffer, which is to stay open as long as it is read.
func openEvents() (*ebpf.Map, *ringbuf.Reader, error) {
	ring, err := ebpf.NewMapFromFD(eventsFD)
	if err != nil {
		return nil, nil, fmt.Errorf("events: %w", err)
	}
	r, err := ringbuf.NewReader(ring)
	if err != nil {
		ring.Close()
		return nil, nil, fmt.Errorf("read events: %w", err)
	}
	return ring, r, nil
}
