package daemon

import (
	"errors"
	"fmt"
	"slices"

	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/sockets"
)

// polled is what a poll found in a network namespace.
type polled struct {
	path    string // leads to the namespace, as long as it is the same
	cookies map[watch.Port][]uint64
}

// locate notes by which paths to get to the network namespaces. Their
// descriptors are not kept: they would keep the namespaces.
func (k *keeper) locate() {
	spaces, err := sockets.NetNSes()
	k.fails("namespaces", err)
	found := map[uint64]bool{}
	for _, ns := range spaces {
		if !k.concerns(ns.Cookie()) {
			ns.Close()
			continue
		}
		found[ns.Cookie()] = true
		if p := k.polled[ns.Cookie()]; p != nil {
			p.path = ns.Path()
		} else {
			k.polled[ns.Cookie()] = &polled{path: ns.Path()}
		}
		ns.Close()
	}
	for cookie := range k.polled {
		if err == nil && !found[cookie] {
			delete(k.polled, cookie)
		}
	}
}

// concerns tells whether there may be something to keep in a namespace.
func (k *keeper) concerns(cookie uint64) bool {
	for key := range k.groups {
		if key.NetNS == cookie {
			return true
		}
	}
	return slices.ContainsFunc(k.services, func(s *config.Service) bool { return k.inNetNS(s, cookie) })
}

// poll asks the kernel which sockets are bound, where it does not tell of them,
// and keeps the groups of those that are new.
func (k *keeper) poll() {
	for cookie, p := range k.polled {
		err := k.pollNetNS(cookie, p)
		if errors.Is(err, sockets.ErrNoNetNS) {
			delete(k.polled, cookie) // until the next sweep finds another way to it
			continue
		}
		k.fails(fmt.Sprint("poll ", cookie), err)
	}
}

func (k *keeper) pollNetNS(cookie uint64, p *polled) error {
	ns, err := sockets.OpenNetNS(p.path)
	if err != nil {
		return err
	}
	defer ns.Close()
	if ns.Cookie() != cookie {
		return fmt.Errorf("%s: %w: it is another one now", p.path, sockets.ErrNoNetNS)
	}
	now := map[watch.Port][]uint64{}
	if err := ns.Do(func() error {
		for _, port := range k.ports {
			cookies, err := sockets.Bound(port.Proto, port.Port)
			if err != nil {
				return err
			}
			now[port] = cookies
		}
		return nil
	}); err != nil {
		return err
	}
	before := p.cookies
	p.cookies = now
	for port, cookies := range now {
		had, looked := before[port]
		fresh := slices.DeleteFunc(slices.Clone(cookies), func(c uint64) bool { return slices.Contains(had, c) })
		if len(fresh) == 0 {
			continue
		}
		if looked {
			k.inbox.note(fresh...) // what they got since the last poll has no other place to go
		}
		groups, err := sockets.Find(sockets.Query{NetNS: cookie, Proto: port.Proto, Port: port.Port})
		if err != nil {
			return err
		}
		for _, g := range groups {
			k.keep(g)
		}
	}
	return nil
}
