package loader

import (
	"errors"
	"iter"
	"net/netip"
	"time"

	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// State is how far a flow has come: StateNew or StateEstablished.
type State = maps.State

// The states of a flow, see Confirm.
const (
	StateNew         = maps.New
	StateEstablished = maps.Established
)

// Flow is a tracked flow.
type Flow struct {
	// Local is the group's address.
	Local netip.AddrPort
	// Client is the peer. A client of an IPv6 group that speaks IPv4 has an
	// IPv4 address. With AffinityClient it is the part of the address that
	// counts, and port 0; with AffinityBytes, who sent the first packet.
	Client netip.AddrPort
	// Slot is where its listener is, or was if that died since.
	Slot int
	// Orphan tells that the listener died: the flow gets another one with its
	// next packet.
	Orphan bool
	State  State
	// Age is how long ago the first packet came, Idle the last one, and Since
	// how long the flow has had its present listener; in whole seconds.
	Age, Idle, Since time.Duration
	// Settling tells that the flow was first seen while the group settled, and
	// so was left where the kernel's hash had it.
	Settling bool
	// Earlier tells that it was first seen before the group's policy was changed,
	// or was last told to settle: by which rule it got its listener is not known.
	Earlier bool
	// Rehomed tells that the flow once had a listener that died.
	Rehomed bool
	// First tells that the flow's first packet said that it is new, while the
	// group settled: the policy gave it a listener at once. Floated tells that it
	// followed the flow that its client had before (Options.First).
	First, Floated bool
	// Hash is the kernel's own hash of the flow's addresses and ports. It is
	// known with AffinityFlow and ConfirmClient alone, else 0.
	Hash uint32

	clients netip.Prefix // whose packets these are
}

// From reports whether the flow is of a client with an address in the prefix. A
// flow of AffinityClient may be of many.
func (f Flow) From(p netip.Prefix) bool { return f.clients.Overlaps(p) }

// ErrHashUnknown: where the kernel's hash would send a flow is only known with
// AffinityFlow and ConfirmClient.
var ErrHashUnknown = errors.New("the kernel's hash of a flow is known with affinity flow and confirm client alone")

// Flows yields the tracked flows that have not expired, in no particular order.
// Flows that come or go meanwhile may be missing or not.
func (g *Group) Flows() iter.Seq2[Flow, error] {
	return func(yield func(Flow, error) bool) {
		g, err := g.current()
		if err != nil {
			yield(Flow{}, err)
			return
		}
		now, err := g.state.now()
		if err != nil {
			yield(Flow{}, err)
			return
		}
		orphan, err := g.state.orphans()
		if err != nil {
			yield(Flow{}, err)
			return
		}
		flows, err := g.state.table()
		if err != nil {
			yield(Flow{}, err)
			return
		}
		defer flows.Close()
		for e := range flows.All(now, g.state.config.Limits()) {
			if !yield(g.flow(e, now, orphan), nil) {
				return
			}
		}
	}
}

// age is how long ago a second of the past was; never negative, for people.
func age(now, second uint32) time.Duration {
	return time.Duration(max(0, maps.Past(now, second))) * time.Second
}

func (g *Group) flow(e maps.Entry, now uint32, orphan func(maps.Word) bool) Flow {
	v := g.state.config.Values()
	var hash uint32
	var prefix ClientPrefix
	if hashKnown(v) {
		hash, _ = maps.HashOf(e.Identity)
	}
	if v.Affinity == maps.AffinityClient {
		_, prefix = affinityOf(v)
	}
	earlier := maps.Past(now, e.Created) > maps.Past(now, v.Ruled)
	return Flow{
		Local:    g.key.Addr,
		Client:   e.Client,
		Slot:     int(e.Word.Slot()),
		Orphan:   orphan(e.Word),
		State:    e.Word.State(),
		Age:      age(now, e.Created),
		Idle:     age(now, e.Word.Second()),
		Since:    age(now, e.Since),
		Settling: !earlier && e.Hint == maps.NoHint && maps.Past(e.Created, v.Ruled) < maps.Age(v.Settled, v.Ruled),
		Earlier:  earlier,
		Rehomed:  e.Since != e.Created,
		First:    e.Hint == maps.HintFirst,
		Floated:  e.Hint == maps.HintFloat,
		Hash:     hash,
		clients:  prefix.of(e.Client.Addr()),
	}
}

// orphans returns a function that tells whether a flow's listener is gone.
func (s *state) orphans() (func(maps.Word) bool, error) {
	registered, err := s.registered()
	if err != nil {
		return nil, err
	}
	var alive [maps.Slots]bool
	for _, slot := range registered {
		alive[slot] = true
	}
	return func(w maps.Word) bool {
		return !alive[w.Slot()] || !w.SameIncarnation(s.listeners.Incarnation(w.Slot()))
	}, nil
}

// CountFlows counts the tracked flows that have not expired, and how many of
// them are established.
func (g *Group) CountFlows() (tracked, established int, err error) {
	tracked, err = g.CountWhere(func(_ int, state maps.State) bool {
		if state == maps.Established {
			established++
		}
		return true
	})
	return tracked, established, err
}

// CountWhere counts the tracked flows that have not expired and for which match
// returns true. It sees the slots of listeners that died, too.
func (g *Group) CountWhere(match func(slot int, state State) bool) (n int, err error) {
	if g, err = g.current(); err != nil {
		return 0, err
	}
	now, err := g.state.now()
	if err != nil {
		return 0, err
	}
	flows, err := g.state.table()
	if err != nil {
		return 0, err
	}
	defer flows.Close()
	for w := range flows.Words(now, g.state.config.Limits()) {
		if match(int(w.Slot()), w.State()) {
			n++
		}
	}
	return n, nil
}

// countFlows is CountFlows for a state of this layout or an older one.
func (p *pinned) countFlows() (tracked int, err error) {
	config, err := p.values()
	if err != nil {
		return 0, err
	}
	now, err := p.now()
	if err != nil {
		return 0, err
	}
	flows, err := p.table()
	if err != nil {
		return 0, err
	}
	defer flows.Close()
	for range flows.Words(now, maps.Limits{New: config.IdleNew, Established: config.Idle}) {
		tracked++
	}
	return tracked, nil
}

// Flush forgets the flows for which match returns true, or all of them if match
// is nil, and returns how many. The next packet of such a flow is that of a new
// one. Flows that are heard of while they are looked at are tried again.
//
// Errors: ErrNotAttached, ErrLocked.
func (g *Group) Flush(match func(Flow) bool) (n int, err error) {
	// With the lock: what an upgrade has copied already would come back.
	err = g.locked(func() error {
		n, err = g.flush(match)
		return errors.Join(err, g.state.recount())
	})
	return n, err
}

func (g *Group) flush(match func(Flow) bool) (n int, err error) {
	now, err := g.state.now()
	if err != nil {
		return 0, err
	}
	orphan, err := g.state.orphans()
	if err != nil {
		return 0, err
	}
	flows, err := g.state.table()
	if err != nil {
		return 0, err
	}
	defer flows.Close()
	if err := g.forgetPeers(flows, now, orphan, match); err != nil {
		return 0, err
	}
	const tries = 3
	for range tries {
		missed := false
		for e := range flows.All(now, g.state.config.Limits()) {
			if match != nil && !match(g.flow(e, now, orphan)) {
				continue
			}
			if flows.Forget(e) {
				n++
			} else {
				missed = true
			}
		}
		if !missed {
			break
		}
	}
	return n, nil
}

// forgetPeers forgets by which number clients are known whose flows are about to be
// forgotten, or these would go back where they were.
func (g *Group) forgetPeers(flows *maps.Flows, now uint32, orphan func(maps.Word) bool, match func(Flow) bool) error {
	if firstOf(g.state.config.Values()) == "" {
		return nil
	}
	of := map[netip.Addr]bool{}
	for e := range flows.All(now, g.state.config.Limits()) {
		if match == nil || match(g.flow(e, now, orphan)) {
			of[e.Client.Addr()] = true
		}
	}
	return maps.ForgetPeers(g.state.Peers, func(client netip.Addr) bool { return match == nil || of[client] })
}

// Forecast is what taking the program off would do.
type Forecast struct {
	// Flows is how many flows are tracked.
	Flows int
	// Move is how many of them the kernel's hash would serve elsewhere, -1 if
	// that is not known: see ErrHashUnknown.
	Move int
}

// DetachForecast tells how many flows a detach would move.
func (g *Group) DetachForecast() (Forecast, error) {
	var f Forecast
	g, err := g.current()
	if err != nil {
		return f, err
	}
	order, err := g.kernelOrder()
	if err != nil {
		return f, err
	}
	registered, err := g.state.registered()
	if err != nil {
		return f, err
	}
	if !hashKnown(g.state.config.Values()) {
		f.Flows, _, err = g.CountFlows()
		if f.Flows > 0 {
			f.Move = -1
		}
		return f, err
	}
	for flow, err := range g.Flows() {
		if err != nil {
			return f, err
		}
		f.Flows++
		if flow.Orphan || len(order) == 0 {
			continue
		}
		slot, ok := registered[order[maps.Scale(flow.Hash, uint32(len(order)))].Cookie]
		if !ok || int(slot) != flow.Slot {
			f.Move++
		}
	}
	return f, nil
}

// Where returns the member of the group that plain Linux would pick for the
// flow now. It reports false if the group has no member left.
//
// Errors: ErrHashUnknown.
func (g *Group) Where(f Flow) (sockets.Socket, bool, error) {
	if !hashKnown(g.state.config.Values()) {
		return sockets.Socket{}, false, ErrHashUnknown
	}
	order, err := g.kernelOrder()
	if err != nil || len(order) == 0 {
		return sockets.Socket{}, false, err
	}
	return order[maps.Scale(f.Hash, uint32(len(order)))], true, nil
}

// kernelOrder returns the members of the live group as the kernel has them.
func (g *Group) kernelOrder() ([]sockets.Socket, error) {
	live, err := g.live()
	if err != nil {
		return nil, err
	}
	return live.Members, nil
}

// live finds the group in the kernel; without members, if there is none.
func (g *Group) live() (sockets.Group, error) { return liveGroup(g.key) }

func liveGroup(key Key) (sockets.Group, error) {
	groups, err := sockets.Find(sockets.Query{NetNS: key.NetNS, Proto: key.Proto, Port: key.Addr.Port(), Addr: key.Addr.Addr()})
	if err != nil {
		return sockets.Group{}, err
	}
	return liveAmong(groups, key), nil
}

// liveAmong prefers the group with a program. Connected sockets may have groups
// of their own at the same address: since Linux 6.13 connect(2) takes a socket
// out of its group, but the next one to bind may make another one with it.
func liveAmong(groups []sockets.Group, key Key) sockets.Group {
	best := sockets.Group{Key: key}
	for _, found := range groups {
		if found.Key != key || found.Kernel == 0 || found.Connected() {
			continue
		}
		if best.Kernel == 0 || found.HasProgram && !best.HasProgram {
			best = found
		}
	}
	return best
}
