package sockets

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Proto is the transport protocol of a reuseport group.
type Proto uint8

// The protocols that have reuseport selection programs.
const (
	UDP Proto = unix.IPPROTO_UDP
	TCP Proto = unix.IPPROTO_TCP
)

// String returns "udp" or "tcp".
func (p Proto) String() string {
	switch p {
	case UDP:
		return "udp"
	case TCP:
		return "tcp"
	default:
		return fmt.Sprintf("proto(%d)", uint8(p))
	}
}

// UnmarshalText accepts "udp" and "tcp".
func (p *Proto) UnmarshalText(text []byte) error {
	switch string(text) {
	case "udp":
		*p = UDP
	case "tcp":
		*p = TCP
	default:
		return fmt.Errorf("protocol %q: use udp or tcp", text)
	}
	return nil
}

// MarshalText is the inverse of UnmarshalText.
func (p Proto) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// Key names a kernel reuseport group: sockets share a group only if they agree
// on all of it (net/ipv4/udp.c udp_reuseport_add_sock, net/ipv4/inet_hashtables.c
// inet_reuseport_add_sock). Keys are comparable.
type Key struct {
	// NetNS is the cookie of the network namespace (SO_NETNS_COOKIE), which
	// is never reused before a reboot. Zero means the caller's namespace,
	// where a function takes a Key.
	NetNS uint64
	// Proto is UDP or TCP.
	Proto Proto
	// Addr is the local address. It is an IPv4 address for AF_INET sockets
	// and an IPv6 one (also "::", also for dual-stack sockets) for AF_INET6.
	Addr netip.AddrPort
	// V6Only is set for AF_INET6 sockets that refuse IPv4 (IPV6_V6ONLY).
	V6Only bool
	// Device is the index of the interface the sockets are bound to
	// (SO_BINDTODEVICE), or zero.
	Device uint32
	// UID owns the sockets.
	UID uint32
}

// String renders a key as people write it, such as "udp 0.0.0.0:1194". Parts
// that are usual (no device, uid 0) are left out, as is V6Only but for "::": a
// socket bound to one IPv6 address takes no IPv4 anyway.
func (k Key) String() string {
	s := fmt.Sprintf("%s %s", k.Proto, k.Addr)
	if k.Device != 0 {
		s += fmt.Sprintf(" dev %d", k.Device)
	}
	if k.V6Only && k.Addr.Addr().IsUnspecified() {
		s += " v6only"
	}
	if k.UID != 0 {
		s += fmt.Sprintf(" uid %d", k.UID)
	}
	return s
}
