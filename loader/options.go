package loader

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/rpsel/rpsel/internal/statedir"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// Key names a reuseport group.
type Key = sockets.Key

// Proto is the transport protocol of a group.
type Proto = sockets.Proto

// The protocols of a group.
const (
	UDP = sockets.UDP
	TCP = sockets.TCP
)

// Errors that callers may want to tell apart. All are wrapped with what they
// are about and the way out.
var (
	// ErrNotAttached: there is no rpsel state for the group.
	ErrNotAttached = errors.New("no rpsel state")
	// ErrNoListener: no listener has that slot or process.
	ErrNoListener = errors.New("no such listener")
	// ErrForeignProgram: the group has a selection program that is not rpsel's.
	ErrForeignProgram = errors.New("another program is attached to the group")
	// ErrUnregistrable: a member of the group cannot be registered.
	ErrUnregistrable = errors.New("a member of the group cannot be registered")
	// ErrOlder: the state is of an older rpsel, to be upgraded.
	ErrOlder = errors.New("state of an older rpsel")
	// ErrNewer: the state is of a newer rpsel, and nothing for this one.
	ErrNewer = errors.New("state of a newer rpsel")
	// ErrIncompatible: the state is not whole, or not rpsel's.
	ErrIncompatible = errors.New("unusable state")
	// ErrTooSmall: a flow table has not the room for the flows there are.
	ErrTooSmall = errors.New("the table is too small")
	// ErrFixed: an option cannot be changed while the group is attached.
	ErrFixed = errors.New("fixed while attached")
	// ErrLocked: another rpsel command held the namespace's lock for too long.
	ErrLocked = statedir.ErrLocked
	// ErrNoBPFFS: there is no BPF file system and none could be mounted.
	ErrNoBPFFS = statedir.ErrNoBPFFS
	// ErrPermission: a capability is missing.
	ErrPermission = sockets.ErrPermission
	// ErrUnsupported: this kernel lacks a feature.
	ErrUnsupported = sockets.ErrUnsupported
	// ErrUncounted: what is asked for goes by the open connections of TCP listeners,
	// and nobody counts them. It is an ErrUnsupported.
	ErrUncounted = fmt.Errorf("%w: connections are not counted", ErrUnsupported)
	// ErrOwner: Options.Owner is not the user of the group's sockets.
	ErrOwner = errors.New("the owner has to be the user of the group's sockets")
	// ErrWatched: another process watches the group.
	ErrWatched = errors.New("its events are read already")
	// ErrRootCgroup: with ConfirmReply, a listener's socket is in the root cgroup.
	ErrRootCgroup = errors.New("its socket is in the root cgroup")
	// ErrFull: all slots of the group are taken.
	ErrFull = errors.New("all slots are taken")
)

// Defaults of Options.
const (
	DefaultFlows   = 262144
	DefaultIdle    = 300 * time.Second
	DefaultIdleNew = 30 * time.Second
	DefaultSettle  = 60 * time.Second

	// MaxFlows bounds Options.Flows: 4 million flows take 240 MiB.
	MaxFlows = 1 << 24
	// MinFlows is the smallest table.
	MinFlows = 64
	// MaxIdle bounds the idle times: the program's clock of 24 bits cannot
	// tell longer silences from the future.
	MaxIdle = 30 * 24 * time.Hour
)

// NoOwner is no user's number: with it, Options.Owner takes the owner back.
const NoOwner uint32 = math.MaxUint32

// Policy says who gets new flows.
type Policy int

