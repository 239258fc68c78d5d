package sockets_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/sockets"
)

func noReuseaddr(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0) }

// adopters are live servers that know nothing of SO_REUSEPORT.
var adopters = []struct {
	network, address string
	options          []func(int) error
}{
	{"udp4", "0.0.0.0:0", nil},
	{"udp4", "127.0.0.1:0", nil},
	{"udp", "[::]:0", nil},
	{"udp6", "[::]:0", nil},
	{"udp6", "[::1]:0", nil},
	{"udp4", "0.0.0.0:0", []func(int) error{toLo, of4711}},
	{"tcp4", "0.0.0.0:0", nil},
	{"tcp4", "127.0.0.1:0", []func(int) error{noReuseaddr}},
	{"tcp", "[::]:0", []func(int) error{noReuseaddr}},
	{"tcp6", "[::1]:0", []func(int) error{toLo, of4711}},
}

func toLo(fd int) error      { return unix.BindToDevice(fd, "lo") }
func of4711(fd int) error    { return unix.Fchown(fd, 4711, -1) }
func reuseaddr(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }

// A live socket gets a group, loses no more than it says, and others can join.
func TestAdopt(t *testing.T) {
	for _, c := range adopters {
		t.Run(fmt.Sprintf("%s %s %d options", c.network, c.address, len(c.options)), func(t *testing.T) {
			netNS(t)
			for range 10 {
				server := bind(t, c.network, c.address, c.options...)
				testAdopt(t, server, func() (listener, error) {
					return tryBind(c.network, local(server).String(), append(c.options, reuseport)...)
				})
				server.Close()
			}
		})
	}
}

// testAdopt adopts a server. The function binds a second one beside it.
func testAdopt(t *testing.T, server listener, join func() (listener, error)) {
	t.Helper()
	if g := findOne(t, server); g.Kernel != 0 || !errors.Is(g.Members[0].Check(), sockets.ErrNoReuseport) {
		t.Fatalf("before: %+v", g)
	}
	if beside, err := join(); !errors.Is(err, unix.EADDRINUSE) {
		beside.Close()
		t.Fatalf("control: a second server binds before: %v", err)
	}
	traffic := tcpTraffic
	if _, ok := server.(*net.UDPConn); ok {
		traffic = udpTraffic
	}
	stop := traffic(t, server)
	adoption, err := sockets.Adopt(server)
	must(t, err)
	stop(adoption.Lost)

	g := findOne(t, server)
	if g.Kernel == 0 || len(g.Members) != 1 || g.HasProgram {
		t.Fatalf("after: %+v", g)
	}
	must(t, g.Members[0].Check())
	again, err := sockets.Adopt(server)
	must(t, err)
	if now := findOne(t, server); now.Kernel != g.Kernel || again.Lost != 0 {
		t.Errorf("adopted again: %+v", now)
	}
	second, err := join()
	must(t, err)
	if g := findOne(t, server); len(g.Members) != 2 || g.Members[0].Cookie != cookies(t, server)[0] {
		t.Errorf("with a second server: %+v", g)
	}
	must(t, second.Close())

	must(t, adoption.Undo(server))
	if err := findOne(t, server).Members[0].Check(); !errors.Is(err, sockets.ErrNoReuseport) {
		t.Errorf("after Undo: %v, want %v", err, sockets.ErrNoReuseport)
	}
}

