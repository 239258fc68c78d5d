package sockets

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/capability"
)

// Conn is a socket borrowed from another process. It is the same socket, not
// a copy: it stays alive as long as either side has it open. So close a Conn
// as soon as it has been used. Kept open, it keeps the socket of a dead server
// in its group, where nobody reads what it gets.
//
// A Conn never touches the socket's O_NONBLOCK state, which its server shares,
// nor the Go poller. All methods may be called concurrently.
type Conn struct {
	holder Holder
	mu     sync.RWMutex
	fd     int // -1: closed
}

// Take borrows the socket with this cookie through the holder's descriptor.
// The caller closes the Conn. Take fails with ErrGone if the process, the
// descriptor or the socket behind it changed since the holder was found, and
// with ErrPermission unless the caller may trace the process (pidfd_getfd(2):
// CAP_SYS_PTRACE, or the same user).
func Take(h Holder, cookie uint64) (*Conn, error) {
	pidfd, err := unix.PidfdOpen(h.PID, 0)
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		return nil, fmt.Errorf("%s: %w: no such process", h, ErrGone)
	case err != nil:
		return nil, fmt.Errorf("%s: pidfd_open: %w", h, err)
	}
	defer unix.Close(pidfd)

	fd, err := unix.PidfdGetfd(pidfd, h.FD, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("%s: %w: the process ended", h, ErrGone)
	case errors.Is(err, unix.EBADF):
		return nil, fmt.Errorf("%s: %w: descriptor %d is closed", h, ErrGone, h.FD)
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%s: %w", h, traceError())
	case err != nil:
		return nil, fmt.Errorf("%s: pidfd_getfd: %w", h, err)
	}
	c := &Conn{holder: h, fd: fd}
	if now, err := Cookie(c); err != nil || now != cookie {
		c.Close()
		return nil, fmt.Errorf("%s: %w: descriptor %d is another file now", h, ErrGone, h.FD)
	}
	return c, nil
}

// Take borrows the socket from any of its holders, as the function Take does.
func (s Socket) Take() (conn *Conn, err error) {
	err = ErrGone
	for _, h := range s.Holders {
		if conn, err = Take(h, s.Cookie); err == nil {
			return conn, nil
		}
	}
	return nil, err
}

// TakeMember borrows a socket of a group, any that can be borrowed. The caller
// closes the Conn. An MPTCP listener cannot stand for its group: the TCP socket
// below it is what is in there.
//
// Errors: as of Take, and ErrMPTCP if the group has no other members.
func TakeMember(g Group) (*Conn, error) {
	var mptcp error
	for _, m := range g.Members {
		if m.MPTCP {
			mptcp = m.Check()
			continue
		}
		for _, h := range m.Holders {
			conn, err := Take(h, m.Cookie)
			if errors.Is(err, ErrGone) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", g.Key, err)
			}
			return conn, nil
		}
	}
	if mptcp != nil {
		return nil, fmt.Errorf("%s: %w", g.Key, mptcp)
	}
	return nil, fmt.Errorf("%s: %w: its servers closed it meanwhile: start them and try again", g.Key, ErrGone)
}

// traceError says why pidfd_getfd was refused (kernel/pid.c __pidfd_fget,
// PTRACE_MODE_ATTACH_REALCREDS).
func traceError() error {
	scope, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope")
	if err == nil && strings.TrimSpace(string(scope)) == "3" {
		return fmt.Errorf("take socket: %w: kernel.yama.ptrace_scope is 3, which forbids it until the next boot", ErrPermission)
	}
	return capability.Denied("take socket", capability.Ptrace)
}

// Holder tells whom the socket was borrowed from, also after Close.
func (c *Conn) Holder() (Holder, bool) { return c.holder, true }

// Close gives the descriptor back. Only the first call does something.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	fd := c.fd
	c.fd = -1
	return os.NewSyscallError("close", unix.Close(fd))
}

// SyscallConn returns the connection's descriptor for Control. Read and Write
// are the server's business and fail with errors.ErrUnsupported.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return (*rawConn)(c), nil }

type rawConn Conn

func (r *rawConn) Control(f func(fd uintptr)) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.fd < 0 {
		return net.ErrClosed
	}
	f(uintptr(r.fd))
	return nil
}