// The policies. The zero Policy is PolicyHash at the first attach; later it leaves
// things as they are.
const (
	policyKept Policy = iota // as it is; PolicyHash at the first attach
	// PolicyHash spreads new flows over all active listeners.
	PolicyHash
	// PolicyNewest gives them to the newest generation, a batch of processes that
	// took up service together; the older ones keep the flows they have. A
	// generation takes over once it has as many members as the one before, or
	// after five seconds. While nobody of it is alive the one before serves.
	PolicyNewest
	// PolicyLeast draws two listeners as PolicyHash draws one, and gives the flow
	// to the one that has fewer flows for its weight. With TCP it goes by the
	// connections that each has open, whatever the affinity; on a kernel that cannot
	// count them (CanCount) it is refused, with ErrUncounted. With UDP and
	// AffinityNone it knows no flows, and is PolicyHash.
	PolicyLeast
	// PolicyRR gives new flows to the listeners in turn, as often as their weights
	// say. Each CPU has turns of its own. The turn of a dead one goes to another at
	// random; with more than 256 listeners all do.
	PolicyRR
	// PolicyRandom draws a listener at random, as their weights are.
	PolicyRandom
	// PolicyCPU gives a flow to a listener whose process last ran on the CPU that
	// takes the flow's first packet; if there is none, to one on the nearest node
	// that has any; on a machine with one node, to any, as PolicyHash. Where a
	// process ran is looked up when its listener registers and at each Housekeep:
	// it means most for processes that are pinned to a CPU.
	PolicyCPU
)

// policies is each one's name, and what the maps have for it.
var policies = []struct {
	policy Policy
	name   string
	number uint32
}{
	{PolicyHash, "hash", maps.PolicyHash},
	{PolicyNewest, "newest", maps.PolicyNewest},
	{PolicyLeast, "least", maps.PolicyLeast},
	{PolicyRR, "rr", maps.PolicyRR},
	{PolicyRandom, "random", maps.PolicyRandom},
	{PolicyCPU, "cpu", maps.PolicyCPU},
}

// Policies lists the names of the policies.
func Policies() (names []string) {
	for _, p := range policies {
		names = append(names, p.name)
	}
	return names
}

// String returns the name as users write it; that of the zero Policy is empty.
func (p Policy) String() string {
	for _, known := range policies {
		if known.policy == p {
			return known.name
		}
	}
	return ""
}

// UnmarshalText takes a name of Policies.
func (p *Policy) UnmarshalText(text []byte) error {
	for _, known := range policies {
		if known.name == string(text) {
			*p = known.policy
			return nil
		}
	}
	names := Policies()
	last := len(names) - 1
	return fmt.Errorf("use %s or %s", strings.Join(names[:last], ", "), names[last])
}

// MarshalText returns the name.
func (p Policy) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// number is what the maps have for it.
func (p Policy) number() uint32 {
	for _, known := range policies {
		if known.policy == p {
			return known.number
		}
	}
	return maps.PolicyHash
}

// policyOf is the policy that the maps have.
func policyOf(number uint32) Policy {
	for _, known := range policies {
		if known.number == number {
			return known.policy
		}
	}
	return policyKept
}

// Options say how a group is attached. The zero value is what most want.
type Options struct {
	// Flows is how many flows the table holds, MinFlows to MaxFlows; memory is
	// about 60 bytes each. Defaults to DefaultFlows. Fixed while attached.
	Flows int
	// Idle is how long an established flow may be silent before it is
	// forgotten, one second to MaxIdle, rounded up to whole seconds. Defaults to
	// DefaultIdle.
	Idle time.Duration
	// IdleNew is the same for a flow that is not confirmed. Defaults to
	// DefaultIdleNew.
	IdleNew time.Duration
	// Settle is how long after the attach flows that look new are left where
	// the kernel's hash has them: until then flows that began before the
	// attach may not have been seen. At most MaxIdle, rounded up to whole seconds;
	// zero is DefaultSettle, negative is none.
	// Nothing settles with another affinity than AffinityFlow.
	Settle time.Duration
	// Affinity says what counts as the same client. Fixed while attached. With
	// another one than AffinityFlow the attach moves flows: all but one in so
	// many as there are listeners.
	Affinity Affinity
	// ClientPrefix says how many bits of an address count with AffinityClient,
	// and goes with no other affinity. Fixed while attached.
	ClientPrefix ClientPrefix
	// First is the protocol by whose packets a flow's first one may say where it
	// belongs. It goes with UDP and AffinityFlow. Fixed while attached.
	First First
	// Confirm says what makes a new flow an established one. Fixed while
	// attached. ConfirmReply is for UDP, and for AffinityFlow or AffinityClient.
	Confirm Confirm
	// Policy says who gets new flows: PolicyHash by default. On a group that is
	// attached the zero Policy changes nothing. No tracked flow moves.
	Policy Policy
	// NewGeneration makes the processes whose listeners are registered next,
	// now or later, open a generation, also if one of the newest is missing or
	// has only just come.
	NewGeneration bool
	// Partial attaches although some members of the group cannot be registered,
	// or have SO_INCOMING_CPU set. Those members lose their share, and existing
	// flows may move.
	Partial bool
	// Replace takes the place of another selection program on the group, also
	// if that alone keeps a socket array with the group's sockets. Flows move.
	Replace bool
	// Again attaches only a group that has state: for who keeps groups as they
	// are. One that was detached meanwhile is ErrNotAttached.
	Again bool
	// Owner is the user whose processes may register sockets of the group
	// through the agent (package agent), without a capability of their own. It
	// has to be the user of the group's sockets, or NoOwner. Nil leaves the
	// owner as it is: nobody, at the first attach.
	Owner *uint32
}

