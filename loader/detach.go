package loader

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// Detached is what a Detach undid.
type Detached struct {
	Key Key
	// Program tells that the program was taken off a live group.
	Program bool
	// Listeners is how many were registered, Flows how many were tracked.
	Listeners, Flows int
}

// Detach takes the program off a group and removes its state: from then on the
// kernel's hash picks. It works when half of the state, or the group, is gone.
//
// Errors: ErrNotAttached, ErrNewer, ErrLocked, ErrPermission, ErrNoBPFFS, and
// sockets.ErrUnseen if the group cannot be seen from this pid namespace.
func (fs FS) Detach(key Key) (Detached, error) {
	d := Detached{Key: key}
	l, err := fs.lockGroup(key)
	if err != nil {
		return d, fmt.Errorf("detach %w", err)
	}
	defer l.Unlock()

	p, err := fs.pinned(key)
	if errors.Is(err, ErrNotAttached) || errors.Is(err, ErrPermission) || errors.Is(err, ErrNewer) {
		return d, err
	}
	live, err := liveGroup(key)
	if err != nil {
		return d, err
	}
	var own *ebpf.Program
	if p != nil {
		defer p.close()
		own = p.RpselSelect
		if d.Listeners, err = maps.NewSockets(p.Socks).Count(); err != nil {
			return d, err
		}
		if d.Listeners > 0 && live.Kernel == 0 {
			// The program would stay, with no state to say whose it is.
			return d, fmt.Errorf("detach %s: %w", key, sockets.ErrUnseen)
		}
		d.Flows, _ = p.countFlows()
	} // what cannot be read cannot be told, but can be removed

	if live.HasProgram && ours(live.Program, own) {
		if err := through(live, detachProgram); err != nil {
			return d, fmt.Errorf("detach %s: %w", key, err)
		}
		d.Program = true
		fault.Point("program taken off")
	}
	if p != nil {
		err = p.evict()
	}
	err = errors.Join(err, fs.remove(key))
	fs.tidy(key.NetNS)
	return d, err
}

// ours reports whether a program is this one, or looks like rpsel's where there
// is none to compare it with.
func ours(id uint32, own *ebpf.Program) bool {
	if own != nil {
		info, err := own.Info()
		if err != nil {
			return false
		}
		ownID, ok := info.ID()
		return ok && uint32(ownID) == id
	}
	return programName(id) == bpf.SelectProgRpselSelect
}

// programName names a program, or nothing: asking needs CAP_SYS_ADMIN.
func programName(id uint32) string {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// through runs f on any member of a group that can be borrowed.
func through(live sockets.Group, f func(syscall.Conn) error) error {
	err := fmt.Errorf("take a member: %w", sockets.ErrGone)
	for _, m := range live.Members {
		var conn *sockets.Conn
		if conn, err = m.Take(); err != nil {
			continue
		}
		err = f(conn)
		conn.Close()
		if err == nil {
			return nil
		}
	}
	return err
}
