package loader

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/internal/iterator"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// counting is what counts the open connections of a TCP group.
type counting struct {
	bpf.ConnsPrograms
	Owners *ebpf.Map `ebpf:"owners"` // whose a connection is
	counts link.Link // nil but for who attached it
}

func (c *counting) close() error {
	err := errors.Join(c.ConnsPrograms.Close(), c.Owners.Close())
	if c.counts != nil {
		err = errors.Join(err, c.counts.Close())
	}
	return err
}

// countingPin is there if connections are counted.
const countingPin = "counting"

// CanCount returns nil if this kernel can count the connections of TCP listeners,
// and else why not.
//
// Errors: ErrPermission, ErrUnsupported.
func CanCount() error {
	c, err := count(Key{}, nil)
	return errors.Join(err, c.close())
}

// attachTracing is the library's. A test has one that cannot.
var attachTracing = link.AttachTracing

// count loads the programs that count, on the maps that there are, and attaches the
// one that follows the sockets. That goes with its pin.
func count(key Key, on map[string]*ebpf.Map) (_ counting, err error) {
	var c counting
	spec, err := bpf.LoadConns()
	if err != nil {
		return c, err
	}
	for name, value := range map[string]any{bpf.ConnsVarNetns: key.NetNS, bpf.ConnsVarPort: key.Addr.Port()} {
		if err := spec.Variables[name].Set(value); err != nil {
			return c, fmt.Errorf("set %s: %w", name, err)
		}
	}
	if err := spec.LoadAndAssign(&c, &ebpf.CollectionOptions{MapReplacements: on}); err != nil {
		err = bpf.Refused("the programs that count connections", err)
		var refused *ebpf.VerifierError
		if !errors.Is(err, ErrPermission) && !errors.Is(err, ErrUnsupported) && errors.As(err, &refused) {
			err = fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
		return c, err
	}
	c.counts, err = attachTracing(link.TracingOptions{Program: c.RpselCount})
	if err != nil {
		err = fmt.Errorf("%w: the tracepoint inet_sock_set_state: %w", ErrUnsupported, err)
		return counting{}, errors.Join(err, c.close())
	}
	return c, nil
}

// startCounting counts a TCP group's connections from now on. A kernel that cannot
// do that does all else.
func (s *state) startCounting(key Key, keep map[string]*ebpf.Map) error {
	on := map[string]*ebpf.Map{bpf.ConnsMapConns: s.Conns, bpf.ConnsMapMovedConns: s.MovedConns}
	if owners := keep[bpf.ConnsMapOwners]; owners != nil {
		on[bpf.ConnsMapOwners] = owners
	}
	c, err := count(key, on)
	if errors.Is(err, ErrUnsupported) {
		return nil
	}
	s.counting, s.counted = c, err == nil
	return err
}

// checkPolicy refuses a policy that goes by connections which nobody counts. s is
// nil if the group has no state.
func checkPolicy(key Key, s *state, p Policy) error {
	if p != PolicyLeast || key.Proto != TCP || s != nil && s.counted {
		return nil
	}
	switch err := CanCount(); {
	case errors.Is(err, ErrUnsupported):
		return fmt.Errorf("%s: policy %s: %w (%v): use another policy", key, p, ErrUncounted, err)
	case err == nil && s != nil:
		return fmt.Errorf("%s: policy %s: %w: \"rpsel upgrade\" makes this kernel do so", key, p, ErrUncounted)
	default:
		return err
	}
}

// own makes the connections that a listener accepts from now on count as the
// slot's.
func (s *state) own(fd int, slot uint32) error {
	if !s.counted {
		return nil
	}
	mine := bpf.ConnsAccepted{Owner: s.owner(slot)}
	if err := s.Owners.Update(int32(fd), &mine, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("slot %d: count its connections: %w", slot, err)
	}
	return nil
}

// ownAll does so for all that are registered.
func (s *state) ownAll(live sockets.Group) error {
	registered, err := s.registered()
	if err != nil {
		return err
	}
	for _, m := range live.Members {
		slot, ok := registered[m.Cookie]
		if !ok {
			continue
		}
		s.conns.Begin(slot, s.listeners.Incarnation(slot))
		conn, err := m.Take()
		if errors.Is(err, sockets.ErrGone) {
			continue
		}
		if err != nil {
			return err
		}
		err = control(conn, func(fd int) error { return s.own(fd, slot) })
		conn.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// countOpen counts the open connections of each slot's listener, from the sockets.
// Counts that a missed event has made wrong it sets right, as far as what changed
// meanwhile cannot be why they differ.
func (s *state) countOpen() (open [maps.Slots]int, err error) {
	var before [maps.Slots]maps.Count
	for slot := range uint32(maps.Slots) {
		before[slot] = s.conns.Count(slot)
	}
	left, err := s.notes()
	if err != nil {
		return open, err
	}
	r, err := iterator.Map(s.RpselOpened, s.Owners)
	if err != nil {
		return open, fmt.Errorf("count connections: %w", err)
	}
	defer r.Close()
	owners, err := iterator.ReadAll[uint64](r)
	if err != nil {
		return open, fmt.Errorf("count connections: %w", err)
	}
	for _, owner := range owners {
		if slot := maps.OwnerSlot(owner); owner == s.owner(slot) {
			open[slot]++
		}
	}
	for slot := range uint32(maps.Slots) {
		s.conns.Correct(before[slot], s.owner(slot), open[slot])
	}
	// Every connection that is known has been asked where it went.
	now, err := s.notes()
	if err != nil {
		return open, err
	}
	for cookie, owner := range left {
		if now[cookie] != owner {
			continue // it moved on meanwhile
		}
		if err := s.MovedConns.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return open, fmt.Errorf("count connections: %w", err)
		}
	}
	return open, nil
}

// owner is what connections of a slot's present listener say.
func (s *state) owner(slot uint32) uint64 { return maps.Owner(slot, s.listeners.Incarnation(slot)) }

// notes are of the connections that went to another listener and have not been
// asked since: who has each, by its cookie.
func (s *state) notes() (map[uint64]uint64, error) {
	notes := map[uint64]uint64{}
	var cookie, owner uint64
	all := s.MovedConns.Iterate()
	for all.Next(&cookie, &owner) {
		notes[cookie] = owner
	}
	if err := all.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, fmt.Errorf("count connections: %w", err)
	}
	return notes, nil
}

// adoptRounds bounds how often adopt looks for connections: each round has room
// for RPSEL_MOVED of them.
const adoptRounds = 128

// adopt counts the connections that the processes of listeners had accepted before
// these were registered; of one process, or (0) of all. Which listener accepted one
// nobody knows: they are dealt in turn to those that its process has. The caller
// holds the lock.
func (s *state) adopt(key Key, pid int) error {
	if !s.counted {
		return nil
	}
	var listeners map[uint32][]uint64
	turn := map[uint32]int{}
	for range adoptRounds {
		strangers, err := s.strangers(pid)
		if err != nil || len(strangers) == 0 {
			return err
		}
		if listeners == nil {
			if listeners, err = s.ownersIn(key, pid); err != nil {
				return err
			}
		}
		adopted := 0
		for _, c := range strangers {
			own := listeners[c.Pid]
			if len(own) == 0 || !reaches(key, c) {
				continue
			}
			err := s.MovedConns.Update(c.Cookie, own[turn[c.Pid]%len(own)], ebpf.UpdateNoExist)
			switch {
			case err == nil:
				turn[c.Pid]++
				adopted++
			case errors.Is(err, ebpf.ErrKeyExist): // another descriptor of it
			case errors.Is(err, unix.E2BIG): // in the next round
			default:
				return fmt.Errorf("count connections: %w", err)
			}
		}
		fault.Point("connections adopted")
		if adopted == 0 {
			return nil
		}
	}
	return nil
}

// strangers lists connections on the port that are not counted, after it has
// counted those that are in the map of where connections went.
func (s *state) strangers(pid int) ([]bpf.ConnsStranger, error) {
	r, err := iterator.Files(s.RpselAdopt, pid)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil // the process ended
	}
	if err != nil {
		return nil, fmt.Errorf("count connections: %w", err)
	}
	defer r.Close()
	strangers, err := iterator.ReadAll[bpf.ConnsStranger](r)
	if err != nil {
		return nil, fmt.Errorf("count connections: %w", err)
	}
	return strangers, nil
}

