package hostile

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

const (
	sizeIPv4 = 20
	sizeIPv6 = 40
	sizeUDP  = 8
)

// udp makes a datagram with its header and checksum.
func udp(from, to netip.AddrPort, payload []byte) []byte {
	d := make([]byte, sizeUDP, sizeUDP+len(payload))
	binary.BigEndian.PutUint16(d, from.Port())
	binary.BigEndian.PutUint16(d[2:], to.Port())
	binary.BigEndian.PutUint16(d[4:], uint16(sizeUDP+len(payload)))
	d = append(d, payload...)
	sum := testnet.Checksum(append(pseudo(from.Addr(), to.Addr(), len(d)), d...))
	if sum == 0 {
		sum = 0xffff // 0 would say that there is none
	}
	binary.BigEndian.PutUint16(d[6:], sum)
	return d
}

// pseudo is what is summed before a datagram of this size (RFC 8200, section 8.1; that of
// IPv4 adds up to the same).
func pseudo(from, to netip.Addr, size int) []byte {
	p := append(from.AsSlice(), to.AsSlice()...)
	p = binary.BigEndian.AppendUint32(p, uint32(size))
	return binary.BigEndian.AppendUint32(p, unix.IPPROTO_UDP)
}

// ipv4 makes a packet, with options of up to 40 bytes, a multiple of four. Of a fragment,
// offset is where its data belongs.
func ipv4(from, to netip.Addr, id uint16, offset int, more bool, options, data []byte) []byte {
	p := make([]byte, sizeIPv4, sizeIPv4+len(options)+len(data))
	p[0], p[8], p[9] = 4<<4|byte((sizeIPv4+len(options))/4), 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(p[2:], uint16(sizeIPv4+len(options)+len(data)))
	binary.BigEndian.PutUint16(p[4:], id)
	flags := uint16(offset / 8)
	if more {
		flags |= 0x2000
	}
	binary.BigEndian.PutUint16(p[6:], flags)
	copy(p[12:], from.AsSlice())
	copy(p[16:], to.AsSlice())
	p = append(p, options...)
	binary.BigEndian.PutUint16(p[10:], testnet.Checksum(p))
	return append(p, data...)
}

// ipv6 makes a packet whose first header after the fixed one has this number.
func ipv6(from, to netip.Addr, next byte, data []byte) []byte {
	p := make([]byte, sizeIPv6, sizeIPv6+len(data))
	p[0], p[6], p[7] = 6<<4, next, 64
	binary.BigEndian.PutUint16(p[4:], uint16(len(data)))
	copy(p[8:], from.AsSlice())
	copy(p[24:], to.AsSlice())
	return append(p, data...)
}

// simple makes the packet that there would be if nothing were wrong.
func simple(from, to netip.AddrPort, payload []byte) []byte {
	d := udp(from, to, payload)
	if from.Addr().Is4() {
		return ipv4(from.Addr(), to.Addr(), 0, 0, false, nil, d)
	}
	return ipv6(from.Addr(), to.Addr(), unix.IPPROTO_UDP, d)
}

// fragment is a part of a datagram: its bytes from first to end.
type fragment struct{ first, end int }

// fragments makes packets of the parts of a datagram, in this order.
func fragments(from, to netip.AddrPort, id uint16, payload []byte, parts []fragment) (packets [][]byte) {
	d := udp(from, to, payload)
	for _, p := range parts {
		end := min(p.end, len(d))
		first := min(p.first, end) &^ 7
		more := end < len(d)
		if from.Addr().Is4() {
			packets = append(packets, ipv4(from.Addr(), to.Addr(), id, first, more, nil, d[first:end]))
			continue
		}
		header := make([]byte, 8) // RFC 8200, section 4.5
		header[0] = unix.IPPROTO_UDP
		at := uint16(first)
		if more {
			at |= 1
		}
		binary.BigEndian.PutUint16(header[2:], at)
		binary.BigEndian.PutUint32(header[4:], uint32(id))
		packets = append(packets, ipv6(from.Addr(), to.Addr(), unix.IPPROTO_FRAGMENT, append(header, d[first:end]...)))
	}
	return packets
}

// extension is a header between IPv6 and UDP, of 8 bytes and whole multiples of that.
type extension struct {
	number byte
	data   []byte // from the third byte on
}

// bytes are those of the header, before one with this number.
func (e extension) bytes(next byte) []byte {
	size := (2 + len(e.data) + 7) / 8 * 8
	header := make([]byte, size)
	header[0], header[1] = next, byte(size/8-1)
	copy(header[2:], e.data)
	return header
}

// extended makes an IPv6 packet with headers in between.
func extended(from, to netip.AddrPort, payload []byte, chain []extension) []byte {
	data, next := udp(from, to, payload), byte(unix.IPPROTO_UDP)
	for _, e := range slices.Backward(chain) {
		data, next = append(e.bytes(next), data...), e.number
	}
	return ipv6(from.Addr(), to.Addr(), next, data)
}
