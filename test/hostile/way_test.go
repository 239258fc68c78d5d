package hostile

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

// way is how packets come to the namespace, and so what the kernel has taken off before
// the program sees them.
type way struct {
	name string
	// open prepares the namespace, whose thread calls it, and returns what puts a packet
	// there. *testnet.Unavailable: this kernel has no such thing.
	open func(t testing.TB, w *world) (sender, error)
	// lost tells that nothing arrives.
	lost bool
}

// sender puts an IP packet onto a way. An error is that of a kernel that does not take it.
type sender func(packet []byte) error

// alone is the way of a packet with nothing around it, the first of ways.
const alone = 0

// Answers always leave by the wire: the namespace's addresses are that one's, and Linux
// takes packets to them from any device.
var ways = []way{
	{name: "alone", open: func(_ testing.TB, w *world) (sender, error) { return w.wire.Send, nil }},
	{name: "Ethernet", open: tagged("tap")},
	{name: "priority tag", open: tagged("tap-p", tag{cTag, 0})},
	{name: "two priority tags", open: tagged("tap-pp", tag{sTag, 0}, tag{cTag, 0})},
	{name: "priority tag by the device", open: offloadedTag("tap-o", tag{cTag, 0})},
	{name: "tag of no VLAN", open: tagged("tap-none", tag{cTag, 3}), lost: true},
	{name: "tag of no VLAN by the device", open: offloadedTag("tap-o-none", tag{cTag, 3}), lost: true},
	{name: "VLAN", open: vlan("tap-v", tag{cTag, 5})},
	{name: "VLAN in a VLAN", open: vlan("tap-vv", tag{sTag, 7}, tag{cTag, 5})},
	{name: "headers in fragments of the buffer", open: scattered},
	{name: "cut by XDP", open: cutByXDP},
	{name: "VXLAN", open: vxlan},
	{name: "GRE", open: gre},
	{name: "either in IPv4", open: inIPv4},
	{name: "either in IPv6", open: inIPv6},
	{name: "either in segment routing", open: segmented},
	{name: "ESP", open: esp},
}

// openWays opens all that this kernel has.
func (w *world) openWays(t testing.TB) {
	t.Helper()
	w.senders, w.lacks = make([]sender, len(ways)), make([]error, len(ways))
	for i, way := range ways {
		err := w.ns.Do(func() (err error) {
			w.senders[i], err = way.open(t, w)
			return err
		})
		if _, lacks := errors.AsType[*testnet.Unavailable](err); lacks {
			w.lacks[i] = err
		} else if err != nil {
			t.Fatalf("%s: %v", way.name, err)
		}
	}
}

// lenient makes the namespace take packets that another would not expect: with addresses of
// another device's, and with a list of segments. The devices to come inherit it.
func lenient() error {
	return errors.Join(
		os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("0"), 0),
		os.WriteFile("/proc/sys/net/ipv4/conf/default/rp_filter", []byte("0"), 0),
		os.WriteFile("/proc/sys/net/ipv6/conf/all/seg6_enabled", []byte("1"), 0),
		os.WriteFile("/proc/sys/net/ipv6/conf/default/seg6_enabled", []byte("1"), 0),
	)
}

// unless makes an error that says that this kernel has no such thing Unavailable.
func unless(what string, err error) error {
	for _, lacks := range []error{unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.ENOENT, unix.ENOSYS} {
		if errors.Is(err, lacks) {
			return &testnet.Unavailable{What: what, Err: err}
		}
	}
	return err
}

// tap is a device that takes Ethernet frames.
type tap struct {
	file *os.File
	link netlink.Link
}

func openTap(t testing.TB, name string, flags uint16) (*tap, error) {
	file, err := testnet.OpenTun(name, unix.IFF_TAP|flags)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { file.Close() })
	link, err := netlink.LinkByName(name)
	return &tap{file, link}, err
}

