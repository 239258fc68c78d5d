// Package owner decides what the owner of a group may do through the agent's
// door: register, drain and resume sockets that he has open, in groups that
// were given to him.
package owner

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"github.com/rpsel/rpsel/internal/comm"
	"github.com/rpsel/rpsel/internal/door"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// None is what people write to take an owner back.
const None = "none"

var errNotOwner = errors.New("not yours")

// Parse reads a user, by name or number, or None, which is loader.NoOwner. A
// user who is called so is known by his number.
func Parse(text string) (uint32, error) {
	if text == None {
		return loader.NoOwner, nil
	}
	number := text
	if u, err := user.Lookup(text); err == nil {
		number = u.Uid
	}
	uid, err := strconv.ParseUint(number, 10, 32)
	if err != nil || uint32(uid) == loader.NoOwner {
		return 0, fmt.Errorf("use a user's name or number, or %s", None)
	}
	return uint32(uid), nil
}

// Name is the user's name, or his number if he has none.
func Name(uid uint32) string {
	number := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(number); err == nil {
		return u.Username
	}
	return number
}

// Groups handles the requests of owners for the groups on a BPF file system.
// What group a socket is in, and whose it is, is read from the descriptor, so
// that it does not matter where the client lives.
type Groups struct {
	FS loader.FS
	// Coming reports whether the agent is going to attach a group, with this
	// user as its owner, when it has noticed that the group is there. It is
	// called concurrently. Nil: it attaches none.
	Coming func(uid uint32, key loader.Key) bool
}

// attachPatience is how long a server that registers at once after its bind waits
// for the agent to attach its group. It takes milliseconds, a quarter of a second
// where the agent has to poll, and seconds on a machine that is overrun.
const attachPatience = 10 * time.Second

var _ door.Handler = Groups{}

// Register gives the socket a slot, whose record names the peer.
func (o Groups) Register(p door.Peer, conn syscall.Conn) (slot int, err error) {
	err = o.with(p, conn, func(g *loader.Group) error {
		slot, err = g.Register(client{conn, p})
		if !errors.Is(err, loader.ErrNotAttached) {
			return err
		}
		// The first socket after the group's last had closed, and the program with
		// it: the agent, that would attach it again, may not see it.
		again, err := o.FS.Attach(client{conn, p}, loader.Options{Again: true})
		if err != nil {
			return err
		}
		defer again.Close()
		slot, err = again.Register(client{conn, p})
		return err
	})
	return slot, err
}

// Drain drains the socket's slot.
func (o Groups) Drain(p door.Peer, conn syscall.Conn) error {
	return o.with(p, conn, func(g *loader.Group) error { return onSlot(g, conn, g.Drain) })
}

// Resume undoes Drain.
func (o Groups) Resume(p door.Peer, conn syscall.Conn) error {
	return o.with(p, conn, func(g *loader.Group) error { return onSlot(g, conn, g.Resume) })
}

// with runs f on the socket's group, if that is the peer's.
func (o Groups) with(p door.Peer, conn syscall.Conn, f func(*loader.Group) error) error {
	key, err := sockets.KeyOf(conn)
	if errors.Is(err, syscall.ENOTSOCK) {
		return errors.New("the descriptor is not a socket")
	}
	if err != nil {
		return err
	}
	// The kernel keeps sockets of different users in different groups.
	if key.UID != p.UID {
		return fmt.Errorf("%s: %w: the socket is uid %d's, you are uid %d", key, errNotOwner, key.UID, p.UID)
	}
	g, err := o.open(p, key)
	for deadline := time.Now().Add(attachPatience); err != nil && o.Coming != nil && o.Coming(p.UID, key) && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond) // nothing tells of it
		g, err = o.open(p, key)
	}
	if err != nil {
		return err
	}
	defer g.Close()
	return f(g)
}

// open opens a group that is the peer's.
func (o Groups) open(p door.Peer, key loader.Key) (*loader.Group, error) {
	g, err := o.FS.Open(key)
	if errors.Is(err, loader.ErrNotAttached) {
		return nil, fmt.Errorf("%s: %w: \"rpsel attach --port %d --owner %d\" makes it", key, loader.ErrNotAttached, key.Addr.Port(), p.UID)
	}
	if err != nil {
		return nil, err
	}
	if uid, ok := g.Owner(); !ok || uid != p.UID {
		g.Close()
		return nil, fmt.Errorf("%s: %w: the group has no owner: \"rpsel attach --port %d --owner %d\" gives it one", key, errNotOwner, key.Addr.Port(), p.UID)
	}
	return g, nil
}

// onSlot changes the slot that the socket is in, and no other: as long as the
// descriptor is open, nobody else can be in there.
func onSlot(g *loader.Group, conn syscall.Conn, change func(slot int) error) error {
	slot, err := g.Slot(conn)
	if err != nil {
		return err
	}
	return change(slot)
}

// client is a socket of the peer.
type client struct {
	syscall.Conn
	peer door.Peer
}

// Holder is the peer. In a pid namespace that cannot be seen from here it has no
// number and no name.
func (c client) Holder() (sockets.Holder, bool) {
	h := sockets.Holder{PID: c.peer.PID}
	if h.PID != 0 {
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", h.PID))
		h.Command = comm.Printable(bytes.TrimSuffix(name, []byte("\n")))
	}
	return h, true
}
