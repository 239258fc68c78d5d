package hostile

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

// offload is what the sender of a packet has left to do, as a virtual machine's does to its
// host (struct virtio_net_hdr).
type offload struct {
	flags, kind byte
	linear      int // bytes of the packet in the linear part of a large buffer; 0: as the kernel likes
	size        int // of the payload of what the packet is to become
	checksum    int // where what is to be summed begins, if not with UDP
}

// header makes the one in front of a packet whose IP header has this size.
func (o offload) header(ip int) []byte {
	h := []byte{o.flags, o.kind}
	for _, n := range []int{o.linear, o.size, ip + o.checksum, 6} {
		h = binary.NativeEndian.AppendUint16(h, uint16(n))
	}
	return h
}

// long is how many times the payload is in a packet that is larger than a page.
const long = 30

// undone makes a packet with its payload n times, each of size bytes, of which f tells what
// is left to do.
func undone(n int, f func(ip, size int, how []byte) offload) func(from, to netip.AddrPort, payload, how []byte) [][]byte {
	return func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		ip := sizeIPv6
		if from.Addr().Is4() {
			ip = sizeIPv4
		}
		payload = append(payload, make([]byte, max(wagon-len(payload), 0))...)
		o := f(ip, len(payload), how)
		p := simple(from, to, slices.Repeat(payload, n))
		switch {
		case o.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0:
			binary.BigEndian.PutUint16(p[ip+6:], ^testnet.Checksum(pseudo(from.Addr(), to.Addr(), len(p)-ip)))
		case o.flags&unix.VIRTIO_NET_HDR_F_DATA_VALID != 0:
			p[ip+6] ^= 0x5a
		}
		return [][]byte{append(o.header(ip), p...)}
	}
}

// openOffload makes a tun device whose packets have what is left to do in front.
func (w *world) openOffload() (err error) {
	if w.offload, err = testnet.OpenTun("offload", unix.IFF_TUN|unix.IFF_VNET_HDR); err != nil {
		return err
	}
	raw, err := w.offload.SyscallConn()
	if err != nil {
		return err
	}
	// The driver that can be asked to make trains takes them (TUN_F_CSUM, TUN_F_USO4, TUN_F_USO6).
	const asked = 0x01 | 0x20 | 0x40
	var inner error
	err = raw.Control(func(fd uintptr) { inner = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, asked) })
	w.trains = inner == nil
	if errors.Is(inner, unix.EINVAL) {
		inner = nil
	}
	return errors.Join(err, os.NewSyscallError("ioctl TUNSETOFFLOAD", inner))
}
