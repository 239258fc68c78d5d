package daemon

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/statedir"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// bornSettle is how long a group settles that has only just come to be: it has
// no flows from before, and the rest of its servers is to get some soon.
const bornSettle = time.Second

// maxGroups is how many groups a service may have. Where anybody may bind its
// port, anybody can make groups of it, one for each address of 127.0.0.0/8, and
// each takes the memory of a flow table.
const maxGroups = 32

// group is one that has state.
type group struct {
	*loader.Group
	// applied is the service whose options are in force, nil if none is known.
	applied *config.Service
	// empty is since when it is known to have no listener; zero if it has one.
	empty time.Time
}

// keep makes of a live group what it should be: attached, if it has state or a
// service, with the service's options, and all its members registered.
func (k *keeper) keep(live sockets.Group) {
	state, service := k.groups[live.Key], k.service(live.Key)
	if live.Connected() || state == nil && service == nil {
		k.warnOwners(live.Key)
		return
	}
	if k.busy(live.NetNS) {
		return
	}
	var err error
	switch {
	case live.Kernel == 0 && service != nil && service.Adopt && errors.Is(live.Members[0].Check(), sockets.ErrNoReuseport):
		err = k.adopt(live, service)
	case live.Kernel == 0:
		err = live.Members[0].Check()
	case state == nil && k.groupsOf(service) >= maxGroups:
		err = fmt.Errorf("service %s has %d groups, more are not attached: name its addresses, a service each", service, maxGroups)
	case state == nil || !state.Picks(live):
		err = k.attach(live, service)
	default:
		if service != nil && state.applied != service {
			k.apply(live, state, service)
		}
		err = k.register(live, state)
	}
	// The same address may have a group, sockets in none, and even a second
	// group.
	k.fails(fmt.Sprint("keep ", live.Key, live.Kernel), err, k.attrs(live)...)
	k.warnOwners(live.Key)
	for _, warning := range append(live.Renounced(), live.Mixed()...) {
		k.complains(warning, warning, k.attrs(live)...)
	}
}

// busy tells whether a command has had the lock of a namespace for too long: it
// may have been stopped, which must not keep the agent from other namespaces.
// A sweep at the next tick does what is put off.
func (k *keeper) busy(netns uint64) bool {
	patience := k.pace.lock
	if k.locked[netns] {
		patience = 0
	}
	err := statedir.FS(k.FS).AwaitUnlocked(netns, patience)
	k.fails(fmt.Sprint("lock ", netns), err)
	if err == nil {
		delete(k.locked, netns)
		return false
	}
	k.locked[netns], k.putOff = true, true
	return true
}

// service finds the service that a group belongs to, nil if there is none.
func (k *keeper) service(key loader.Key) *config.Service {
	for _, s := range k.services {
		if s.Proto == key.Proto && s.Port == key.Addr.Port() &&
			(!s.Addr.IsValid() || s.Addr == key.Addr.Addr()) && k.inNetNS(s, key.NetNS) {
			return s
		}
	}
	return nil
}

// groupsOf counts the groups of a service.
func (k *keeper) groupsOf(s *config.Service) (n int) {
	for key := range k.groups {
		if k.service(key) == s {
			n++
		}
	}
	return n
}

// inNetNS tells whether a service is for a network namespace.
func (k *keeper) inNetNS(s *config.Service, cookie uint64) bool {
	switch s.NetNS {
	case config.AllNetNS:
		return true
	case "":
		return cookie == k.own
	}
	named, known := k.named[s.NetNS]
	if !known {
		ns, err := sockets.OpenNetNS(s.NetNS)
		if err == nil {
			named = ns.Cookie()
			ns.Close()
		}
		if errors.Is(err, sockets.ErrNoNetNS) {
			err = nil // its container does not run now
		}
		k.fails("netns "+s.NetNS, err)
		k.named[s.NetNS] = named
	}
	return named == cookie
}

// adopt makes a group of a live socket that has no SO_REUSEPORT.
func (k *keeper) adopt(live sockets.Group, service *config.Service) error {
	conn, err := sockets.TakeMember(live)
	if err != nil {
		return err
	}
	adoption, err := sockets.Adopt(conn)
	conn.Close()
	if err != nil {
		return err
	}
	k.Log.Info("adopted", append(k.attrs(live), "listener", live.Members[0].Holders[0].String(), "lost", adoption.Lost)...)
	return k.attach(live, service)
}

// attach attaches a group for the first time, or again after its last socket had
// closed, and the program with it. service may be nil.
func (k *keeper) attach(live sockets.Group, service *config.Service) error {
	o := loader.Options{Again: true}
	if service != nil {
		o = service.Options
	}
	if o.Settle == 0 {
		if k.watcher != nil {
			k.watcher.Sync() // a sweep may see a listener before its report came
		}
		if k.inbox.born(live) {
			o.Settle = bornSettle
		}
	}
	g, err := k.attachWith(live, o)
	if errors.Is(err, loader.ErrNotAttached) {
		return nil // detached, and not heard of yet
	}
	if err != nil {
		return err
	}
	defer g.Close()
	what := "attached again"
	if g.Fresh() {
		what = "attached"
		k.done.Attached++
	} else {
		k.done.Reattached++
	}
	k.done.Registered += uint64(len(g.Joined()))
	k.Log.Info(what, append(k.attrs(live), "listeners", len(g.Joined()))...)
	k.refresh()
	if state := k.groups[live.Key]; state != nil {
		state.applied = service
	}
	return nil
}

