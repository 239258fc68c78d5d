package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/internal/layout1"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/sockets"
)

// killCase is a command that is killed, and what is done before and after.
type killCase struct {
	name    string
	servers int      // with SO_REUSEPORT; 0: one without
	before  []string // commands, and events: see killWorld.do
	killed  string
	after   []string // what makes good for it; nil: the same again
	fresh   []string // servers that get new flows in the end
	idle    []string // and that do not
	status  string   // what "status -j" prints in the end: a regular expression
	look    bool     // and right after the kill
	links   int      // in the end, to the cgroups of servers; 0: they are not in cgroups of their own
	tcp     bool     // and thirty connections that stay open all the while
}

// P6: every command that changes a group is killed at each of its steps, and so
// are the agent and what "rpsel run" leaves in the background. The packets go
// where they went, what comes next succeeds, and nothing is left behind.
// A short run kills at each mark once, in the first case that comes to it.
func TestKilledAtEveryStep(t *testing.T) {
	testnet.Privileged(t)
	rpsel := buildCommand(t, "rpsel-faults")
	const upgraded = `"attached":true.*"tracked":200,`
	const newest = "attach --settle 0 --policy newest"
	const tenEach = `"attached":true.*("connections":10}.*){3}`
	attached := []string{"attach --settle 0"}
	const replied, confirmed = "attach --settle 0 --confirm reply", `"tracked":200,"established":200,`
	var visited sync.Map
	met := map[string]bool{}
	for _, c := range []killCase{
		{name: "attach", servers: 3, killed: "attach --settle 0", fresh: []string{"s0"}},
		{name: "attach, a joiner", servers: 3, before: []string{"attach --settle 0", "add"}, killed: "attach", fresh: []string{"s3"}},
		{name: "attach, joiners", servers: 3, before: []string{"attach --settle 0", "add", "add"}, killed: "attach", fresh: []string{"s3", "s4"}},
		{name: "attach, in a dead one's place", servers: 3, before: []string{"attach --settle 0", "close", "add"}, killed: "attach", fresh: []string{"s3"}},
		{name: "attach, all had died", servers: 1, before: []string{"attach --settle 0", "close", "add", "add"}, killed: "attach --settle 0", fresh: []string{"s1", "s2"}},
		{name: "attach --adopt", killed: "attach --adopt --settle 0", fresh: []string{"s0"}},
		{name: "drain", servers: 3, before: attached, killed: "drain --slot 1", fresh: []string{"s0"}, idle: []string{"s1"}},
		{name: "resume", servers: 3, before: []string{"attach --settle 0", "drain --slot 1"}, killed: "resume --slot 1", fresh: []string{"s1"}},
		{name: "weight", servers: 3, before: attached, killed: "weight --slot 1 5", fresh: []string{"s1"}},
		{name: "detach", servers: 3, before: attached, killed: "detach", fresh: []string{"s0"}},
		{name: "attach, a new generation", servers: 3, before: []string{newest, "start 3"}, killed: "attach --generation new", fresh: []string{"t0"}, idle: []string{"s0"}},
		{name: "attach, one that waits", servers: 3, before: []string{"attach --policy newest", "start 1"}, killed: "attach --generation new", fresh: []string{"s0"}, idle: []string{"t0"}},
		{name: "attach, the last that is waited for", servers: 3, before: []string{newest, "start 2", "attach --generation new", "start 1", "gap"}, killed: "attach", fresh: []string{"t0", "u0"}, idle: []string{"s0"}},
		{name: "attach, in the gap of a generation", servers: 3, before: []string{newest, "start 3", "attach --generation new", "kill", "start 3"}, killed: "attach", fresh: []string{"u0"}, idle: []string{"s0"}},
		{name: "attach, another policy", servers: 3, before: []string{"attach --settle 0", "start 3", "attach --generation new"}, killed: "attach --policy newest", fresh: []string{"t0"}, idle: []string{"s0"}},
		{name: "attach, back to hash", servers: 3, before: []string{newest, "start 3", "attach --generation new"}, killed: "attach --policy hash", fresh: []string{"s0", "t0"}},
		{name: "upgrade, layout", servers: 3, before: []string{"layout 1", "close", "pick 2"}, killed: "upgrade", status: upgraded, fresh: []string{"s2"}},
		{name: "upgrade, both", servers: 3, before: []string{"layout 1", "close", "pick 2"}, killed: "upgrade --flows 2000", status: upgraded, fresh: []string{"s2"}},
		{name: "upgrade, and a look", servers: 3, before: []string{"attach --settle 0", "close", "pick 2"}, killed: "upgrade --flows 2000", status: upgraded, look: true, fresh: []string{"s2"}},
		{name: "attach --confirm reply", servers: 3, links: 1, killed: replied, status: `"confirm":"reply".*"tracked":200,"established":200,`, fresh: []string{"s0"}},
		{name: "attach --confirm reply, a joiner elsewhere", servers: 3, links: 2, before: []string{replied, "start 1"}, killed: "attach", status: confirmed, fresh: []string{"t0"}},
		{name: "drain, a cgroup has no listener any more", servers: 3, links: 1, before: []string{replied, "start 1", "attach", "kill"}, killed: "drain --slot 1", status: confirmed, fresh: []string{"s0"}, idle: []string{"s1"}},
		{name: "upgrade, confirm reply", servers: 3, links: 1, before: []string{replied}, killed: "upgrade --flows 2000", status: confirmed, fresh: []string{"s0"}},
		{name: "attach, TCP", tcp: true, servers: 3, killed: "attach", status: tenEach, fresh: []string{"s0", "s1", "s2"}},
		{name: "upgrade, TCP", tcp: true, servers: 3, before: []string{"layout 1"}, killed: "upgrade", status: tenEach, fresh: []string{"s0", "s1", "s2"}},
		{name: "run", servers: 3, before: attached, killed: "run", after: []string{"run", "attach"}, fresh: []string{"s0", "r"}},
		{name: "run, all had died", servers: 1, before: []string{"attach --settle 0", "close"}, killed: "run", after: []string{"run", "attach --settle 0"}, fresh: []string{"r"}},
		{name: "agent, a joiner", servers: 3, before: []string{"attach --settle 0", "add"}, killed: "agent", fresh: []string{"s3"}},
		{name: "agent, joiners while it runs", servers: 3, before: attached, killed: "agent add", after: []string{"agent"}, fresh: []string{"s3"}},
		{name: "agent, a service with bind programs", servers: 3, killed: "agent service", fresh: []string{"s0"}},
		{name: "agent, all had died", servers: 1, before: []string{"attach --settle 0", "close", "add", "add"}, killed: "agent", fresh: []string{"s1", "s2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for at, name := range c.run(t, rpsel, 0) {
				if testing.Short() && met[name] {
					continue
				}
				met[name] = true
				t.Run(fmt.Sprint(at+1, " ", name), func(t *testing.T) {
					t.Parallel()
					steps := c.run(t, rpsel, at+1)
					visited.Store(steps[len(steps)-1], true)
				})
			}
		})
	}
	chosen := flag.Lookup("test.run").Value.String() + flag.Lookup("test.skip").Value.String()
	if t.Failed() || testing.Short() || strings.Contains(chosen, "/") {
		return // it is not every case that was run to its end
	}
	for _, point := range faultPoints(t) {
		if _, ok := visited.Load(point); !ok {
			t.Errorf("no case is killed at %s", point)
		}
	}
}

