package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/internal/daemon"
	"github.com/rpsel/rpsel/internal/demo"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// rpsel runs a command line in this process.
func rpsel(args ...string) (code int, out, talk string) {
	var stdout, stderr bytes.Buffer
	code = run(args, &env{out: &stdout, err: &stderr})
	return code, stdout.String(), stderr.String()
}

// A wrong command line gets one line that names the flag, what was given and
// what is allowed.
func TestUsage(t *testing.T) {
	port := "use a number from 1 to 65535"
	for _, c := range []struct{ line, want string }{
		{"attach", "rpsel attach needs --port: " + port},
		{"attach --port 0", `--port "0": ` + port},
		{"attach --port 70000", `--port "70000": ` + port},
		{"attach --port -1", `--port "-1": ` + port},
		{"attach --port +1", `--port "+1": ` + port},
		{"attach --port 1.5", `--port "1.5": ` + port},
		{"attach --port 0x10", `--port "0x10": ` + port},
		{"attach --port 1194,1195", `--port "1194,1195": ` + port},
		{"attach --port 99999999999999999999", `--port "99999999999999999999": ` + port},
		{"attach --port openvpn", `--port "openvpn": ` + port},
		{"attach --port=", `--port "": ` + port},
		{"attach -p", "--port needs a value"},
		{"attach 1194", `rpsel attach takes no argument, got "1194"`},
		{"attach --port 1 --proto sctp", `--proto "sctp": use udp or tcp`},
		{"attach --port 1 --proto=", `--proto "": use udp or tcp`},
		{"attach --port 1 --addr localhost", `--addr "localhost": use an IPv4 or IPv6 address`},
		{"attach --port 1 --addr 10.0.0.1:1194", `--addr "10.0.0.1:1194": use an IPv4 or IPv6 address`},
		{"attach --port 1 --addr fe80::1%lo", `--addr "fe80::1%lo": use an IPv4 or IPv6 address`},
		{"attach --port 1 --flows 0", `--flows "0": use a number from 64 to 16777216`},
		{"attach --port 1 --flows -5", `--flows "-5": use a number from 64 to 16777216`},
		{"attach --port 1 --flows many", `--flows "many": use a number from 64 to 16777216`},
		{"attach --port 1 --idle 0", `--idle "0": use a duration from 1s to 720h0m0s, such as 90s or 5m`},
		{"attach --port 1 --idle 300", `--idle "300": use a duration from`},
		{"attach --port 1 --idle 1000h", `--idle "1000h": use a duration from`},
		{"attach --port 1 --idle-new soon", `--idle-new "soon": use a duration from`},
		{"attach --port 1 --settle -1s", `--settle "-1s": use a duration from 0s to`},
		{"attach --port 1 --netns=", `--netns "": use a name in /run/netns, a path or a pid`},
		{"attach --port 1 --bpffs=", `--bpffs "": use a directory`},
		{"attach --port 1 --adopt=maybe", `--adopt "maybe": use true or false`},
		{"attach --port 1 --owner=", `--owner "": use a user's name or number, or none`},
		{"attach --port 1 --owner rpsel-nobody", `--owner "rpsel-nobody": use a user's name or number, or none`},
		{"attach --port 1 --owner -1", `--owner "-1": use a user's name or number, or none`},
		{"attach --port 1 --owner 4294967295", `--owner "4294967295": use a user's name or number, or none`},
		{"attach --port 1 --policy lottery", `--policy "lottery": use hash, newest, least, rr, random or cpu`},
		{"attach --port 1 --policy=", `--policy "": use hash, newest, least, rr, random or cpu`},
		{"attach --port 1 --affinity server", `--affinity "server": use flow, client, bytes:OFFSET,LENGTH (of the payload; up to 1024 and 1 to 20) or none`},
		{"attach --port 1 --affinity bytes:0", `--affinity "bytes:0": use flow, client`},
		{"attach --port 1 --affinity bytes:0,21", `--affinity "bytes:0,21": use flow, client`},
		{"attach --port 1 --affinity bytes:-1,4", `--affinity "bytes:-1,4": use flow, client`},
		{"attach --port 1 --proto tcp --affinity bytes:0,4", `--affinity bytes:0,4: for TCP use client or none`},
		{"attach --port 1 --proto tcp --affinity flow", `--affinity flow: for TCP use client or none`},
		{"attach --port 1 --first quic", `--first "quic": use openvpn`},
		{"attach --port 1 --first openvpn --proto tcp", "--first openvpn: it goes with UDP"},
		{"attach --port 1 --first openvpn --affinity client", "--first openvpn: it goes with affinity flow: with client all ports of an address have one listener anyway"},
		{"attach --port 1 --first openvpn --affinity bytes:0,4", "--first openvpn: it goes with affinity flow"},
		{"attach --port 1 --confirm maybe", `--confirm "maybe": use client or reply`},
		{"attach --port 1 --confirm reply --proto tcp --affinity none", "--confirm reply: for TCP it is the kernel that answers a client's first packet: use client\n"},
		{"attach --port 1 --client-prefix 24/56", `--client-prefix 24/56: it goes with --affinity client`},
		{"attach --port 1 --affinity client --client-prefix 24", `--client-prefix "24": use two numbers of bits`},
		{"attach --port 1 --affinity client --client-prefix 0/56", `--client-prefix "0/56": use two numbers of bits`},
		{"attach --port 1 --affinity client --client-prefix 24/129", `--client-prefix "24/129": use two numbers of bits`},
		{"attach --port 1 --generation 2", `--generation "2": use auto or new`},
		{"attach --port 1 --color red", "unknown flag: --color"},
		{"attach --port 1 -x", "unknown shorthand flag: 'x' in -x"},
		{"attach --port 1 -q -v", "--quiet and --verbose: use one of them"},

		{"flows --count -H", "--count and --no-header: use one of them"},
		{"detach", "rpsel detach needs --port"},
		{"flush --all", "rpsel flush needs --port"},
		{"flush -p 1", "rpsel flush needs exactly one of --client PREFIX, --slot SLOT and --all"},
		{"flush -p 1 --all=false", "rpsel flush needs exactly one of"},
		{"flush -p 1 --all --slot 1", "rpsel flush needs exactly one of"},
		{"flush -p 1 --client 10.0.0.1 --all", "rpsel flush needs exactly one of"},
		{"flush -p 1 --client 10.0.0", `--client "10.0.0": use an address or a prefix`},
		{"flush -p 1 --slot -1", `--slot "-1": use a number from 0 to 4095`},
		{"flows --slot 4096", `--slot "4096": use a number from 0 to 4095`},
		{"flows --pid 0", `--pid "0": use a number from 1 to`},
		{"flows --client 10.0.0.0/33", `--client "10.0.0.0/33": use an address or a prefix`},
		{"status --watch 5s", `--watch and "5s": write --watch=5s`},
		{"status --watch=0", `--watch "0": use a duration from 100ms to 1h0m0s`},
		{"upgrade 1194", `rpsel upgrade takes no argument, got "1194"`},
		{"upgrade --flows 63", `--flows "63": use a number from 64 to 16777216`},
		{"upgrade --dry-run=maybe", `--dry-run "maybe": use true or false`},
		{"why", "rpsel why takes one CLIENT, got 0 arguments"},
		{"why 10.0.0.1 10.0.0.2", "rpsel why takes one CLIENT, got 2 arguments"},
		{"why somebody", `CLIENT "somebody": use an address, or an address and a port`},
		{"why 10.0.0.1:0", `CLIENT "10.0.0.1:0": use an address, or an address and a port`},
		{"why 10.0.0.1:70000", `CLIENT "10.0.0.1:70000": use an address, or an address and a port`},
		{"check --addr ::", "--proto, --addr and --netns need --port"},
		{"check --netns 1", "--proto, --addr and --netns need --port"},
		{"version --port 1", "unknown flag: --port"},
		{"demo --flows 9", "unknown flag: --flows"},
		{"completion", "completion takes one shell: bash, fish or zsh"},
		{"completion tcsh", `completion "tcsh": use bash, fish or zsh`},
		{"frobnicate", `unknown command "frobnicate": "rpsel help" lists them`},
		{"statsu", `unknown command "statsu": did you mean status?`},
		{"help frobnicate", "help frobnicate: no such command"},
		{"--port 1", "unknown flag: --port"},
	} {
		t.Run(c.line, func(t *testing.T) {
			args := strings.Fields(c.line)
			code, out, talk := rpsel(args...)
			if code != exitUsage || out != "" || !strings.HasPrefix(talk, "rpsel: "+c.want) || strings.Count(talk, "\n") != 1 {
				t.Errorf("exit code %d, stdout %q, stderr %q, want %d and %q", code, out, talk, exitUsage, c.want)
			}
		})
	}
}