// etherType of a packet, by its version.
func etherType(packet []byte) uint16 {
	if len(packet) > 0 && packet[0]>>4 == 6 {
		return unix.ETH_P_IPV6
	}
	return unix.ETH_P_IP
}

// tag is a VLAN tag; with id 0 it has a priority alone.
type tag struct{ protocol, id uint16 }

// The protocols of tags: a customer's, and a service provider's around that.
const (
	cTag = 0x8100
	sTag = 0x88a8
)

// frame makes one, with tags.
func frame(to netlink.Link, packet []byte, tags ...tag) []byte {
	f := slices.Concat(to.Attrs().HardwareAddr, []byte{2, 0, 0, 0, 0, 1})
	for _, tag := range tags {
		f = binary.BigEndian.AppendUint16(f, tag.protocol)
		f = binary.BigEndian.AppendUint16(f, 5<<13|tag.id)
	}
	return append(binary.BigEndian.AppendUint16(f, etherType(packet)), packet...)
}

// tagged sends frames with tags in the frame.
func tagged(name string, tags ...tag) func(testing.TB, *world) (sender, error) {
	return func(t testing.TB, _ *world) (sender, error) {
		dev, err := openTap(t, name, 0)
		if err != nil {
			return nil, err
		}
		return func(packet []byte) error {
			_, err := dev.file.Write(frame(dev.link, packet, tags...))
			return err
		}, nil
	}
}

// vlan sends tagged frames to a device that has VLANs, one in the other.
func vlan(name string, tags ...tag) func(testing.TB, *world) (sender, error) {
	send := tagged(name, tags...)
	return func(t testing.TB, w *world) (sender, error) {
		f, err := send(t, w)
		if err != nil {
			return nil, err
		}
		below := name
		for _, tag := range tags {
			parent, err := netlink.LinkByName(below)
			if err != nil {
				return nil, err
			}
			below += "." + strconv.Itoa(int(tag.id))
			if err := add(&netlink.Vlan{
				LinkAttrs: netlink.LinkAttrs{Name: below, ParentIndex: parent.Attrs().Index},
				VlanId:    int(tag.id), VlanProtocol: netlink.VlanProtocol(tag.protocol),
			}); err != nil {
				return nil, err
			}
		}
		return f, nil
	}
}

// add makes a device and sets it up.
func add(l netlink.Link) error {
	if err := netlink.LinkAdd(l); err != nil {
		return unless(l.Type(), err)
	}
	return netlink.LinkSetUp(l)
}

// offloadedTag sends frames that get a tag beside the frame, as from a network card that
// takes it off. A second one in the frame is what the kernel makes of two itself.
func offloadedTag(name string, tag tag) func(testing.TB, *world) (sender, error) {
	return func(t testing.TB, w *world) (sender, error) {
		send, err := tagged(name)(t, w)
		if err != nil {
			return nil, err
		}
		program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.SchedCLS, License: "Dual MIT/GPL",
			Instructions: asm.Instructions{
				asm.Mov.Imm(asm.R2, int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, tag.protocol)))),
				asm.Mov.Imm(asm.R3, int32(tag.id)),
				asm.FnSkbVlanPush.Call(),
				asm.Mov.Imm(asm.R0, 0), asm.Return(), // TC_ACT_OK
			},
		})
		if err != nil {
			return nil, err
		}
		defer program.Close()
		dev, err := netlink.LinkByName(name)
		if err != nil {
			return nil, err
		}
		attrs := netlink.QdiscAttrs{LinkIndex: dev.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}
		if err := netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: attrs}); err != nil {
			return nil, unless("clsact", err)
		}
		return send, unless("cls_bpf", netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: dev.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
			Fd:          program.FD(), Name: "tag", DirectAction: true,
		}))
	}
}