// faultPoints lists the calls of fault.Point in the source as the log has them.
func faultPoints(t *testing.T) (points []string) {
	t.Helper()
	files := token.NewFileSet()
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			f, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || f.Sel.Name != "Point" {
				return true
			}
			if pkg, ok := f.X.(*ast.Ident); !ok || pkg.Name != "fault" {
				return true
			}
			name, err := strconv.Unquote(call.Args[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			points = append(points, fmt.Sprintf("%s (%s/%s:%d)", name, filepath.Base(filepath.Dir(path)), filepath.Base(path), files.Position(call.Pos()).Line))
			return true
		})
		return nil
	})
	if err != nil || len(points) == 0 {
		t.Fatalf("%d points, %v", len(points), err)
	}
	return points
}

// killWorld is what a command to be killed has around it.
type killWorld struct {
	t       *testing.T
	rpsel   string
	ns      *testnet.NetNS
	bpffs   string
	proto   string
	log     string // of the steps
	cgroup  string // of what "rpsel run" starts
	options testnet.ServerOptions
	servers *testnet.Server
	started []*testnet.Server // by "rpsel run"
	others  []*testnet.Server // by "start"
	agent   *exec.Cmd
}

func newKillWorld(t *testing.T, rpsel string, servers int, proto string, inCgroup bool) *killWorld {
	w := &killWorld{
		t: t, rpsel: rpsel, ns: testnet.New(t), bpffs: testnet.BPFFS(t), proto: proto,
		log: filepath.Join(t.TempDir(), "steps"),
	}
	own, err := cgroup.Own()
	if err == nil {
		w.cgroup, err = os.MkdirTemp(own, fmt.Sprintf("rpsel-test-%d-", os.Getpid()))
	}
	if err != nil {
		t.Fatal(err)
	}
	run, err := agent.Dir(w.bpffs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	w.options = testnet.ServerOptions{Network: proto + "4", Addr: "127.0.0.1:1194", ReusePort: servers > 0}
	if inCgroup {
		w.options.Cgroup = w.makeCgroup("s")
	}
	w.servers = testnet.StartGroup(t, w.ns, max(1, servers), w.options)
	return w
}

// makeCgroup makes a cgroup for servers.
func (w *killWorld) makeCgroup(name string) string {
	w.t.Helper()
	dir := filepath.Join(w.cgroup, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	return dir
}

// close ends all processes, and looks whether they leave something: the cgroup
// of a "rpsel run" that was killed is removed by the next.
func (w *killWorld) close(when string) {
	w.stopAgent()
	w.servers.Kill()
	for _, s := range slices.Concat(w.others, w.started) {
		s.Kill()
	}
	if w.options.Cgroup != "" {
		below, err := filepath.Glob(filepath.Join(w.cgroup, "*", "cgroup.procs"))
		for _, file := range below {
			err = errors.Join(err, os.Remove(filepath.Dir(file)))
		}
		if err != nil {
			w.t.Errorf("%s: %v", when, err)
		}
	}
	if len(w.started) > 0 {
		sweep := w.ns.Command("sh", "-c", `echo 0 >"$0/cgroup.procs" && exec "$1" run -- true`, w.cgroup, w.rpsel)
		if out, err := sweep.CombinedOutput(); err != nil {
			w.t.Errorf("%s: rpsel run -- true: %v\n%s", when, err, out)
		}
	}
	// The reapers end, and remove theirs, when they notice.
	w.await(when+": the cgroups to go", func() bool { return os.Remove(w.cgroup) == nil })
}

// await polls, since nothing tells.
func (w *killWorld) await(what string, done func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("waited in vain for %s", what)
		}
	}
}

