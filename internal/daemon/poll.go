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

// locate notes by which paths to get to the network namespaces, and what is in
// those that are new. Their descriptors are not kept: they would keep the
// namespaces.
func (k *keeper) locate() {
	spaces, err := sockets.NetNSes()
	k.fails("namespaces of processes", err)
	for _, s := range k.services {
		if s.NetNS != "" && s.NetNS != config.AllNetNS {
			if ns, err := sockets.OpenNetNS(s.NetNS); err == nil {
				spaces = append(spaces, ns)
			}
		}
	}
	found := map[uint64]*polled{}
	for _, ns := range spaces {
		if cookie := ns.Cookie(); k.concerns(cookie) {
			p := k.polled[cookie]
			if p == nil {
				p = &polled{}
				p.cookies, err = k.bound(ns)
				k.fails(fmt.Sprint("poll ", cookie), err)
			}
			p.path = ns.Path()
			found[cookie] = p
		}
		ns.Close()
	}
	k.polled = found
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
	now, came, err := k.noteFresh(cookie, p)
	if err != nil {
		return err
	}
	p.cookies = now
	for _, port := range came {
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

// noteFresh notes which sockets were bound in a namespace since the last poll, and
// lists all, and the ports that have such.
func (k *keeper) noteFresh(cookie uint64, p *polled) (now map[watch.Port][]uint64, came []watch.Port, err error) {
	ns, err := sockets.OpenNetNS(p.path)
	if err != nil {
		return nil, nil, err
	}
	defer ns.Close()
	if ns.Cookie() != cookie {
		return nil, nil, fmt.Errorf("%s: %w: it is another one now", p.path, sockets.ErrNoNetNS)
	}
	if now, err = k.bound(ns); err != nil {
		return nil, nil, err
	}
	for port, cookies := range now {
		had, looked := p.cookies[port]
		fresh := slices.DeleteFunc(slices.Clone(cookies), func(c uint64) bool { return slices.Contains(had, c) })
		if len(fresh) == 0 {
			continue
		}
		came = append(came, port)
		if looked {
			// What it got in a quarter of a second counts as new flows.
			k.inbox.note(fresh...)
		}
	}
	return now, came, nil
}

// bound lists the sockets on all ports in a network namespace.
func (k *keeper) bound(ns *sockets.NetNS) (map[watch.Port][]uint64, error) {
	found := map[watch.Port][]uint64{}
	err := ns.Do(func() error {
		for _, port := range k.ports {
			cookies, err := sockets.Bound(port.Proto, port.Port)
			if err != nil {
				return err
			}
			found[port] = cookies
		}
		return nil
	})
	return found, err
}
