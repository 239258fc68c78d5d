package loader

import (
	"errors"
	"fmt"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// Confirm says what makes a new flow an established one, which no new flow can
// push out of a full table. The zero Confirm is the default, ConfirmClient.
type Confirm string

// The ways of confirmation.
const (
	// ConfirmClient is the client's next packet, at least a second after its first.
	ConfirmClient Confirm = "client"
	// ConfirmReply is the server's answer: for a server that answers nobody who
	// has not proved himself, such as OpenVPN with tls-crypt. Where everybody is
	// answered, so is who forges his address. A client that the server does not
	// answer stays new for as long as it speaks.
	//
	// It is seen in the cgroups of the listeners' sockets, which have to be in
	// another one than the root. The kernel's hash of a flow is not known then,
	// see ErrHashUnknown. Attaching moves no flow all the same.
	ConfirmReply Confirm = "reply"
)

var errConfirm = errors.New("use client or reply")

// UnmarshalText takes client or reply.
func (c *Confirm) UnmarshalText(text []byte) error {
	given := Confirm(text)
	if given != ConfirmClient && given != ConfirmReply {
		return errConfirm
	}
	*c = given
	return nil
}

// checkProto refuses what it does not go with: ConfirmReply is for where the server answers,
// and the answer tells whose it is.
func (c Confirm) checkProto(p Proto, a Affinity) error {
	_, length := a.bytes()
	switch {
	case c == "", c == ConfirmClient:
		return nil
	case c != ConfirmReply:
		return fmt.Errorf("confirm %q: %w", string(c), errConfirm)
	case p == TCP:
		return fmt.Errorf("confirm %s: for TCP it is the kernel that answers a client's first packet: use %s", c, ConfirmClient)
	case a == AffinityNone:
		return fmt.Errorf("confirm %s: with affinity %s there are no flows to confirm: use %s or %s", c, a, AffinityFlow, AffinityClient)
	case length > 0:
		return fmt.Errorf("confirm %s: with affinity %s an answer does not tell which flow it is of: use %s or %s", c, a, AffinityFlow, AffinityClient)
	}
	return nil
}

// number is what the maps have for it.
func (c Confirm) number() uint32 {
	if c == ConfirmReply {
		return maps.ConfirmReply
	}
	return maps.ConfirmClient
}

// confirmOf reads what confirms a group's flows.
func confirmOf(c *bpf.SelectConfig) Confirm {
	if c.Confirm == maps.ConfirmReply {
		return ConfirmReply
	}
	return ConfirmClient
}

// hashKnown reports whether the kernel's hash of a flow can be told from its
// identity.
func hashKnown(c *bpf.SelectConfig) bool {
	return c.Affinity == maps.AffinityFlow && c.Confirm == maps.ConfirmClient
}

// check tells why a socket cannot be registered, or nil.
func (c Confirm) check(m sockets.Socket) error {
	if err := m.Check(); err != nil || c != ConfirmReply || m.Cgroup != 0 {
		return err
	}
	return fmt.Errorf("%s: %w, where its replies cannot be seen: start it by \"rpsel run\" or in a systemd unit, or use --confirm %s",
		m.Holders[0], ErrRootCgroup, ConfirmClient)
}
