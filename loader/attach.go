package loader

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/maps"
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

// settleRounds bounds how often Attach looks again whether a socket came or
// went while it attached.
const settleRounds = 5

// releasePatience is how long Attach waits for the kernel to free a socket array
// that nobody has any more, which takes it some milliseconds.
const releasePatience = time.Second

// Attach makes the reuseport group of conn sticky: it registers all members and
// attaches the selection program. No flow moves. On a group that is attached
// it registers what is new, and changes the times that are given.
//
// It borrows conn, which may be any bound UDP socket or TCP listener with
// SO_REUSEPORT, of any process and network namespace. The caller closes the
// Group. Either all is done or nothing.
//
// Errors: ErrUnregistrable, ErrForeignProgram, ErrFixed, ErrIncompatible,
// ErrLocked, ErrPermission, ErrUnsupported, ErrNoBPFFS, sockets.ErrNoReuseport,
// sockets.ErrGone.
func Attach(conn syscall.Conn, o Options) (*Group, error) { return DefaultFS.Attach(conn, o) }

// Attach is the function of the same name, with state on this bpffs.
func (fs FS) Attach(conn syscall.Conn, o Options) (_ *Group, err error) {
	full, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	// What is refused leaves no trace, not even a directory.
	p, err := fs.Plan(conn, o)
	if err != nil {
		return nil, err
	}
	key := p.Key
	l, err := fs.lockNew(key.NetNS)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", key, err)
	}
	defer l.unlock()
	if err := fs.sweepAside(key.NetNS); err != nil {
		return nil, fmt.Errorf("attach %s: remove what a killed command left: %w", key, err)
	}

	if p.takeover() {
		if err := fs.release(conn, o); err != nil {
			fs.tidy(key.NetNS)
			return nil, fmt.Errorf("%s: %w", key, err)
		}
	}

	s, err := fs.open(key)
	switch {
	case errors.Is(err, ErrNotAttached):
		return fs.attachNew(key, conn, full)
	case err != nil:
		return nil, err
	}
	g := &Group{fs: fs, key: key, state: s}
	defer func() {
		if err != nil {
			g.Close()
		}
	}()
	if o.Flows != 0 && uint32(o.Flows) != s.config.Values().Capacity {
		return nil, fmt.Errorf("%s: flows %d: %w, with %d: detach it first", key, o.Flows, ErrFixed, s.config.Values().Capacity)
	}
	if err := g.attachAgain(conn, o, full); err != nil {
		return nil, fmt.Errorf("attach %s: %w", key, err)
	}
	limits := s.config.Limits()
	if o.Idle != 0 {
		limits.Established = seconds(o.Idle)
	}
	if o.IdleNew != 0 {
		limits.New = seconds(o.IdleNew)
	}
	s.config.SetLimits(limits)
	return g, nil
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
		adopting := p.group.HasProgram && programName(p.group.Program) == sockets.AdoptProgram
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
func (p Plan) inUse() bool {
	return slices.ContainsFunc(p.Skipped, func(u Unregistered) bool { return errors.Is(u.Reason, sockets.ErrInUse) })
}

// takeover tells that members to be registered are in the array of a program
// that is to be replaced.
func (p Plan) takeover() bool {
	return slices.ContainsFunc(p.Register, func(m sockets.Socket) bool { return m.UserData == sockets.UserDataArray })
}

// release takes the program that is to be replaced off the group, and waits
// until the kernel has freed the array that the program alone had kept: it is
// of another tool, or of an rpsel whose bpffs is gone. If somebody else has the
// array too, the program is put back.
func (fs FS) release(conn syscall.Conn, o Options) error {
	p, err := fs.plan(conn, o)
	if err != nil || !p.takeover() {
		return err
	}
	if err := detachProgram(conn); err != nil {
		return err
	}
	program := p.group.Program
	for deadline := time.Now().Add(releasePatience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if p, err = fs.plan(conn, Options{Partial: true}); err != nil || !p.inUse() {
			return err
		}
	}
	err = fmt.Errorf("%w: %w", ErrUnregistrable, p.Skipped[0].Reason)
	old, openErr := ebpf.NewProgramFromID(ebpf.ProgramID(program))
	if openErr != nil {
		return err // gone, or not eBPF
	}
	defer old.Close()
	return errors.Join(err, attachProgram(conn, old))
}

func (fs FS) plan(conn syscall.Conn, o Options) (Plan, error) {
	if _, err := o.withDefaults(); err != nil {
		return Plan{}, err
	}
	key, err := sockets.KeyOf(conn)
	if err != nil {
		return Plan{}, err
	}
	s, err := fs.open(key)
	if errors.Is(err, ErrNotAttached) {
		return makePlan(key, conn, nil, o)
	}
	if err != nil {
		return Plan{}, err
	}
	defer s.close()
	if o.Flows != 0 && uint32(o.Flows) != s.config.Values().Capacity {
		return Plan{}, fmt.Errorf("%s: flows %d: %w, with %d: detach it first", key, o.Flows, ErrFixed, s.config.Values().Capacity)
	}
	return makePlan(key, conn, s, o)
}

