package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/layout1"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/sockets"
)

func TestMain(m *testing.M) {
	testnet.MaybeServe()
	flag.Set("test.parallel", "4") // commands that are killed, and those after them, wait for the kernel half of the time
	testscript.Main(testnet.Checked{M: m}, map[string]func(){"rpsel": main, "without": without, "only": onlyCmd})
}

// without runs a command without some capabilities: without bpf,perfmon CMD…
func without() {
	bits := map[string]uintptr{
		"bpf": unix.CAP_BPF, "perfmon": unix.CAP_PERFMON, "sys_admin": unix.CAP_SYS_ADMIN,
		"net_admin": unix.CAP_NET_ADMIN, "sys_ptrace": unix.CAP_SYS_PTRACE,
	}
	runtime.LockOSThread()
	for _, name := range strings.Split(os.Args[1], ",") {
		bit, ok := bits[name]
		if !ok {
			panic("unknown capability " + name)
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, bit, 0, 0, 0); err != nil {
			panic(err)
		}
	}
	path, err := exec.LookPath(os.Args[2])
	if err == nil {
		err = syscall.Exec(path, os.Args[2:], os.Environ())
	}
	panic(err)
}

// scripts runs txtar scripts, each in a network namespace and with a BPF file
// system of its own. Besides testscript's commands they have:
//
//	exits CODE COMMAND…          run a command that exits with this code
//	interrupt N COMMAND…         run rpsel, interrupt it when it has printed so many
//	                             lines, and expect that it takes that for its end
//	await N PROTO PORT           wait until so many listeners are registered and
//	                             have settled
//	device NAME                  make a network interface
//	serve NAME NETWORK ADDR OPT… start a server of 1 socket; options are a
//	                             number of sockets, plain (no SO_REUSEPORT),
//	                             v6only, mptcp, cpu (SO_INCOMING_CPU), uid=N,
//	                             cgroup (in one of its own),
//	                             hold (accept no connection), of=NAME (the socket
//	                             of that server). Sets $NAME to its pid
//	gap PORT                     make the newest generation lack members
//	layout1 PORT                 attach as an rpsel of layout 1 did
//	layout PORT N                write another layout into a udp group's state
//	foreign PORT                 attach a program that is not rpsel's
//	die NAME                     kill it
//	ask NAME [N ADDR]            let N new flows, or those of before, ask
//	call NAME [N ADDR]           the same with N new connections
//	moved NAME none|some [SERVER…]  how many moved at the last ask, but for
//	                             those of these servers' sockets
//	served NAME none|some SERVER how many a server's socket answered
//	page NAME [CODE]             run the next script of a page of docs/, which exits
//	                             with this code; all its scripts have to be run
//	reading PORT                 wait until another one reads the events of a group
//	programs NAME…               skip the script where one is missing
//	remember                     note bpffs, groups and sockets
//	unchanged                    they are as noted
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			w := &world{t: env.T().(testing.TB), servers: map[string]*testnet.Server{}, clients: map[string]*clients{}, pages: map[string]*testnet.Page{}}
			w.ns = testnet.New(w.t)
			env.Values[worldKey{}] = w
			env.Setenv("NETNS", w.ns.Path())
			env.Setenv("COOKIE", strconv.FormatUint(w.ns.Cookie(), 10))
			return w.enter()
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":     exits,
			"interrupt": interrupt,
			"device":    device,
			"foreign":   inWorld((*world).foreign),
			"await":     inWorld((*world).await),
			"gap":       inWorld((*world).gap),
			"layout":    inWorld((*world).layout),
			"layout1":   inWorld((*world).layout1),
			"serve":     inWorld((*world).serve),
			"die":       inWorld((*world).die),
			"ask":       inWorld((*world).ask),
			"call":      inWorld((*world).call),
			"moved":     inWorld((*world).moved),
			"page":      inWorld((*world).page),
			"served":    inWorld((*world).served),
			"reading":   inWorld((*world).reading),
			"programs":  inWorld((*world).programs),
			"remember":  inWorld((*world).remember),
			"unchanged": inWorld((*world).unchanged),
		},
	})
}

type worldKey struct{}

