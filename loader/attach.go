package loader

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// settleRounds bounds how often Attach looks again whether a socket came or
// went while it attached.
const settleRounds = 5

// releasePatience is how long Attach waits for the kernel to free a socket array
// that nobody has any more, which takes it some milliseconds, and more than
// a second where all CPUs are busy.
const releasePatience = 5 * time.Second

// Attach makes the reuseport group of conn sticky: it registers all members and
// attaches the selection program. No flow moves (but see Options.Affinity). On a group that is attached
// it registers what is new, and changes the policy, the times and the owner that
// are given.
//
// It borrows conn, which may be any bound UDP socket or TCP listener with
// SO_REUSEPORT, of any process and network namespace. The caller closes the
// Group. Either all is done or nothing.
//
// Errors: ErrUnregistrable, ErrForeignProgram, ErrFixed, ErrOwner, ErrOlder, ErrNewer,
// ErrIncompatible, ErrNotAttached (Options.Again), ErrLocked, ErrPermission, ErrUnsupported, ErrUncounted,
// ErrNoBPFFS, sockets.ErrNoReuseport, sockets.ErrGone.
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
	defer l.Unlock()
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
	case errors.Is(err, ErrNotAttached) && o.Again:
		fs.tidy(key.NetNS)
		return nil, err
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
	if err := s.checkFixed(key, o); err != nil {
		return nil, err
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
	s.setOwner(o)
	if err := s.adopt(key, 0); err != nil {
		return nil, err
	}
	return g, nil
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
	fault.Point("program attached")
	if err := g.settle(conn, p, o); err != nil {
		return nil, errors.Join(err, detachProgram(conn))
	}
	if err := g.state.adopt(g.key, 0); err != nil {
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
	if _, err := g.repair(now); err != nil {
		return err
	}
	p, err := makePlan(g.key, conn, g.state, o)
	if err != nil {
		return err
	}
	if given.NewGeneration {
		g.state.closeGeneration()
		fault.Point("generation closed")
	}
	if p.Attached {
		if given.Settle != 0 {
			if err := g.state.settle(now, o.Settle); err != nil {
				return err
			}
			if err := g.state.redeal(now); err != nil {
				return err
			}
		}
		if err := g.state.setPolicy(now, given.Policy); err != nil {
			return err
		}
		return g.join(p.Register, now)
	}
	// The group was made anew since, or somebody took the program off: its
	// flows are where the kernel's hash has them, as at a first attach.
	if err := g.state.settle(now, o.Settle); err != nil {
		return err
	}
	if err := g.state.setPolicy(now, given.Policy); err != nil {
		return err
	}
	if err := g.followKernel(p); err != nil {
		return err
	}
	if err := attachProgram(conn, g.state.RpselSelect); err != nil {
		return err
	}
	fault.Point("program attached")
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
	return g.state.dealAnew(now, maps.KernelTable(order, g.state.picks.Limit()))
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