// With --json an error is JSON too, wherever the flag stands.
func TestUsageJSON(t *testing.T) {
	for _, line := range []string{"attach -j --port 0", "attach --port 0 --json", "attach -j", "status --slot 1 -j", "status -j -H"} {
		t.Run(line, func(t *testing.T) {
			code, out, talk := rpsel(strings.Fields(line)...)
			var document struct {
				Schema int
				Error  struct {
					Code    int
					Message string
				}
			}
			if err := json.Unmarshal([]byte(talk), &document); err != nil {
				t.Fatalf("%v: %q", err, talk)
			}
			if code != exitUsage || out != "" || document.Schema != 1 || document.Error.Code != code || document.Error.Message == "" {
				t.Errorf("exit code %d, stdout %q, stderr %q", code, out, talk)
			}
		})
	}
}

func TestExitCode(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{errors.New("any"), exitFailed},
		{loader.ErrFixed, exitFailed},
		{loader.ErrLocked, exitFailed},
		{loader.ErrIncompatible, exitFailed},
		{loader.ErrOlder, exitFailed},
		{loader.ErrNewer, exitFailed},
		{loader.ErrTooSmall, exitFailed},
		{usageError("wrong"), exitUsage},
		{notFound("gone"), exitNotFound},
		{loader.ErrNotAttached, exitNotFound},
		{sockets.ErrNoNetNS, exitNotFound},
		{sockets.ErrGone, exitNotFound},
		{sockets.ErrPermission, exitPermission},
		{errors.Join(loader.ErrUnregistrable, sockets.ErrPermission), exitPermission},
		{loader.ErrForeignProgram, exitUnsupported},
		{loader.ErrNoBPFFS, exitUnsupported},
		{sockets.ErrMPTCP, exitUnsupported},
		{&codedError{code: exitTimeout}, exitTimeout},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: exit code %d, want %d", c.err, got, c.want)
		}
	}
}

