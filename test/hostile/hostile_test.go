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
}

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
	{name: "destination options", taken: true, make: headers(extension{destination, unknown(12)})},
	{name: "a routing header", taken: true, make: headers(extension{routing, []byte{99, 0, 0, 0, 0, 0}})},
	{name: "a routing header with somewhere left to go", dropped: true, make: headers(extension{routing, []byte{99, 1, 0, 0, 0, 0}})},
	{name: "all headers", taken: true, make: headers(extension{hopByHop, padding()}, extension{destination, padding()}, extension{routing, []byte{99, 0, 0, 0, 0, 0}}, extension{destination, unknown(244)})},
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
	{name: "from itself", dropped: true, make: func(from, to netip.AddrPort, payload, how []byte) [][]byte {
		return [][]byte{simple(to, to, payload)}
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

// P1, P8: whatever the shape of a packet, it goes where its client's flow is; nobody
// else's flow moves, and each run is counted once.
func TestShapes(t *testing.T) {
	w := newWorld(t, true)
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			for _, g := range w.groups {
				var sent []string
				for c := range clientsOf / 2 {
					from, to := client(c), local(client(c).Addr(), g.port)
					payload := append(w.next(c), make([]byte, 40)...)
					packets := s.make(from, to, slices.Clone(payload), []byte{byte(c), 3, 0x17, 200, 100, 31, 0x44})
					if packets == nil {
						continue
					}
					w.send(t, packets)
					if s.taken && !w.await(g.port, string(payload)) {
						t.Errorf("%s, client %d: not answered", kinds[g.kind].name, c)
					}
					sent = append(sent, string(payload))
				}
				w.settle(t, g)
				for _, payload := range sent {
					if got := w.answers(g.port, payload); s.dropped && got != 0 || got > 1 {
						t.Errorf("%s, client %d: answered %d times", kinds[g.kind].name, payload[tokenSize-1], got)
					}
				}
			}
		})
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
					w.send(t, s.make(client(c), local(client(c).Addr(), g.port), w.next(c), nil))
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

// FuzzPackets sends packets of any shape: each step is a shape, a group, a client and how
// many bytes say how.
func FuzzPackets(f *testing.F) {
	for i := range shapes {
		how := []byte{9, 0x21, 0x80, 3, 255, 7}
		var steps []byte
		for c := range 4 {
			steps = append(steps, byte(i), byte(i+c), byte(c), byte(len(how)))
			steps = append(steps, how...)
		}
		f.Add(steps)
	}
	w := newWorld(f, true)
	f.Fuzz(func(t *testing.T, steps []byte) {
		touched := map[*group]bool{}
		for range maxSteps {
			if len(steps) < 4 {
				break
			}
			s, g, c := shapes[int(steps[0])%len(shapes)], w.groups[int(steps[1])%len(w.groups)], int(steps[2])%clientsOf
			n := min(int(steps[3]), len(steps)-4)
			how := steps[4 : 4+n]
			steps = steps[4+n:]
			payload := append(w.next(c), how...)
			w.send(t, s.make(client(c), local(client(c).Addr(), g.port), payload, slices.Clone(how)))
			touched[g] = true
		}
		for g := range touched {
			w.settle(t, g)
		}
	})
}

// maxSteps keeps what waits in the sockets below the size of their buffers.
const maxSteps = 8