// world is what a script has around it.
type world struct {
	t       testing.TB
	ns      *testnet.NetNS
	servers map[string]*testnet.Server
	clients map[string]*clients
	pages   map[string]*testnet.Page
	before  []string
	ring    uint32 // that of the last reader of events
}

type clients struct {
	*testnet.Clients
	before, now []string
}

// enter moves the thread of the script, and so the processes it starts, into
// the namespaces. The thread ends with the script.
func (w *world) enter() error {
	runtime.LockOSThread()
	netns, err := os.Open(w.ns.Path())
	if err != nil {
		return err
	}
	defer netns.Close()
	if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("setns", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	// An agent outside keeps its run directory.
	if err := os.MkdirAll(agent.DefaultDir, 0o755); err != nil {
		return err
	}
	return errors.Join(
		os.NewSyscallError("mount", unix.Mount("tmpfs", agent.DefaultDir, "tmpfs", 0, "mode=0755")),
		os.NewSyscallError("mount", unix.Mount("bpf", bpffs, "bpf", 0, "mode=0700")))
}

const bpffs = "/sys/fs/bpf"

func inWorld(f func(*world, *testscript.TestScript, []string)) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg {
			ts.Fatalf("this command cannot be negated")
		}
		f(ts.Value(worldKey{}).(*world), ts, args)
	}
}

func (w *world) page(ts *testscript.TestScript, args []string) {
	if w.pages[args[0]] == nil {
		w.pages[args[0]] = testnet.OpenPage(w.t, args[0])
	}
	code := "0"
	if len(args) > 1 {
		code = args[1]
	}
	exits(ts, false, []string{code, "sh", "-euc", w.pages[args[0]].Next()})
}

func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	code := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if code != want {
		ts.Fatalf("exit code %d, want %d", code, want)
	}
}

func interrupt(ts *testscript.TestScript, _ bool, args []string) {
	lines, err := strconv.Atoi(args[0])
	ts.Check(err)
	path, err := os.Executable()
	ts.Check(err)
	cmd := &exec.Cmd{Path: path, Args: args[1:], Stderr: ts.Stderr()}
	pipe, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	for out := bufio.NewScanner(pipe); out.Scan(); lines-- {
		fmt.Fprintln(ts.Stdout(), out.Text())
		if lines == 1 {
			ts.Check(cmd.Process.Signal(os.Interrupt))
		}
	}
	ts.Check(cmd.Wait())
}

func device(ts *testscript.TestScript, _ bool, args []string) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = args[0]
	ts.Check(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}))
}

func (w *world) serve(ts *testscript.TestScript, args []string) {
	o := testnet.ServerOptions{Name: args[0], Network: args[1], Addr: args[2], ReusePort: true}
	n := 1
	for _, opt := range args[3:] {
		uid, isUID := strings.CutPrefix(opt, "uid=")
		owner, isOf := strings.CutPrefix(opt, "of=")
		var err error
		switch {
		case opt == "plain":
			o.ReusePort = false
		case opt == "v6only":
			o.V6Only = true
		case opt == "mptcp":
			o.MPTCP = true
		case opt == "cpu":
			o.Sockopts = []testnet.Sockopt{{Level: unix.SOL_SOCKET, Name: unix.SO_INCOMING_CPU, Value: 0}}
		case opt == "cgroup":
			o.Cgroup = w.cgroup(ts)
		case opt == "hold":
			o.Hold = true
		case isUID:
			o.UID, err = strconv.Atoi(uid)
		case isOf:
			o.Socket, err = w.copySocket(w.servers[owner])
		default:
			n, err = strconv.Atoi(opt)
		}
		ts.Check(err)
	}
	s := testnet.StartGroup(w.t, w.ns, n, o)
	if o.Socket != nil {
		o.Socket.Close()
	}
	w.servers[args[0]] = s
	ts.Setenv(args[0], strconv.Itoa(s.PID()))
}

// cgroup makes one for a server.
func (w *world) cgroup(ts *testscript.TestScript) string {
	root, err := cgroup.Root()
	ts.Check(err)
	return testnet.Cgroup(w.t, root)
}

