package loader

import (
	"errors"
	"fmt"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/maps"
)

// First is a protocol of whose packets a flow's first one may say where it
// belongs. The zero First is none.
type First string

// FirstOpenVPN is OpenVPN over UDP. While the group settles, a flow that opens a
// session is not left where the kernel's hash has it: it is new beyond doubt, and the
// policy gives it any listener, one that has just joined as well. And a data packet
// of an unknown flow goes where its client's other flow is, if one listener alone has
// had flows of that address and peer-id within Options.Idle: a NAT has given the
// client another port. Otherwise it is served as any new flow.
const FirstOpenVPN First = "openvpn"

var errFirst = errors.New("use openvpn")

// UnmarshalText takes openvpn.
func (f *First) UnmarshalText(text []byte) error {
	if First(text) != FirstOpenVPN {
		return errFirst
	}
	*f = FirstOpenVPN
	return nil
}

// checkProto refuses what it does not go with: over TCP the program sees no payload, and
// only with AffinityFlow, the default of UDP, is a client's other port another flow.
func (f First) checkProto(p Proto, a Affinity) error {
	switch {
	case f == "":
		return nil
	case f != FirstOpenVPN:
		return fmt.Errorf("first %q: %w", string(f), errFirst)
	case p != UDP:
		return fmt.Errorf("first %s: it goes with UDP: a connection has no payload yet when it gets its listener", f)
	case a == AffinityClient:
		return fmt.Errorf("first %s: it goes with affinity flow: with client all ports of an address have one listener anyway", f)
	case a != "" && a != AffinityFlow:
		return fmt.Errorf("first %s: it goes with affinity flow", f)
	}
	return nil
}

// number is what the maps have for it.
func (f First) number() uint32 {
	if f == FirstOpenVPN {
		return maps.FirstOpenVPN
	}
	return maps.FirstAny
}

// firstOf reads a group's.
func firstOf(c *bpf.SelectConfig) First {
	if c.First == maps.FirstOpenVPN {
		return FirstOpenVPN
	}
	return ""
}
