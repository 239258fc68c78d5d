package watch

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/sockets"
)

// Event is about one socket.
type Event struct {
	// Proto and Addr say what it is bound to, or is about to be.
	Proto sockets.Proto
	Addr  netip.AddrPort
	// Cookie identifies the socket until the next boot (SO_COOKIE). That of an
	// MPTCP socket is the one of the TCP socket below it.
	Cookie uint64
	// NetNS is the cookie of its network namespace, 0 if that is not known.
	NetNS uint64
	// PID called bind(2): the process in the initial pid namespace. It is 0 if
	// that is not known, and in another pid namespace it is another process's
	// number, or nobody's. It is a hint where to look; Cookie decides.
	PID int
	// Command is the name of that process, up to 15 bytes.
	Command string
}

// String renders an event as people write it, such as
// "openvpn (pid 4711): udp 0.0.0.0:1194".
func (e Event) String() string {
	if e.PID == 0 {
		return fmt.Sprintf("socket %d: %s %s", e.Cookie, e.Proto, e.Addr)
	}
	return fmt.Sprintf("%s (pid %d): %s %s", e.Command, e.PID, e.Proto, e.Addr)
}

// EventOf turns what a program reported into an Event.
func EventOf(raw bpf.WatchEvent) Event {
	var addr [16]byte
	for i, word := range raw.Addr {
		binary.NativeEndian.PutUint32(addr[4*i:], word)
	}
	ip := netip.AddrFrom16(addr)
	if raw.Family == unix.AF_INET {
		ip = ip.Unmap()
	}
	command, _, _ := bytes.Cut(raw.Command[:], []byte{0})
	return Event{
		Proto:   sockets.Proto(raw.Protocol),
		Addr:    netip.AddrPortFrom(ip, raw.Port),
		Cookie:  raw.Cookie,
		NetNS:   raw.NetnsCookie,
		PID:     int(raw.Pid),
		Command: string(command),
	}
}
