package testnet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/sockets"
)

// envServe makes a test binary a server. It holds the work as JSON.
const envServe = "RPSEL_TESTNET_SERVE"

// work is what a server process does.
type work struct {
	ServerOptions
	Names     []string // of the sockets, in the order they are bound
	Inherited bool     // the only socket is descriptor 3
}

// Main is a TestMain: its package's tests may start servers and Build the command,
// and must have closed at the end what they opened, see Checked.
func Main(m *testing.M) {
	MaybeServe()
	if _, no := errors.AsType[*Unavailable](privileged()); no && maySkip() {
		flag.Set("test.skip", "^Example") // an example cannot skip itself
	}
	os.Exit(Checked{m}.Run())
}

// MaybeServe turns the process into a server and does not return, if
// StartServer or StartGroup started it. A TestMain calls it first.
func MaybeServe() {
	encoded, ok := os.LookupEnv(envServe)
	if !ok {
		return
	}
	var w work
	err := json.Unmarshal([]byte(encoded), &w)
	if err == nil {
		err = w.serve()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serve binds the sockets, reports them on standard output, answers clients and
// obeys orders from standard input until that ends. It is one thread with
// one epoll, so that orders and answers never overlap.
func (w *work) serve() error {
	if w.UID != 0 {
		if err := syscall.Setuid(w.UID); err != nil {
			return os.NewSyscallError("setuid", err)
		}
	}
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	watch := func(fd int) error {
		event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
		return os.NewSyscallError("epoll_ctl", unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &event))
	}
	// A TCP socket that does not listen would be reported all the time.
	serving := func(fd int) error {
		if w.Hold {
			return nil
		}
		if err := watch(fd); !errors.Is(err, unix.EEXIST) {
			return err
		}
		return nil
	}
	var listeners []int           // descriptors by index
	names := make(map[int]string) // of listeners, by descriptor
	add := func(name string) error {
		fd, err := w.bind()
		if err != nil {
			return err
		}
		listeners = append(listeners, fd)
		names[fd] = name
		if w.Bound {
			return nil
		}
		return serving(fd)
	}
	report := func() error {
		line := []any{w.Addr}
		for fd := range names {
			cookie, err := cookieOf(fd)
			if err != nil {
				return err
			}
			line = append(line, cookie)
		}
		fmt.Println(line...)
		return nil
	}
	for _, name := range w.Names {
		if err := add(name); err != nil {
			return err
		}
	}
	if err := report(); err != nil {
		return err
	}
	if err := watch(unix.Stdin); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("epoll_wait", err)
		}
		for _, event := range events[:max(n, 0)] {
			fd := int(event.Fd)
			name, isListener := names[fd]
			switch {
			case fd == unix.Stdin:
				n, err := unix.Read(fd, buf)
				if n <= 0 {
					return err // the test has ended
				}
				var index, backlog int
				order := strings.TrimSuffix(string(buf[:n]), "\n")
				if name, ok := strings.CutPrefix(order, "add "); ok {
					err = add(name)
				} else if _, err = fmt.Sscanf(order, "close %d", &index); err == nil {
					delete(names, listeners[index])
					err = w.close(listeners[index])
				} else if order == "accept" {
					w.Hold, err = false, nil
					for listener := range names {
						err = errors.Join(err, serving(listener))
					}
				} else if _, err = fmt.Sscanf(order, "shutdown %d", &index); err == nil {
					unix.EpollCtl(epoll, unix.EPOLL_CTL_DEL, listeners[index], nil)
					err = os.NewSyscallError("shutdown", unix.Shutdown(listeners[index], unix.SHUT_RD))
				} else if _, err = fmt.Sscanf(order, "listen %d %d", &index, &backlog); err == nil {
					err = os.NewSyscallError("listen", unix.Listen(listeners[index], backlog))
					if err == nil {
						err = serving(listeners[index])
					}
				} else if _, err = fmt.Sscanf(order, "ask %d", &index); err == nil {
					fmt.Println(askAgent(listeners[index], strings.Fields(order)[2:]))
					continue
				}
				if err == nil {
					err = report()
				}
				if err != nil {
					return fmt.Errorf("%s: %w", order, err)
				}
			case !isListener: // a connection, or closed by an order just now
				if n, _ := unix.Read(fd, buf); n <= 0 {
					unix.Close(fd)
				}
			case w.stream():
				conn, _, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
				if err != nil {
					continue // the client has given up
				}
				unix.Write(conn, []byte(name))
				if err := watch(conn); err != nil {
					return err
				}
			default:
				n, client, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT)
				if err != nil || bytes.HasPrefix(buf[:n], []byte(Silence)) {
					continue
				}
				if err := w.reply(fd, append(buf[:n:n], name...), client); err != nil {
					fmt.Fprintln(os.Stderr, err)
				}
			}
		}
	}
}

