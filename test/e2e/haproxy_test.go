package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

const (
	// reloads is how often HAProxy is reloaded at least, and as often as it takes
	// to see what is looked for, but not more often than mostReloads.
	reloads, mostReloads = 10, 100
	loadClients          = 64
	// raced is how many connections may be lost in the moment that TestHAProxyReload
	// speaks of: one in some hundred thousand, of which a long run has four. Plain
	// Linux loses twice as many in as many reloads, or the control fails.
	raced = 10
)

// haproxy is a real HAProxy in a namespace, that answers each request itself.
type haproxy struct {
	t       testing.TB
	command []string
	ns      *testnet.NetNS
	current *daemon
	number  int
}

func newHAProxy(t testing.TB, ns *testnet.NetNS, bind string, shards int) *haproxy {
	t.Helper()
	config := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(config, []byte(haproxyConfig(bind, shards)), 0o600); err != nil {
		t.Fatal(err)
	}
	h := &haproxy{t: t, command: []string{need(t, "haproxy"), "-db", "-f", config}, ns: ns}
	h.start()
	awaitServer(t, ns, webAddr)
	return h
}

// haproxyConfig is a configuration with as many threads as listeners, that answers
// each request itself. Without idle-close-on-response an old process closes the
// connections that it has accepted and that have sent nothing yet.
func haproxyConfig(bind string, shards int) string {
	return fmt.Sprintf(`
global
	nbthread %d
defaults
	mode http
	timeout client 20s
	timeout http-request 20s
	option idle-close-on-response
frontend test
	bind %s shards %[1]d
	http-request return status 200 content-type text/plain string ok
`, shards, bind)
}

// start starts a process, which with "-sf PID" takes over from another.
func (h *haproxy) start(args ...string) {
	h.t.Helper()
	h.number++
	h.current = startDaemon(h.t, h.ns, fmt.Sprint("haproxy ", h.number), slices.Concat(h.command, args)...)
}

// reload is what the manual has: a new process binds the same port, and tells the
// old one to close its listeners and to end when its connections have. It returns
// when that has happened.
func (h *haproxy) reload() {
	h.t.Helper()
	old := h.current
	h.start("-sf", strconv.Itoa(old.cmd.Process.Pid))
	old.awaitEnd(h.t)
}

// HAProxy is reloaded under load. Plain Linux resets the connections that wait in
// the listeners of the old process; with the agent they go to the new one.
//
// One moment is lost to any program: another CPU makes a connection of a client's
// last ACK, for a listener that closes before it is queued there (net/ipv4/
// inet_connection_sock.c inet_csk_complete_hashdance). It is rare, and who drains
// first is safe from it, see TestHAProxyDrain.
func TestHAProxyReload(t *testing.T) {
	t.Parallel()
	testnet.Privileged(t)
	// The control goes on until it has lost so many, and as many have to wait in a
	// closing listener with rpsel.
	const enough = 2 * raced
	for _, c := range []struct {
		bind   string
		shards int
	}{{"127.0.0.1:8080", 2}, {":::8080 v4v6", 4}} {
		t.Run(fmt.Sprint(c.bind, " shards ", c.shards), func(t *testing.T) {
			ns := testnet.New(t)
			h := newHAProxy(t, ns, c.bind, c.shards)
			load := startLoad(t, ns, loadClients, webAddr)
			control, lost := 0, 0
			for ; control < reloads || lost < enough && control < mostReloads; control++ {
				h.reload()
				_, lost = load.count()
			}
			load.end()
			t.Log(load.row(fmt.Sprint("plain Linux, ", control, " reloads")))
			if lost < enough {
				t.Errorf("plain Linux: %d connections lost in %d reloads: rpsel has nothing to show", lost, control)
			}

			ns = testnet.New(t)
			r := newRpsel(t, ns, int(webAddr.Port()))
			r.proto = "tcp"
			defer r.explain()
			r.agent()
			h = newHAProxy(t, ns, c.bind, c.shards)
			r.awaitListeners(h.current.cmd.Process.Pid, c.shards)
			load = startLoad(t, ns, loadClients, webAddr)
			n, migrated := 0, 0
			for ; n < max(reloads, control) || migrated < enough && n < mostReloads; n++ {
				h.reload()
				migrated = r.counter("migrated")
			}
			load.settle(t)
			t.Log(load.row(fmt.Sprint("rpsel, ", n, " reloads")), "; ", migrated, " migrated")
			counts := ns.Counts(t)
			t.Logf("by the kernel's count %d were moved and %d could not be; servers reset %d that they had accepted",
				counts["TcpExtTCPMigrateReqSuccess"], counts["TcpExtTCPMigrateReqFailure"], counts["TcpExtTCPAbortOnClose"])
			if migrated < enough {
				t.Errorf("%d connections waited in closing listeners in %d reloads", migrated, n)
			}
			if _, lost := load.count(); lost > raced {
				t.Errorf("with rpsel %d connections were lost", lost)
			}
		})
	}
}

// The new process starts beside the old one, which is drained before it is told to
// close its listeners: nothing waits in them, and no connection fails on whatever
// number of CPUs. The control is that of TestHAProxyReload.
func TestHAProxyDrain(t *testing.T) {
	t.Parallel()
	const shards = 4
	ns := testnet.New(t)
	r := newRpsel(t, ns, int(webAddr.Port()))
	r.proto = "tcp"
	defer r.explain()
	r.agent()
	h := newHAProxy(t, ns, ":::8080 v4v6", shards)
	load := startLoad(t, ns, loadClients, webAddr)
	for range reloads {
		old := h.current
		h.start()
		r.awaitListeners(h.current.cmd.Process.Pid, shards)
		r.drain(old.cmd.Process.Pid)
		old.signal(t, unix.SIGUSR1)
		old.awaitEnd(t)
	}
	load.settle(t)
	t.Log(load.row(fmt.Sprint("rpsel drain, ", reloads, " reloads")), "; ", r.counter("migrated"), " migrated")
	if _, lost := load.count(); lost > 0 {
		t.Errorf("%d connections were lost", lost)
	}
}
