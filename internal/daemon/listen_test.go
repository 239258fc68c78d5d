package daemon

import (
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// TCP sockets are registered when they listen: long after they were bound, be that
// before the agent started or after, and again when they had ended listening,
// drained ones as drained; also the only one, with whose group the program goes.
func TestListens(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	key := keyOf(ns, loader.TCP, addr)
	serve := func(name string) *testnet.Server {
		return testnet.StartServer(t, ns, testnet.ServerOptions{Network: "tcp4", Addr: addr, ReusePort: true, Name: name, Bound: true})
	}
	shares := func() map[string]int {
		return testnet.Shares(testnet.NewTCPClients(t, ns, 120, addr).Ask())
	}
	before := serve("before")
	a := start(t, fs, service(ns, 1194, `proto = "tcp"`, `settle = "0s"`))
	after := serve("after")
	after.Listen(0, 512)
	a.awaitListeners(key, 1)
	if got := shares(); got["after"] != 120 {
		t.Errorf("one listens: accepted by %v", got)
	}
	before.Listen(0, 512)
	a.awaitListeners(key, 2)
	if got := shares(); got["before"] < 20 || got["after"] < 20 {
		t.Errorf("both listen: accepted by %v", got)
	}

	g, err := loader.FS(fs).Open(key)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	var slot int
	for _, l := range a.awaitListeners(key, 2).Listeners {
		if l.PID == before.PID() {
			slot = l.Slot
		}
	}
	if err := g.Drain(slot); err != nil {
		t.Fatal(err)
	}
	before.Shutdown(0)
	a.awaitListeners(key, 1)
	before.Listen(0, 512)
	a.awaitListeners(key, 2)
	if got := shares(); got["after"] != 120 {
		t.Errorf("one drains, and listens again: accepted by %v", got)
	}
	before.Kill()
	a.awaitListeners(key, 1)
	after.Shutdown(0)
	if got := shares(); got[""] != 120 {
		t.Errorf("nobody listens: accepted by %v", got)
	}
	after.Listen(0, 512)
	a.awaitSaid(`msg="attached again"`)
	a.awaitListeners(key, 1)
	if got := shares(); got["after"] != 120 {
		t.Errorf("the last one listens again: accepted by %v", got)
	}
}

// Of a socket that was bound before its port was watched the report does not say
// where it is. It is registered for the report all the same, not by a later sweep.
func TestListensSomewhere(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	serve := func(bound bool) *testnet.Server {
		return testnet.StartServer(t, ns, testnet.ServerOptions{Network: "tcp4", Addr: addr, ReusePort: true, Bound: bound})
	}
	serve(false)
	before := serve(true)
	a := start(t, fs, service(ns, 1194, `proto = "tcp"`, `settle = "0s"`), func(o *Options) { o.pace.sweep = time.Hour })
	key := keyOf(ns, loader.TCP, addr)
	a.awaitListeners(key, 1)
	before.Listen(0, 512)
	a.awaitListeners(key, 2)
}
