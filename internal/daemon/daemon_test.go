package daemon

import (
	"fmt"
	"strings"
	"testing"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

const addr = "127.0.0.1:1194"

// Servers are killed and started again, and nobody runs a command: exactly the
// flows of the killed one move, the new one takes nobody's and gets its share.
func TestKillAndRestart(t *testing.T) {
	for _, network := range []string{"udp4", "tcp4"} {
		t.Run(network, func(t *testing.T) {
			ns, fs := testnet.New(t), testnet.BPFFS(t)
			options := testnet.ServerOptions{Network: network, Addr: addr, ReusePort: true}
			key := keyOf(ns, map[string]loader.Proto{"udp4": loader.UDP, "tcp4": loader.TCP}[network], addr)
			clients := func(n int) *testnet.Clients {
				if network == "tcp4" {
					return testnet.NewTCPClients(t, ns, n, addr)
				}
				return testnet.NewClients(t, ns, n, addr)
			}
			var servers []*testnet.Server
			for _, name := range []string{"a", "b", "c"} {
				options.Name = name
				servers = append(servers, testnet.StartServer(t, ns, options))
			}
			a := start(t, fs, service(ns, 1194, fmt.Sprintf("proto = %q", network[:3]), `settle = "0s"`))
			a.awaitListeners(key, 3)
			known := clients(300)
			before := known.Ask()
			servers[0].Kill()
			after := known.Ask()
			if moved := testnet.Moved(before, after, "a"); network == "udp4" && moved != 0 || testnet.Shares(after)[""] != 0 {
				t.Errorf("%d flows of others moved, answers from %v", moved, testnet.Shares(after))
			}
			options.Name = "d"
			testnet.StartServer(t, ns, options)
			a.awaitListeners(key, 3)
			if moved := testnet.Moved(after, known.Ask()); network == "udp4" && moved != 0 {
				t.Errorf("%d flows moved to the new server", moved)
			}
			if shares := testnet.Shares(clients(300).Ask()); shares["d"] < 40 {
				t.Errorf("new flows: %v", shares)
			}

			// The control: without rpsel it is plain Linux.
			a.stop()
			if _, err := loader.FS(fs).Detach(key); err != nil {
				t.Fatal(err)
			}
			before = known.Ask()
			servers[2].Kill() // the first in the kernel's order, since a went
			if moved := testnet.Moved(before, known.Ask(), "c"); network == "udp4" && moved == 0 {
				t.Error("no flow moved without a program")
			}
		})
	}
}

// The last server of a group ends, and the program goes with the kernel's group.
// Another one comes: the group is attached again, and is not kept from its new
// flows for the time that flows from before might need.
func TestComesBack(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true, Name: "a"}
	key := keyOf(ns, loader.UDP, addr)
	first := testnet.StartServer(t, ns, options)
	a := start(t, fs, service(ns, 1194))
	if s, ok := status(t, a.fs, key); !ok || s.Settling == 0 {
		t.Errorf("servers that had run before: %+v", s)
	}
	first.Kill()
	for _, name := range []string{"b", "c"} {
		options.Name = name
		testnet.StartServer(t, ns, options)
	}
	a.awaitSaid(`msg="attached again"`)
	a.awaitListeners(key, 2)
	known := testnet.NewClients(t, ns, 200, addr)
	before := known.Ask()
	if shares := testnet.Shares(before); shares["b"] == 0 || shares["c"] == 0 {
		t.Errorf("new flows: %v", shares)
	}
	options.Name = "d"
	testnet.StartServer(t, ns, options)
	a.awaitListeners(key, 3)
	if moved := testnet.Moved(before, known.Ask()); moved != 0 {
		t.Errorf("%d flows moved", moved)
	}
}

// All servers of a service start at once, with nothing attached before.
func TestManyAtOnce(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	const n = 16
	a := start(t, fs, service(ns, 1194))
	started := make(chan *testnet.Server)
	for i := range n {
		go func() {
			started <- testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true, Name: fmt.Sprint("s", i)})
		}()
	}
	for range n {
		<-started
	}
	a.awaitListeners(keyOf(ns, loader.UDP, addr), n)
	if shares := testnet.Shares(testnet.NewClients(t, ns, 640, addr).Ask()); len(shares) != n {
		t.Errorf("new flows: %v", shares)
	}
	if strings.Contains(a.said(), "level=WARN") {
		t.Errorf("warned")
	}
}