func TestParseClient(t *testing.T) {
	for _, c := range []struct {
		text string
		addr string
		port uint16
	}{
		{"10.0.0.1", "10.0.0.1", 0},
		{"10.0.0.1:40001", "10.0.0.1", 40001},
		{"::1", "::1", 0},
		{"[2001:db8::1]:40001", "2001:db8::1", 40001},
		{"::ffff:10.0.0.1", "10.0.0.1", 0},
	} {
		addr, port, err := parseClient(c.text)
		if err != nil || addr != netip.MustParseAddr(c.addr) || port != c.port {
			t.Errorf("%s: %s, %d, %v", c.text, addr, port, err)
		}
	}
}

// example is the group of the design's section 7.
func example() loader.Status {
	server := []sockets.Holder{{PID: 4800, FD: 3, Command: "openvpn"}}
	return loader.Status{
		Key:        loader.Key{NetNS: 1, Proto: loader.UDP, Addr: netip.MustParseAddrPort("0.0.0.0:1194")},
		NetNSInode: 4026531840,
		Attached:   true,
		Policy:     "hash", Affinity: "flow", Confirm: "client",
		Idle: 300 * time.Second, IdleNew: 30 * time.Second,
		Tracked: 4400, Established: 4300, Capacity: 262144, Generation: 3,
		Counters: loader.Counters{Rehomed: 310},
		Listeners: []loader.Listener{
			{Slot: 0, Cookie: 801, PID: 4711, Command: "openvpn", State: "active", Weight: 1, Generation: 3, Flows: 4090, Recent: 120, Hit: 50000, New: 1020, Rehomed: 3},
			{Slot: 1, Cookie: 802, PID: 4702, Command: "openvpn", State: "draining", Weight: 0, Generation: 2, Flows: 310, Hit: 1200},
		},
		Unregistered: []loader.Unregistered{{Socket: sockets.Socket{Cookie: 803, Holders: server}}},
	}
}

