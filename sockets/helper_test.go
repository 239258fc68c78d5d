package sockets_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/sockets"
)

func TestMain(m *testing.M) {
	if do := os.Getenv("RPSEL_TEST_AS"); do != "" {
		os.Exit(asChild(do))
	}
	testnet.Main(m)
}

// netNS moves the test into a network namespace of its own, whose loopback is
// up. The thread it locks ends with the test.
func netNS(t testing.TB) {
	t.Helper()
	testnet.Privileged(t)
	runtime.LockOSThread()
	must(t, unix.Unshare(unix.CLONE_NEWNET))
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	must(t, err)
	ifr.SetUint16(unix.IFF_UP)
	must(t, unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// reuseport lets a socket share its address before it binds.
func reuseport(fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
}

// listener is what both protocols' sockets have in common.
type listener interface {
	syscall.Conn
	io.Closer
}

// bind opens a UDP socket or TCP listener after the options, and closes it
// when the test ends.
func bind(t testing.TB, network, address string, options ...func(fd int) error) listener {
	t.Helper()
	l, err := tryBind(network, address, options...)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return l
}

func tryBind(network, address string, options ...func(fd int) error) (listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var errs []error
		err := raw.Control(func(fd uintptr) {
			for _, o := range options {
				errs = append(errs, o(int(fd)))
			}
		})
		return errors.Join(append(errs, err)...)
	}}
	lc.SetMultipathTCP(false)
	if strings.HasPrefix(network, "tcp") {
		l, err := lc.Listen(context.Background(), network, address)
		if err != nil {
			return nil, err
		}
		return l.(*net.TCPListener), nil
	}
	c, err := lc.ListenPacket(context.Background(), network, address)
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// local gives a listener's address.
func local(l listener) netip.AddrPort {
	switch l := l.(type) {
	case *net.UDPConn:
		return l.LocalAddr().(*net.UDPAddr).AddrPort()
	case *net.TCPListener:
		return l.Addr().(*net.TCPAddr).AddrPort()
	}
	panic("no listener")
}

// cookies gives the cookies of listeners.
func cookies(t testing.TB, ls ...listener) []uint64 {
	t.Helper()
	var all []uint64
	for _, l := range ls {
		c, err := sockets.Cookie(l)
		must(t, err)
		all = append(all, c)
	}
	return all
}

// find finds what is on the listener's port in the test's namespace.
func find(t testing.TB, l listener) []sockets.Group {
	t.Helper()
	ns, err := sockets.OpenNetNS("")
	must(t, err)
	defer ns.Close()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: local(l).Port()})
	must(t, err)
	return groups
}

// findOne is find where one group is expected.
func findOne(t testing.TB, l listener) sockets.Group {
	t.Helper()
	groups := find(t, l)
	if len(groups) != 1 {
		t.Fatalf("found %d groups, want 1: %+v", len(groups), groups)
	}
	return groups[0]
}

func memberCookies(g sockets.Group) []uint64 {
	var all []uint64
	for _, m := range g.Members {
		all = append(all, m.Cookie)
	}
	return all
}

// control runs f on the listener's descriptor.
func control(t testing.TB, conn syscall.Conn, f func(fd int)) {
	t.Helper()
	raw, err := conn.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { f(int(fd)) }))
}

func descriptor(t testing.TB, conn syscall.Conn) int {
	t.Helper()
	var n int
	control(t, conn, func(fd int) { n = fd })
	return n
}

// steer makes the kernel pick the member at an index of the group's own order.
func steer(t testing.TB, l listener, index int) {
	t.Helper()
	filter := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: uint32(index)}}
	prog := unix.SockFprog{Len: 1, Filter: &filter[0]}
	control(t, l, func(fd int) {
		must(t, unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &prog))
	})
}

// answering sends something to the port and tells which listener got it.
func answering(t testing.TB, ls []listener) int {
	t.Helper()
	target := local(ls[0])
	network := "udp"
	if _, ok := ls[0].(*net.TCPListener); ok {
		network = "tcp"
	}
	c, err := net.Dial(network, target.String())
	must(t, err)
	defer c.Close()
	if network == "udp" {
		_, err = c.Write([]byte("who?"))
		must(t, err)
	}
	var fds []unix.PollFd
	for _, l := range ls {
		fds = append(fds, unix.PollFd{Fd: int32(descriptor(t, l)), Events: unix.POLLIN})
	}
	n, err := unix.Poll(fds, int(time.Minute/time.Millisecond))
	must(t, err)
	if n != 1 {
		t.Fatalf("%d listeners got something, want 1", n)
	}
	for i := range fds {
		if fds[i].Revents == 0 {
			continue
		}
		switch l := ls[i].(type) {
		case *net.UDPConn:
			_, _, err = l.ReadFrom(make([]byte, 16))
		case *net.TCPListener:
			var c net.Conn
			if c, err = l.Accept(); err == nil {
				c.Close()
			}
		}
		must(t, err)
		return i
	}
	panic("unreachable")
}

// child starts a process that holds the files and lives until the test ends,
// or until it is killed.
func child(t testing.TB, files ...*os.File) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	must(t, err)
	cmd.ExtraFiles = files
	must(t, cmd.Start())
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	return cmd
}

// file duplicates a listener's descriptor.
func file(t testing.TB, l listener) *os.File {
	t.Helper()
	f, err := l.(interface{ File() (*os.File, error) }).File()
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// asNobody runs a function of asChild without any capability.
func asNobody(t testing.TB, do string, args ...string) string {
	t.Helper()
	// The test binary's directory is closed to others: hand it over open.
	exe, err := os.Open("/proc/self/exe")
	must(t, err)
	defer exe.Close()
	cmd := exec.Command("/proc/self/fd/3", args...)
	cmd.ExtraFiles = []*os.File{exe}
	cmd.Dir = "/"
	cmd.Env = []string{"RPSEL_TEST_AS=" + do}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s as nobody: %v\n%s", do, err, out)
	}
	return string(out)
}

// openFiles counts the test's descriptors.
func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}