// CheckOwner refuses, with ErrOwner, an owner that is not the user of the
// group's sockets: no socket of his could be in the group.
func (o Options) CheckOwner(key Key) error {
	if o.Owner == nil || *o.Owner == NoOwner || *o.Owner == key.UID {
		return nil
	}
	return fmt.Errorf("%s: owner %d: %w: name uid %d, or start the servers as uid %d", key, *o.Owner, ErrOwner, key.UID, *o.Owner)
}

// CheckProto refuses, in one line, what does not go with the protocol, or with the
// affinity. It does not look at the rest.
func (o Options) CheckProto(p Proto) error {
	return cmp.Or(o.Affinity.checkProto(p), o.First.checkProto(p, o.Affinity), o.Confirm.checkProto(p, o.Affinity))
}

// checkFixed refuses what cannot be changed while the group is attached.
func (s *state) checkFixed(key Key, o Options) error {
	v := s.config.Values()
	if o.Flows != 0 && uint32(o.Flows) != v.Capacity {
		return fmt.Errorf("%s: flows %d: %w, with %d: \"rpsel upgrade --flows %d\" changes it", key, o.Flows, ErrFixed, v.Capacity, o.Flows)
	}
	affinity, prefix := affinityOf(v)
	for _, fixed := range []struct{ option, given, is string }{
		{"affinity", string(o.Affinity.canonical()), string(affinity)},
		{"client prefix", o.ClientPrefix.String(), prefix.full().String()},
		{"first", string(o.First), cmp.Or(string(firstOf(v)), "none")},
		{"confirm", string(o.Confirm), string(confirmOf(v))},
	} {
		if fixed.given != "" && fixed.given != fixed.is {
			return fmt.Errorf("%s: %s %s: %w, with %s: detach it, and attach it with that", key, fixed.option, fixed.given, ErrFixed, fixed.is)
		}
	}
	return nil
}

// withDefaults checks the options and fills in the defaults.
func (o Options) withDefaults() (Options, error) {
	if o.Flows == 0 {
		o.Flows = DefaultFlows
	}
	if o.Idle == 0 {
		o.Idle = DefaultIdle
	}
	if o.IdleNew == 0 {
		o.IdleNew = DefaultIdleNew
	}
	switch {
	case o.Settle == 0:
		o.Settle = DefaultSettle
	case o.Settle < 0:
		o.Settle = 0
	}
	if o.Policy < policyKept || o.Policy > PolicyCPU {
		return o, fmt.Errorf("policy %d: use one of %s", o.Policy, strings.Join(Policies(), ", "))
	}
	if err := o.checkAffinity(); err != nil {
		return o, err
	}
	if err := o.CheckProto(UDP); err != nil {
		return o, err
	}
	if o.Flows < MinFlows || o.Flows > MaxFlows {
		return o, fmt.Errorf("flows %d: use %d to %d", o.Flows, MinFlows, MaxFlows)
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"idle", o.Idle}, {"idle-new", o.IdleNew}} {
		if d.value < time.Second || d.value > MaxIdle {
			return o, fmt.Errorf("%s %v: use 1s to %v", d.name, d.value, MaxIdle)
		}
	}
	if o.Settle > MaxIdle {
		return o, fmt.Errorf("settle %v: use at most %v", o.Settle, MaxIdle)
	}
	return o, nil
}