// copySocket copies the descriptor of a server's socket.
func (w *world) copySocket(s *testnet.Server) (copied *os.File, err error) {
	groups, err := sockets.Find(sockets.Query{NetNS: w.ns.Cookie(), Port: s.Addr.Port()})
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		for _, m := range g.Members {
			if len(m.Holders) > 0 && m.Holders[0].PID == s.PID() {
				return dup(m)
			}
		}
	}
	return nil, fmt.Errorf("pid %d has no socket", s.PID())
}

func dup(m sockets.Socket) (copied *os.File, err error) {
	conn, err := m.Take()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		var n int
		if n, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			copied = os.NewFile(uintptr(n), "socket")
		}
	})
	return copied, errors.Join(err, controlErr)
}

// await waits for an agent to do its work.
func (w *world) await(ts *testscript.TestScript, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	s := scope{netns: w.ns.Path(), bpffs: bpffs}
	ts.Check((*protoValue)(&s.proto).Set(args[1]))
	ts.Check((*portValue)(&s.port).Set(args[2]))
	ts.Check(await(s, n))
}

// foreign attaches a classic program that picks the first member.
func (w *world) foreign(ts *testscript.TestScript, args []string) {
	port, err := parseNumber(args[0], 1, 65535)
	ts.Check(err)
	groups, err := sockets.Find(sockets.Query{NetNS: w.ns.Cookie(), Port: uint16(port)})
	ts.Check(err)
	filter := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	prog := unix.SockFprog{Len: 1, Filter: &filter[0]}
	ts.Check(withMember(groups[0], func(conn *sockets.Conn) error {
		raw, err := conn.SyscallConn()
		if err != nil {
			return err
		}
		controlErr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &prog)
		})
		return errors.Join(err, controlErr)
	}))
}

func (w *world) layout1(ts *testscript.TestScript, args []string) {
	port, err := parseNumber(args[0], 1, 65535)
	ts.Check(err)
	layout1.Attach(w.t, bpffs, w.ns, uint16(port), layout1.Options{Flows: 1000})
}

// layout writes to a group of 127.0.0.1.
func (w *world) layout(ts *testscript.TestScript, args []string) {
	n, err := strconv.ParseUint(args[1], 10, 32)
	ts.Check(err)
	config, err := ebpf.LoadPinnedMap(filepath.Join(bpffs, "rpsel", strconv.FormatUint(w.ns.Cookie(), 10), "udp_7f000001_"+args[0], "config"), nil)
	ts.Check(err)
	defer config.Close()
	value, err := config.LookupBytes(uint32(0))
	ts.Check(err)
	binary.NativeEndian.PutUint32(value[8:], uint32(n))
	ts.Check(config.Put(uint32(0), value))
}

func (w *world) gap(ts *testscript.TestScript, args []string) {
	ts.Check(makeGap(bpffs, w.ns, "udp_7f000001_"+args[0]))
}

// makeGap makes a group's newest generation lack members. Who joins is one of them then,
// also if the machine is too slow for that to be within the seconds that it else has.
func makeGap(bpffs string, ns *testnet.NetNS, group string) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(bpffs, "rpsel", fmt.Sprint(ns.Cookie()), group, bpf.SelectMapConfig), nil)
	if err != nil {
		return err
	}
	defer m.Close()
	var config bpf.SelectConfig
	if err := m.Lookup(uint32(0), &config); err != nil {
		return err
	}
	config.Members += 100
	return m.Put(uint32(0), config)
}

func (w *world) die(_ *testscript.TestScript, args []string) { w.servers[args[0]].Kill() }

func (w *world) ask(ts *testscript.TestScript, args []string) {
	w.answers(ts, args, testnet.NewClients)
}

func (w *world) call(ts *testscript.TestScript, args []string) {
	w.answers(ts, args, testnet.NewTCPClients)
}

func (w *world) answers(ts *testscript.TestScript, args []string, newClients func(testing.TB, *testnet.NetNS, int, string) *testnet.Clients) {
	if len(args) == 3 {
		n, err := strconv.Atoi(args[1])
		ts.Check(err)
		w.clients[args[0]] = &clients{Clients: newClients(w.t, w.ns, n, args[2])}
	}
	c := w.clients[args[0]]
	c.before, c.now = c.now, c.Ask()
	ts.Logf("%v", testnet.Shares(c.now))
	if slices.Contains(c.now, "") {
		ts.Fatalf("flows without an answer")
	}
	ts.Setenv(args[0]+"_PORT", strconv.Itoa(c.Port(0)))
}

