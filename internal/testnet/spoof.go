package testnet

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	udpSize = 8
	// SpoofedSize is the size of a spoofed packet's payload.
	SpoofedSize = 12
	// SpoofedBatch is how many packets are sent at a time.
	SpoofedBatch = 64
)

// Spoofer writes UDP packets with any source, by a raw socket. It is one
// goroutine's.
type Spoofer struct {
	fd     int
	target netip.AddrPort
	header int // size of the IP header
	packet [SpoofedBatch][]byte
	iov    [SpoofedBatch]unix.Iovec
	msg    [SpoofedBatch]message
	n      int // packets that wait in the batch
}

// message is struct mmsghdr (sendmmsg(2)).
type message struct {
	header unix.Msghdr
	sent   uint32
}

// NewSpoofer sends to a target in a namespace, the loopback's or another one that
// is routed there. The caller closes it.
func NewSpoofer(ns *NetNS, target netip.AddrPort) (*Spoofer, error) {
	s := &Spoofer{target: target, header: 20}
	family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	if target.Addr().Is6() {
		s.header = 40
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: target.Addr().As16()}
	}
	err := ns.Do(func() (err error) {
		// IPPROTO_RAW: the IP header is ours (raw(7), ipv6(7)).
		if s.fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.Connect(s.fd, to); err != nil {
			unix.Close(s.fd)
			return os.NewSyscallError("connect", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := range s.packet {
		p := make([]byte, s.header+udpSize+SpoofedSize)
		if s.header == 20 {
			p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
			binary.BigEndian.PutUint16(p[4:], 1) // or the kernel would look for a number
			copy(p[16:], target.Addr().AsSlice())
		} else {
			p[0], p[6], p[7] = 0x60, unix.IPPROTO_UDP, 64
			binary.BigEndian.PutUint16(p[4:], udpSize+SpoofedSize)
			copy(p[24:], target.Addr().AsSlice())
		}
		udp := p[s.header:]
		binary.BigEndian.PutUint16(udp[2:], target.Port())
		binary.BigEndian.PutUint16(udp[4:], udpSize+SpoofedSize)
		s.packet[i] = p
		s.iov[i] = unix.Iovec{Base: &p[0]}
		s.iov[i].SetLen(len(p))
		s.msg[i].header.Iov = &s.iov[i]
		s.msg[i].header.SetIovlen(1)
	}
	return s, nil
}

// Close gives back the socket. What waits in the batch is not sent.
func (s *Spoofer) Close() { unix.Close(s.fd) }

// Put adds a packet to the batch, and sends that when it is full.
func (s *Spoofer) Put(source netip.AddrPort, payload [SpoofedSize]byte) error {
	p := s.packet[s.n]
	udp := p[s.header:]
	if s.header == 20 {
		from := source.Addr().As4()
		copy(p[12:], from[:])
	} else {
		from := source.Addr().As16()
		copy(p[8:], from[:])
	}
	binary.BigEndian.PutUint16(udp, source.Port())
	copy(udp[udpSize:], payload[:])
	if s.header == 40 { // IPv4 may go without
		binary.BigEndian.PutUint16(udp[6:], 0)
		binary.BigEndian.PutUint16(udp[6:], udpChecksum(p))
	}
	if s.n++; s.n == SpoofedBatch {
		return s.Flush()
	}
	return nil
}

// Flush sends the batch.
func (s *Spoofer) Flush() error {
	for first := 0; first < s.n; {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&s.msg[first])), uintptr(s.n-first), 0, 0, 0)
		// ENOBUFS is the queue of the loopback: the packet is lost, as on a wire.
		switch {
		case errno == 0:
			first += int(n)
		case errors.Is(errno, unix.ENOBUFS):
			first++
		case !errors.Is(errno, unix.EINTR):
			return os.NewSyscallError("sendmmsg", errno)
		}
	}
	s.n = 0
	return nil
}

// udpChecksum is that of the UDP datagram in an IPv6 packet without options (RFC
// 8200, section 8.1): over addresses, length and protocol, header and payload.
func udpChecksum(p []byte) uint16 {
	sum := uint32(len(p)-40) + unix.IPPROTO_UDP
	for i := 8; i < len(p); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return max(1, ^uint16(sum)) // 0 would say that there is none
}
