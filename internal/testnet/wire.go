package testnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Wire is a network of TCP clients of whose packets the test decides each: what is
// not sent stays away, what the kernel sends again is seen. The clients are no
// sockets; the other end of a tun device of a namespace is this process. Of UDP it
// takes whole packets.
type Wire struct {
	t         testing.TB
	tun       *os.File
	mu        sync.Mutex
	calls     map[netip.AddrPort]*Call // by client
	datagrams func(Datagram)           // nil: nobody wants them
}

// Datagram is one that the namespace sends to a client.
type Datagram struct {
	From, To netip.AddrPort
	Payload  string
}

// Datagrams makes the wire give what servers send over UDP, one after the other, to f.
func (w *Wire) Datagrams(f func(Datagram)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.datagrams = f
}

// Send puts an IP packet onto the wire, whatever is wrong with it. The error is that of
// a kernel that does not even take it for one. Packets of several goroutines come at the
// same time, each on the sender's CPU (os.File would let one after the other write).
func (w *Wire) Send(packet []byte) error {
	raw, err := w.tun.SyscallConn()
	if err != nil {
		return err
	}
	var wrote error
	err = raw.Control(func(fd uintptr) { _, wrote = unix.Write(int(fd), packet) })
	return errors.Join(err, wrote)
}

// The addresses of a wire: at .1 is the namespace, all others are clients'.
var (
	WireIPv4 = netip.MustParsePrefix("198.51.100.1/24")
	WireIPv6 = netip.MustParsePrefix("2001:db8:51::1/64")
)

// NewWire lays a wire to a namespace, one at most.
func NewWire(t testing.TB, ns *NetNS) *Wire {
	t.Helper()
	w := &Wire{t: t, calls: map[netip.AddrPort]*Call{}}
	err := ns.Do(w.open)
	if u, lacks := errors.AsType[*Unavailable](err); lacks {
		u.Skip(t)
	}
	must(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.read()
	}()
	t.Cleanup(func() {
		w.tun.Close()
		<-done
	})
	return w
}

// open makes the device in the namespace of the calling thread.
func (w *Wire) open() error {
	var err error
	if w.tun, err = OpenTun("wire", unix.IFF_TUN); err != nil {
		return err
	}
	link, err := netlink.LinkByName("wire")
	if err != nil {
		return err
	}
	for _, prefix := range []netip.Prefix{WireIPv4, WireIPv6} {
		addr, err := netlink.ParseAddr(prefix.String())
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD // usable at once
		if err := netlink.AddrAdd(link, addr); err != nil {
			return err
		}
		if err := awaitLocal(prefix.Addr()); err != nil {
			return err
		}
	}
	return nil
}

// OpenTun makes a tun or tap device in the namespace of the calling thread, and sets it
// up. It goes with the file.
func OpenTun(name string, flags uint16) (*os.File, error) {
	const path = "/dev/net/tun"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM) {
		return nil, &Unavailable{"tun devices", err}
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(flags | unix.IFF_NO_PI)
		err = os.NewSyscallError("ioctl TUNSETIFF", ioctl(fd, unix.TUNSETIFF, request))
	}
	var link netlink.Link
	if err == nil {
		link, err = netlink.LinkByName(name)
	}
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// awaitLocal returns when packets to an address are taken in, which is a moment
// after IPv6 got it (net/ipv6/addrconf.c addrconf_dad_work).
func awaitLocal(addr netip.Addr) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		routes, err := netlink.RouteGet(addr.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is not local: %v: %w", addr, routes, err)
		}
	}
}

func ioctl(fd int, request uint, arg *unix.Ifreq) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(arg))); errno != 0 {
		return errno
	}
	return nil
}