// target is where clients of a server send to.
func target(t *testing.T, server listener) string {
	addr := local(server)
	if !addr.Addr().IsUnspecified() {
		return addr.String()
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if findOne(t, server).V6Only {
		loopback = netip.IPv6Loopback()
	}
	return netip.AddrPortFrom(loopback, addr.Port()).String()
}

// udpTraffic sends datagrams until stop, which accounts for every one.
func udpTraffic(t *testing.T, server listener) func(lost uint32) {
	t.Helper()
	l := server.(*net.UDPConn)
	var sent, received atomic.Int64
	var reader, senders sync.WaitGroup
	reader.Go(func() {
		for buf := make([]byte, 64); ; received.Add(1) {
			if _, _, err := l.ReadFromUDPAddrPort(buf); err != nil {
				return // the deadline of stop
			}
		}
	})
	// Many flows, of which the kernel's hash would give half to the helper.
	var conns []net.Conn
	for range 32 {
		c, err := net.Dial("udp", target(t, server))
		must(t, err)
		conns = append(conns, c)
	}
	var done atomic.Bool
	for _, c := range conns {
		senders.Go(func() {
			for !done.Load() {
				// More than the queues hold would be lost there.
				if sent.Load()-received.Load() > 100 {
					runtime.Gosched()
					continue
				}
				if _, err := c.Write([]byte("datagram")); err != nil {
					t.Errorf("send: %v", err) // ECONNREFUSED: nobody was there
					return
				}
				sent.Add(1)
			}
		})
	}
	for sent.Load() < 1000 && !t.Failed() { // until the traffic has begun
		runtime.Gosched()
	}
	return func(lost uint32) {
		done.Store(true)
		senders.Wait()
		for _, c := range conns {
			c.Close()
		}
		missing := func() int64 { return sent.Load() - received.Load() }
		for end := time.Now().Add(time.Minute); missing() > int64(lost) && time.Now().Before(end); {
			runtime.Gosched()
		}
		l.SetReadDeadline(time.Now())
		reader.Wait()
		l.SetReadDeadline(time.Time{})
		if m := missing(); m != int64(lost) {
			t.Errorf("%d of %d datagrams missing, Adopt says %d", m, sent.Load(), lost)
		}
	}
}

// tcpTraffic opens connections until stop, each of which must be answered.
func tcpTraffic(t *testing.T, server listener) func(lost uint32) {
	t.Helper()
	l := server.(*net.TCPListener)
	var accepting, clients, conns sync.WaitGroup
	accepting.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // the deadline of stop
			}
			conns.Go(func() {
				defer c.Close()
				for echo := make([]byte, 1); ; {
					if _, err := c.Read(echo); err != nil {
						return
					}
					c.Write(echo)
				}
			})
		}
	})
	echo := func(c net.Conn) error {
		if _, err := c.Write([]byte("?")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	address := target(t, server)
	dialer := net.Dialer{Timeout: time.Minute}
	dialer.SetMultipathTCP(false)
	dial := func() (net.Conn, error) {
		c, err := dialer.DialContext(context.Background(), "tcp", address)
		if err == nil {
			c.(*net.TCPConn).SetLinger(0)
			c.SetDeadline(time.Now().Add(time.Minute))
		}
		return c, err
	}
	// One that was accepted before has neither option, and must live on.
	old, err := dial()
	must(t, err)
	must(t, echo(old))

	var done atomic.Bool
	var served atomic.Int64
	ns, err := sockets.OpenNetNS("")
	must(t, err)
	for range 8 {
		clients.Go(func() {
			err := ns.Do(func() error {
				for !done.Load() {
					c, err := dial()
					if err != nil {
						return err
					}
					err = echo(c)
					c.Close()
					if err != nil {
						return err
					}
					served.Add(1)
				}
				return nil
			})
			if err != nil {
				t.Errorf("client: %v", err)
			}
		})
	}
	for served.Load() < 10 && !t.Failed() { // until the traffic has begun
		runtime.Gosched()
	}
	return func(uint32) {
		done.Store(true)
		clients.Wait()
		ns.Close()
		if err := echo(old); err != nil {
			t.Errorf("connection from before: %v", err)
		}
		old.Close()
		l.SetDeadline(time.Now())
		accepting.Wait()
		l.SetDeadline(time.Time{})
		conns.Wait()
	}
}

// Adopt works on a socket of another namespace, and of another process.
func TestAdoptElsewhere(t *testing.T) {
	netNS(t)
	server := bind(t, "udp4", "0.0.0.0:0")
	cookie := cookies(t, server)[0]
	g := findOne(t, server)
	process := child(t, file(t, server))
	// Not the test's goroutine, so not in its namespace.
	errs := make(chan error)
	go func() {
		conn, err := sockets.Take(sockets.Holder{PID: process.Process.Pid, FD: 3}, cookie)
		if err != nil {
			errs <- err
			return
		}
		defer conn.Close()
		_, err = sockets.Adopt(conn)
		errs <- err
	}()
	must(t, <-errs)
	after := findOne(t, server)
	if after.Key != g.Key || after.Kernel == 0 {
		t.Errorf("%+v", after)
	}
}

// Sockets that cannot be adopted are refused, and are as before.
func TestAdoptRefused(t *testing.T) {
	netNS(t)
	connected := bind(t, "udp4", "127.0.0.1:0")
	control(t, connected, func(fd int) {
		must(t, unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}))
	})
	// A third socket, on the wildcard, that no longer tolerates others.
	crowded := bind(t, "udp4", "127.0.0.1:53", reuseaddr)
	third := bind(t, "udp4", "0.0.0.0:53", reuseaddr)
	control(t, third, func(fd int) { must(t, noReuseaddr(fd)) })

	accepted, err := net.Dial("tcp", local(bind(t, "tcp4", "127.0.0.1:0")).String())
	must(t, err)
	defer accepted.Close()

	before := openFiles(t)
	for _, c := range []struct {
		name string
		conn syscall.Conn
		want error
	}{
		{"connected", connected, sockets.ErrConnected},
		{"crowded", crowded, unix.EADDRINUSE},
		{"not listening", accepted.(*net.TCPConn), nil},
	} {
		_, err := sockets.Adopt(c.conn)
		if err == nil || (c.want != nil && !errors.Is(err, c.want)) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		control(t, c.conn, func(fd int) {
			if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT); err != nil || on != 0 {
				t.Errorf("%s: SO_REUSEPORT is %d, %v", c.name, on, err)
			}
		})
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors became %d", before, after)
	}
	if g := findOne(t, connected); g.Kernel != 0 {
		t.Errorf("%+v", g)
	}
}
