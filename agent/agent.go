// Package agent lets a server without any privilege register its own sockets
// with the rpsel agent.
//
// The group has to have the server's user as its owner (by "rpsel attach --port
// PORT --owner USER", or the service's owner in the agent's file), and "rpsel
// agent" has to run. Then any process of that user, without a capability and
// without access to the BPF file system, may register, drain and resume sockets
// that it has open, and no others. It talks to the agent through a unix socket
// that belongs to the user; the descriptor itself tells the agent what group it
// is about, so that a server in another network or mount namespace only needs
// that one socket mounted.
//
// The agent finds new listeners by itself as well. What registering adds is that
// it is done when Register returns, also where the agent cannot look: in another
// pid namespace, or where it has to poll. A server that runs with or without an
// agent ignores ErrNoAgent.
//
// The package is for servers, and so it is small: it needs no BPF. Package
// loader is for those who attach.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/door"
)

// DefaultDir is the run directory of the agent that keeps /sys/fs/bpf.
const DefaultDir = "/run/rpsel"

// defaultFS is where a bpffs usually is.
const defaultFS = "/sys/fs/bpf"

// Errors that callers may want to tell apart. All are wrapped with what they
// are about and the way out.
var (
	// ErrNoAgent: no agent listens in the directory.
	ErrNoAgent = errors.New("no rpsel agent")
	// ErrNotOwner: no group that the agent keeps has the caller as its owner.
	ErrNotOwner = errors.New("no group has this user as its owner")
	// ErrRefused: the agent said no. The text is the agent's.
	ErrRefused = errors.New("the agent refused")
)

// Dir returns the run directory of the agent that keeps the state on a BPF file
// system, given by its mount point: DefaultDir for "" and /sys/fs/bpf, else one
// below it that is named after the file system.
func Dir(bpffs string) (string, error) {
	if bpffs == "" || filepath.Clean(bpffs) == defaultFS {
		return DefaultDir, nil
	}
	var kind unix.Statfs_t
	if err := unix.Statfs(bpffs, &kind); err != nil {
		return "", &os.PathError{Op: "statfs", Path: bpffs, Err: err}
	}
	if kind.Type != unix.BPF_FS_MAGIC {
		return "", fmt.Errorf("%s is no BPF file system: mount one there, or name its mount point", bpffs)
	}
	var named, usual unix.Stat_t
	if err := unix.Stat(bpffs, &named); err != nil {
		return "", &os.PathError{Op: "stat", Path: bpffs, Err: err}
	}
	if unix.Stat(defaultFS, &usual) == nil && usual.Dev == named.Dev {
		return DefaultDir, nil
	}
	return filepath.Join(DefaultDir, fmt.Sprintf("bpffs-%x", named.Dev)), nil
}

// Client talks to an agent. The zero value talks to the one in DefaultDir.
// Its methods may be called concurrently.
//
// Each method asks for one thing and returns when it is done. The context bounds
// how long that may take: usually some milliseconds, and 10 s while another
// rpsel command holds the lock. All methods borrow conn, which has to be a socket
// of the group, bound and (TCP) listening: *net.UDPConn, *net.TCPListener and
// *os.File fit. The agent keeps no reference to it.
//
// Errors of all methods: ErrNoAgent, ErrNotOwner, ErrRefused, the context's.
type Client struct {
	// Dir is the agent's run directory. Defaults to DefaultDir.
	Dir string
}

// Register gives the socket a slot and its share of new flows. A socket that
// has a slot keeps it.
func (c Client) Register(ctx context.Context, conn syscall.Conn) (slot int, err error) {
	return c.ask(ctx, door.Register, conn)
}

// Drain ends new flows for the socket; it keeps those it has. Draining twice is
// fine.
func (c Client) Drain(ctx context.Context, conn syscall.Conn) error {
	_, err := c.ask(ctx, door.Drain, conn)
	return err
}

// Resume undoes Drain. Resuming twice is fine.
func (c Client) Resume(ctx context.Context, conn syscall.Conn) error {
	_, err := c.ask(ctx, door.Resume, conn)
	return err
}

func (c Client) ask(ctx context.Context, op door.Op, conn syscall.Conn) (slot int, err error) {
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("%s: %w", op, context.Cause(ctx))
		} else if err != nil {
			err = fmt.Errorf("%s: %w", op, err)
		}
	}()
	to, err := c.dial(ctx)
	if err != nil {
		return 0, err
	}
	defer to.Close()
	stop := context.AfterFunc(ctx, func() { to.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := send(to, op, conn); err != nil {
		return 0, err
	}
	// One more byte than an answer may have would tell that it is too long.
	buf := make([]byte, door.MaxAnswer+1)
	n, err := to.Read(buf)
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET):
		return 0, fmt.Errorf("%w: it ended, or was too busy to answer: try again", ErrNoAgent)
	case err != nil:
		return 0, err
	}
	answer, err := door.ParseAnswer(buf[:n])
	if err != nil {
		return 0, err
	}
	if !answer.Done {
		return 0, fmt.Errorf("%w: %s", ErrRefused, answer.Text)
	}
	return int(answer.Slot), nil
}

// send sends the request with the socket's descriptor.
func send(to *net.UnixConn, op door.Op, conn syscall.Conn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) {
		_, _, inner = to.WriteMsgUnix(door.Request{Op: op}.Marshal(), unix.UnixRights(int(fd)), nil)
	})
	if err != nil {
		return err
	}
	return inner
}

// dial connects to the door of the caller's user.
func (c Client) dial(ctx context.Context) (*net.UnixConn, error) {
	dir := c.Dir
	if dir == "" {
		dir = DefaultDir
	}
	path, err := find(dir)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	to, err := d.DialContext(ctx, door.Network, path)
	switch {
	case err == nil:
		return to.(*net.UnixConn), nil
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("%w at %s, it has ended: start it", ErrNoAgent, path)
	case errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("%w: %s cannot be reached: no directory above it may be closed to others", ErrNoAgent, path)
	default:
		return nil, err
	}
}

// find finds the door of the caller's user. It goes by who owns the socket and
// not by its name, since a user has another number in a user namespace.
func find(dir string) (path string, err error) {
	doors, err := filepath.Glob(filepath.Join(dir, door.Pattern))
	if err != nil {
		return "", fmt.Errorf("%s: %w", dir, err)
	}
	uid := uint32(os.Geteuid())
	for _, path := range doors {
		var stat unix.Stat_t
		if unix.Stat(path, &stat) == nil && stat.Uid == uid {
			return path, nil
		}
	}
	if _, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("%w: %w: start it, or name its run directory", ErrNoAgent, err)
	}
	return "", fmt.Errorf("%w (uid %d, in %s): \"rpsel attach --port PORT --owner %d\" makes it that", ErrNotOwner, uid, dir, uid)
}
