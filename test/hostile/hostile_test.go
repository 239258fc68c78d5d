package hostile

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

// shape is a way in which a packet is not as it should be.
type shape struct {
	name string
	// make makes the packets of a datagram; none, if the family has no such thing. What
	// the bytes say is up to the shape.
	make func(from, to netip.AddrPort, payload, how []byte) [][]byte
	// taken tells that the server gets it; dropped, that it does not. Neither: that is
	// up to what the bytes say.
	taken, dropped bool
	// offloaded tells that each packet begins with what the sender left to do (offload).
	offloaded bool
	// train is how many datagrams may come of a packet, of taken ones all. 0: one.
	train int
}

// datagrams is how many come of a packet, at most.
func (s shape) datagrams() int { return max(s.train, 1) }

// at is a byte of how, or 0.
func at(how []byte, i int) int {
	if i < len(how) {
		return int(how[i])
	}
	return 0
}

// mangled makes a packet and lets f change it.
func mangled(f func(packet []byte, header int, how []byte) []byte) func(from, to netip.AddrPort, payload, how []byte) [][]byte {
	return func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		header := sizeIPv6
		if from.Addr().Is4() {
			header = sizeIPv4
		}
		return [][]byte{f(simple(from, to, payload), header, how)}
	}
}

// inParts sends a datagram in fragments.
func inParts(parts func(size int, how []byte) []fragment) func(from, to netip.AddrPort, payload, how []byte) [][]byte {
	return func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		return fragments(from, to, id(), payload, parts(sizeUDP+len(payload), how))
	}
}

// id is a number for the fragments of a datagram, none that a datagram has yet.
func id() uint16 { return uint16(ids.Add(1)) }

var ids atomic.Uint32

// cut cuts a datagram into fragments of a size.
func cut(size, each int) (parts []fragment) {
	for first := 0; first < size; first += each {
		parts = append(parts, fragment{first, min(first+each, size)})
	}
	return parts
}

// addrSize is how long an address is in a header of this size, whose end it is.
func addrSize(header int) int {
	if header == sizeIPv4 {
		return 4
	}
	return 16
}

// only makes packets of one family.
func only(v4 bool, f func(from, to netip.AddrPort, payload, how []byte) [][]byte) func(from, to netip.AddrPort, payload, how []byte) [][]byte {
	return func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		if from.Addr().Is4() != v4 {
			return nil
		}
		return f(from, to, payload, how)
	}
}

// elsewhere sends to another address, of everybody.
func elsewhere(v4 bool, addr string) func(from, to netip.AddrPort, payload, how []byte) [][]byte {
	return only(v4, func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		to = netip.AddrPortFrom(netip.MustParseAddr(addr), to.Port())
		return [][]byte{simple(from, to, append([]byte(everybody), payload...))}
	})
}

func headers(chain ...extension) func(from, to netip.AddrPort, payload, how []byte) [][]byte {
	return only(false, func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		return [][]byte{extended(from, to, payload, chain)}
	})
}

// padding fills a header of options (RFC 8200, section 4.2) of 8 bytes, and unknown a
// larger one: with an option to be skipped by who does not know it.
func padding() []byte      { return []byte{1, 4, 0, 0, 0, 0} }
func unknown(n int) []byte { return append([]byte{0x1e, byte(n)}, make([]byte, n)...) }

// most is eight options that fill a header.
func most() []byte { return append(slices.Repeat(unknown(255), 7), unknown(245)...) }

// route is a routing header of a type, with so many addresses left to go.
func route(kind byte, left int, list ...netip.Addr) extension {
	data := []byte{kind, byte(left), 0, 0, 0, 0}
	for _, addr := range list {
		data = append(data, addr.AsSlice()...)
	}
	return extension{routing, data}
}

// segments is the routing header of segment routing (RFC 8754).
func segments(left int, list ...netip.Addr) extension {
	e := route(4, left, list...)
	e.data[2] = byte(len(list) - 1)
	return e
}

const (
	hopByHop    = 0
	routing     = 43
	destination = 60
)

