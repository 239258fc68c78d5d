package e2e

import (
	"fmt"
	"net/netip"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/internal/testnet"
)

// webAddr is where the servers of these tests listen.
var webAddr = netip.MustParseAddrPort("127.0.0.1:8080")

// Four servers with one thread each are restarted in turn, under load. Plain
// Linux resets what waits in the listener of each; with the agent nothing but the
// one connection that the server had taken is lost, and nothing if it is drained
// before.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	testnet.Privileged(t)
	const servers, rounds, clients = 4, 5, 48
	for _, c := range []struct {
		name         string
		rpsel, drain bool
		least, most  int // connections lost
	}{
		// Of 48 connections the servers work on 4, and the others wait.
		{"plain Linux", false, false, servers*rounds + raced + 1, 1 << 30},
		{"rpsel", true, false, 0, servers*rounds + raced},
		{"rpsel drain", true, true, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := testnet.New(t)
			r := newRpsel(t, ns, int(webAddr.Port()))
			r.proto = "tcp"
			if c.rpsel {
				defer r.explain()
				r.agent()
			}
			start := func() *daemon {
				s := startSingle(t, ns, webAddr)
				if c.rpsel {
					r.awaitActive(s.cmd.Process.Pid)
				}
				return s
			}
			var group [servers]*daemon
			for i := range group {
				group[i] = start()
			}
			load := startLoad(t, ns, clients, webAddr)
			load.awaitAnswers(t, clients)
			for range rounds {
				for i, s := range group {
					if c.drain {
						r.drain(s.cmd.Process.Pid)
					}
					s.signal(t, unix.SIGTERM)
					<-s.ended
					group[i] = start()
				}
			}
			load.settle(t)
			t.Log(load.row(fmt.Sprint(c.name, ", ", servers*rounds, " restarts")))
			if _, lost := load.count(); lost < c.least || lost > c.most {
				t.Errorf("%d connections lost, want %d to %d", lost, c.least, c.most)
			}
		})
	}
}

// A web server of Go is replaced under load: the new process registers, the old
// one drains, closes its listener and finishes what it has. No request fails, or one or
// two in the moment that TestHAProxyReload speaks of: the server does not wait between
// draining and closing. The control is the same without rpsel, where connections wait in
// what is closed.
func TestWebServer(t *testing.T) {
	t.Parallel()
	testnet.Privileged(t)
	for _, how := range []string{"agent", "loader"} {
		t.Run(how, func(t *testing.T) {
			control := replaceWeb(t, testnet.New(t), []string{"plain", "-"}, func(n, lost int) bool {
				return n >= replacements && lost > raced
			})
			t.Log(control.row(fmt.Sprint("plain Linux, ", control.replaced, " replaced")))
			if _, lost := control.count(); lost <= raced {
				t.Errorf("plain Linux: %d requests failed while %d servers were replaced: rpsel has nothing to show", lost, control.replaced)
			}

			ns := testnet.New(t)
			r := newRpsel(t, ns, int(webAddr.Port()))
			r.proto = "tcp"
			defer r.explain()
			where := r.bpffs
			if how == "agent" {
				dir, err := agent.Dir(r.bpffs)
				if err != nil {
					t.Fatal(err)
				}
				where = dir
				r.agent(`owner = "nobody"`)
			}
			sticky := replaceWeb(t, ns, []string{how, where}, func(n, _ int) bool { return n >= control.replaced })
			t.Log(sticky.row(fmt.Sprint("rpsel, ", sticky.replaced, " replaced")))
			if _, lost := sticky.count(); lost > 2 {
				t.Errorf("%d requests failed", lost)
			}
			if n := len(sticky.answers()); n <= sticky.replaced {
				t.Errorf("%d processes answered, want each of %d", n, sticky.replaced+1)
			}
		})
	}
}

// replacements is how often a web server is replaced at least, and as often as the
// control needs to lose something, but not more often than mostReplacements.
const replacements, mostReplacements = 10, 200

type replacedLoad struct {
	*load
	replaced int
}

// replaceWeb replaces a web server under load until it is enough.
func replaceWeb(t testing.TB, ns *testnet.NetNS, how []string, enough func(n, lost int) bool) replacedLoad {
	t.Helper()
	start := func() *daemon {
		return startSelf(t, ns, append([]string{"web", webAddr.String()}, how...)...)
	}
	current := start()
	l := startLoad(t, ns, loadClients, webAddr)
	n := 0
	for lost := 0; n < mostReplacements && !enough(n, lost); n++ {
		l.awaitAnswers(t, loadClients)
		next := start()
		current.signal(t, unix.SIGTERM)
		current.awaitEnd(t)
		if code := current.cmd.ProcessState.ExitCode(); code != 0 {
			t.Fatalf("the old server ended with exit code %d", code)
		}
		current = next
		_, lost = l.count()
	}
	l.settle(t)
	return replacedLoad{l, n}
}

// drain runs "rpsel drain --wait" for a process.
func (r *rpsel) drain(pid int) {
	r.t.Helper()
	cmd := r.outside("drain", "--pid", strconv.Itoa(pid), "--wait", "--timeout", "1m")
	if out, err := cmd.CombinedOutput(); err != nil {
		r.t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}
