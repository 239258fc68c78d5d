package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// sweep looks for all groups there are, whatever was told of them, and keeps
// them. It is the net under the events.
func (k *keeper) sweep() error {
	k.refresh()
	if k.watcher == nil {
		k.locate()
	}
	groups, err := k.findAll()
	if err != nil {
		return err
	}
	if k.watcher == nil {
		for cookie, p := range k.polled {
			k.noteFresh(cookie, p) // who came since the last poll; what is wrong the next tells
		}
	}
	for _, g := range groups {
		k.keep(g)
	}
	k.forgetNetNSes()
	k.forgetEmpty()
	k.openDoors()
	k.done.Swept = time.Now()
	return nil
}

// forgetEmpty removes the state of groups whose servers have not come back for
// so long that no flow of theirs is left, if a service says how to make it anew.
func (k *keeper) forgetEmpty() {
	for key, g := range k.groups {
		s := k.service(key)
		if slots, err := g.Slots(); s == nil || err != nil || len(slots) > 0 {
			g.empty = time.Time{}
			continue
		}
		if g.empty.IsZero() {
			g.empty = time.Now()
		}
		if time.Since(g.empty) > cmp.Or(s.Options.Idle, loader.DefaultIdle) {
			k.remove(key, g, "its servers have been gone for longer than idle")
		}
	}
}

// remove removes the state of a group.
func (k *keeper) remove(key loader.Key, g *group, why string) {
	_, err := k.FS.Detach(key)
	if errors.Is(err, loader.ErrNotAttached) {
		err = nil
	}
	k.fails(fmt.Sprint("remove ", key), err, k.keyAttrs(key)...)
	if err != nil {
		return
	}
	g.Close()
	delete(k.groups, key)
	k.Log.Info("state removed: "+why, append(k.keyAttrs(key), "netns_cookie", key.NetNS)...)
}

// findAll finds all groups on the ports of services and of groups with state, in
// all namespaces.
func (k *keeper) findAll() ([]sockets.Group, error) {
	switch len(k.ports) {
	case 0:
		return nil, nil
	case 1:
		return sockets.Find(sockets.Query{Proto: k.ports[0].Proto, Port: k.ports[0].Port})
	}
	// The search goes through all open files, however few ports are asked for.
	groups, err := sockets.Find(sockets.Query{})
	return slices.DeleteFunc(groups, func(g sockets.Group) bool {
		return !slices.Contains(k.ports, watch.Port{Proto: g.Proto, Port: g.Addr.Port()})
	}), err
}

// reload reads the file again. With a bad one all stays as it is.
func (k *keeper) reload() {
	k.notify(reloading())
	services, place, err := load(k.Options)
	k.done.ConfigStale = err != nil
	if err != nil {
		k.Log.Error("the configuration stays as it was: "+err.Error(), "file", k.Config)
		k.notify("READY=1\n" + k.statusLine())
		return
	}
	old := k.services
	k.services, k.place = services, place
	k.Log.Info("configuration read", "file", k.Config, "services", len(services))
	for _, s := range old {
		same := func(o *config.Service) bool {
			return o.Proto == s.Proto && o.Port == s.Port && o.Addr == s.Addr && o.NetNS == s.NetNS
		}
		if !slices.ContainsFunc(services, same) {
			k.Log.Info(fmt.Sprintf(`service removed: what is attached stays so, "rpsel detach --port %d" ends that`, s.Port), "service", s.String())
		}
	}
	k.serve()
	k.forcePins()
	k.openDoors()
	k.watchPorts()
	k.trySweep()
	k.notify("READY=1\n" + k.statusLine())
}
