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
	flows       = 20000
	ports       = 10  // client sockets, each with a port of its own
	perNet      = 250 // flows of one /24
	questionLen = 12
	inFlight    = 400 // datagrams that wait in one socket, at most
	patience    = 60  // seconds that an answer may take
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
	closing bool                         // sockets of the group close just now: see askSome
	lost    int                          // questions that were asked again for that
}

// newTraffic opens the sockets. The clients have no addresses yet.
func newTraffic(t testing.TB, ns *testnet.NetNS, firstPort int) *traffic {
	t.Helper()
	c := &traffic{}
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
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
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

// readdress lets all clients be others: 127.NUMBER.x.y.
func (c *traffic) readdress(number byte) {
	for i := range c.nets {
		c.nets[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{127, number, byte(i), 0}), 24)
	}
	for i := range c.source {
		addr := c.nets[i/perNet].Addr().As4()
		addr[3] = byte(1 + i%perNet/ports)
		c.source[i] = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: addr})
	}
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

// askSome asks and waits for the answers.
//
// While a socket of a group closes there is a moment in which the kernel finds it
// although it has left the group, and lets it have packets that are another
// member's, without asking any program (net/ipv4/udp.c udp_lib_unhash, tried with
// one that always selects the same member). So what is not answered then is asked
// again.
func (c *traffic) askSome(fd int, which, positions []int, answers []string) error {
	send := func() error {
		to := &unix.SockaddrInet4{Addr: server.Addr().As4(), Port: int(server.Port())}
		var question [questionLen]byte
		binary.BigEndian.PutUint32(question[:], c.seq)
		for _, at := range positions {
			if answers[at] != "" {
				continue
			}
			binary.BigEndian.PutUint64(question[4:], uint64(at))
			if err := unix.Sendmsg(fd, question[:], c.source[which[at]], to, 0); err != nil {
				return fmt.Errorf("ask as %s: %w", c.name(which[at]), err)
			}
		}
		return nil
	}
	if err := send(); err != nil {
		return err
	}
	var answer [64]byte
	for left, waited := len(positions), 0; left > 0; {
		n, _, err := unix.Recvfrom(fd, answer[:], 0)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if waited++; waited == patience {
				return nil
			}
			if !c.closing {
				continue
			}
			c.lost += left
			if err := send(); err != nil {
				return err
			}
		case err != nil:
			return os.NewSyscallError("recvfrom", err)
		case n > questionLen && binary.BigEndian.Uint32(answer[:]) == c.seq:
			at := binary.BigEndian.Uint64(answer[4:])
			if answers[at] == "" {
				left--
			}
			answers[at] = string(answer[questionLen:n])
		}
	}
	return nil
}