// makePlan looks at the group as it is. s is nil if it has no state.
func makePlan(key Key, conn syscall.Conn, s *state, o Options) (Plan, error) {
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
		own, err := s.RpselSelect.Info()
		if err != nil {
			return p, err
		}
		id, _ := own.ID()
		p.Attached = p.group.HasProgram && p.group.Program == uint32(id)
		if !p.Attached {
			// One state serves one group.
			other, err := liveGroup(key)
			if err != nil {
				return p, err
			}
			if other.HasProgram && other.Program == uint32(id) {
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
	for _, m := range p.group.Members {
		if _, ok := registered[m.Cookie]; ok {
			continue
		}
		free := m
		if foreign && m.UserData == sockets.UserDataArray {
			free.UserData = sockets.UserDataFree // once that program is gone
		}
		if err := free.Check(); err != nil {
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

// attachNew makes state for a group that has none. The caller holds the lock.
func (fs FS) attachNew(key Key, conn syscall.Conn, o Options) (_ *Group, err error) {
	p, err := makePlan(key, conn, nil, o)
	if err != nil {
		return nil, err
	}
	s, err := create(key, len(p.group.Members), o)
	if err != nil {
		return nil, err
	}
	g := &Group{fs: fs, key: key, state: s, fresh: true}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("attach %s: %w", key, err), s.evict(), fs.remove(key), g.Close())
			fs.tidy(key.NetNS)
		}
	}()
	if err := g.followKernel(p); err != nil {
		return nil, err
	}
	if err := fs.publish(key, s); err != nil {
		return nil, err
	}
	if err := attachProgram(conn, g.state.RpselSelect); err != nil {
		return nil, err
	}
	if err := g.settle(conn, p, o); err != nil {
		return nil, errors.Join(err, detachProgram(conn))
	}
	return g, nil
}

// attachAgain brings an existing state up to date with its group. given are the
// options without defaults.
func (g *Group) attachAgain(conn syscall.Conn, given, o Options) error {
	now, err := g.state.now()
	if err != nil {
		return err
	}
	if err := g.state.repair(now); err != nil {
		return err
	}
	p, err := makePlan(g.key, conn, g.state, o)
	if err != nil {
		return err
	}
	if p.Attached {
		if given.Settle != 0 {
			// If it has settled, what it has settled to is what stays.
			if err := g.state.redeal(now); err != nil {
				return err
			}
			g.state.config.Settle(now, settledAt(now, o.Settle))
		}
		return g.join(p.Register, now)
	}
	// The group was made anew since, or somebody took the program off: its
	// flows are where the kernel's hash has them, as at a first attach.
	g.state.config.Settle(now, settledAt(now, o.Settle))
	if err := g.followKernel(p); err != nil {
		return err
	}
	if err := attachProgram(conn, g.state.RpselSelect); err != nil {
		return err
	}
	return g.settle(conn, p, o)
}

// followKernel registers all members and makes the program pick as the kernel
// does now.
func (g *Group) followKernel(p Plan) error {
	now, err := g.state.now()
	if err != nil {
		return err
	}
	if err := g.seatAll(p.Register, now); err != nil {
		return err
	}
	registered, err := g.state.registered()
	if err != nil {
		return err
	}
	order := make([]uint16, 0, len(p.group.Members))
	for _, m := range p.group.Members {
		slot, ok := registered[m.Cookie]
		if !ok {
			slot = maps.NoSlot
		}
		order = append(order, uint16(slot))
	}
	return g.state.deal(now, maps.KernelTable(order, g.state.picks.Limit()))
}

// settle looks again until no socket came or went behind its back since the
// plan: what the kernel's order was when the program took over is what counts.
func (g *Group) settle(conn syscall.Conn, planned Plan, o Options) error {
	for range settleRounds {
		p, err := makePlan(g.key, conn, g.state, o)
		if err != nil {
			return err
		}
		same := func(a, b sockets.Socket) bool { return a.Cookie == b.Cookie }
		if slices.EqualFunc(p.group.Members, planned.group.Members, same) {
			return nil
		}
		if err := g.followKernel(p); err != nil {
			return err
		}
		planned = p
	}
	return nil
}

// attachProgram makes a program pick for conn's whole group. The kernel
// replaces atomically what was there (net/core/sock_reuseport.c
// reuseport_attach_prog), and keeps the program as long as the group lives.
func attachProgram(conn syscall.Conn, program *ebpf.Program) error {
	return control(conn, func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, program.FD())
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINVAL):
			return fmt.Errorf("attach the program: %w", sockets.ErrNoReuseport)
		case errors.Is(err, unix.EPERM):
			return fmt.Errorf("attach the program: %w: the socket has SO_LOCK_FILTER", ErrPermission)
		default:
			return fmt.Errorf("attach the program: %w", err)
		}
	})
}

// detachProgram takes the program off conn's group, if there is one.
func detachProgram(conn syscall.Conn) error {
	return control(conn, func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("detach the program: %w", err)
		}
		return nil
	})
}

// control runs f on conn's descriptor.
func control(conn syscall.Conn, f func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}