// steps are those passed so far.
func (w *killWorld) steps() []string {
	text, err := os.ReadFile(w.log)
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

// do runs a command line, which is killed at a step, or at none (0). Apart from
// commands there are
//
//	add, close   a server opens a socket, or closes its first
//	start N      another process, named t, u and so on, opens some
//	kill         the last of those is killed
//	gap          the newest generation lacks one, whatever the clock says
//	layout 1     the group is attached as by an older rpsel
//	pick 2       new flows all go to slot 2
//	run          a server is started by "rpsel run"; done when it is registered
//	agent        an agent is started; done when it is ready, and it runs on
//	agent add    the same, and then a socket is opened
//	agent service  the same, with the port as a service of its configuration
func (w *killWorld) do(at int, line string) (killed bool, err error) {
	fault := func() []string {
		if at < 0 {
			return nil
		}
		return []string{fmt.Sprint(fault.KillAt, "=", at), fault.Log + "=" + w.log}
	}()
	reached := func() bool { return at > 0 && len(w.steps()) >= at }
	if number, ok := strings.CutPrefix(line, "start "); ok {
		n, err := strconv.Atoi(number)
		if err != nil {
			return false, err
		}
		o := w.options
		o.Name = string(rune('t' + len(w.others)))
		if o.Cgroup != "" {
			o.Cgroup = w.makeCgroup(o.Name)
		}
		w.others = append(w.others, testnet.StartGroup(w.t, w.ns, n, o))
		return false, nil
	}
	switch line {
	case "add":
		w.servers.Add()
		return false, nil
	case "layout 1":
		layout1.Attach(w.t, w.bpffs, w.ns, 1194, layout1.Options{Flows: 1000})
		return false, nil
	case "pick 2":
		key := sockets.Key{NetNS: w.ns.Cookie(), Proto: sockets.UDP, Addr: netip.MustParseAddrPort("127.0.0.1:1194")}
		layout1.PickOnly(w.t, w.bpffs, key, 2)
		return false, nil
	case "gap":
		return false, makeGap(w.bpffs, w.ns, "udp_7f000001_1194")
	case "kill":
		w.others[len(w.others)-1].Kill()
		return false, nil
	case "close":
		w.servers.Close(0)
		return false, nil
	case "run":
		wrap := slices.Concat([]string{"env"}, fault, []string{"sh", "-c", `echo 0 >"$0/cgroup.procs" && exec "$@"`, w.cgroup,
			w.rpsel, "run", "--bpffs", w.bpffs, "--port", "1194", "--"})
		s, err := testnet.TryServer(w.t, w.ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", Name: "r", Wrap: wrap})
		if err != nil {
			if !reached() {
				return false, err
			}
			return true, nil
		}
		w.started = append(w.started, s)
		w.await("the server to be registered", func() bool { return reached() || w.registered(s.PID(), 1) })
		return reached(), nil
	case "agent", "agent add", "agent service":
		w.stopAgent()
		ready := make(chan bool)
		cmd := exec.Command(w.rpsel, "agent", "--bpffs", w.bpffs)
		if line == "agent service" {
			file := filepath.Join(w.t.TempDir(), "rpsel.toml")
			text := fmt.Sprintf("[[service]]\nport = 1194\nnetns = %q\nsettle = \"0s\"\nforce = true\n", w.ns.Path())
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				return false, err
			}
			cmd.Args = append(cmd.Args, "--config", file)
		}
		cmd.Env = append(os.Environ(), fault...)
		talk, err := cmd.StderrPipe()
		if err == nil {
			err = w.ns.Start(cmd)
		}
		if err != nil {
			return false, err
		}
		w.agent = cmd
		go func() {
			lines := bufio.NewScanner(talk)
			found := false
			for lines.Scan() {
				if !found && strings.Contains(lines.Text(), "msg=ready") {
					found = true
					ready <- true
				}
			}
			if !found {
				ready <- false
			}
		}()
		if <-ready && line == "agent add" {
			w.servers.Add()
			w.await("the listener to be registered", func() bool { return reached() || w.registered(w.servers.PID(), len(w.servers.Names)) })
		}
		if reached() {
			err := cmd.Wait()
			w.agent = nil
			return isKilled(err), err
		}
		return false, nil
	}
	args := strings.Fields(line)
	cmd := exec.Command(w.rpsel, slices.Concat(args[:1], []string{"--bpffs", w.bpffs, "-N", w.ns.Path(), "--port", "1194", "--proto", w.proto}, args[1:])...)
	cmd.Env = append(os.Environ(), fault...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", line, err, out)
	}
	return isKilled(err), err
}

// keepOpen opens connections, each when the one before has been accepted.
func keepOpen(t *testing.T, ns *testnet.NetNS, n int, addr string) {
	t.Helper()
	for range n {
		err := ns.Do(func() error {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			_, err = c.Read(make([]byte, 8))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func isKilled(err error) bool {
	exit, ok := errors.AsType[*exec.ExitError](err)
	return ok && exit.Sys().(syscall.WaitStatus).Signal() == unix.SIGKILL
}

// stopAgent ends the agent, once it is done with what it is at.
func (w *killWorld) stopAgent() {
	if w.agent == nil {
		return
	}
	if err := w.endAgent(); err != nil {
		w.t.Errorf("the agent: %v", err)
	}
}

// endAgent ends the agent that runs, and returns how it ended.
func (w *killWorld) endAgent() error {
	cmd := w.agent
	w.agent = nil
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		w.t.Error(err)
	}
	return cmd.Wait()
}

func (w *killWorld) status() (code int, out, talk string) {
	return rpsel("status", "--bpffs", w.bpffs, "-N", w.ns.Path(), "--port", "1194", "--proto", w.proto, "--json")
}

// registered tells whether a process has so many listeners, all with what they
// need for new flows: the last step has been passed then.
func (w *killWorld) registered(pid, n int) bool {
	code, out, talk := w.status()
	if code != exitDone {
		w.t.Fatal(talk)
	}
	var status struct {
		Groups []struct {
			Attached  bool
			Listeners []struct {
				PID   int
				State string
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		w.t.Fatal(err)
	}
	have := 0
	for _, l := range status.Groups[0].Listeners {
		if l.PID == pid && l.State == "active" {
			have++
		}
	}
	if !status.Groups[0].Attached || have < n {
		return false
	}
	// Whoever did it has the lock until all is done.
	code, _, talk = rpsel("attach", "--bpffs", w.bpffs, "-N", w.ns.Path(), "--port", "1194")
	if code != exitDone {
		w.t.Fatal(talk)
	}
	return true
}

// run goes through the case, with the command killed at a step, or at none (0),
// and returns the steps that were passed.
func (c *killCase) run(t *testing.T, rpsel string, at int) (steps []string) {
	t.Helper()
	proto, newClients := "udp", testnet.NewClients
	if c.tcp {
		proto, newClients = "tcp", testnet.NewTCPClients
	}
	w := newKillWorld(t, rpsel, c.servers, proto, c.links > 0)
	when := fmt.Sprintf("killed at step %d", at)
	defer func() { w.close(when) }()
	clients := newClients(t, w.ns, 200, "127.0.0.1:1194")
	if c.tcp {
		keepOpen(t, w.ns, 30, "127.0.0.1:1194")
	}
	for _, line := range c.before {
		clients.Ask()
		if _, err := w.do(-1, line); err != nil {
			t.Fatal(err)
		}
	}
	before := clients.Ask()

	killed, err := w.do(at, c.killed)
	steps = w.steps()
	if at == 0 {
		w.stopAgent()
		steps = w.steps()
	}
	// Who joins some seconds after another one dates no generation: on a machine that is
	// slow this time there may be a step less than in the run that counted them.
	all := false
	if at > 0 && !killed && err == nil {
		if w.agent != nil {
			err = w.endAgent()
		}
		killed, steps = isKilled(err), w.steps()
		all = err == nil && len(steps) == at-1
	}
	if len(steps) == 0 || at == 0 && err != nil || killed != (at > 0) && !all {
		t.Fatalf("%s: %d steps, killed: %v, %v", when, len(steps), killed, err)
	}
	when += ", " + steps[len(steps)-1]
	if moved := testnet.Moved(before, clients.Ask()); moved != 0 {
		t.Errorf("%s: %d flows moved", when, moved)
	}
	look := func(when string) {
		code, out, talk := w.status()
		if code != exitDone || !regexp.MustCompile(c.status).MatchString(out) {
			t.Errorf("%s: status %s%s", when, out, talk)
		}
	}
	if c.look {
		look(when)
	}
	after := c.after
	if after == nil {
		after = []string{c.killed}
	}
	for _, line := range after {
		if _, err := w.do(-1, line); err != nil {
			t.Errorf("%s, and then: %v", when, err)
		}
	}
	now := clients.Ask()
	if moved := testnet.Moved(before, now); moved != 0 || testnet.Shares(now)[""] != 0 {
		t.Errorf("%s, and then %v: %d flows moved, answers from %v", when, after, moved, testnet.Shares(now))
	}
	if c.status != "" {
		look(fmt.Sprintf("%s, and then %v", when, after))
	}
	var shares map[string]int
	right := func() bool {
		shares = testnet.Shares(newClients(t, w.ns, 100, "127.0.0.1:1194").Ask())
		has := func(s string) bool { return shares[s] > 0 }
		return !slices.ContainsFunc(c.fresh, func(s string) bool { return !has(s) }) && !slices.ContainsFunc(c.idle, has)
	}
	if w.agent != nil {
		w.await(when+": the agent to repair it", right)
	} else if !right() {
		t.Errorf("%s, and then %v: new flows of %v, but not of %v: %v", when, after, c.fresh, c.idle, shares)
	}
	aside, err := filepath.Glob(filepath.Join(w.bpffs, "rpsel", "*", "tmp_*"))
	if err != nil || len(aside) > 0 {
		t.Errorf("%s, and then %v: left behind: %v, %v", when, after, aside, err)
	}
	if c.links > 0 {
		links, err := filepath.Glob(filepath.Join(w.bpffs, "rpsel", "*", "udp_*", "reply_*"))
		if err != nil || len(links) != c.links {
			t.Errorf("%s, and then %v: links %v, %v", when, after, links, err)
		}
	}
	if strings.Contains(c.killed, "service") {
		pins, err := filepath.Glob(filepath.Join(w.bpffs, "rpsel", "bind", "udp_1194", "*"))
		if err != nil || len(pins) != 3 {
			t.Errorf("%s, and then %v: bind programs %v, %v", when, after, pins, err)
		}
	}
	return steps
}

// A container is gone, and its network namespace with it: the state that is left
// can be removed all the same.
func TestDetachGoneNamespace(t *testing.T) {
	bpffs := testnet.BPFFS(t)
	t.Run("container", func(t *testing.T) {
		ns := testnet.New(t)
		testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
		if code, _, talk := rpsel("attach", "--bpffs", bpffs, "-N", ns.Path(), "--port", "1194"); code != exitDone {
			t.Fatal(talk)
		}
	})
	code, out, talk := rpsel("detach", "--bpffs", bpffs, "-N", "all", "--port", "1194")
	if code != exitDone || !strings.Contains(out, "udp 127.0.0.1:1194") {
		t.Errorf("exit code %d, printed %q, said %q", code, out, talk)
	}
	if left, err := filepath.Glob(filepath.Join(bpffs, "rpsel*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