func TestStatusTable(t *testing.T) {
	dead := example()
	dead.Key.Addr, dead.Key.V6Only, dead.Key.UID = netip.MustParseAddrPort("[::]:1194"), true, 1000
	dead.Attached, dead.Settling = false, 42*time.Second
	dead.Unregistered = nil
	dead.Listeners = []loader.Listener{{Slot: 11, State: "dead", Weight: 1, Recent: 7, RxQueue: -1, Drops: -1}}
	tcp := example()
	tcp.Key.Proto, tcp.Listeners[0].Connections = sockets.TCP, 17
	turning := example()
	turning.Policy, turning.Turning = "newest", 4*time.Second
	turning.Listeners, turning.Unregistered = nil, nil
	for _, c := range []struct {
		name   string
		status loader.Status
		header bool
		want   string
	}{
		{"design", example(), true, `
udp 0.0.0.0:1194  policy hash  affinity flow  flows 4400/262144  rehomed 310  fallback 0
  SLOT   PID  COMMAND  STATE         WEIGHT  FLOWS  NEW/S  PACKETS  RXQ  DROPS
     0  4711  openvpn  active             1   4090     12    51023    0      0
     1  4702  openvpn  draining           0    310      0     1200    0      0
     -  4800  openvpn  unregistered       -      -      -        -    0      0
`},
		{"tcp", tcp, true, `
tcp 0.0.0.0:1194  policy hash  affinity flow  flows 4400/262144  rehomed 310  fallback 0
  SLOT   PID  COMMAND  STATE         WEIGHT  FLOWS  NEW/S  PACKETS  RXQ  DROPS  CONNS
     0  4711  openvpn  active             1   4090     12    51023    0      0     17
     1  4702  openvpn  draining           0    310      0     1200    0      0      0
     -  4800  openvpn  unregistered       -      -      -        -    0      0      -
`},
		{"unusual", dead, false, `
udp [::]:1194 v6only uid 1000  policy hash  affinity flow  flows 4400/262144  rehomed 310  fallback 0  settling 42s  not attached
  11  -    dead  1  0  0.7  0  -  -
`},
		{"turning", turning, false, `
udp 0.0.0.0:1194  policy newest  affinity flow  flows 4400/262144  rehomed 310  fallback 0  turning 4s
`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got bytes.Buffer
			if err := (&scope{}).writeStatus(&got, c.status, c.header); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.TrimPrefix(c.want, "\n"), got.String()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestStatusJSON(t *testing.T) {
	status := example()
	status.Listeners = status.Listeners[:1]
	status.Listeners[0].RxQueue = -1
	var got bytes.Buffer
	e := &env{out: &got, err: &got}
	if err := (&scope{}).printStatus(e, []loader.Status{status}, true, false); err != nil {
		t.Fatal(err)
	}
	want := `{"schema":1,"groups":[{"netns":4026531840,"netns_cookie":1,"proto":"udp","family":"ipv4","addr":"0.0.0.0","port":1194,"v6only":false,"device":"","uid":0,"attached":true,` +
		`"policy":"hash","affinity":"flow","confirm":"client","idle_seconds":300,"idle_new_seconds":30,"settling_seconds":0,` +
		`"flows":{"tracked":4400,"established":4300,"capacity":262144},"generation":3,"turning_seconds":0,` +
		`"counters":{"runs":0,"hit":0,"new":0,"rehomed":310,"untracked":0,"fallback":0,"migrated":0,"parse_error":0,"table_full":0,"evicted":0},` +
		`"unregistered":[{"pid":4800,"command":"openvpn","reason":"not registered yet: \"rpsel attach\" registers it"}],` +
		`"listeners":[{"slot":0,"pid":4711,"command":"openvpn","cookie":801,"generation":3,"state":"active","weight":1,` +
		`"flows":4090,"hit":50000,"new":1020,"rehomed":3,"untracked":0,"migrated":0,"bytes":0,"rx_queue":null,"drops":0,"connections":0}],"client_prefix":"","first":"","owner":null,"warnings":[]}]}` + "\n"
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Every listener drains, and the program is gone: both are said, not only shown.
func TestStatusTalk(t *testing.T) {
	status := example()
	status.AllDraining, status.Attached = true, false
	var out, talk bytes.Buffer
	s := &scope{agent: &daemon.Info{PID: 4711, Mode: daemon.Polling, Reason: "cgroup2 is not mounted"}}
	if err := s.printStatus(&env{out: &out, err: &talk}, []loader.Status{status}, false, false); err != nil {
		t.Fatal(err)
	}
	if want := "warning: the agent (pid 4711) polls for new listeners: cgroup2 is not mounted\n"; !strings.Contains(talk.String(), want) {
		t.Errorf("stderr %q, want %q", talk.String(), want)
	}
	for _, want := range []string{"every listener drains", "its program is not attached"} {
		if !strings.Contains(talk.String(), "warning: udp 0.0.0.0:1194: "+want) {
			t.Errorf("stderr %q, want %q", talk.String(), want)
		}
	}
}

func TestFlowLines(t *testing.T) {
	var got bytes.Buffer
	list := flowList{keys: []loader.Key{{Proto: loader.UDP, Addr: netip.MustParseAddrPort("0.0.0.0:1194")}}}
	list.add(0, loader.Flow{Client: netip.MustParseAddrPort("10.0.0.1:40001"), State: 3, Age: 12 * time.Second}, 4711, ruleTable)
	if err := list.writeLines(&env{out: &got}); err != nil {
		t.Fatal(err)
	}
	want := `{"proto":"udp","local":"0.0.0.0:1194","client":"10.0.0.1:40001","slot":0,"pid":4711,"state":"established","age_seconds":12,"idle_seconds":0,"rule":"table"}` + "\n"
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// What a flow is known to have come by counts before what its time would say.
func TestRuleOf(t *testing.T) {
	for _, c := range []struct {
		flow       loader.Flow
		rule, says string
	}{
		{loader.Flow{First: true}, "first", "it said that the flow is new"},
		{loader.Flow{First: true, Earlier: true}, "first", "it said that the flow is new"},
		{loader.Flow{Floated: true, Earlier: true}, "float", "same address and peer-id"},
		{loader.Flow{Floated: true, Rehomed: true}, "rehomed", "died"},
		{loader.Flow{Earlier: true, Settling: true}, "earlier", "not known"},
		{loader.Flow{Settling: true}, "kernel", "left where it was"},
		{loader.Flow{}, "least", "policy least"},
	} {
		if got := ruleOf(c.flow, "least"); got != c.rule || !strings.Contains(explainRule(got), c.says) {
			t.Errorf("%+v: rule %s: %s, want %s", c.flow, got, explainRule(got), c.rule)
		}
	}
}

func TestDrawDemo(t *testing.T) {
	result := demo.Result{
		Listeners: 3,
		Plain:     demo.Half{Kill: demo.Count{Flows: 2000, Moved: 1500}, Start: demo.Count{Flows: 3000, Moved: 1}, Fresh: demo.Fresh{Flows: 1000, Got: 333}},
		Sticky:    demo.Half{Attach: &demo.Count{Flows: 3000}, Kill: demo.Count{Flows: 2000}, Start: demo.Count{Flows: 3000}, Fresh: demo.Fresh{Flows: 1000, Got: 340}},
	}
	var got bytes.Buffer
	if err := drawDemo(&got, result, "█"); err != nil {
		t.Fatal(err)
	}
	want := `3 listeners on one UDP port: flows that moved although their own listener was alive

EVENT                  SYSTEM       FLOWS  MOVED   SHARE
rpsel attaches         rpsel         3000      0   0.0 %
first listener killed  plain Linux   2000   1500  75.0 %  ██████████████████████████████
                       rpsel         2000      0   0.0 %
another one started    plain Linux   3000      1   0.0 %  █
                       rpsel         3000      0   0.0 %

Of new flows after that, the new listener got 33.3 % on plain Linux, 34.0 % with rpsel.
`
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Servers end between the plan and the attach: the command says so, and takes
// back what it has adopted and attached before.
func TestAttachVanished(t *testing.T) {
	ns := testnet.New(t)
	fs := testnet.BPFFS(t)
	stays := testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194"})
	goes := testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.2:1194", ReusePort: true})
	var talk bytes.Buffer
	a := attachment{
		scope:  scope{port: 1194, netns: ns.Path(), bpffs: fs},
		env:    &env{err: &talk},
		settle: -1,
		adopt:  true,
	}
	jobs, err := a.plan()
	if err != nil || len(jobs) != 2 {
		t.Fatalf("%d jobs, %v", len(jobs), err)
	}
	goes.Kill()
	_, err = a.attachAll(jobs)
	if !errors.Is(err, sockets.ErrGone) || exitCode(err) != exitNotFound || !strings.Contains(err.Error(), "udp 127.0.0.2:1194") {
		t.Errorf("got %v (exit code %d), want %v", err, exitCode(err), sockets.ErrGone)
	}
	if want := "what this command had attached before is detached again"; !strings.Contains(talk.String(), want) {
		t.Errorf("stderr %q, want %q", talk.String(), want)
	}
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie()})
	if err != nil || len(groups) != 1 || groups[0].HasProgram || groups[0].Members[0].Reuseport || groups[0].Members[0].UserData != sockets.UserDataFree {
		t.Errorf("groups %+v, %v", groups, err)
	}
	if keys, err := loader.FS(fs).Keys(0); err != nil || len(keys) != 0 {
		t.Errorf("state of %v, %v", keys, err)
	}
	if clients := testnet.NewClients(t, ns, 1, stays.Addr.String()); clients.Ask()[0] != "s" {
		t.Error("the other server does not answer")
	}
}

// The demo leaves nothing, however it ends.
func TestDemoEnds(t *testing.T) {
	testnet.Privileged(t)
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(s.String(), func(t *testing.T) {
			cmd := &exec.Cmd{Path: path, Args: []string{"rpsel", "demo", "-j"}}
			talk, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(talk)
			for lines.Scan() && lines.Text() != "rpsel: attach while they run" {
			}
			inside := children(t, cmd.Process.Pid)
			if len(inside) != 1 {
				t.Fatalf("processes %v inside", inside)
			}
			// Three listeners, unless one has been killed meanwhile.
			processes := append(inside, children(t, inside[0])...)
			if len(processes) < 3 {
				t.Fatalf("processes %v, want that inside and its listeners", processes)
			}
			if err := cmd.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
			last := ""
			for lines.Scan() {
				last = lines.Text()
			}
			err = cmd.Wait()
			if s != syscall.SIGKILL {
				want := `{"schema":1,"error":{"code":1,"message":"demo: interrupted, nothing is left of it"}}`
				if cmd.ProcessState.ExitCode() != exitFailed || last != want {
					t.Errorf("%v, stderr ends with %q, want %q", err, last, want)
				}
			}
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
				processes = slices.DeleteFunc(processes, func(pid int) bool {
					return !strings.HasPrefix(commandLine(pid), "rpsel\x00demo-")
				})
				if len(processes) == 0 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("processes %v are left", processes)
				}
			}
		})
	}
}

// children lists the processes whose parent is pid.
func children(t *testing.T, pid int) []int {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var list []int
	for _, path := range stats {
		stat, _ := os.ReadFile(path) // the process may have ended
		_, rest, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(rest); len(f) > 1 && f[1] == strconv.Itoa(pid) {
			child, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, child)
		}
	}
	return list
}

// commandLine is empty for a process that has ended.
func commandLine(pid int) string {
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return string(line)
}
