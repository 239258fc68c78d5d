package loader

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// Group is a handle on an attached reuseport group. Its methods may be called
// concurrently, but not after Close. It follows the group when another process
// upgrades it, or detaches and attaches it anew.
type Group struct {
	fs        FS
	key       Key
	state     *state // replaced by follow; who holds the lock or a copy may read it
	fresh     bool
	joined    []int
	swept     atomic.Int64 // the bucket where the next sweep begins
	sweptAt   atomic.Pointer[time.Time]
	countedAt atomic.Pointer[time.Time] // when connections were last counted from the sockets
	closed    sync.Once

	mu  sync.Mutex
	old []*state // replaced, and perhaps still read
}

// Open returns a handle on an attached group. A zero key.NetNS stands for the
// caller's network namespace. The caller closes the Group.
//
// Errors: ErrNotAttached, ErrOlder, ErrNewer, ErrIncompatible, ErrPermission.
func Open(key Key) (*Group, error) { return DefaultFS.Open(key) }

// Open is the function of the same name, with state on this bpffs.
func (fs FS) Open(key Key) (*Group, error) {
	if key.NetNS == 0 {
		own, err := ownNetNS()
		if err != nil {
			return nil, err
		}
		key.NetNS = own
	}
	s, err := fs.open(key)
	if err != nil {
		return nil, err
	}
	return &Group{fs: fs, key: key, state: s}, nil
}

// Close gives back the group's descriptors and memory. The kernel keeps
// balancing. It is idempotent.
func (g *Group) Close() (err error) {
	g.closed.Do(func() {
		errs := []error{g.state.close()}
		for _, s := range g.old {
			errs = append(errs, s.close())
		}
		err = errors.Join(errs...)
	})
	return err
}

// follow makes the state in force the group's, if that is another by now.
func (g *Group) follow() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	dir, err := g.fs.inForce(g.key)
	if err != nil {
		return err
	}
	if now, err := os.Stat(dir); err == nil && os.SameFile(now, g.state.dir) {
		return nil
	}
	s, err := g.fs.open(g.key)
	if err != nil {
		return err
	}
	g.old = append(g.old, g.state)
	g.state = s
	return nil
}

// current returns the group with the state in force, for reading. A group that
// was detached is read as it was.
func (g *Group) current() (*Group, error) {
	if err := g.follow(); err != nil && !errors.Is(err, ErrNotAttached) {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return &Group{fs: g.fs, key: g.key, state: g.state}, nil
}

// Key names the group.
func (g *Group) Key() Key { return g.key }

// Affinity says what counts as the same client here.
func (g *Group) Affinity() (Affinity, error) {
	now, err := g.current()
	if err != nil {
		return "", err
	}
	affinity, _ := affinityOf(now.state.config.Values())
	return affinity, nil
}

// Fresh reports whether the Attach that returned the group made its state.
func (g *Group) Fresh() bool { return g.fresh }

// Joined lists the slots that the Attach that returned the group filled.
func (g *Group) Joined() []int { return slices.Clone(g.joined) }

// Owner returns the user whose processes may register sockets of the group
// through the agent. It reports false if there is none, or it cannot be read.
func (g *Group) Owner() (uid uint32, ok bool) {
	now, err := g.current()
	if err != nil {
		return 0, false
	}
	return now.state.config.Owner()
}

// Slot returns the slot of a socket. It borrows conn.
//
// Errors: ErrNoListener.
func (g *Group) Slot(conn syscall.Conn) (int, error) {
	cookie, err := sockets.Cookie(conn)
	if err != nil {
		return 0, err
	}
	slots, err := g.Slots()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", g.key, err)
	}
	slot, ok := slots[cookie]
	if !ok {
		return 0, fmt.Errorf("%s: socket %d: %w: register it first", g.key, cookie, ErrNoListener)
	}
	return slot, nil
}

// change runs f with the namespace's lock held, on the state as it should be
// after the listeners that died since.
func (g *Group) change(f func(now uint32) error) error {
	return g.repaired(func(now uint32, _ findings) error { return f(now) })
}

// repaired is change for who wants to know what was repaired.
func (g *Group) repaired(f func(now uint32, found findings) error) error {
	return g.locked(func() error {
		now, err := g.state.now()
		if err != nil {
			return err
		}
		found, err := g.repair(now)
		if err != nil {
			return fmt.Errorf("%s: %w", g.key, err)
		}
		return f(now, found)
	})
}

