package sockets

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Bound lists the cookies of the UDP sockets that are bound to a port, or the
// TCP sockets that listen on it, at any address, in the network namespace of
// the calling thread (see NetNS.Do). It asks the kernel's sock_diag and looks at
// no process: cheap enough to be asked again and again whether something
// changed. The order is the kernel's own and says nothing.
//
// For an MPTCP listener it gives the cookie of the TCP socket below.
func Bound(proto Proto, port uint16) ([]uint64, error) {
	var cookies []uint64
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := bound(family, proto, port)
		if err != nil {
			return nil, fmt.Errorf("list %s sockets on port %d: %w", proto, port, err)
		}
		cookies = append(cookies, found...)
	}
	return cookies, nil
}

// maxDumps bounds how often a list is asked for again that changed meanwhile.
const maxDumps = 3

func bound(family uint8, proto Proto, port uint16) (cookies []uint64, err error) {
	for range maxDumps {
		cookies = nil
		request := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		request.AddData(diagRequest{family, proto, port})
		err = request.ExecuteIter(unix.NETLINK_SOCK_DIAG, nl.SOCK_DIAG_BY_FAMILY, func(message []byte) bool {
			if len(message) >= diagCookie+8 && binary.BigEndian.Uint16(message[diagPort:]) == port {
				low := binary.NativeEndian.Uint32(message[diagCookie:])
				high := binary.NativeEndian.Uint32(message[diagCookie+4:])
				cookies = append(cookies, uint64(high)<<32|uint64(low))
			}
			return true
		})
		if !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	return cookies, err
}

// Where things are in struct inet_diag_msg and struct inet_diag_req_v2
// (include/uapi/linux/inet_diag.h).
const (
	diagPort        = 4  // inet_diag_msg.id.idiag_sport
	diagCookie      = 44 // inet_diag_msg.id.idiag_cookie
	diagRequestSize = 56
)

// diagRequest asks for the sockets on a port.
type diagRequest struct {
	family uint8
	proto  Proto
	port   uint16
}

func (diagRequest) Len() int { return diagRequestSize }

func (d diagRequest) Serialize() []byte {
	const listening = 1 << 10 // TCP_LISTEN
	b := make([]byte, diagRequestSize)
	b[0], b[1] = d.family, uint8(d.proto)
	states := uint32(1<<32 - 1)
	if d.proto == TCP {
		states = listening
	}
	binary.NativeEndian.PutUint32(b[4:], states)
	binary.BigEndian.PutUint16(b[8:], d.port)
	return b
}