var shapes = []shape{
	{name: "plain", taken: true, make: mangled(func(p []byte, _ int, _ []byte) []byte { return p })},
	{name: "fragments", taken: true, make: inParts(func(size int, _ []byte) []fragment { return cut(size, 16) })},
	{name: "fragments backwards", taken: true, make: inParts(func(size int, _ []byte) []fragment {
		parts := cut(size, 24)
		slices.Reverse(parts)
		return parts
	})},
	{name: "fragments in any order", taken: true, make: inParts(func(size int, how []byte) []fragment {
		parts := cut(size, 8)
		rand.New(rand.NewPCG(uint64(at(how, 0)), 1)).Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
		return parts
	})},
	{name: "a first fragment with no more than the UDP header", taken: true, make: inParts(func(size int, _ []byte) []fragment {
		return []fragment{{0, 8}, {8, size}}
	})},
	{name: "a fragment twice", make: inParts(func(size int, _ []byte) []fragment {
		return []fragment{{0, 16}, {0, 16}, {16, size}}
	})},
	{name: "fragments that overlap", dropped: true, make: inParts(func(size int, _ []byte) []fragment {
		return []fragment{{0, 24}, {16, size}}
	})},
	{name: "fragments without an end", dropped: true, make: inParts(func(size int, _ []byte) []fragment {
		return []fragment{{0, 8}, {8, 16}}
	})},
	{name: "any fragments", make: inParts(func(size int, how []byte) (parts []fragment) {
		for i := 0; i+1 < len(how) && i < 16; i += 2 {
			parts = append(parts, fragment{at(how, i) * size / 256, at(how, i+1) * size / 255})
		}
		return parts
	})},
	{name: "options", taken: true, make: only(true, func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		options := []byte{7, 39, 4} // record route
		options = append(options, make([]byte, 37)...)
		return [][]byte{ipv4(from.Addr(), to.Addr(), 1, 0, false, options, udp(from, to, payload))}
	})},
	{name: "options that do nothing", taken: true, make: only(true, func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		return [][]byte{ipv4(from.Addr(), to.Addr(), 1, 0, false, []byte{1, 1, 1, 0}, udp(from, to, payload))}
	})},
	{name: "any options", make: only(true, func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		options := append(slices.Clone(how[:min(len(how), 40)]), make([]byte, 40)...)[:(min(len(how), 40)+3)/4*4]
		return [][]byte{ipv4(from.Addr(), to.Addr(), 1, 0, false, options, udp(from, to, payload))}
	})},
	{name: "hop-by-hop options", taken: true, make: headers(extension{hopByHop, padding()})},
	{name: "a router alert", taken: true, make: headers(extension{hopByHop, []byte{5, 2, 0, 0, 1, 0}})},
	{name: "the length of a jumbogram", dropped: true, make: headers(extension{hopByHop, []byte{0xc2, 4, 0, 0, 0, 100}})},
	{name: "destination options", taken: true, make: headers(extension{destination, unknown(12)})},
	{name: "a home address", dropped: true, make: headers(extension{destination, append([]byte{0xc9, 16}, client(1).Addr().AsSlice()...)})},
	{name: "a routing header", taken: true, make: headers(route(99, 0))},
	{name: "a routing header with somewhere left to go", dropped: true, make: headers(route(99, 1))},
	{name: "routing type 0", taken: true, make: headers(route(0, 0, near6))},
	{name: "routing type 0 with us left to go", dropped: true, make: headers(route(0, 1, near6))},
	// Whether these come in is a matter of the kernel's configuration (CONFIG_IPV6_MIP6).
	{name: "routing type 2", make: headers(route(2, 0, near6))},
	{name: "routing type 2 with us left to go", make: headers(route(2, 1, near6))},
	{name: "routing type 3", dropped: true, make: headers(route(3, 0, near6))},
	{name: "segments", taken: true, make: headers(segments(0, near6, far6))},
	{name: "segments with us left to go", taken: true, make: headers(segments(1, near6, far6))},
	{name: "segments with others left to go", dropped: true, make: headers(segments(1, far6, near6))},
	{name: "more segments left than there are", dropped: true, make: headers(segments(2, near6, near6))},
	{name: "a fragment that is all", taken: true, make: headers(extension{unix.IPPROTO_FRAGMENT, make([]byte, 6)})},
	{name: "a fragment that is all, between headers", taken: true, make: headers(extension{hopByHop, padding()}, route(0, 0, near6), extension{unix.IPPROTO_FRAGMENT, make([]byte, 6)}, extension{destination, padding()})},
	{name: "a fragment that is all, twice", dropped: true, make: headers(extension{unix.IPPROTO_FRAGMENT, make([]byte, 6)}, extension{unix.IPPROTO_FRAGMENT, make([]byte, 6)})},
	{name: "all headers", taken: true, make: headers(extension{hopByHop, padding()}, extension{destination, padding()}, route(99, 0), extension{destination, unknown(244)})},
	// As many options as Linux takes (max_hbh_opts_number, max_dst_opts_number), in headers as
	// long as they can be: where UDP begins is not in the linear part of the buffer.
	{name: "the longest headers", taken: true, make: headers(extension{hopByHop, most()}, extension{destination, most()}, segments(0, slices.Repeat([]netip.Addr{near6}, 127)...), extension{destination, most()})},
	{name: "an option too many", dropped: true, make: headers(extension{destination, slices.Concat(slices.Repeat(unknown(1), 8), unknown(4))})},
	{name: "any headers", make: only(false, func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		var chain []extension
		for i := 0; i < len(how) && i < 32; i += 8 {
			number := []byte{hopByHop, routing, destination, unix.IPPROTO_FRAGMENT, how[i]}[at(how, i)%5]
			chain = append(chain, extension{number, how[i:min(i+8, len(how))]})
		}
		return [][]byte{extended(from, to, payload, chain)}
	})},
	{name: "fragments with headers", taken: true, make: only(false, func(from, to netip.AddrPort, payload, how []byte) (packets [][]byte) {
		for _, p := range fragments(from, to, id(), payload, cut(sizeUDP+len(payload), 16)) {
			options := append([]byte{p[6], 0}, padding()...)
			packets = append(packets, ipv6(from.Addr(), to.Addr(), hopByHop, append(options, p[sizeIPv6:]...)))
		}
		return packets
	})},
	{name: "a bad checksum", dropped: true, make: mangled(func(p []byte, header int, _ []byte) []byte {
		p[header+6] ^= 0x5a
		return p
	})},
	{name: "no checksum", make: mangled(func(p []byte, header int, _ []byte) []byte {
		p[header+6], p[header+7] = 0, 0 // IPv4 may go without
		return p
	})},
	{name: "a UDP length beyond the end", dropped: true, make: mangled(func(p []byte, header int, how []byte) []byte {
		binary.BigEndian.PutUint16(p[header+4:], uint16(len(p)-header+1+at(how, 0)))
		return p
	})},
	{name: "a UDP length of nothing", make: mangled(func(p []byte, header int, _ []byte) []byte {
		binary.BigEndian.PutUint16(p[header+4:], 0)
		return p
	})},
	{name: "a UDP length below its header", dropped: true, make: mangled(func(p []byte, header int, _ []byte) []byte {
		binary.BigEndian.PutUint16(p[header+4:], 7)
		return p
	})},
	{name: "a shorter UDP length", make: mangled(func(p []byte, header int, how []byte) []byte {
		binary.BigEndian.PutUint16(p[header+4:], uint16(sizeUDP+at(how, 0)%(len(p)-header-sizeUDP+1)))
		p[header+6], p[header+7] = 0, 0
		return p
	})},
	{name: "less than a UDP header", dropped: true, make: mangled(func(p []byte, header int, how []byte) []byte {
		size := at(how, 0) % sizeUDP
		if header == sizeIPv4 {
			binary.BigEndian.PutUint16(p[2:], uint16(header+size))
			p[10], p[11] = 0, 0
			binary.BigEndian.PutUint16(p[10:], testnet.Checksum(p[:header]))
		} else {
			binary.BigEndian.PutUint16(p[4:], uint16(size))
		}
		return p[:header+size]
	})},
	{name: "an IP length beyond the end", dropped: true, make: mangled(func(p []byte, header int, _ []byte) []byte {
		return p[:len(p)-1]
	})},
	{name: "bytes behind the end", taken: true, make: mangled(func(p []byte, _ int, how []byte) []byte {
		return append(p, how...)
	})},
	{name: "source port 0", make: func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		return [][]byte{simple(netip.AddrPortFrom(from.Addr(), 0), to, payload)} // nobody can be answered there
	}},
	// The kernel takes it, and so do we: as a flow of its own, of an IPv4 client.
	{name: "an IPv4 address as an IPv6 one", make: only(false, func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		mapped := netip.AddrFrom16(netip.AddrFrom4([4]byte{198, 51, 100, 10}).As16())
		return [][]byte{ipv6(mapped, to.Addr(), unix.IPPROTO_UDP, udp(netip.AddrPortFrom(mapped, from.Port()), to, payload))}
	})},
	// IPv6 takes it. An answer would be another one, and so on.
	{name: "from itself", dropped: true, make: func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		return [][]byte{simple(to, to, append([]byte(testnet.Silence), payload...))}
	}},
	{name: "empty", make: func(from, to netip.AddrPort, _, how []byte) [][]byte {
		return [][]byte{simple(from, to, nil)}
	}},
	{name: "short", make: func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		return [][]byte{simple(from, to, payload[:at(how, 0)%(tokenSize+1)])}
	}},
	{name: "large", taken: true, make: func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		return [][]byte{simple(from, to, append(payload, make([]byte, 60000)...))}
	}},
	{name: "large, in fragments", taken: true, make: func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		payload = append(payload, make([]byte, 30000)...)
		return fragments(from, to, id(), payload, cut(sizeUDP+len(payload), 1400))
	}},
	{name: "a checksum left to do", offloaded: true, taken: true, make: undone(1, func(ip, size int, _ []byte) offload {
		return offload{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM}
	})},
	// Whether a tun device believes that is up to the kernel.
	{name: "a bad checksum said to be good", offloaded: true, make: undone(1, func(ip, size int, _ []byte) offload {
		return offload{flags: unix.VIRTIO_NET_HDR_F_DATA_VALID}
	})},
	{name: "an IP header in the linear part", offloaded: true, taken: true, make: undone(long, func(ip, size int, _ []byte) offload {
		return offload{linear: ip}
	})},
	{name: "a byte in the linear part", offloaded: true, taken: true, make: undone(long, func(ip, size int, _ []byte) offload {
		return offload{linear: 1}
	})},
	{name: "fragments left to make", offloaded: true, taken: true, make: undone(long, func(ip, size int, _ []byte) offload {
		return offload{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, kind: unix.VIRTIO_NET_HDR_GSO_UDP, linear: ip + sizeUDP, size: 1400}
	})},
	{name: "a train", offloaded: true, taken: true, train: long, make: undone(long, func(ip, size int, _ []byte) offload {
		return offload{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, kind: unix.VIRTIO_NET_HDR_GSO_UDP_L4, linear: ip + sizeUDP, size: size}
	})},
	// What is cut begins with the client's token again.
	{name: "anything left to do", offloaded: true, train: long, make: undone(long, func(ip, size int, how []byte) offload {
		return offload{
			flags:    byte(at(how, 0) & 3),
			kind:     []byte{unix.VIRTIO_NET_HDR_GSO_NONE, unix.VIRTIO_NET_HDR_GSO_UDP, unix.VIRTIO_NET_HDR_GSO_UDP_L4}[at(how, 1)%3],
			linear:   at(how, 2),
			size:     []int{0, size, 2 * size, long * size, 65535}[at(how, 3)%5],
			checksum: at(how, 4) * at(how, 5) % 512,
		}
	})},
	{name: "multicast", make: elsewhere(true, "224.0.0.1")},
	{name: "multicast v6", make: elsewhere(false, "ff02::1")},
	{name: "broadcast", make: elsewhere(true, "198.51.100.255")},
	{name: "broadcast to all", make: elsewhere(true, "255.255.255.255")},
	{name: "wrong bytes", make: mangled(func(p []byte, header int, how []byte) []byte {
		for i := 0; i+2 < len(how); i += 3 {
			where := (at(how, i)<<8 | at(how, i+1)) % len(p)
			if where < header && where >= header-addrSize(header) {
				continue // it might become a broadcast
			}
			p[where] ^= how[i+2]
		}
		return p
	})},
	{name: "wrong bytes with right checksums", make: func(_, to netip.AddrPort, payload, how []byte) [][]byte {
		// Other clients, other ports, other lengths: what a firewall would let through.
		from := netip.AddrPortFrom(client(at(how, 0)%clientsOf/2*2+at(how, 1)%2).Addr(), uint16(40000+at(how, 2)%32))
		if from.Addr().Is4() != to.Addr().Is4() {
			to = local(from.Addr(), to.Port())
		}
		return [][]byte{simple(from, to, append(payload, how...))}
	}},
}