// apply puts the options of a service into force on an attached group.
func (k *keeper) apply(live sockets.Group, state *group, service *config.Service) {
	o := service.Options
	o.Settle = 0 // that is for an attach, and this is none
	g, err := k.attachWith(live, o)
	k.fails(fmt.Sprint("apply ", live.Key), err, k.attrs(live)...)
	if err != nil {
		return
	}
	g.Close()
	state.applied = service
	k.Log.Info("options of the service are in force", append(k.attrs(live), "service", service.String())...)
}

// attachWith attaches a group through any of its members. What is fixed while a
// group has state stays as it is, and so does the policy where the kernel does not
// count what it goes by.
func (k *keeper) attachWith(live sockets.Group, o loader.Options) (*loader.Group, error) {
	conn, err := sockets.TakeMember(live)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	g, err := k.FS.Attach(conn, o)
	var refused []string
	for _, left := range []struct {
		cause error
		out   func()
	}{
		{loader.ErrFixed, func() { o.Flows = 0 }},
		{loader.ErrFixed, func() { o.Affinity, o.ClientPrefix = "", loader.ClientPrefix{} }},
		{loader.ErrFixed, func() { o.First = "" }},
		{loader.ErrFixed, func() { o.Confirm = "" }},
		{loader.ErrUncounted, func() { o.Policy = 0 }},
	} {
		if !errors.Is(err, left.cause) {
			continue
		}
		if text := err.Error(); !slices.Contains(refused, text) {
			refused = append(refused, text)
			k.complains("fixed "+text, text, k.attrs(live)...)
		}
		left.out()
		g, err = k.FS.Attach(conn, o)
	}
	k.refuse(live.Key, refused)
	return g, err
}

// refuse tells those who look at the agent what of a service is not in force.
func (k *keeper) refuse(key loader.Key, what []string) {
	if slices.Equal(k.refused[key], what) {
		return
	}
	delete(k.refused, key)
	if what != nil {
		k.refused[key] = what
	}
	k.fails("info", k.claim.say(k.info()))
}

// register gives slots to the members of an attached group that have none.
func (k *keeper) register(live sockets.Group, state *group) error {
	slots, err := state.Slots()
	if err != nil {
		return err
	}
	var members []sockets.Socket
	var conns []syscall.Conn
	for _, m := range live.Members {
		// Of a server that has just died the agent may be the last holder.
		if _, ok := slots[m.Cookie]; ok || len(m.Holders) == 0 || m.Holders[0].PID == pid {
			continue
		}
		conn, err := m.Take()
		if errors.Is(err, sockets.ErrGone) {
			continue
		}
		if err == nil {
			// Kept open, it would keep a dead server's socket in the group.
			defer conn.Close()
			err = m.Check()
		}
		if err != nil {
			k.fails(fmt.Sprint("register ", m.Cookie), err, k.attrs(live)...)
			continue
		}
		members, conns = append(members, m), append(conns, conn)
	}
	if len(conns) == 0 {
		return nil
	}
	answers, err := state.RegisterAll(conns)
	if errors.Is(err, loader.ErrNotAttached) {
		return nil // detached, or its last socket closed: the next look tells
	}
	if err != nil {
		return err
	}
	for i, a := range answers {
		k.fails(fmt.Sprint("register ", members[i].Cookie), a.Err, k.attrs(live)...)
		if a.Err == nil {
			k.done.Registered++
			k.Log.Info("registered", append(k.attrs(live), "slot", a.Slot, "listener", members[i].Holders[0].String())...)
		}
	}
	return nil
}

// warnOwners tells of groups that are kept apart by their owners alone.
func (k *keeper) warnOwners(key loader.Key) {
	owners := []uint32{key.UID}
	for other := range k.groups {
		uid := other.UID
		if other.UID = key.UID; other == key && uid != key.UID {
			owners = append(owners, uid)
		}
	}
	subject := fmt.Sprint("owners ", key.NetNS, key.Proto, key.Addr)
	if len(owners) > 1 {
		slices.Sort(owners)
		k.complains(subject, sockets.DescribeOwners(owners), k.keyAttrs(key)...)
	}
}

// attrs name a live group in the log.
func (k *keeper) attrs(live sockets.Group) []any {
	return append(k.keyAttrs(live.Key), "netns", live.NetNSInode)
}

// keyAttrs name a group by what state there is.
func (k *keeper) keyAttrs(key loader.Key) []any { return []any{"group", key.String()} }
