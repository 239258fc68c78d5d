package sockets_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/sockets"
)

// A socket that another process holds can be taken, stays as it is, and lives
// as long as it is held.
func TestTake(t *testing.T) {
	for _, network := range []string{"udp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			netNS(t)
			l := bind(t, network, loopback(network), reuseport)
			key, err := sockets.KeyOf(l)
			must(t, err)
			cookie := cookies(t, l)[0]
			f := file(t, l)
			must(t, unix.SetNonblock(int(f.Fd()), false))
			server := child(t, f)
			f.Close()
			must(t, l.Close())

			ns, err := sockets.OpenNetNS("")
			must(t, err)
			defer ns.Close()
			groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: key.Addr.Port()})
			must(t, err)
			if len(groups) != 1 || len(groups[0].Members) != 1 {
				t.Fatalf("found %+v", groups)
			}
			m := groups[0].Members[0]
			if len(m.Holders) != 1 || m.Holders[0] != (sockets.Holder{PID: server.Process.Pid, FD: 3, Command: "cat"}) || m.Cookie != cookie {
				t.Fatalf("found %+v", m)
			}
			before := openFiles(t)
			conn, err := sockets.Take(m.Holders[0], m.Cookie)
			must(t, err)
			defer conn.Close()
			if h, ok := conn.Holder(); !ok || h != m.Holders[0] {
				t.Errorf("borrowed from %v, want %v", h, m.Holders[0])
			}
			if now, err := sockets.KeyOf(conn); err != nil || now != key {
				t.Errorf("KeyOf: %+v, %v, want %+v", now, err, key)
			}
			control(t, conn, func(fd int) {
				flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
				must(t, err)
				if flags&unix.O_NONBLOCK != 0 {
					t.Error("the socket does not block any more")
				}
			})
			// The server dies, its socket stays.
			server.Process.Kill()
			server.Wait()
			if again, err := tryBind(network, key.Addr.String()); !errors.Is(err, unix.EADDRINUSE) {
				again.Close()
				t.Errorf("bind beside a socket that is held: %v", err)
			}
			must(t, conn.Close())
			must(t, conn.Close())
			if after := openFiles(t); after > before {
				t.Errorf("%d descriptors became %d", before, after)
			}
			if _, err := sockets.Cookie(conn); !errors.Is(err, net.ErrClosed) {
				t.Errorf("use after close: %v, want %v", err, net.ErrClosed)
			}
			again, err := tryBind(network, key.Addr.String())
			must(t, err)
			again.Close()
		})
	}
}

func TestTakeGone(t *testing.T) {
	netNS(t)
	l := bind(t, "udp4", "127.0.0.1:0", reuseport)
	cookie := cookies(t, l)[0]
	server := child(t, file(t, l))
	h := sockets.Holder{PID: server.Process.Pid, FD: 3, Command: "cat"}
	before := openFiles(t)
	gone := func(t *testing.T, h sockets.Holder, cookie uint64) {
		t.Helper()
		if _, err := sockets.Take(h, cookie); !errors.Is(err, sockets.ErrGone) {
			t.Errorf("Take: %v, want %v", err, sockets.ErrGone)
		} else if !strings.HasPrefix(err.Error(), fmt.Sprintf("cat (pid %d): ", h.PID)) {
			t.Errorf("Take: %v, without the process", err)
		}
	}
	t.Run("other socket", func(t *testing.T) { gone(t, h, cookie+1) })
	t.Run("no socket", func(t *testing.T) { gone(t, sockets.Holder{PID: h.PID, FD: 0, Command: "cat"}, cookie) })
	t.Run("closed", func(t *testing.T) { gone(t, sockets.Holder{PID: h.PID, FD: 99, Command: "cat"}, cookie) })
	t.Run("no process", func(t *testing.T) { gone(t, sockets.Holder{PID: 1 << 30, FD: 3, Command: "cat"}, cookie) })
	t.Run("reused", func(t *testing.T) {
		// The same number, here as in a server that reopens its socket.
		fd := descriptor(t, l)
		here := sockets.Holder{PID: os.Getpid(), FD: fd, Command: "cat"}
		conn, err := sockets.Take(here, cookie)
		must(t, err)
		must(t, conn.Close())
		other := bind(t, "udp4", local(l).String(), reuseport)
		must(t, unix.Dup3(descriptor(t, other), fd, unix.O_CLOEXEC))
		gone(t, here, cookie)
		other.Close()
	})
	t.Run("dead", func(t *testing.T) {
		server.Process.Kill()
		server.Wait()
		gone(t, h, cookie)
	})
	if after := openFiles(t); after > before {
		t.Errorf("%d descriptors became %d", before, after)
	}
}

