package loader_test

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// Packets that are not simple are tracked under the right client all the same:
// empty ones, those whose payload is not in the linear part (a datagram of
// 60 000 bytes has its header there and no more), and IPv6 with extension headers
// between the address and the port.
func TestPackets(t *testing.T) {
	// A destination options header that holds nothing but padding (RFC 8200,
	// section 4.6). The kernel fills in the first byte.
	options := string([]byte{0, 0, 1, 4, 0, 0, 0, 0})
	for _, c := range []struct {
		name, network, listen, remote string
		size                          int
		prepare                       func(fd int) error
	}{
		{name: "empty", network: "udp4", listen: "127.0.0.1:1194", remote: "127.0.0.1:1194"},
		{name: "large", network: "udp4", listen: "127.0.0.1:1194", remote: "127.0.0.1:1194", size: 60000},
		{name: "empty v6", network: "udp6", listen: "[::]:1194", remote: "[::1]:1194"},
		{name: "large v6", network: "udp6", listen: "[::]:1194", remote: "[::1]:1194", size: 60000},
		{name: "large v4 on dual stack", network: "udp6", listen: "[::]:1194", remote: "127.0.0.1:1194", size: 60000},
		{name: "destination options", network: "udp6", listen: "[::]:1194", remote: "[::1]:1194", size: 4, prepare: func(fd int) error {
			return unix.SetsockoptString(fd, unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, options)
		}},
		{name: "hop-by-hop options", network: "udp6", listen: "[::]:1194", remote: "[::1]:1194", size: 4, prepare: func(fd int) error {
			return unix.SetsockoptString(fd, unix.IPPROTO_IPV6, unix.IPV6_HOPOPTS, options)
		}},
		{name: "fragments", network: "udp6", listen: "[::]:1194", remote: "[::1]:1194", size: 5000, prepare: func(fd int) error {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU, 1280)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true})
			g := attach(t, fs, ns, noSettle)
			var client netip.AddrPort
			err := ns.Do(func() error {
				conn, err := net.Dial("udp", c.remote)
				if err != nil {
					return err
				}
				defer conn.Close()
				client = conn.LocalAddr().(*net.UDPAddr).AddrPort()
				if c.prepare != nil {
					raw, err := conn.(*net.UDPConn).SyscallConn()
					if err != nil {
						return err
					}
					raw.Control(func(fd uintptr) { err = c.prepare(int(fd)) })
					if err != nil {
						return err
					}
				}
				for range 3 {
					if _, err := conn.Write(make([]byte, c.size)); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			await(t, fs, g.Key(), "all packets", func(*loader.Group) bool { return status(t, g).Counters.Runs >= 3 })
			s := status(t, g)
			if s.Counters != (loader.Counters{Runs: 3, New: 1, Hit: 2}) {
				t.Errorf("counters %+v", s.Counters)
			}
			for f, err := range g.Flows() {
				if err != nil || f.Client != client {
					t.Errorf("client %v, %v, want %v", f.Client, err, client)
				}
			}
		})
	}
}