// read gives what the kernel sends to the calls, until the device is closed.
func (w *Wire) read() {
	packet := make([]byte, 1<<16)
	for {
		n, err := w.tun.Read(packet)
		if err != nil {
			return
		}
		client, s, ok := parse(packet[:n])
		if !ok {
			w.mu.Lock()
			f := w.datagrams
			w.mu.Unlock()
			if d, ok := parseDatagram(packet[:n]); ok && f != nil {
				f(d)
			}
			continue
		}
		w.mu.Lock()
		c := w.calls[client]
		w.mu.Unlock()
		if c != nil {
			c.got <- s
		}
	}
}

// The flags of a segment.
const (
	flagFIN = 1 << iota
	flagSYN
	flagRST
	flagPSH
	flagACK
)

// segment is what is read of a TCP segment.
type segment struct {
	flags    byte
	seq, ack uint32
	payload  string
}

// Call is a TCP connection to a server that its client makes step by step. Its
// methods may not be called concurrently, but for ACK beside ACK.
type Call struct {
	// Client is the client's address and port.
	Client netip.AddrPort

	wire     *Wire
	server   netip.AddrPort
	got      chan segment
	seq, ack uint32
}

// Call makes a connection, of which nothing is sent yet. The server is an address
// of the namespace.
func (w *Wire) Call(client, server netip.AddrPort) *Call {
	c := &Call{Client: client, wire: w, server: server, got: make(chan segment, 64), seq: uint32(client.Port()) << 16}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls[client] = c
	return c
}

// SYN sends the first packet, with data (TCP Fast Open) or without, and waits for
// the answer.
func (c *Call) SYN(data string) error {
	c.send(flagSYN, data)
	c.seq++
	return c.AwaitSYNACK()
}

// SYNAgain sends the first packet once more, as a client does that heard nothing,
// and waits for the answer.
func (c *Call) SYNAgain() error {
	c.seq--
	c.send(flagSYN, "")
	c.seq++
	return c.AwaitSYNACK()
}

// AwaitSYNACK waits for the answer to the SYN, which the kernel sends once more
// when a second has passed.
func (c *Call) AwaitSYNACK() error {
	s, err := c.await(func(s segment) bool { return s.flags&flagSYN != 0 })
	if err != nil {
		return fmt.Errorf("no SYN-ACK: %w", err)
	}
	c.ack = s.seq + 1
	c.seq = s.ack // it may acknowledge data, too
	return nil
}

// ACK completes the connection.
func (c *Call) ACK() { c.send(flagACK, "") }

// Name waits for what the server that has accepted the connection answers with. It
// is "" if the connection was reset, or nothing came for some seconds. It ends the
// connection.
func (c *Call) Name() string {
	// A connection that nobody has need not be told before the client sends.
	c.send(flagACK|flagPSH, "?")
	s, err := c.await(func(s segment) bool { return s.payload != "" })
	if err != nil {
		return ""
	}
	c.seq += 1
	c.send(flagRST, "")
	return s.payload
}

var errReset = errors.New("connection reset")

// await waits for a segment, and passes over others.
func (c *Call) await(wanted func(segment) bool) (segment, error) {
	timeout := time.After(patience)
	for {
		select {
		case s := <-c.got:
			switch {
			case s.flags&flagRST != 0:
				return s, errReset
			case wanted(s):
				return s, nil
			}
		case <-timeout:
			return segment{}, errors.New("nothing came")
		}
	}
}

const (
	headerIPv4 = 20
	headerIPv6 = 40
	headerTCP  = 20
	headerUDP  = 8
)

