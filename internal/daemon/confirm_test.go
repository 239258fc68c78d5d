package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// A service with confirm = "reply": who comes in another cgroup is registered, and
// his replies count from his first flow on. Who comes in the root cgroup is not,
// and why is said once, and by the status.
func TestConfirmReply(t *testing.T) {
	testnet.Privileged(t)
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.events")); err == nil {
		(&testnet.Unavailable{What: "the root cgroup", Err: errors.New("this is a cgroup namespace")}).Skip(t)
	}
	dirs := []string{testnet.Cgroup(t, root), testnet.Cgroup(t, root)}
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	serve := func(name, dir string) *testnet.Server {
		return testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: dir, Name: name})
	}
	serve("a", dirs[0])
	a := start(t, fs, service(ns, 1194, `settle = "0s"`, `confirm = "reply"`))
	key := keyOf(ns, loader.UDP, "127.0.0.1:1194")
	a.awaitListeners(key, 1)
	serve("b", dirs[1])
	if s := a.awaitListeners(key, 2); s.Confirm != loader.ConfirmReply {
		t.Errorf("status %+v", s)
	}
	shares := testnet.Shares(testnet.NewClients(t, ns, 100, "127.0.0.1:1194").Ask())
	if s, _ := status(t, a.fs, key); s.Established != 100 || shares["a"] == 0 || shares["b"] == 0 {
		t.Errorf("%d flows established, shares %v", s.Established, shares)
	}

	r := serve("r", root)
	said := fmt.Sprintf("(pid %d): its socket is in the root cgroup", r.PID())
	a.awaitSaid(said)
	serve("c", dirs[1])
	await(t, "another listener to be registered", func() bool {
		s, _ := status(t, a.fs, key)
		return len(s.Listeners) == 3
	})
	s, _ := status(t, a.fs, key)
	if len(s.Listeners) != 3 || len(s.Unregistered) != 1 || !errors.Is(s.Unregistered[0].Reason, loader.ErrRootCgroup) {
		t.Errorf("status %+v", s)
	}
	if n := strings.Count(a.said(), said); n != 1 {
		t.Errorf("it is said %d times", n)
	}
}
