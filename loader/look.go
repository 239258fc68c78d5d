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
	if err != nil {
		return false
	}
	attached, err := now.state.attached(live)
	return err == nil && attached
}

// Current reports whether the state is still the one that was opened: the group
// may have been detached since, and attached anew, or upgraded. A handle that is
// not current is as good as another, but keeps what it has left behind.
func (g *Group) Current() bool {
	dir, err := g.fs.inForce(g.key)
	if err != nil {
		return false
	}
	now, err := os.Stat(dir)
	g.mu.Lock()
	defer g.mu.Unlock()
	return err == nil && len(g.old) == 0 && os.SameFile(g.state.dir, now)
}