// ownersIn lists the registered listeners that processes hold.
func (s *state) ownersIn(key Key, pid int) (map[uint32][]uint64, error) {
	groups, err := sockets.Find(sockets.Query{
		NetNS: key.NetNS, Proto: key.Proto, Port: key.Addr.Port(), Addr: key.Addr.Addr(), PID: pid,
	})
	if err != nil {
		return nil, err
	}
	registered, err := s.registered()
	if err != nil {
		return nil, err
	}
	owners := map[uint32][]uint64{}
	for _, live := range groups {
		for _, m := range live.Members {
			slot, ok := registered[m.Cookie]
			if !ok || live.Key != key {
				continue
			}
			for _, h := range m.Holders {
				owners[uint32(h.PID)] = append(owners[uint32(h.PID)], s.owner(slot))
			}
		}
	}
	return owners, nil
}

// reaches reports whether a connection may have come by a listener of the group's
// address: its socket is of the family of that one.
func reaches(key Key, c bpf.ConnsStranger) bool {
	group := key.Addr.Addr()
	if c.Family == unix.AF_INET {
		return group.Is4() && (group.IsUnspecified() || group == netip.AddrFrom4([4]byte(c.Local[:4])))
	}
	local := netip.AddrFrom16(c.Local)
	switch {
	case group.Is4():
		return false
	case !group.IsUnspecified():
		return local.Unmap() == group.Unmap()
	default:
		return !local.Is4In6() || !key.V6Only
	}
}
