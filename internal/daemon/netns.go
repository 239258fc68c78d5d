package daemon

import (
	"errors"
	"fmt"
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
		if _, err := k.FS.Detach(key); err != nil && !errors.Is(err, loader.ErrNotAttached) {
			k.fails(fmt.Sprint("forget ", key), err, k.keyAttrs(key)...)
			continue
		}
		g.Close()
		delete(k.groups, key)
		k.Log.Info("state removed: its network namespace is gone", append(k.keyAttrs(key), "netns_cookie", key.NetNS)...)
	}
	k.watchPorts()
}
