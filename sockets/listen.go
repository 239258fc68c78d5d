package sockets

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen opens n TCP listeners on one address, as one reuseport group in
// which each can be registered: with SO_REUSEPORT, without MPTCP. Network and
// address are as in net.Listen; port 0 chooses a port once, for all. The
// context bounds the resolution of a name. The caller closes the listeners.
func Listen(ctx context.Context, n int, network, address string) ([]*net.TCPListener, error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
	default:
		return nil, &net.OpError{Op: "listen", Net: network, Err: net.UnknownNetworkError(network)}
	}
	return open(n, address, func(lc *net.ListenConfig, address string) (*net.TCPListener, error) {
		l, err := lc.Listen(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return l.(*net.TCPListener), nil
	}, func(l *net.TCPListener) net.Addr { return l.Addr() })
}

// ListenPacket opens n UDP sockets on one address, as one reuseport group.
// Network and address are as in net.ListenPacket; port 0 chooses a port once,
// for all. The context bounds the resolution of a name. The caller closes the
// sockets.
func ListenPacket(ctx context.Context, n int, network, address string) ([]*net.UDPConn, error) {
	switch network {
	case "udp", "udp4", "udp6":
	default:
		return nil, &net.OpError{Op: "listen", Net: network, Err: net.UnknownNetworkError(network)}
	}
	return open(n, address, func(lc *net.ListenConfig, address string) (*net.UDPConn, error) {
		c, err := lc.ListenPacket(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return c.(*net.UDPConn), nil
	}, (*net.UDPConn).LocalAddr)
}

type socket interface {
	syscall.Conn
	io.Closer
}

// open opens n sockets of one group.
func open[S socket](n int, address string, listen func(*net.ListenConfig, string) (S, error), local func(S) net.Addr) (socks []S, err error) {
	if n < 1 {
		return nil, fmt.Errorf("listen on %s: %d sockets, at least 1 is needed", address, n)
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	defer func() {
		if err != nil {
			closeAll(socks)
			socks = nil
		}
	}()
	reuseport := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return controlRaw(raw, setReuseport)
	}}
	reuseport.SetMultipathTCP(false)

	// For a socket with SO_REUSEPORT the kernel counts the ports of other UDP
	// groups of the same user among the free ones (net/ipv4/udp.c
	// udp_lib_lport_inuse). So where it chooses, the first socket binds
	// without, and gets the option before the second binds: that makes the
	// group.
	first, want := reuseport, n
	if port == "" || port == "0" {
		first.Control = nil
		want = max(n, 2)
	}
	for len(socks) < want {
		lc := &reuseport
		if len(socks) == 0 {
			lc = &first
		}
		s, err := listen(lc, address)
		if err != nil {
			return socks, err
		}
		socks = append(socks, s)
		if len(socks) == 1 {
			address = local(s).String()
			if err := control(s, setReuseport); err != nil {
				return socks, err
			}
		}
	}
	err = closeAll(socks[n:])
	return socks[:n], err
}

func closeAll[S io.Closer](socks []S) error {
	var errs []error
	for _, s := range socks {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

func setReuseport(fd int) error {
	return os.NewSyscallError("setsockopt SO_REUSEPORT", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
}