func (w *world) moved(ts *testscript.TestScript, args []string) {
	c := w.clients[args[0]]
	var except []string
	for _, server := range args[2:] {
		except = append(except, w.servers[server].Names...)
	}
	noneOrSome(ts, args[1], testnet.Moved(c.before, c.now, except...))
}

func (w *world) served(ts *testscript.TestScript, args []string) {
	n := 0
	for _, name := range w.servers[args[2]].Names {
		n += testnet.Shares(w.clients[args[0]].now)[name]
	}
	noneOrSome(ts, args[1], n)
}

func noneOrSome(ts *testscript.TestScript, want string, n int) {
	ts.Logf("%d", n)
	if got := map[bool]string{true: "none", false: "some"}[n == 0]; got != want {
		ts.Fatalf("%d flows, want %s", n, want)
	}
}

func (w *world) programs(_ *testscript.TestScript, args []string) {
	for _, name := range args {
		needProgram(w.t, name)
	}
}

func (w *world) remember(ts *testscript.TestScript, _ []string) { w.before = w.state(ts) }

func (w *world) unchanged(ts *testscript.TestScript, _ []string) {
	if diff := cmp.Diff(w.before, w.state(ts)); diff != "" {
		ts.Fatalf("bpffs, groups or sockets changed (-before +after):\n%s", diff)
	}
}

// state describes all that rpsel might change.
func (w *world) state(ts *testscript.TestScript) []string {
	var state []string
	err := filepath.WalkDir(bpffs, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			state = append(state, path+" "+d.Type().String())
		}
		return err
	})
	ts.Check(err)
	groups, err := sockets.Find(sockets.Query{NetNS: w.ns.Cookie()})
	ts.Check(err)
	for _, g := range groups {
		if g.Members[0].Connected.IsValid() {
			continue // a client of ours, which a child between fork and exec may still hold
		}
		g.Kernel = min(g.Kernel, 1)
		for i := range g.Members {
			g.Members[i].RxQueue, g.Members[i].Drops = 0, 0
		}
		state = append(state, fmt.Sprintf("%#v", g))
	}
	return state
}

// reading waits until a group's program has the ring of another reader than at the
// last time.
func (w *world) reading(ts *testscript.TestScript, args []string) {
	pins, err := filepath.Glob(fmt.Sprintf("/sys/fs/bpf/rpsel/%d/udp_*_%s/reports", w.ns.Cookie(), args[0]))
	ts.Check(err)
	if len(pins) != 1 {
		ts.Fatalf("port %s: %v", args[0], pins)
	}
	reports, err := ebpf.LoadPinnedMap(pins[0], nil)
	ts.Check(err)
	defer reports.Close()
	reader, err := ebpf.LoadPinnedMap(filepath.Join(filepath.Dir(pins[0]), "reader"), nil)
	ts.Check(err)
	defer reader.Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		var ring uint32
		var v bpf.SelectReader
		err := reports.Lookup(uint32(0), &ring)
		ts.Check(reader.Lookup(uint32(0), &v))
		if err == nil && ring != w.ring && v.Read != 0 {
			w.ring = ring
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("nobody reads the events of port %s", args[0])
		}
	}
}

// Every example of the help texts is run by a script, as it stands.
func TestExamples(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	var scripts strings.Builder
	for _, path := range paths {
		script, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		scripts.Write(script)
	}
	for _, cmd := range newRootCmd(&env{}).Commands() {
		if cmd.Hidden {
			continue
		}
		t.Run(cmd.Name(), func(t *testing.T) {
			if cmd.Short == "" || cmd.Example == "" {
				t.Error("no short description or no example")
			}
			for line := range strings.Lines(cmd.Example) {
				example := strings.TrimSpace(line)
				run := regexp.MustCompile(`(?m)^(exec|exits \d|interrupt \d+) ` + regexp.QuoteMeta(example) + `( &\S*)?$`)
				if !run.MatchString(scripts.String()) {
					t.Errorf("no script runs %q", example)
				}
			}
		})
	}
}