// locked runs f with the namespace's lock held, on the state in force: with the
// lock nobody can replace it.
func (g *Group) locked(f func() error) error {
	l, err := g.fs.lock(g.key.NetNS)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w: it was detached", g.key, ErrNotAttached)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", g.key, err)
	}
	defer func() {
		g.mu.Lock() // flock(2) orders the goroutines, too, but Go's memory model knows only of this
		defer g.mu.Unlock()
		l.Unlock()
	}()
	if err := g.fs.sweepAside(g.key.NetNS); err != nil {
		return fmt.Errorf("%s: %w", g.key, err)
	}
	err = g.follow()
	if errors.Is(err, ErrNotAttached) {
		return fmt.Errorf("%s: %w: it was detached", g.key, ErrNotAttached)
	}
	if err != nil {
		return err
	}
	return f()
}

// Register gives a member of the group a slot and its share of new flows, once
// the group has settled. No existing flow moves. A socket that has a slot keeps
// it. Register borrows conn; the slot becomes empty when its socket closes, or, of
// TCP, ends listening. If that listens again it is registered again: it has its
// slot, weight and generation, and drains if it did.
//
// The group's record names the process that conn says it was borrowed from, by
// a method Holder like the one of sockets.Conn, else the calling one.
//
// Errors: sockets.ErrOtherGroup, sockets.ErrOtherUID, ErrNotAttached (also when
// all sockets of the group had closed: then Attach it again), ErrUnregistrable,
// ErrFull, ErrLocked.
func (g *Group) Register(conn syscall.Conn) (slot int, err error) {
	registered, err := g.RegisterAll([]syscall.Conn{conn})
	if err != nil {
		return 0, err
	}
	return registered[0].Slot, registered[0].Err
}

// Registration is what became of one socket.
type Registration struct {
	Slot int
	// Err is why the socket has no slot, or nil.
	Err error
}

// RegisterAll is Register for sockets that came at the same time: it takes
// about as long as for one. The answers are in the order of conns. One that
// cannot be registered does not keep the others from it.
//
// Errors, for all of them: ErrNotAttached, ErrLocked. In Registration.Err:
// sockets.ErrOtherGroup, sockets.ErrOtherUID, ErrUnregistrable, ErrFull.
func (g *Group) RegisterAll(conns []syscall.Conn) ([]Registration, error) {
	answers := make([]Registration, len(conns))
	cookies := make([]uint64, len(conns))
	for i, conn := range conns {
		if err := sockets.SameGroup(conn, g.key); err != nil {
			answers[i].Err = fmt.Errorf("register with %s: %w", g.key, err)
		} else if cookies[i], err = sockets.Cookie(conn); err != nil {
			answers[i].Err = err
		}
	}
	if !slices.ContainsFunc(answers, func(r Registration) bool { return r.Err == nil }) {
		return answers, nil
	}
	err := g.change(func(now uint32) error {
		r, err := g.state.roll()
		if err != nil {
			return err
		}
		registered := r.registered()
		own, err := g.ownDescriptors()
		if err != nil {
			return err
		}
		members := make([]sockets.Socket, len(conns))
		for i, conn := range conns {
			if _, ok := registered[cookies[i]]; ok || answers[i].Err != nil {
				continue
			}
			members[i], answers[i].Err = g.member(own, conn, cookies[i])
			if errors.Is(answers[i].Err, ErrNotAttached) {
				return answers[i].Err
			}
		}
		var fresh []uint32
		for i, conn := range conns {
			if answers[i].Err != nil {
				continue
			}
			at, ok := registered[cookies[i]]
			if !ok {
				if at, answers[i].Err = g.seat(members[i], conn, now, r); answers[i].Err != nil {
					continue
				}
				registered[cookies[i]] = at
				fresh = append(fresh, at)
			}
			answers[i].Slot = int(at)
		}
		if len(fresh) == 0 {
			return nil
		}
		if err := g.state.admit(now, fresh...); err != nil {
			return err
		}
		return g.state.adopt(g.key, onlyPID(members))
	})
	if err != nil {
		return nil, err
	}
	return answers, nil
}

// onlyPID is the process that sockets were borrowed from, or 0 if there are several.
func onlyPID(members []sockets.Socket) (pid int) {
	for _, m := range members {
		for _, h := range m.Holders {
			if pid != 0 && h.PID != pid {
				return 0
			}
			pid = h.PID
		}
	}
	return pid
}

// ownDescriptors finds the groups of the group's key by the descriptors of this
// process: its own sockets, and those it has borrowed.
func (g *Group) ownDescriptors() ([]sockets.Group, error) {
	return sockets.Find(sockets.Query{
		NetNS: g.key.NetNS, Proto: g.key.Proto, Port: g.key.Addr.Port(), Addr: g.key.Addr.Addr(), PID: os.Getpid(),
	})
}