func (*rawConn) Read(func(uintptr) bool) error  { return errors.ErrUnsupported }
func (*rawConn) Write(func(uintptr) bool) error { return errors.ErrUnsupported }

// control runs f on the connection's descriptor.
func control(conn syscall.Conn, f func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	return controlRaw(raw, f)
}

func controlRaw(raw syscall.RawConn, f func(fd int) error) error {
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// Cookie reads the number that identifies a socket until the next boot
// (SO_COOKIE). It borrows conn.
func Cookie(conn syscall.Conn) (uint64, error) {
	var cookie uint64
	err := control(conn, func(fd int) (err error) {
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		return os.NewSyscallError("getsockopt SO_COOKIE", err)
	})
	return cookie, err
}

// KeyOf reads the key of the group that a bound UDP or TCP socket is in, or
// would be in if it had SO_REUSEPORT. It borrows conn. MPTCP sockets give
// ErrMPTCP.
func KeyOf(conn syscall.Conn) (Key, error) {
	var k Key
	err := control(conn, func(fd int) (err error) {
		k, err = keyOf(fd)
		return err
	})
	return k, err
}

func keyOf(fd int) (Key, error) {
	var k Key
	proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return k, os.NewSyscallError("getsockopt SO_PROTOCOL", err)
	}
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return k, os.NewSyscallError("getsockopt SO_DOMAIN", err)
	}
	switch {
	case domain != unix.AF_INET && domain != unix.AF_INET6:
		return k, fmt.Errorf("%w: address family %d is neither IPv4 nor IPv6", ErrOtherGroup, domain)
	case proto == unix.IPPROTO_MPTCP:
		return k, ErrMPTCP
	case proto != unix.IPPROTO_UDP && proto != unix.IPPROTO_TCP:
		return k, fmt.Errorf("%w: protocol %d is neither UDP nor TCP", ErrOtherGroup, proto)
	}
	k.Proto = Proto(proto)

	addr, err := unix.Getsockname(fd)
	if err != nil {
		return k, os.NewSyscallError("getsockname", err)
	}
	switch a := addr.(type) {
	case *unix.SockaddrInet4:
		k.Addr = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		k.Addr = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
		v6only, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err != nil {
			return k, os.NewSyscallError("getsockopt IPV6_V6ONLY", err)
		}
		k.V6Only = v6only != 0
	}
	device, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
	if err != nil {
		return k, os.NewSyscallError("getsockopt SO_BINDTOIFINDEX", err)
	}
	k.Device = uint32(device)

	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return k, os.NewSyscallError("fstat", err)
	}
	k.UID = stat.Uid

	k.NetNS, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return k, fmt.Errorf("%w: SO_NETNS_COOKIE needs Linux 5.14", ErrUnsupported)
	}
	return k, os.NewSyscallError("getsockopt SO_NETNS_COOKIE", err)
}

// SameGroup tells in what conn's socket differs from a group's members: nil if
// in nothing, else an error that wraps ErrOtherUID if only the owner differs,
// and ErrOtherGroup in any other case. It borrows conn.
func SameGroup(conn syscall.Conn, group Key) error {
	k, err := KeyOf(conn)
	if err != nil {
		return err
	}
	if group.NetNS == 0 {
		own, err := OpenNetNS("")
		if err != nil {
			return err
		}
		defer own.Close()
		group.NetNS = own.Cookie()
	}
	switch {
	case k.NetNS != group.NetNS:
		return fmt.Errorf("%s: %w: it is in another network namespace", k, ErrOtherGroup)
	case k.Proto != group.Proto:
		return fmt.Errorf("%s: %w: the group is %s", k, ErrOtherGroup, group.Proto)
	case k.Addr != group.Addr:
		return fmt.Errorf("%s: %w: the group is on %s", k, ErrOtherGroup, group.Addr)
	case k.V6Only != group.V6Only:
		return fmt.Errorf("%s: %w: IPV6_V6ONLY is %t, the group's is %t", k, ErrOtherGroup, k.V6Only, group.V6Only)
	case k.Device != group.Device:
		return fmt.Errorf("%s: %w: it is bound to device %d, the group to %d", k, ErrOtherGroup, k.Device, group.Device)
	case k.UID != group.UID:
		return fmt.Errorf("%s: %w (uid %d, the group's is %d)", k, ErrOtherUID, k.UID, group.UID)
	}
	return nil
}
