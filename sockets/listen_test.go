package sockets_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/sockets"
)

// openGroup is Listen or ListenPacket, by the network.
func openGroup(n int, network, address string) ([]listener, error) {
	var ls []listener
	if network[0] == 'u' {
		conns, err := sockets.ListenPacket(context.Background(), n, network, address)
		for _, c := range conns {
			ls = append(ls, c)
		}
		return ls, err
	}
	tcp, err := sockets.Listen(context.Background(), n, network, address)
	for _, l := range tcp {
		ls = append(ls, l)
	}
	return ls, err
}

// The sockets are one group, in order, and each can be registered.
func TestListen(t *testing.T) {
	for _, c := range []struct {
		network, address string
		n                int
	}{
		{"udp", "127.0.0.1:0", 4}, {"udp", "127.0.0.1:0", 1}, {"udp4", ":0", 3}, {"udp", ":0", 3}, {"udp6", "[::1]:0", 2}, {"udp", "127.0.0.1:53", 3}, {"udp4", "127.0.0.1:53", 1},
		{"tcp", "127.0.0.1:0", 4}, {"tcp", "127.0.0.1:0", 1}, {"tcp4", ":0", 3}, {"tcp", ":0", 3}, {"tcp6", "[::1]:0", 2}, {"tcp", "127.0.0.1:53", 3},
	} {
		t.Run(fmt.Sprintf("%s %s %d", c.network, c.address, c.n), func(t *testing.T) {
			netNS(t)
			before := openFiles(t)
			ls, err := openGroup(c.n, c.network, c.address)
			must(t, err)
			g := findOne(t, ls[0])
			if g.Kernel == 0 || len(ls) != c.n || len(g.Members) != c.n {
				t.Fatalf("%d sockets, group %+v", len(ls), g)
			}
			for i, m := range g.Members {
				if err := m.Check(); err != nil {
					t.Error(err)
				}
				if m.Cookie != cookies(t, ls[i])[0] {
					t.Errorf("member %d is another socket", i)
				}
			}
			for _, l := range ls {
				must(t, l.Close())
			}
			if after := openFiles(t); after > before+1 { // the poller's, once
				t.Errorf("%d descriptors became %d", before, after)
			}
		})
	}
}

func TestListenErrors(t *testing.T) {
	netNS(t)
	taken := map[string]listener{"udp": bind(t, "udp4", "127.0.0.1:53"), "tcp": bind(t, "tcp4", "127.0.0.1:53")}
	before := openFiles(t)
	for network := range taken {
		if _, err := openGroup(2, network, "127.0.0.1:53"); !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("%s on a port in use: %v, want %v", network, err, unix.EADDRINUSE)
		}
		for _, c := range []struct {
			n                int
			network, address string
		}{{0, network, ":0"}, {-1, network, ":0"}, {1, network, "no port"}, {1, network + "5", ":0"}, {1, network, ":70000"}} {
			if _, err := openGroup(c.n, c.network, c.address); err == nil {
				t.Errorf("Listen %+v: no error", c)
			}
		}
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors became %d", before, after)
	}
}

// Port 0 never joins the group of another server, as a plain bind of a socket
// with SO_REUSEPORT may (the control).
func TestListenNewGroup(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		t.Run(network, func(t *testing.T) {
			netNS(t)
			must(t, os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40000"), 0))
			bind(t, network, "127.0.0.1:40000", reuseport)
			if network == "udp" {
				joined := bind(t, network, "127.0.0.1:0", reuseport)
				if p := local(joined).Port(); p != 40000 {
					t.Fatalf("control: port %d", p)
				}
				joined.Close()
			}
			if ls, err := openGroup(2, network, "127.0.0.1:0"); !errors.Is(err, unix.EADDRINUSE) {
				t.Errorf("got %d sockets, %v, want %v", len(ls), err, unix.EADDRINUSE)
			}
		})
	}
}

func ExampleListenPacket() {
	conns, err := sockets.ListenPacket(context.Background(), 3, "udp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, c := range conns {
		defer c.Close()
		fmt.Println(c.LocalAddr().String() == conns[0].LocalAddr().String())
	}
	// Output:
	// true
	// true
	// true
}

func ExampleListen() {
	listeners, err := sockets.Listen(context.Background(), 2, "tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, l := range listeners {
		defer l.Close()
	}
	key, err := sockets.KeyOf(listeners[0])
	if err != nil {
		fmt.Println(err)
		return
	}
	// Every further listener is in the group of the first.
	fmt.Println(key.Proto, sockets.SameGroup(listeners[1], key))
	// Output: tcp <nil>
}
