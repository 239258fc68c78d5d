package loader

import (
	"os"

	"github.com/rpsel/rpsel/sockets"
)

// Slots returns the slots that have a living listener, by the cookie of its
// socket.
func (g *Group) Slots() (map[uint64]int, error) {
	now, err := g.current()
	if err != nil {
		return nil, err
	}
	registered, err := now.state.registered()
	if err != nil {
		return nil, err
	}
	slots := make(map[uint64]int, len(registered))
	for cookie, slot := range registered {
		slots[cookie] = int(slot)
	}
	return slots, nil
}

// Picks reports whether the group's program is the one that picks for a group
// that sockets.Find gave.
func (g *Group) Picks(live sockets.Group) bool {
	now, err := g.current()
	return err == nil && live.HasProgram && ours(live.Program, now.state.RpselSelect)
}

// Current reports whether the state is still the one that Open opened: the group
// may have been detached since, and attached anew, or upgraded.
func (g *Group) Current() bool {
	now, err := os.Stat(g.fs.groupDir(g.key))
	return err == nil && g.dir != nil && os.SameFile(g.dir, now)
}

// MakeMount mounts the bpffs if it is missing, as Attach does.
//
// Errors: ErrNoBPFFS, ErrPermission.
func (fs FS) MakeMount() error {
	if !fs.mounted() {
		return fs.mountBPFFS()
	}
	return fs.writable()
}