// scattered sends frames of which only the Ethernet header is in the linear part of the
// buffer; the rest is in pages, the first with half an IP header. They come by GRO.
func scattered(t testing.TB, _ *world) (sender, error) {
	const page = 4096
	dev, err := openTap(t, "tap-frags", unix.IFF_NAPI|unix.IFF_NAPI_FRAGS)
	if err != nil {
		return nil, err
	}
	raw, err := dev.file.SyscallConn()
	if err != nil {
		return nil, err
	}
	return func(packet []byte) (err error) {
		f := frame(dev.link, packet)
		var parts [][]byte
		for _, size := range []int{14, 10} {
			size = min(size, len(f))
			parts, f = append(parts, f[:size]), f[size:]
		}
		for len(f) > 0 {
			size := min(page, len(f))
			parts, f = append(parts, f[:size]), f[size:]
		}
		return errors.Join(raw.Write(func(fd uintptr) bool {
			_, err = unix.Writev(int(fd), parts)
			return !errors.Is(err, unix.EAGAIN)
		}), err)
	}, nil
}

// cutByXDP sends frames behind others, which a program cuts off, as one that takes off a
// tunnel's header.
func cutByXDP(t testing.TB, _ *world) (sender, error) {
	const outer = 18
	dev, err := openTap(t, "tap-xdp", 0)
	if err != nil {
		return nil, err
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.XDP, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, outer), asm.FnXdpAdjustHead.Call(),
			asm.Mov.Imm(asm.R0, 2), asm.Return(), // XDP_PASS
		},
	})
	if err != nil {
		return nil, err
	}
	defer program.Close()
	l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: dev.link.Attrs().Index, Flags: link.XDPGenericMode})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { l.Close() })
	return func(packet []byte) error {
		// 0x88b5 is for experiments (IEEE 802).
		cut := slices.Concat(dev.link.Attrs().HardwareAddr, []byte{2, 0, 0, 0, 0, 2, 0x88, 0xb5}, make([]byte, outer-14))
		_, err := dev.file.Write(append(cut, frame(dev.link, packet)...))
		return err
	}, nil
}

// The other ends of tunnels.
var (
	far4  = netip.MustParseAddr("198.51.100.200")
	far6  = netip.MustParseAddr("2001:db8:51::200")
	near4 = testnet.WireIPv4.Addr()
	near6 = testnet.WireIPv6.Addr()
)

// protocolOf says what a packet is as the payload of another one.
func protocolOf(packet []byte) byte {
	if etherType(packet) == unix.ETH_P_IPV6 {
		return unix.IPPROTO_IPV6
	}
	return unix.IPPROTO_IPIP
}

// around4 makes the outer packet of a tunnel over IPv4.
func around4(protocol byte, data []byte) []byte {
	p := ipv4(far4, near4, 0, 0, false, nil, data)
	p[9], p[10], p[11] = protocol, 0, 0
	binary.BigEndian.PutUint16(p[10:], testnet.Checksum(p[:sizeIPv4]))
	return p
}

func vxlan(_ testing.TB, w *world) (sender, error) {
	const port, id = 4789, 7
	if err := add(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vxlan"}, VxlanId: id, Port: port, SrcAddr: near4.AsSlice()}); err != nil {
		return nil, err
	}
	dev, err := netlink.LinkByName("vxlan")
	return func(packet []byte) error {
		header := []byte{0x08, 0, 0, 0, 0, 0, id, 0} // RFC 7348
		return w.wire.Send(simple(netip.AddrPortFrom(far4, 50000), netip.AddrPortFrom(near4, port), append(header, frame(dev, packet)...)))
	}, err
}

func gre(_ testing.TB, w *world) (sender, error) {
	return func(packet []byte) error {
		header := binary.BigEndian.AppendUint16([]byte{0, 0}, etherType(packet)) // RFC 2784
		return w.wire.Send(around4(unix.IPPROTO_GRE, append(header, packet...)))
	}, add(&netlink.Gretun{LinkAttrs: netlink.LinkAttrs{Name: "gre"}, Local: near4.AsSlice(), Remote: far4.AsSlice()})
}

