package loader

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/maps"
)

// Affinity says what counts as the same client, and so goes to one listener. The
// zero Affinity is the default: AffinityFlow for UDP, AffinityNone for TCP.
type Affinity string

// The affinities, beside those of AffinityBytes.
const (
	// AffinityFlow is the client's address and port, and the local address. It is
	// the only one with which an attach moves nothing, since it is what the
	// kernel goes by.
	AffinityFlow Affinity = "flow"
	// AffinityClient is the client's address, or a prefix of it
	// (Options.ClientPrefix). With TCP it is counted by connections that are
	// opened, and a client is idle while it opens none.
	AffinityClient Affinity = "client"
	// AffinityNone tracks nothing: each datagram, each connection, is given to a
	// listener anew, by the weights.
	AffinityNone Affinity = "none"
)

// Bounds of AffinityBytes.
const (
	// MaxAffinityOffset is the last byte of the payload that can be the first.
	MaxAffinityOffset = 1024
	// MaxAffinityLength is how many bytes count at most.
	MaxAffinityLength = maps.KeyBytes
)

// AffinityBytes is length bytes of the payload of each datagram, from an offset
// on, such as the id of a session: 1 to MaxAffinityLength bytes, at an offset of
// 0 to MaxAffinityOffset. A datagram too short for them is served as with
// AffinityFlow. UDP only.
func AffinityBytes(offset, length int) Affinity {
	return Affinity(fmt.Sprintf("bytes:%d,%d", offset, length))
}

var bytesAffinity = regexp.MustCompile(`^bytes:(\d{1,5}),(\d{1,3})$`)

var errAffinity = fmt.Errorf("use flow, client, bytes:OFFSET,LENGTH (of the payload; up to %d and 1 to %d) or none", MaxAffinityOffset, MaxAffinityLength)

// UnmarshalText takes flow, client, none or bytes:OFFSET,LENGTH.
func (a *Affinity) UnmarshalText(text []byte) error {
	given := Affinity(text).canonical()
	if _, length := given.bytes(); length == 0 && given != AffinityFlow && given != AffinityClient && given != AffinityNone {
		return errAffinity
	}
	*a = given
	return nil
}

// canonical is the one way to write an affinity: bytes:00,4 is bytes:0,4.
func (a Affinity) canonical() Affinity {
	if offset, length := a.bytes(); length > 0 {
		return AffinityBytes(offset, length)
	}
	return a
}

// bytes returns where the bytes are that count; a length of 0, if they do not.
func (a Affinity) bytes() (offset, length int) {
	m := bytesAffinity.FindStringSubmatch(string(a))
	if m == nil {
		return 0, 0
	}
	offset, _ = strconv.Atoi(m[1])
	length, _ = strconv.Atoi(m[2])
	if offset > MaxAffinityOffset || length < 1 || length > MaxAffinityLength {
		return 0, 0
	}
	return offset, length
}

// checkProto refuses an affinity that the protocol has no use for: of TCP the
// program sees a connection's first packet, with no payload and a port that the
// next connection will not have.
func (a Affinity) checkProto(p Proto) error {
	if p != TCP || a == "" || a == AffinityNone || a == AffinityClient {
		return nil
	}
	return fmt.Errorf("affinity %s: for TCP use client or none", a)
}

// ClientPrefix is how many bits of an address count with AffinityClient, where
// one client comes by several addresses: a carrier's NAT, or IPv6. The zero
// ClientPrefix is the whole address.
type ClientPrefix struct {
	V4 int // 1 to 32; 0: all
	V6 int // 1 to 128; 0: all
}

var errPrefix = errors.New("use two numbers of bits, for IPv4 and IPv6, such as 24/56")

// UnmarshalText takes V4/V6, such as 24/56.
func (p *ClientPrefix) UnmarshalText(text []byte) error {
	four, six, ok := strings.Cut(string(text), "/")
	v4, err4 := strconv.Atoi(four)
	v6, err6 := strconv.Atoi(six)
	given := ClientPrefix{v4, v6}
	if !ok || err4 != nil || err6 != nil || v4 == 0 || v6 == 0 || !given.valid() {
		return errPrefix
	}
	*p = given
	return nil
}

