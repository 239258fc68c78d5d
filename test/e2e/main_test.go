// Package e2e tests the rpsel command with real servers that know nothing of
// it, on traffic that real clients make.
package e2e

import (
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/testnet"
)

func TestMain(m *testing.M) {
	serve()
	// Laboratories wait for most of their time: one per CPU is too few.
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	testnet.Main(m)
}

// rpsel is the command, for one port in one namespace with state of its own.
type rpsel struct {
	t     testing.TB
	path  string
	ns    *testnet.NetNS
	bpffs string
	proto string // udp if not set
	port  int
	box   *box // where the command is run, nil for the machine
}

// newRpsel builds the command.
func newRpsel(t testing.TB, ns *testnet.NetNS, port int) *rpsel {
	t.Helper()
	return &rpsel{t: t, path: testnet.Build(t), ns: ns, bpffs: testnet.BPFFS(t), port: port}
}

func (r *rpsel) args(verb string, args ...string) []string {
	return append([]string{verb, "--bpffs", r.bpffs, "--proto", cmp.Or(r.proto, "udp"), "--port", strconv.Itoa(r.port)}, args...)
}

// run is the command line that, with a server's appended, runs the server with
// SO_REUSEPORT forced. It is to be started in the namespace.
func (r *rpsel) run() []string {
	return append([]string{r.path}, r.args("run", "--")...)
}

// share is run for tests of the agent: what "rpsel run" itself would register
// it looks for in a place without state.
func (r *rpsel) share() []string {
	return []string{r.path, "run", "--port", strconv.Itoa(r.port), "--bpffs", r.t.TempDir(), "--"}
}

// agent starts "rpsel agent" in the namespace, with the port as its service and
// further lines for that, and returns when it is ready.
func (r *rpsel) agent(lines ...string) *daemon {
	r.t.Helper()
	file := filepath.Join(r.t.TempDir(), "rpsel.toml")
	text := fmt.Sprintf("[[service]]\nproto = %q\nport = %d\n%s\n", cmp.Or(r.proto, "udp"), r.port, strings.Join(lines, "\n"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
	d := startDaemon(r.t, r.ns, "agent", r.path, "agent", "--bpffs", r.bpffs, "--config", file)
	d.await(r.t, "msg=ready")
	return d
}

// outside is a command that speaks of the namespace from outside.
func (r *rpsel) outside(verb string, args ...string) *exec.Cmd {
	if r.box != nil {
		return r.box.command(append([]string{"rpsel", verb, "--port", strconv.Itoa(r.port)}, args...)...)
	}
	return exec.Command(r.path, r.args(verb, append([]string{"-N", r.ns.Path()}, args...)...)...)
}

// attach runs "rpsel attach", which must succeed, and shows what it says.
func (r *rpsel) attach(args ...string) {
	r.t.Helper()
	cmd := r.outside("attach", args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	r.t.Logf("rpsel attach\n%s", out)
}

// status is what the tests read of "rpsel status --json".
type status struct {
	Groups []struct {
		Attached        bool
		SettlingSeconds int `json:"settling_seconds"`
		Counters        map[string]int
		Flows           struct{ Tracked, Established int }
		Listeners       []listener
	}
}

type listener struct {
	Slot        int
	PID         int
	State       string
	Cookie      uint64
	Connections int
}

// What the command's exit codes say.
const (
	usage    = 2
	notThere = 3
	timedOut = 6
)

// await returns when the status has a property. It fails the test if it has
// not for two minutes.
func (r *rpsel) await(what string, property func(status) bool) {
	r.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); {
		cmd := r.outside("status", "--json")
		out, err := cmd.Output()
		if err != nil && cmd.ProcessState.ExitCode() != notThere {
			r.t.Fatalf("%s: %v", cmd, err)
		}
		if err == nil {
			var s status
			if err := json.Unmarshal(out, &s); err != nil {
				r.t.Fatalf("%s: %v\n%s", cmd, err, out)
			}
			if property(s) {
				return
			}
		}
		time.Sleep(100 * time.Millisecond) // nothing tells of a change
	}
	r.t.Fatalf("%s: not within two minutes", what)
}

// awaitSettled returns when new listeners have their share of new flows.
func (r *rpsel) awaitSettled() {
	r.t.Helper()
	r.await("settled", func(s status) bool {
		for _, g := range s.Groups {
			if g.SettlingSeconds > 0 {
				return false
			}
		}
		return true
	})
}

// awaitActive returns a process's active listener when it has one, other than
// those before.
func (r *rpsel) awaitActive(pid int, before ...listener) (active listener) {
	r.t.Helper()
	r.await(fmt.Sprintf("pid %d active", pid), func(s status) bool {
		for _, g := range s.Groups {
			for _, l := range g.Listeners {
				old := slices.ContainsFunc(before, func(b listener) bool { return b.Cookie == l.Cookie })
				if l.PID == pid && l.State == "active" && !old {
					active = l
					return true
				}
			}
		}
		return false
	})
	return active
}

// awaitListeners returns when a process has so many active listeners.
func (r *rpsel) awaitListeners(pid, n int) {
	r.t.Helper()
	r.await(fmt.Sprintf("%d listeners of pid %d active", n, pid), func(s status) bool {
		active := 0
		for _, g := range s.Groups {
			for _, l := range g.Listeners {
				if l.PID == pid && l.State == "active" {
					active++
				}
			}
		}
		return active == n
	})
}

// counter reads a counter of the port's groups.
func (r *rpsel) counter(name string) (sum int) {
	r.t.Helper()
	r.await("counters", func(s status) bool {
		sum = 0
		for _, g := range s.Groups {
			sum += g.Counters[name]
		}
		return len(s.Groups) > 0
	})
	return sum
}

// awaitServer returns when a web server answers.
func awaitServer(t testing.TB, ns *testnet.NetNS, addr netip.AddrPort) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = ns.Do(func() error { _, err := request(addr); return err }); err == nil {
			return
		}
	}
	t.Fatalf("nothing answers on %s: %v", addr, err)
}

// explain shows the port's state if the test has failed. To be deferred, or
// the servers are gone by then.
func (r *rpsel) explain() {
	if !r.t.Failed() {
		return
	}
	for _, noun := range []string{"status", "flows"} {
		out, err := r.outside(noun).CombinedOutput()
		r.t.Logf("rpsel %s: %v\n%s", noun, err, out)
	}
}

// need skips the test where a program is missing, or fails it in CI.
func need(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if errors.Is(err, exec.ErrNotFound) {
		path, err = exec.LookPath(filepath.Join("/usr/sbin", program))
	}
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		(&testnet.Unavailable{What: program, Err: err}).Skip(t)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}