// askAgent does what Server.AskAgent says and returns its report.
func askAgent(fd int, args []string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	client := agent.Client{Dir: args[1]}
	var slot int
	var err error
	switch args[0] {
	case "register":
		slot, err = client.Register(ctx, socket(fd))
	case "drain":
		err = client.Drain(ctx, socket(fd))
	case "resume":
		err = client.Resume(ctx, socket(fd))
	default:
		err = errors.New("the agent cannot do that")
	}
	if err != nil {
		return "error " + err.Error()
	}
	return fmt.Sprint("slot ", slot)
}

// socket is a descriptor as a syscall.Conn.
type socket int

func (s socket) SyscallConn() (syscall.RawConn, error) { return s, nil }

func (s socket) Control(f func(fd uintptr)) error {
	f(uintptr(s))
	return nil
}

func (socket) Read(func(uintptr) bool) error  { return errors.ErrUnsupported }
func (socket) Write(func(uintptr) bool) error { return errors.ErrUnsupported }

func (w *work) stream() bool { return strings.HasPrefix(w.Network, "tcp") }

// bind makes a socket, and turns port 0 in w.Addr into the one it got.
func (w *work) bind() (int, error) {
	if w.Inherited {
		return 3, nil
	}
	addr, err := netip.ParseAddrPort(w.Addr)
	if err != nil {
		return -1, err
	}
	kind, family := unix.SOCK_DGRAM, unix.AF_INET
	if w.stream() {
		kind = unix.SOCK_STREAM
	}
	if strings.HasSuffix(w.Network, "6") {
		family = unix.AF_INET6
	}
	protocol := 0
	if w.MPTCP {
		protocol = unix.IPPROTO_MPTCP
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	opts := w.Sockopts
	if w.ReusePort {
		opts = append(opts, Sockopt{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1})
	}
	if family == unix.AF_INET6 {
		v6only := 0
		if w.V6Only {
			v6only = 1
		}
		opts = append(opts, Sockopt{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, v6only})
	}
	for _, o := range opts {
		if err := unix.SetsockoptInt(fd, o.Level, o.Name, o.Value); err != nil {
			return -1, os.NewSyscallError("setsockopt", err)
		}
	}
	if err := unix.Bind(fd, sockaddr(addr)); err != nil {
		return -1, os.NewSyscallError("bind", err)
	}
	if w.stream() && !w.Bound {
		if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
			return -1, os.NewSyscallError("listen", err)
		}
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		return -1, os.NewSyscallError("getsockname", err)
	}
	switch bound := bound.(type) {
	case *unix.SockaddrInet4:
		addr = netip.AddrPortFrom(addr.Addr(), uint16(bound.Port))
	case *unix.SockaddrInet6:
		addr = netip.AddrPortFrom(addr.Addr(), uint16(bound.Port))
	}
	w.Addr = addr.String()
	return fd, nil
}

// close closes a listener, and waits until it is gone: a search of all processes
// that looks at it just now, of a test of another package perhaps, keeps it
// alive until the search ends.
func (w *work) close(fd int) error {
	cookie, err := cookieOf(fd)
	if err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil {
		return os.NewSyscallError("close", err)
	}
	gone, err := w.awaitGone([]uint64{cookie}, netip.MustParseAddrPort(w.Addr).Port(), patience)
	if err == nil && !gone {
		err = fmt.Errorf("the listener with cookie %d is still there %v after its close", cookie, patience)
	}
	return err
}

// awaitGone waits, for so long at most, until none of these sockets is bound in the
// network namespace of the calling thread.
func (w *work) awaitGone(cookies []uint64, port uint16, patience time.Duration) (gone bool, err error) {
	proto := sockets.UDP
	if w.stream() {
		proto = sockets.TCP
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		left, err := sockets.Bound(proto, port)
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(left, func(c uint64) bool { return slices.Contains(cookies, c) }) {
			return true, nil
		}
		if time.Now().After(deadline) {
			return false, nil
		}
	}
}

func cookieOf(fd int) (uint64, error) {
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	return cookie, os.NewSyscallError("getsockopt SO_COOKIE", err)
}

// sockaddr is the address for system calls.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
