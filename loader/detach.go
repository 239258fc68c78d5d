package loader

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/fault"
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
// Errors: ErrNotAttached, ErrLocked, ErrPermission, ErrNoBPFFS, and
// sockets.ErrUnseen if the group cannot be seen from this pid namespace.
func (fs FS) Detach(key Key) (Detached, error) {
	d := Detached{Key: key}
	l, err := fs.lock(key.NetNS)
	if errors.Is(err, os.ErrNotExist) {
		return d, fmt.Errorf("%s: %w", key, ErrNotAttached)
	}
	if err != nil {
		return d, fmt.Errorf("detach %s: %w", key, err)
	}
	defer l.unlock()
	if err := fs.sweepAside(key.NetNS); err != nil {
		return d, fmt.Errorf("detach %s: remove what a killed command left: %w", key, err)
	}

	s, err := fs.open(key)
	if errors.Is(err, ErrNotAttached) || errors.Is(err, ErrPermission) {
		return d, err
	}
	if s != nil {
		defer s.close()
	}
	live, err := liveGroup(key)
	if err != nil {
		return d, err
	}
	if s != nil {
		registered, err := s.registered()
		if err != nil {
			return d, err
		}
		d.Listeners = len(registered)
		if d.Listeners > 0 && live.Kernel == 0 {
			// The program would stay, with no state to say whose it is.
			return d, fmt.Errorf("detach %s: %w", key, sockets.ErrUnseen)
		}
		if d.Flows, _, err = (&Group{fs: fs, key: key, state: s}).CountFlows(); err != nil {
			return d, err
		}
	} // else: what cannot be read cannot be told, but can be removed

	if live.HasProgram && ours(live.Program, s) {
		if err := detachFrom(live); err != nil {
			return d, fmt.Errorf("detach %s: %w", key, err)
		}
		d.Program = true
		fault.Point("program taken off")
	}
	if s != nil {
		err = s.evict()
	}
	err = errors.Join(err, fs.remove(key))
	fs.tidy(key.NetNS)
	return d, err
}

// ours reports whether a program is the state's, or looks like it where the
// state does not say.
func ours(id uint32, s *state) bool {
	if s != nil {
		info, err := s.RpselSelect.Info()
		if err != nil {
			return false
		}
		own, ok := info.ID()
		return ok && uint32(own) == id
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

// detachFrom takes the program off through any member that can be borrowed.
func detachFrom(live sockets.Group) error {
	err := fmt.Errorf("take a member: %w", sockets.ErrGone)
	for _, m := range live.Members {
		var conn *sockets.Conn
		if conn, err = takeAny(m); err != nil {
			continue
		}
		err = detachProgram(conn)
		conn.Close()
		if err == nil {
			return nil
		}
	}
	return err
}