// member looks for the socket among the members of the group that the program
// picks for.
func (g *Group) member(own []sockets.Group, conn syscall.Conn, cookie uint64) (sockets.Socket, error) {
	for _, live := range own {
		i := slices.IndexFunc(live.Members, func(m sockets.Socket) bool { return m.Cookie == cookie })
		if live.Key != g.key || i < 0 {
			continue
		}
		attached, err := g.state.attached(live)
		if err != nil {
			return sockets.Socket{}, err
		}
		if !attached {
			break
		}
		m := live.Members[i]
		if borrowed, ok := conn.(interface{ Holder() (sockets.Holder, bool) }); ok {
			if h, ok := borrowed.Holder(); ok {
				m.Holders = []sockets.Holder{h}
			}
		}
		if err := confirmOf(g.state.config.Values()).check(m); err != nil {
			return m, fmt.Errorf("%s: %w: %w", g.key, ErrUnregistrable, err)
		}
		return m, nil
	}
	// It is in no group, or in another than the one that was attached.
	if _, err := makePlan(g.key, conn, g.state, Options{Partial: true, Replace: true}); err != nil {
		return sockets.Socket{}, err
	}
	return sockets.Socket{}, fmt.Errorf("%s: %w: its last socket had closed: attach it again", g.key, ErrNotAttached)
}

// Drain ends new flows for the listener in a slot. It keeps those it has, and
// gets new ones again only when there is no other listener. While the group
// settles it also keeps the flows the kernel's hash had given it, as far as
// they cannot be told from new ones. Draining twice is fine.
//
// Errors: ErrNoListener, ErrNotAttached, ErrLocked.
func (g *Group) Drain(slot int) error {
	return g.alter(slot, func(at uint32, now uint32) error {
		if g.state.listeners.State(at) == maps.SlotDraining {
			return nil
		}
		g.state.listeners.SetState(at, maps.SlotDraining)
		fault.Point("slot draining")
		if err := g.state.redeal(now); err != nil {
			return err
		}
		return g.state.adopt(g.key, 0)
	})
}

// CountAccepted counts the connections that waited for a TCP listener when it was
// registered, and have been accepted since. Attach, Register and Drain do it, too.
//
// Errors: ErrNotAttached, ErrLocked.
func (g *Group) CountAccepted() error {
	return g.change(func(uint32) error { return g.state.adopt(g.key, 0) })
}

// Resume undoes Drain, with the same errors. Resuming twice is fine.
func (g *Group) Resume(slot int) error {
	return g.alter(slot, func(at uint32, now uint32) error {
		if g.state.listeners.State(at) == maps.SlotActive {
			return nil
		}
		return g.state.activate(now, at)
	})
}

// MaxWeight is the largest weight of a listener.
const MaxWeight = 65535

// SetWeight sets the share of new flows that a listener gets, relative to the
// weights of the others: 1, the default, to MaxWeight. No existing flow moves.
//
// Errors: ErrNoListener, ErrNotAttached, ErrLocked.
func (g *Group) SetWeight(slot, weight int) error {
	if weight < 1 || weight > MaxWeight {
		return fmt.Errorf("weight %d: use 1 to %d, or drain the listener", weight, MaxWeight)
	}
	return g.alter(slot, func(at uint32, now uint32) error {
		records, err := g.state.listeners.Records()
		if err != nil {
			return err
		}
		record := records[at]
		record.Weight = uint32(weight) | maps.Undealt
		if err := g.state.listeners.Record(at, record); err != nil {
			return err
		}
		fault.Point("weight recorded")
		return g.state.redeal(now)
	})
}

// alter runs f on a slot that has a living listener.
func (g *Group) alter(slot int, f func(at, now uint32) error) error {
	return g.change(func(now uint32) error {
		if slot >= 0 && slot < maps.Slots {
			cookie, err := g.state.sockets.Cookie(uint32(slot))
			if err != nil {
				return err
			}
			if cookie != 0 {
				return f(uint32(slot), now)
			}
		}
		return fmt.Errorf("%s: slot %d: %w", g.key, slot, ErrNoListener)
	})
}

// join registers sockets of other processes and gives them their share.
func (g *Group) join(members []sockets.Socket, now uint32) error {
	if err := g.seatAll(members, now); err != nil {
		return err
	}
	if len(members) == 0 {
		return nil
	}
	slots := make([]uint32, 0, len(g.joined))
	for _, slot := range g.joined {
		slots = append(slots, uint32(slot))
	}
	return g.state.admit(now, slots...)
}

// seatAll puts sockets of other processes into slots, without a share yet. A
// socket that closed meanwhile is passed over.
func (g *Group) seatAll(members []sockets.Socket, now uint32) error {
	r, err := g.state.roll()
	if err != nil {
		return err
	}
	for _, m := range members {
		conn, err := m.Take()
		if errors.Is(err, sockets.ErrGone) {
			continue
		}
		if err != nil {
			return err
		}
		// Kept open, it would keep a dead server's socket in the group.
		slot, err := g.seat(m, conn, now, r)
		conn.Close()
		if err != nil {
			return err
		}
		g.joined = append(g.joined, int(slot))
	}
	return nil
}
