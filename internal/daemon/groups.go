package daemon

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/force"
	"github.com/rpsel/rpsel/internal/statedir"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/loader"
)

// pid is the agent's own.
var pid = os.Getpid()

// recover removes what commands left behind that were killed.
func (k *keeper) recover() error {
	spaces, err := statedir.FS(k.FS).NetNSes()
	if err != nil {
		return err
	}
	for _, cookie := range spaces {
		if k.busy(cookie) {
			continue // whoever has the lock next does it
		}
		k.fails(fmt.Sprint("recover ", cookie), k.FS.Sweep(cookie))
	}
	return nil
}

// keys names the groups that have state.
func (k *keeper) keys() []loader.Key { return slices.Collect(maps.Keys(k.groups)) }

// refresh looks which groups have state. It reports whether ports are watched
// from now on that were not: nobody told of listeners that have come there.
func (k *keeper) refresh() (more bool) {
	keys, err := k.FS.Keys(0)
	k.fails("keys", err)
	if err != nil {
		return false
	}
	for key, g := range k.groups {
		if g.Current() {
			continue
		}
		g.Close()
		delete(k.groups, key)
		if !slices.Contains(keys, key) {
			k.Log.Info("detached", k.keyAttrs(key)...)
			k.refuse(key, nil)
		}
	}
	wanted := map[string]bool{}
	for _, key := range keys {
		wanted[opening(key)] = true
	}
	maps.DeleteFunc(k.failures, func(subject string, _ failure) bool {
		return strings.HasPrefix(subject, openSubject) && !wanted[subject]
	})
	for _, key := range keys {
		if k.groups[key] != nil {
			continue
		}
		g, err := k.FS.Open(key)
		if errors.Is(err, loader.ErrNotAttached) {
			continue // detached since it was listed
		}
		k.fails(opening(key), err, k.keyAttrs(key)...)
		if err == nil {
			k.groups[key] = &group{Group: g}
		}
	}
	return k.watchPorts()
}

// openSubject begins the subject of a failure to open a group.
const openSubject = "open "

func opening(key loader.Key) string { return fmt.Sprint(openSubject, key.NetNS, " ", key) }

// watchPorts says which listeners are to be reported. It reports whether there
// are more than before.
func (k *keeper) watchPorts() (more bool) {
	var ports []watch.Port
	add := func(p watch.Port) {
		if !slices.Contains(ports, p) {
			ports = append(ports, p)
			more = more || !slices.Contains(k.ports, p)
		}
	}
	for _, s := range k.services {
		add(watch.Port{Proto: s.Proto, Port: s.Port})
	}
	for key := range k.groups {
		add(watch.Port{Proto: key.Proto, Port: key.Addr.Port()})
	}
	k.ports = ports
	if k.watcher != nil {
		if err := k.watcher.SetPorts(ports); err != nil {
			k.unwatch(err)
		}
	}
	return more
}

// housekeep does what is due for a group by the time that has passed.
func (k *keeper) housekeep(g *group) {
	if k.busy(g.Key().NetNS) {
		return
	}
	done, err := g.Housekeep()
	if errors.Is(err, loader.ErrNotAttached) {
		return // detached since refresh looked
	}
	k.fails(fmt.Sprint("housekeep ", g.Key()), err, k.keyAttrs(g.Key())...)
	if done.Buried > 0 {
		k.Log.Info("listeners left", append(k.keyAttrs(g.Key()), "listeners", done.Buried)...)
	} else if done.Repaired {
		k.Log.Info("housekept", k.keyAttrs(g.Key())...)
	}
	if done.Forgotten > 0 {
		k.Log.Debug("expired flows forgotten", append(k.keyAttrs(g.Key()), "flows", done.Forgotten)...)
	}
}

// openDoors lets the owners of groups in, those of services whose first server is
// yet to come, and nobody else.
func (k *keeper) openDoors() {
	services := k.services
	k.announced.Store(&services)
	var owners []uint32
	add := func(uid uint32) {
		if !slices.Contains(owners, uid) {
			owners = append(owners, uid)
		}
	}
	for _, g := range k.groups {
		if uid, ok := g.Owner(); ok {
			add(uid)
		}
	}
	for _, s := range k.services {
		if uid := s.Options.Owner; uid != nil && *uid != loader.NoOwner {
			add(*uid)
		}
	}
	k.fails("doors", k.door.SetOwners(owners))
}

// coming reports whether a group belongs to a service whose owner is this user, as
// far as can be told without a look at namespaces. It may be called concurrently.
func (k *keeper) coming(uid uint32, key loader.Key) bool {
	return slices.ContainsFunc(*k.announced.Load(), func(s *config.Service) bool {
		return s.Options.Owner != nil && *s.Options.Owner == uid && s.Proto == key.Proto && s.Port == key.Addr.Port() &&
			(!s.Addr.IsValid() || s.Addr == key.Addr.Addr())
	})
}

// forcePins pins the programs that force SO_REUSEPORT for the services that want
// them, and removes those of others.
func (k *keeper) forcePins() {
	wanted := map[string]bool{}
	for _, s := range k.services {
		if !s.Force {
			continue
		}
		settings := force.Settings{Proto: s.Proto, Port: s.Port, Addr: s.Addr, Reuseport: force.On}
		dir := force.PinDir(k.FS, settings)
		wanted[dir] = true
		changed, err := force.Pin(k.FS, settings)
		k.fails("pin "+dir, err, "service", s.String())
		if changed {
			k.Log.Info("bind programs pinned", "service", s.String(), "dir", dir)
		}
	}
	pinned, err := force.Pinned(k.FS)
	k.fails("pinned", err)
	for _, settings := range pinned {
		dir := force.PinDir(k.FS, settings)
		if wanted[dir] {
			continue
		}
		err := force.Unpin(k.FS, settings)
		k.fails("unpin "+dir, err)
		if err == nil {
			k.Log.Info("bind programs removed: no service forces that port any more", "dir", dir)
		}
	}
}
