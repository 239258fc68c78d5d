package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

// nat is between a client and its server: what the client sends to one address
// comes to the server from another, and from a port that can change.
type nat struct {
	t      testing.TB
	ns     *testnet.NetNS
	front  *net.UDPConn // for the client
	source netip.Addr
	server netip.AddrPort
	up     atomic.Pointer[net.UDPConn] // for the server
	client atomic.Pointer[net.UDPAddr]
}

// newNAT makes a NAT with an address of its own in the namespace, the number'th of
// the network that it shares with the server.
func newNAT(t testing.TB, ns *testnet.NetNS, number int, server netip.AddrPort) *nat {
	t.Helper()
	addr := ns.IPv4.As4()
	addr[3] = byte(100 + number)
	n := &nat{t: t, ns: ns, source: netip.AddrFrom4(addr), server: server}
	err := ns.Do(func() error {
		veth, err := netlink.LinkByName("veth")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(n.source.String() + "/24")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(veth, a); err != nil {
			return err
		}
		n.front, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.front.Close() })
	n.rebind()
	go func() {
		buf := make([]byte, 64<<10)
		for {
			size, from, err := n.front.ReadFromUDP(buf)
			if err != nil {
				return // closed
			}
			n.client.Store(from)
			n.up.Load().Write(buf[:size])
		}
	}()
	return n
}

// port is where the client finds it.
func (n *nat) port() int { return n.front.LocalAddr().(*net.UDPAddr).Port }

// rebind gives the client another port. What was sent to the one before still
// comes through.
func (n *nat) rebind() {
	n.t.Helper()
	var up *net.UDPConn
	err := n.ns.Do(func() (err error) {
		up, err = net.DialUDP("udp4", &net.UDPAddr{IP: n.source.AsSlice()}, net.UDPAddrFromAddrPort(n.server))
		return err
	})
	if err != nil {
		n.t.Fatal(fmt.Errorf("rebind %s: %w", n.source, err))
	}
	n.t.Cleanup(func() { up.Close() })
	n.up.Store(up)
	go func() {
		buf := make([]byte, 64<<10)
		for {
			size, err := up.Read(buf)
			if errors.Is(err, unix.ECONNREFUSED) {
				continue // the server is gone for the moment
			}
			if err != nil {
				return // closed
			}
			if to := n.client.Load(); to != nil {
				n.front.WriteToUDP(buf[:size], to)
			}
		}
	}()
}
