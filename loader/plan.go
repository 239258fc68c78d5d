package loader

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/sockets"
)

// Unregistered is a member of a group without a slot.
type Unregistered struct {
	Socket sockets.Socket
	// Reason is why it cannot be registered, or nil if nobody has done it yet.
	Reason error
}

// Plan is what Attach would do.
type Plan struct {
	Key Key
	// Attached tells that rpsel's program picks for the group already.
	Attached bool
	// Register lists the members without a slot, in the kernel's order.
	Register []sockets.Socket
	// Skipped lists those that would be left out (Options.Partial).
	Skipped []Unregistered

	group sockets.Group
}

// Plan checks what Attach would do with these options, and changes nothing. It
// waits for a command that is about to change the group, and removes what a
// killed one left behind.
func (fs FS) Plan(conn syscall.Conn, o Options) (Plan, error) {
	p, err := fs.plan(conn, o)
	if !p.inUse() && !errors.Is(err, ErrForeignProgram) {
		return p, err
	}
	// Program or array may be of an rpsel whose state is not in place yet, or
	// never will be.
	if err := fs.Sweep(p.Key.NetNS); err != nil {
		return Plan{}, err
	}
	for deadline := time.Now().Add(releasePatience); ; time.Sleep(5 * time.Millisecond) {
		p, err = fs.plan(conn, o)
		adopting := p.group.HasProgram && programName(p.group.Program) == bpf.AdoptProgram
		switch {
		case time.Now().Before(deadline) && (adopting || p.inUse() && !p.group.HasProgram):
		case adopting && errors.Is(err, ErrForeignProgram):
			if err := detachProgram(conn); err != nil {
				return Plan{}, err
			}
			return fs.plan(conn, o)
		default:
			return p, err
		}
	}
}

// inUse tells that a member is in a socket array that is not the group's.
func (p Plan) inUse() bool { return p.skips(sockets.ErrInUse) }

// skips tells that a member is left out, or in the way, for this reason.
func (p Plan) skips(reason error) bool {
	return slices.ContainsFunc(p.Skipped, func(u Unregistered) bool { return errors.Is(u.Reason, reason) })
}

// takeover tells that members to be registered are in the array of a program
// that is to be replaced.
func (p Plan) takeover() bool {
	return slices.ContainsFunc(p.Register, func(m sockets.Socket) bool { return m.UserData == sockets.UserDataArray })
}

func (fs FS) plan(conn syscall.Conn, o Options) (Plan, error) {
	if _, err := o.withDefaults(); err != nil {
		return Plan{}, err
	}
	key, err := sockets.KeyOf(conn)
	if err != nil {
		return Plan{}, err
	}
	if err := o.CheckOwner(key); err != nil {
		return Plan{}, err
	}
	if err := o.CheckProto(key.Proto); err != nil {
		return Plan{}, fmt.Errorf("%s: %w", key, err)
	}
	s, err := fs.open(key)
	if errors.Is(err, ErrNotAttached) {
		if err := checkPolicy(key, nil, o.Policy); err != nil {
			return Plan{}, err
		}
		return makePlan(key, conn, nil, o)
	}
	if err != nil {
		return Plan{}, err
	}
	defer s.close()
	if err := s.checkFixed(key, o); err != nil {
		return Plan{}, err
	}
	if err := checkPolicy(key, s, o.Policy); err != nil {
		return Plan{}, err
	}
	return makePlan(key, conn, s, o)
}

// closing is how long a member that no process holds is given to go. When a
// process ends, its descriptors go first, and its sockets a moment later.
const closing = 100 * time.Millisecond

// makePlan looks at the group as it is. s is nil if it has no state.
func makePlan(key Key, conn syscall.Conn, s *state, o Options) (Plan, error) {
	for deadline := time.Now().Add(closing); ; time.Sleep(2 * time.Millisecond) {
		p, err := planOnce(key, conn, s, o)
		if !p.skips(sockets.ErrUnseen) || time.Now().After(deadline) {
			return p, err
		}
	}
}

func planOnce(key Key, conn syscall.Conn, s *state, o Options) (Plan, error) {
	p := Plan{Key: key}
	cookie, err := sockets.Cookie(conn)
	if err != nil {
		return p, err
	}
	// First who is registered, then who there is: one that closes in between
	// would seem to be in another array.
	registered := map[uint64]uint32{}
	if s != nil {
		if registered, err = s.registered(); err != nil {
			return p, err
		}
	}
	if p.group, err = findGroup(key, cookie); err != nil {
		return p, err
	}
	if s != nil {
		if p.Attached, err = s.attached(p.group); err != nil {
			return p, err
		}
		if !p.Attached {
			// One state serves one group.
			other, err := liveGroup(key)
			if err != nil {
				return p, err
			}
			if second, err := s.attached(other); err != nil {
				return p, err
			} else if second {
				return p, fmt.Errorf("%s: %w: %s is in a second group of this address, since it bound beside a connected socket: restart it",
					key, ErrUnregistrable, describe(p.group.Members[len(p.group.Members)-1]))
			}
		}
	}
	foreign := p.group.HasProgram && !p.Attached
	if foreign && !o.Replace {
		owner := "detach the tool it belongs to"
		if ours(p.group.Program, nil) {
			owner = "it is an rpsel's with its state elsewhere: name that with --bpffs"
		}
		return p, fmt.Errorf("%s: %w (program id %d): %s, or take its place with --replace",
			key, ErrForeignProgram, p.group.Program, owner)
	}
	confirm := o.Confirm
	if s != nil {
		confirm = confirmOf(s.config.Values())
	}
	for _, m := range p.group.Members {
		if _, ok := registered[m.Cookie]; ok {
			continue
		}
		free := m
		if foreign && m.UserData == sockets.UserDataArray {
			free.UserData = sockets.UserDataFree // once that program is gone
		}
		if err := confirm.check(free); err != nil {
			p.Skipped = append(p.Skipped, Unregistered{m, err})
		} else {
			p.Register = append(p.Register, m)
		}
	}
	if o.Partial {
		return p, nil
	}
	if len(p.Skipped) > 0 {
		return p, fmt.Errorf("%s: %w: %w; or leave it out with --partial", key, ErrUnregistrable, p.Skipped[0].Reason)
	}
	if p.group.IncomingCPU && !p.Attached {
		return p, fmt.Errorf("%s: %w as it is used: SO_INCOMING_CPU is set on one, by which the kernel picks first; attaching would move flows, allow it with --partial",
			key, ErrUnregistrable)
	}
	return p, nil
}

// attached tells whether the state's program picks for a live group.
func (s *state) attached(live sockets.Group) (bool, error) {
	id, err := s.programID()
	return live.HasProgram && live.Program == id, err
}

// findGroup finds the live group of a key by one of its members.
func findGroup(key Key, cookie uint64) (sockets.Group, error) {
	groups, err := sockets.Find(sockets.Query{NetNS: key.NetNS, Proto: key.Proto, Port: key.Addr.Port(), Addr: key.Addr.Addr()})
	if err != nil {
		return sockets.Group{}, err
	}
	for _, g := range groups {
		if g.Key != key || !slices.ContainsFunc(g.Members, func(m sockets.Socket) bool { return m.Cookie == cookie }) {
			continue
		}
		if g.Kernel == 0 {
			return g, fmt.Errorf("%s: %w", key, g.Members[0].Check())
		}
		return g, nil
	}
	return sockets.Group{}, fmt.Errorf("%s: %w", key, sockets.ErrGone)
}
