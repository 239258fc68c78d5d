package chaos

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

const (
	flows    = 20000
	ports    = 10  // client sockets, each with a port of its own
	perNet   = 250 // flows of one /24
	inFlight = 400 // datagrams that wait in one socket, at most
	patience = 20  // seconds that an answer may take
)

var server = netip.MustParseAddrPort("127.0.0.1:1194")

// traffic is 20 000 clients on few sockets: each sends from one of many loopback
// addresses (IP_PKTINFO), and knows its answers by the number in them. Its
// methods may not be called concurrently.
type traffic struct {
	sockets [ports]int
	nets    [flows / perNet]netip.Prefix // by the flows' numbers, perNet each
	source  [flows][]byte                // control messages that say which address a flow sends from
	seq     uint32                       // of the last question: answers to earlier ones do not count
}

// newTraffic chooses addresses and ports by two numbers.
func newTraffic(t testing.TB, ns *testnet.NetNS, second byte, firstPort int) *traffic {
	t.Helper()
	c := &traffic{}
	for i := range c.nets {
		c.nets[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{127, second, byte(i), 0}), 24)
	}
	for i := range c.source {
		addr := c.nets[i/perNet].Addr().As4()
		addr[3] = byte(1 + i%perNet/ports)
		c.source[i] = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: addr})
	}
	err := ns.Do(func() error {
		for i := range c.sockets {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return os.NewSyscallError("socket", err)
			}
			c.sockets[i] = fd
			t.Cleanup(func() { unix.Close(fd) })
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20); err != nil {
				return os.NewSyscallError("setsockopt SO_RCVBUFFORCE", err)
			}
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: patience}); err != nil {
				return os.NewSyscallError("setsockopt SO_RCVTIMEO", err)
			}
			if err := unix.Bind(fd, &unix.SockaddrInet4{Port: firstPort + i}); err != nil {
				return os.NewSyscallError("bind", err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// name is the client address of a flow, as "rpsel why" takes it.
func (c *traffic) name(flow int) string {
	addr := c.nets[flow/perNet].Addr().As4()
	addr[3] = byte(1 + flow%perNet/ports)
	at, err := unix.Getsockname(c.sockets[flow%ports])
	if err != nil {
		return netip.AddrFrom4(addr).String()
	}
	return netip.AddrPortFrom(netip.AddrFrom4(addr), uint16(at.(*unix.SockaddrInet4).Port)).String()
}

// ask sends a datagram from each of these flows, all different, and returns who
// answered, in the same order: "" for nobody.
func (c *traffic) ask(which []int) (answers []string, err error) {
	c.seq++
	answers = make([]string, len(which))
	var bySocket [ports][]int // positions in which
	for at, flow := range which {
		bySocket[flow%ports] = append(bySocket[flow%ports], at)
	}
	for socket, positions := range bySocket {
		for len(positions) > 0 {
			n := min(inFlight, len(positions))
			if err := c.askSome(c.sockets[socket], which, positions[:n], answers); err != nil {
				return nil, err
			}
			positions = positions[n:]
		}
	}
	return answers, nil
}

func (c *traffic) askSome(fd int, which, positions []int, answers []string) error {
	to := &unix.SockaddrInet4{Addr: server.Addr().As4(), Port: int(server.Port())}
	var question [12]byte
	binary.BigEndian.PutUint32(question[:], c.seq)
	for _, at := range positions {
		binary.BigEndian.PutUint64(question[4:], uint64(at))
		if err := unix.Sendmsg(fd, question[:], c.source[which[at]], to, 0); err != nil {
			return fmt.Errorf("ask as %s: %w", c.name(which[at]), err)
		}
	}
	var answer [64]byte
	for left := len(positions); left > 0; {
		n, _, err := unix.Recvfrom(fd, answer[:], 0)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return nil // that was patience
		case err != nil:
			return os.NewSyscallError("recvfrom", err)
		case n > len(question) && binary.BigEndian.Uint32(answer[:]) == c.seq:
			answers[binary.BigEndian.Uint64(answer[4:])] = string(answer[len(question):n])
			left--
		}
	}
	return nil
}
