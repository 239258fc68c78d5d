package kubernetes

import (
	"fmt"
	"testing"

	"github.com/rpsel/rpsel/internal/testnet"
)

// One agent per node keeps the servers of several pods on the node's network,
// which have process namespaces of their own. A pod that replaces another one
// takes no flow but those of that.
func TestDaemonSet(t *testing.T) {
	testnet.Privileged(t)
	m := load(t, "daemonset.yaml")
	for _, with := range []bool{false, true} {
		t.Run(fmt.Sprintf("rpsel=%t", with), func(t *testing.T) {
			outside, inside := testnet.Pair(t)
			n := newNode(t)
			agent := startPod(t, n, inside, m, "rpsel")
			if with {
				agent.start(agent.rpsel(t))
			}
			awaitListeners := func(listeners int) {
				if with {
					agent.awaitListeners(listeners)
				}
			}
			old, new := startPod(t, n, inside, m, "server"), startPod(t, n, inside, m, "server")
			first := []*testnet.Server{old.serve("a"), old.serve("b")}
			awaitListeners(2)
			flows := testnet.NewClients(t, outside, clients, fmt.Sprintf("%s:%d", inside.IPv4, port))
			before := flows.AskAll()
			new.serve("c")
			new.serve("d")
			awaitListeners(4)
			joined := testnet.Moved(before, flows.AskAll())
			now := flows.AskAll()
			first[0].Kill()
			left := testnet.Moved(now, flows.AskAll(), "a")
			if with && (joined != 0 || left != 0) || !with && (joined < 20 || left < 20) {
				t.Errorf("of %d flows %d moved when a pod came, %d when a server ended", clients, joined, left)
			}
		})
	}
}
