package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/sockets"
)

// With ConfirmReply a program looks at what the listeners send. It is linked to
// the cgroup of each listener's socket before that has a slot, and stays as long
// as there is a listener of that cgroup: the links are pinned in the group's
// directory, and go with it.

const (
	replyPin   = "reply" // of the program
	linkPrefix = "reply_"
)

// linkPin names the pin of the link to a cgroup.
func linkPin(cgroup uint64) string { return linkPrefix + strconv.FormatUint(cgroup, 10) }

// linkPins lists the cgroups that a group's directory has links to.
func linkPins(dir string) (cgroups []uint64, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), linkPrefix)
		if id, err := strconv.ParseUint(number, 10, 64); ok && err == nil {
			cgroups = append(cgroups, id)
		}
	}
	return cgroups, err
}

// HaveSenderNetNS reports whether a program can tell the network namespace of who
// sends. Without it two groups on one address in two namespaces, with listeners
// in one cgroup, confirm each other's flows (ConfirmReply).
func HaveSenderNetNS() bool { return senderNetNS() }

var senderNetNS = sync.OnceValue(func() bool {
	return features.HaveProgramHelper(ebpf.CGroupSKB, asm.FnGetNetnsCookie) == nil
})

// serverConstants are what the program knows the group's sockets by.
func serverConstants(key Key) map[string]any {
	family, address := uint32(unix.AF_INET), [16]byte{}
	if key.Addr.Addr().Is6() {
		family = unix.AF_INET6
	}
	copy(address[:], key.Addr.Addr().AsSlice())
	netns := key.NetNS
	if !HaveSenderNetNS() {
		netns = 0
	}
	return map[string]any{
		bpf.SelectVarServerPort: uint32(key.Addr.Port()), bpf.SelectVarServerFamily: family,
		bpf.SelectVarServerAddress: address, bpf.SelectVarServerDevice: key.Device, bpf.SelectVarServerNetns: netns,
	}
}

// seat puts a socket into a slot, without a share yet. From before that on its
// replies count.
func (g *Group) seat(m sockets.Socket, conn syscall.Conn, now uint32, r *roll) (uint32, error) {
	if confirmOf(g.state.config.Values()) == ConfirmReply {
		if err := g.link(m.Cgroup); err != nil {
			return 0, fmt.Errorf("%w: %s: see its replies: %w", ErrUnregistrable, describe(m), err)
		}
	}
	return g.state.seat(m, conn, now, r)
}

// link makes the program see what a cgroup's sockets send, if it does not yet.
// Until the state is pinned it keeps the link itself.
func (g *Group) link(id uint64) error {
	pinned := g.state.dir != nil
	path := filepath.Join(g.fs.groupDir(g.key), linkPin(id))
	if _, ok := g.state.links[id]; ok {
		return nil
	}
	if _, err := os.Stat(path); pinned && err == nil {
		return nil
	}
	dir, err := cgroup.OpenID(id)
	if err != nil {
		return err
	}
	defer dir.Close()
	links, err := dir.Link([]cgroup.Program{{Program: g.state.RpselReply, Hook: ebpf.AttachCGroupInetEgress}})
	if err != nil {
		return err
	}
	fault.Point("cgroup linked")
	if !pinned {
		g.state.links[id] = links[0]
		return nil
	}
	defer links.Close()
	if err := pinLink(links[0], path); err != nil {
		return err
	}
	fault.Point("link pinned")
	return nil
}

func pinLink(l *link.RawLink, path string) error {
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin %s: %w", filepath.Base(path), err)
	}
	return os.Chmod(path, fileMode)
}

// keepLinks pins the links of the state in place aside as well. They run its
// program until tend lets them run another.
func (fs FS) keepLinks(key Key, aside string) error {
	ids, err := linkPins(fs.groupDir(key))
	for _, id := range ids {
		err = errors.Join(err, os.Link(filepath.Join(fs.groupDir(key), linkPin(id)), filepath.Join(aside, linkPin(id))))
	}
	return err
}

// strayed is what is wrong with a group's links.
type strayed struct {
	idle  []uint64 // no listener is in that cgroup any more
	stale []uint64 // they run the program of before an upgrade
}

func (s strayed) none() bool { return len(s.idle)+len(s.stale) == 0 }

// strayed looks after the links of a group. It changes nothing.
func (fs FS) strayed(key Key, s *state, r *roll) (found strayed, err error) {
	if s.RpselReply == nil {
		return found, nil
	}
	listening := map[uint64]bool{}
	for slot, record := range r.records {
		if r.cookies[slot] != 0 {
			listening[record.Cgroup] = true
		}
	}
	info, err := s.RpselReply.Info()
	if err != nil {
		return found, err
	}
	own, _ := info.ID()
	ids, err := linkPins(fs.groupDir(key))
	if errors.Is(err, os.ErrNotExist) {
		return found, nil // it was detached meanwhile
	}
	if err != nil {
		return found, err
	}
	for _, id := range ids {
		if !listening[id] {
			found.idle = append(found.idle, id)
			continue
		}
		err := fs.withLink(key, id, func(l link.Link) error {
			info, err := l.Info()
			if err == nil && info.Program != own {
				found.stale = append(found.stale, id)
			}
			return err
		})
		if err != nil {
			return found, err
		}
	}
	return found, nil
}

// withLink runs f on a link, unless somebody has removed it meanwhile.
func (fs FS) withLink(key Key, id uint64, f func(link.Link) error) error {
	path := filepath.Join(fs.groupDir(key), linkPin(id))
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return openError(key, path, err)
	}
	defer l.Close()
	return f(l)
}

// tend removes the links that nobody needs, and makes the others run the
// program of the state. The caller has the lock.
func (fs FS) tend(key Key, s *state) (strayed, error) {
	r, err := s.roll()
	if err != nil {
		return strayed{}, err
	}
	found, err := fs.strayed(key, s, r)
	if err != nil {
		return found, err
	}
	for _, id := range found.stale {
		err := fs.withLink(key, id, func(l link.Link) error { return l.Update(s.RpselReply) })
		if err != nil && !errors.Is(err, unix.ENOLINK) { // its cgroup is gone: there is nothing to see
			return found, fmt.Errorf("replace the program that sees replies: %w", err)
		}
		fault.Point("link updated")
	}
	for _, id := range found.idle {
		if err := os.Remove(filepath.Join(fs.groupDir(key), linkPin(id))); err != nil {
			return found, err
		}
		fault.Point("link removed")
	}
	return found, nil
}

// look finds what is to be repaired, see state.look.
func (g *Group) look(now uint32) (findings, error) {
	f, r, err := g.state.look(now)
	if err == nil {
		f.links, err = g.fs.strayed(g.key, g.state, r)
	}
	return f, err
}

// repair finishes what a killed command began, see state.repair.
func (g *Group) repair(now uint32) (findings, error) {
	f, err := g.state.repair(now)
	if err == nil {
		f.links, err = g.fs.tend(g.key, g.state)
	}
	return f, err
}