// String returns the prefix as UnmarshalText takes it; "" for the zero one.
func (p ClientPrefix) String() string {
	if p == (ClientPrefix{}) {
		return ""
	}
	p = p.full()
	return fmt.Sprintf("%d/%d", p.V4, p.V6)
}

func (p ClientPrefix) valid() bool { return p.V4 >= 0 && p.V4 <= 32 && p.V6 >= 0 && p.V6 <= 128 }

// full puts the number of bits where zero stands for all.
func (p ClientPrefix) full() ClientPrefix {
	if p.V4 == 0 {
		p.V4 = 32
	}
	if p.V6 == 0 {
		p.V6 = 128
	}
	return p
}

// of is the part of an address that counts.
func (p ClientPrefix) of(addr netip.Addr) netip.Prefix {
	p = p.full()
	bits := p.V6
	if addr.Is4() {
		bits = p.V4
	}
	return netip.PrefixFrom(addr, bits).Masked()
}

// masks are what the program lays over an address.
func (p ClientPrefix) masks() (v4, v6 [2]uint64) {
	p = p.full()
	mask := func(bits int) (m [2]uint64) {
		var b [16]byte
		for i := range bits {
			b[i/8] |= 0x80 >> (i % 8)
		}
		return [2]uint64{binary.NativeEndian.Uint64(b[:8]), binary.NativeEndian.Uint64(b[8:])}
	}
	return mask(96 + p.V4), mask(p.V6)
}

// checkAffinity checks the options that say what counts as the same client.
func (o Options) checkAffinity() error {
	if _, length := o.Affinity.bytes(); length == 0 {
		switch o.Affinity {
		case "", AffinityFlow, AffinityClient, AffinityNone:
		default:
			return fmt.Errorf("affinity %q: %w", string(o.Affinity), errAffinity)
		}
	}
	if !o.ClientPrefix.valid() {
		return fmt.Errorf("client prefix %d/%d: %w", o.ClientPrefix.V4, o.ClientPrefix.V6, errPrefix)
	}
	if o.ClientPrefix != (ClientPrefix{}) && o.Affinity != AffinityClient {
		return fmt.Errorf("client prefix %s: it goes with affinity %s", o.ClientPrefix, AffinityClient)
	}
	return nil
}

// setAffinity writes a group's affinity, with new keys, into the configuration
// of a new state.
func setAffinity(c *bpf.SelectConfig, p Proto, o Options) {
	offset, length := o.Affinity.bytes()
	switch {
	case length > 0:
		c.Affinity, c.Offset, c.Length = maps.AffinityBytes, uint32(offset), uint32(length)
	case o.Affinity == AffinityClient:
		c.Affinity = maps.AffinityClient
		if o.ClientPrefix != (ClientPrefix{}) {
			full := o.ClientPrefix.full()
			c.Prefix4, c.Prefix6 = uint32(full.V4), uint32(full.V6)
		}
	case o.Affinity == AffinityNone, o.Affinity == "" && p == TCP:
		// An accepted connection is sticky by itself.
		c.Affinity = maps.AffinityNone
	default:
		c.Affinity = maps.AffinityFlow
	}
	random := func(keys []uint64) {
		for i := range keys {
			var b [8]byte
			rand.Read(b[:]) // never fails
			keys[i] = binary.NativeEndian.Uint64(b[:])
		}
	}
	random(c.Key.High[:])
	random(c.Key.Low[:])
}

// affinityOf reads a group's affinity.
func affinityOf(c *bpf.SelectConfig) (Affinity, ClientPrefix) {
	switch c.Affinity {
	case maps.AffinityClient:
		return AffinityClient, ClientPrefix{int(c.Prefix4), int(c.Prefix6)}
	case maps.AffinityBytes:
		return AffinityBytes(int(c.Offset), int(c.Length)), ClientPrefix{}
	case maps.AffinityNone:
		return AffinityNone, ClientPrefix{}
	default:
		return AffinityFlow, ClientPrefix{}
	}
}