func inIPv4(_ testing.TB, w *world) (sender, error) {
	return func(packet []byte) error { return w.wire.Send(around4(protocolOf(packet), packet)) }, errors.Join(
		add(&netlink.Iptun{LinkAttrs: netlink.LinkAttrs{Name: "ipip"}, Local: near4.AsSlice(), Remote: far4.AsSlice()}),
		add(&netlink.Sittun{LinkAttrs: netlink.LinkAttrs{Name: "sit"}, Local: near4.AsSlice(), Remote: far4.AsSlice()}))
}

func inIPv6(_ testing.TB, w *world) (sender, error) {
	return func(packet []byte) error { return w.wire.Send(ipv6(far6, near6, protocolOf(packet), packet)) },
		add(&netlink.Ip6tnl{LinkAttrs: netlink.LinkAttrs{Name: "ip6tnl"}, Local: near6.AsSlice(), Remote: far6.AsSlice()})
}

// segmented sends packets behind a list of segments of which none is left: the kernel takes
// it off without a device (ipv6_srh_rcv in net/ipv6/exthdrs.c).
func segmented(_ testing.TB, w *world) (sender, error) {
	return func(packet []byte) error {
		header := segments(0, near6).bytes(protocolOf(packet))
		return w.wire.Send(ipv6(far6, near6, routing, append(header, packet...)))
	}, nil
}

// esp sends packets in tunnels of IPsec that encrypt with a cipher that does nothing (RFC
// 2410). The policies let all else pass, too.
func esp(_ testing.TB, w *world) (sender, error) {
	const id = 0x5e1
	for _, c := range []struct {
		from, to netip.Addr
		all      string
	}{{far4, near4, "0.0.0.0/0"}, {far6, near6, "::/0"}} {
		err := netlink.XfrmStateAdd(&netlink.XfrmState{
			Src: c.from.AsSlice(), Dst: c.to.AsSlice(), Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TUNNEL, Spi: id,
			Crypt: &netlink.XfrmStateAlgo{Name: "ecb(cipher_null)"},
		})
		if err != nil {
			return nil, unless("ESP", err)
		}
		_, all, err := net.ParseCIDR(c.all)
		if err != nil {
			return nil, err
		}
		if err := netlink.XfrmPolicyAdd(&netlink.XfrmPolicy{
			Src: all, Dst: all, Dir: netlink.XFRM_DIR_IN,
			Tmpls: []netlink.XfrmPolicyTmpl{{Src: c.from.AsSlice(), Dst: c.to.AsSlice(), Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TUNNEL, Optional: 1}},
		}); err != nil {
			return nil, err
		}
	}
	return func(packet []byte) error {
		next := protocolOf(packet)
		data := binary.BigEndian.AppendUint32(nil, id) // RFC 4303
		data = append(binary.BigEndian.AppendUint32(data, 1), packet...)
		var pad byte
		for ; len(data)%4 != 2; pad++ {
			data = append(data, pad+1)
		}
		data = append(data, pad, next)
		if next == unix.IPPROTO_IPV6 {
			return w.wire.Send(ipv6(far6, near6, unix.IPPROTO_ESP, data))
		}
		return w.wire.Send(around4(unix.IPPROTO_ESP, data))
	}, nil
}

// P1, P8: packets of any shape go where their client's flow is by whatever way they come.
// The control of tags are those ways that lose all.
func TestWays(t *testing.T) {
	w := newWorld(t, true)
	plain := slices.DeleteFunc(slices.Clone(shapes), func(s shape) bool { return s.offloaded })
	for i, way := range ways {
		if i == alone {
			continue // TestShapes
		}
		t.Run(way.name, func(t *testing.T) {
			if u, lacks := errors.AsType[*testnet.Unavailable](w.lacks[i]); lacks {
				u.SkipHere(t)
			}
			w.try(t, i, 2, plain...)
		})
	}
}