// try sends packets of shapes onto a way, from some clients to each group.
func (w *world) try(t *testing.T, by, clients int, shapes ...shape) {
	t.Helper()
	type packet struct {
		shape
		client  int
		payload string
	}
	for _, g := range w.groups {
		var sent []packet
		for _, s := range shapes {
			if s.taken && s.train > 0 && !w.trains {
				t.Logf("%s: this kernel takes none", s.name)
				continue
			}
			before, n := g.counted(t), uint64(0)
			taken := s.taken && !ways[by].lost
			for c := range clients {
				from, to := client(c), local(client(c).Addr(), g.port)
				payload := append(w.next(c), make([]byte, 40)...)
				packets := s.make(from, to, slices.Clone(payload), []byte{byte(c), 3, 0x17, 200, 100, 31, 0x44})
				if packets == nil {
					continue
				}
				w.send(t, s, by, packets)
				if taken && !w.awaitAnswers(g.port, string(payload), s.datagrams()) {
					t.Fatalf("%s, %s, client %d: answered %d times", s.name, kinds[g.kind].name, c, w.answers(g.port, string(payload)))
				}
				sent = append(sent, packet{s, c, string(payload)})
				n++
			}
			// The wire has a packet delivered before it takes the next; a fragment, or a
			// part of a train, is no run.
			if runs := g.counted(t) - before; taken && by == alone && runs != n {
				t.Errorf("%s, %s: %d runs of %d packets", s.name, kinds[g.kind].name, runs, n)
			}
		}
		w.settle(t, g)
		for _, p := range sent {
			got := w.answers(g.port, p.payload)
			if (p.dropped || ways[by].lost) && got != 0 || got > p.datagrams() {
				t.Errorf("%s, %s, client %d: answered %d times", p.name, kinds[g.kind].name, p.client, got)
			}
		}
	}
}

