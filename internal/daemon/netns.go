package daemon

import (
	"slices"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// forgetNetNSes removes the state of network namespaces that are gone: the
// kernel lists them no longer, which it does as long as a process, a mount, a
// descriptor or a socket keeps them. Their cookies are never used again, so
// nobody can come back to that state. That all slots are empty goes without
// saying then, and is looked at nevertheless.
func (k *keeper) forgetNetNSes() {
	if !slices.ContainsFunc(k.keys(), func(key loader.Key) bool { return key.NetNS != k.own }) {
		return
	}
	known, err := sockets.NetNSCookies()
	k.fails("namespaces", err)
	if err != nil {
		return
	}
	for key, g := range k.groups {
		if slices.Contains(known, key.NetNS) {
			continue
		}
		slots, err := g.Slots()
		if err != nil || len(slots) > 0 {
			continue
		}
		k.remove(key, g, "its network namespace is gone")
	}
	k.watchPorts()
}