// send writes a packet.
func (c *Call) send(flags byte, payload string) {
	c.wire.t.Helper()
	tcp := make([]byte, headerTCP, headerTCP+len(payload))
	binary.BigEndian.PutUint16(tcp, c.Client.Port())
	binary.BigEndian.PutUint16(tcp[2:], c.server.Port())
	binary.BigEndian.PutUint32(tcp[4:], c.seq)
	if flags&flagACK != 0 {
		binary.BigEndian.PutUint32(tcp[8:], c.ack)
	}
	tcp[12], tcp[13] = headerTCP/4<<4, flags
	binary.BigEndian.PutUint16(tcp[14:], 65535) // window
	tcp = append(tcp, payload...)

	from, to := c.Client.Addr().AsSlice(), c.server.Addr().AsSlice()
	pseudo := binary.BigEndian.AppendUint32(append(append([]byte{}, from...), to...), uint32(len(tcp)))
	pseudo = binary.BigEndian.AppendUint32(pseudo, unix.IPPROTO_TCP)
	binary.BigEndian.PutUint16(tcp[16:], Checksum(append(pseudo, tcp...)))

	var ip []byte
	if c.Client.Addr().Is4() {
		ip = make([]byte, headerIPv4)
		ip[0], ip[8], ip[9] = 4<<4|headerIPv4/4, 64, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(ip[2:], uint16(headerIPv4+len(tcp)))
		copy(ip[12:], from)
		copy(ip[16:], to)
		binary.BigEndian.PutUint16(ip[10:], Checksum(ip))
	} else {
		ip = make([]byte, headerIPv6)
		ip[0], ip[6], ip[7] = 6<<4, unix.IPPROTO_TCP, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(len(tcp)))
		copy(ip[8:], from)
		copy(ip[24:], to)
	}
	must(c.wire.t, c.wire.Send(append(ip, tcp...)))
}

// Checksum is the Internet checksum (RFC 1071).
func Checksum(data []byte) uint16 {
	sum := uint32(0)
	for i, b := range data {
		sum += uint32(b) << (8 * (1 - i%2))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// parse reads a packet to a client. It reports false if that is no TCP.
func parse(packet []byte) (client netip.AddrPort, s segment, ok bool) {
	var to netip.Addr
	var tcp []byte
	switch {
	case len(packet) >= headerIPv4+headerTCP && packet[0]>>4 == 4 && packet[9] == unix.IPPROTO_TCP:
		to, _ = netip.AddrFromSlice(packet[16:20])
		tcp = packet[int(packet[0]&15)*4 : binary.BigEndian.Uint16(packet[2:])]
	case len(packet) >= headerIPv6+headerTCP && packet[0]>>4 == 6 && packet[6] == unix.IPPROTO_TCP:
		to, _ = netip.AddrFromSlice(packet[24:40])
		tcp = packet[headerIPv6:]
	default:
		return client, s, false
	}
	s = segment{
		flags: tcp[13], seq: binary.BigEndian.Uint32(tcp[4:]), ack: binary.BigEndian.Uint32(tcp[8:]),
		payload: string(tcp[int(tcp[12]>>4)*4:]),
	}
	return netip.AddrPortFrom(to, binary.BigEndian.Uint16(tcp[2:])), s, true
}

// parseDatagram reads a UDP datagram to a client that is not in fragments.
func parseDatagram(packet []byte) (d Datagram, ok bool) {
	var from, to netip.Addr
	var udp []byte
	switch {
	case len(packet) >= headerIPv4+headerUDP && packet[0] == 4<<4|headerIPv4/4 && packet[9] == unix.IPPROTO_UDP:
		from, _ = netip.AddrFromSlice(packet[12:16])
		to, _ = netip.AddrFromSlice(packet[16:20])
		udp = packet[headerIPv4:]
	case len(packet) >= headerIPv6+headerUDP && packet[0]>>4 == 6 && packet[6] == unix.IPPROTO_UDP:
		from, _ = netip.AddrFromSlice(packet[8:24])
		to, _ = netip.AddrFromSlice(packet[24:40])
		udp = packet[headerIPv6:]
	default:
		return d, false
	}
	return Datagram{
		From:    netip.AddrPortFrom(from, binary.BigEndian.Uint16(udp)),
		To:      netip.AddrPortFrom(to, binary.BigEndian.Uint16(udp[2:])),
		Payload: string(udp[headerUDP:]),
	}, true
}