// P1, P8: whatever the shape of a packet, it goes where its client's flow is; nobody
// else's flow moves, and each run is counted once.
func TestShapes(t *testing.T) {
	w := newWorld(t, true)
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) { w.try(t, alone, clientsOf/2, s) })
	}
}

// The control: on plain Linux flows of others are seen to move when a listener closes.
func TestPlainLinuxMoves(t *testing.T) {
	w := newWorld(t, false)
	for _, g := range w.groups {
		for c := range clientsOf {
			w.ask(t, g, c)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.moved) < clientsOf {
		t.Errorf("%d flows of others moved as a listener closed", len(w.moved))
	}
}

// Broadcast and multicast are for every member of a group, and no run of its program.
func TestEverybody(t *testing.T) {
	w := newWorld(t, true)
	for _, s := range shapes {
		for c := range 2 {
			to := local(client(c).Addr(), firstPort)
			packets := s.make(client(c), to, w.next(c), nil)
			if len(packets) != 1 || !bytes.Contains(packets[0], []byte(everybody)) {
				continue
			}
			t.Run(s.name, func(t *testing.T) {
				for _, g := range w.groups {
					before, had := g.counted(t), w.answers(g.port, everybody)
					w.send(t, s, alone, s.make(client(c), local(client(c).Addr(), g.port), w.next(c), nil))
					if !w.awaitAnswers(g.port, everybody, had+members) {
						t.Errorf("%s: %d of %d members answer", kinds[g.kind].name, w.answers(g.port, everybody)-had, members)
					}
					if runs := g.counted(t) - before; runs != 0 {
						t.Errorf("%s: %d runs", kinds[g.kind].name, runs)
					}
				}
			})
		}
	}
}

// FuzzPackets sends packets of any shape by any way: each step is a shape, a group, a client,
// a way and how many bytes say how.
func FuzzPackets(f *testing.F) {
	for i := range shapes {
		how := []byte{9, 0x21, 0x80, 3, 255, 7}
		var steps []byte
		for c := range 4 {
			steps = append(steps, byte(i), byte(i+c), byte(c), byte(4*i+c), byte(len(how)))
			steps = append(steps, how...)
		}
		f.Add(steps)
	}
	w := newWorld(f, true)
	f.Fuzz(func(t *testing.T, steps []byte) {
		touched := map[*group]bool{}
		for range maxSteps {
			if len(steps) < 5 {
				break
			}
			s, g, c := shapes[int(steps[0])%len(shapes)], w.groups[int(steps[1])%len(w.groups)], int(steps[2])%clientsOf
			by := int(steps[3]) % len(ways)
			n := min(int(steps[4]), len(steps)-5)
			how := steps[5 : 5+n]
			steps = steps[5+n:]
			payload := append(w.next(c), how...)
			w.send(t, s, by, s.make(client(c), local(client(c).Addr(), g.port), payload, slices.Clone(how)))
			touched[g] = true
		}
		for g := range touched {
			w.settle(t, g)
		}
	})
}

// maxSteps keeps what waits in the sockets below the size of their buffers.
const maxSteps = 8