func TestTakePermission(t *testing.T) {
	netNS(t)
	out := asNobody(t, "take", fmt.Sprint(os.Getpid()))
	want := fmt.Sprintf("server (pid %d): take socket: permission denied without CAP_SYS_PTRACE: run as root\n", os.Getpid())
	if out != want {
		t.Errorf("got  %swant %s", out, want)
	}
}

// Each part in which a socket differs from a group is named.
func TestSameGroup(t *testing.T) {
	netNS(t)
	l := bind(t, "udp6", "[::]:1194", reuseport)
	key, err := sockets.KeyOf(l)
	must(t, err)
	key.NetNS = 0 // here
	must(t, sockets.SameGroup(l, key))

	elsewhere := key
	elsewhere.NetNS = 1
	for _, c := range []struct {
		name, says string
		key        sockets.Key
		l          listener
		want       error
	}{
		{"namespace", "network namespace", elsewhere, l, sockets.ErrOtherGroup},
		{"protocol", "the group is udp", key, bind(t, "tcp6", "[::]:1194", reuseport), sockets.ErrOtherGroup},
		{"family", "the group is on [::]:1194", key, bind(t, "udp4", "0.0.0.0:1194", reuseport), sockets.ErrOtherGroup},
		{"address", "the group is on [::]:1194", key, bind(t, "udp6", "[::1]:1194", reuseport), sockets.ErrOtherGroup},
		{"port", "the group is on [::]:1194", key, bind(t, "udp6", "[::]:1195", reuseport), sockets.ErrOtherGroup},
		{"v6only", "IPV6_V6ONLY is false, the group's is true", key, bind(t, "udp", "[::]:1194", reuseport), sockets.ErrOtherGroup},
		{"device", "bound to device 1, the group to 0", key, bind(t, "udp6", "[::]:1194", reuseport, func(fd int) error { return unix.BindToDevice(fd, "lo") }), sockets.ErrOtherGroup},
	} {
		// No subtest: it would run on a thread outside of the namespace.
		err := sockets.SameGroup(c.l, c.key)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %v: %s", c.name, err, c.want, c.says)
		}
	}

	// The kernel lets another user's socket bind only to another address.
	owned := func(fd int) error { return unix.Fchown(fd, 4711, -1) }
	if other, err := tryBind("udp6", "[::]:1194", reuseport, owned); !errors.Is(err, unix.EADDRINUSE) {
		other.Close()
		t.Errorf("bind of another user: %v, want %v", err, unix.EADDRINUSE)
	}
	other := bind(t, "udp6", "[::]:1196", reuseport, owned)
	key.Addr = local(other)
	err = sockets.SameGroup(other, key)
	if !errors.Is(err, sockets.ErrOtherUID) || errors.Is(err, sockets.ErrOtherGroup) {
		t.Errorf("owner: %v, want %v", err, sockets.ErrOtherUID)
	}
}

func TestKeyOfOthers(t *testing.T) {
	for _, c := range []struct {
		name               string
		family, kind, prot int
	}{
		{"unix", unix.AF_UNIX, unix.SOCK_DGRAM, 0},
		{"udplite", unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE},
	} {
		t.Run(c.name, func(t *testing.T) {
			fd, err := unix.Socket(c.family, c.kind|unix.SOCK_CLOEXEC, c.prot)
			if c.prot == unix.IPPROTO_UDPLITE && errors.Is(err, unix.EPROTONOSUPPORT) {
				return // Linux 7.2 has UDP-Lite no more: there is no such socket to refuse
			}
			must(t, err)
			f := os.NewFile(uintptr(fd), c.name)
			defer f.Close()
			if _, err := sockets.KeyOf(f); !errors.Is(err, sockets.ErrOtherGroup) {
				t.Errorf("%v, want %v", err, sockets.ErrOtherGroup)
			}
		})
	}
}
