package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/internal/layout1"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func TestRunUsage(t *testing.T) {
	const (
		port   = `use a number from 1 to 65535: see "rpsel run --help"`
		addr   = `use an IPv4 or IPv6 address, such as :: or 0.0.0.0: see "rpsel run --help"`
		toggle = `use on, off or leave: see "rpsel run --help"`
	)
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--port", "0", "true"}, exitUsage, `--port "0": ` + port},
		{[]string{"--port", "70000", "true"}, exitUsage, `--port "70000": ` + port},
		{[]string{"--port", "65536", "true"}, exitUsage, `--port "65536": ` + port},
		{[]string{"--port", "-5", "true"}, exitUsage, `--port "-5": ` + port},
		{[]string{"--port", "abc", "true"}, exitUsage, `--port "abc": ` + port},
		{[]string{"--port", "openvpn", "true"}, exitUsage, `--port "openvpn": ` + port},
		{[]string{"--port", "1194x", "true"}, exitUsage, `--port "1194x": ` + port},
		{[]string{"--port", " 1194", "true"}, exitUsage, `--port " 1194": ` + port},
		{[]string{"--port", "+1194", "true"}, exitUsage, `--port "+1194": ` + port},
		{[]string{"--port", "", "true"}, exitUsage, `--port "": ` + port},
		{[]string{"--addr", "", "true"}, exitUsage, `--addr "": ` + addr},
		{[]string{"--addr", "localhost", "true"}, exitUsage, `--addr "localhost": ` + addr},
		{[]string{"--addr", "10.0.0.256", "true"}, exitUsage, `--addr "10.0.0.256": ` + addr},
		{[]string{"--addr", "010.0.0.1", "true"}, exitUsage, `--addr "010.0.0.1": ` + addr},
		{[]string{"--addr", "10.0.0.0/8", "true"}, exitUsage, `--addr "10.0.0.0/8": ` + addr},
		{[]string{"--addr", "fe80::1%eth0", "true"}, exitUsage, `--addr "fe80::1%eth0": ` + addr},
		{[]string{"--addr", "*", "true"}, exitUsage, `--addr "*": ` + addr},
		{[]string{"--proto", "sctp", "true"}, exitUsage, `--proto "sctp": use udp, tcp or both: see "rpsel run --help"`},
		{[]string{"--proto", "", "true"}, exitUsage, `--proto "": use udp, tcp or both: see "rpsel run --help"`},
		{[]string{"--reuseport", "1", "true"}, exitUsage, `--reuseport "1": ` + toggle},
		{[]string{"--reuseport", "", "true"}, exitUsage, `--reuseport "": ` + toggle},
		{[]string{"--reuseaddr", "yes", "true"}, exitUsage, `--reuseaddr "yes": ` + toggle},
		{[]string{"--bind-device", "", "true"}, exitUsage, `--bind-device "": use the name of a network interface: see "rpsel run --help"`},
		{[]string{"--user", "", "true"}, exitUsage, `--user "": use a name or number: see "rpsel run --help"`},
		{[]string{"--cgroup", "", "true"}, exitUsage, `--cgroup "": use a directory: see "rpsel run --help"`},
		{[]string{"--debug=2", "true"}, exitUsage, `--debug "2": use true or false: see "rpsel run --help"`},
		{nil, exitUsage, `run needs a command: see "rpsel run --help"`},
		{[]string{"--port", "1194", "--"}, exitUsage, `run needs a command: see "rpsel run --help"`},
		{[]string{"--cgroup", "/x", "true"}, exitUsage, `run --cgroup takes no command, got "true": it covers what lives in the cgroup`},
		{[]string{"--cgroup", "/x", "--user", "nobody"}, exitUsage, `run --cgroup takes no --user: it starts nothing`},

		{[]string{"--cgroup", "/no/such/dir"}, exitNotFound, `cgroup: open /no/such/dir: no such file or directory`},
		{[]string{"--cgroup", "/tmp"}, exitNotFound, `/tmp: not a cgroup2 directory: name one below the mount point of cgroup2`},
		{[]string{"--user", "no-such-user", "true"}, exitNotFound, `"no-such-user": no such user: use a name or number of the user database`},
		{[]string{"--bind-device", "nodev", "true"}, exitNotFound, `"nodev": no such network interface: ip link lists them`},
		{[]string{"no-such-command"}, 127, `no-such-command: command not found`},
		{[]string{"--", "no-such-command", "--port", "abc"}, 127, `no-such-command: command not found`},
		{[]string{"no-such-command", "--port", "abc"}, 127, `no-such-command: command not found`},
		{[]string{"/etc/passwd"}, 126, `/etc/passwd: command cannot be executed: permission denied`},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			code, out, talk := rpsel(append([]string{"run"}, test.args...)...)
			if code != test.code || out != "" || talk != "rpsel: "+test.want+"\n" {
				t.Errorf("exit code %d, want %d; stdout %q\nsaid %swant rpsel: %s", code, test.code, out, talk, test.want)
			}
		})
	}
}

// A server that is started through run joins its attached group by itself, and
// takes no flow; on a port where nothing is attached run leaves it at that. A
// server with many sockets registers them all, be it long after they were bound.
func TestRunRegisters(t *testing.T) {
	for _, c := range []struct {
		network string
		late    bool // they listen some time after they were bound
	}{{"udp4", false}, {"udp6", false}, {"tcp4", false}, {"tcp4", true}} {
		network := c.network
		t.Run(network+map[bool]string{true: ", late"}[c.late], func(t *testing.T) {
			ns, bpffs := testnet.New(t), testnet.BPFFS(t)
			const n = 16
			options := testnet.ServerOptions{
				Network: network, Addr: map[string]string{"udp4": "127.0.0.1", "udp6": "[::1]", "tcp4": "127.0.0.1"}[network] + ":1194",
				Wrap: []string{buildCommand(t, "rpsel"), "run", "--bpffs", bpffs, "--port", "1194", "--"},
			}
			where := []string{"--bpffs", bpffs, "--port", "1194", "--proto", network[:3], "-N", ns.Path()}
			rpselDone := func(verb string, args ...string) string {
				t.Helper()
				code, out, talk := rpsel(append(append([]string{verb}, where...), args...)...)
				if code != exitDone {
					t.Fatal(talk)
				}
				return out
			}

			options.Name = "a"
			testnet.StartServer(t, ns, options)
			rpselDone("attach", "--settle", "1s")

			clients := testnet.NewClients(t, ns, 200, options.Addr)
			if network == "tcp4" {
				clients = testnet.NewTCPClients(t, ns, 200, options.Addr)
			}
			before := clients.Ask()
			options.Name, options.Bound = "b", c.late
			b := testnet.StartGroup(t, ns, n, options)
			if c.late {
				if out := rpselDone("status", "--json"); strings.Count(out, `"slot":`) != 1 {
					t.Errorf("they do not listen yet: %s", out)
				}
				for i := range n {
					b.Listen(i, 512)
				}
			}
			var status struct {
				Groups []struct {
					Settling     int               `json:"settling_seconds"`
					Unregistered []json.RawMessage `json:"unregistered"`
					Listeners    []struct {
						PID   int    `json:"pid"`
						State string `json:"state"`
					} `json:"listeners"`
				} `json:"groups"`
			}
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
				out := rpselDone("status", "--json")
				if err := json.Unmarshal([]byte(out), &status); err != nil {
					t.Fatal(err)
				}
				g := status.Groups[0]
				if len(g.Listeners) == n+1 && len(g.Unregistered) == 0 && g.Settling == 0 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("not registered: %s", out)
				}
			}
			if l := status.Groups[0].Listeners[n]; l.PID != b.PID() || l.State != "active" {
				t.Errorf("listener %+v, b is %d", l, b.PID())
			}
			if network != "tcp4" { // each connection is a flow of its own
				if moved := testnet.Moved(before, clients.Ask()); moved > 0 {
					t.Errorf("%d flows moved", moved)
				}
			}
			ask := func() map[string]int {
				fresh := testnet.NewClients(t, ns, 200, options.Addr)
				if network == "tcp4" {
					fresh = testnet.NewTCPClients(t, ns, 200, options.Addr)
				}
				return testnet.Shares(fresh.Ask())
			}
			// Those that are registered together get their shares after the last of them.
			shares := ask()
			for deadline := time.Now().Add(time.Minute); len(shares) < n && time.Now().Before(deadline); {
				shares = ask()
			}
			if len(shares) < n {
				t.Errorf("new flows: %v", shares)
			}

			// The control: without a group it is plain Linux.
			rpselDone("detach")
			before = clients.Ask()
			options.Name, options.Bound = "c", false
			testnet.StartGroup(t, ns, n, options)
			if moved := testnet.Moved(before, clients.Ask()); moved == 0 {
				t.Error("no flow moved without a program")
			}
		})
	}
}

// The only server of an attached port comes back. The kernel's group had gone
// with it, and the program with the group.
func TestRunAttachesAgain(t *testing.T) {
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{
		Network: "udp4", Addr: "127.0.0.1:1194",
		Wrap: []string{buildCommand(t, "rpsel"), "run", "--bpffs", bpffs, "--port", "1194", "--"},
	}
	only := testnet.StartServer(t, ns, options)
	if code, _, talk := rpsel("attach", "--bpffs", bpffs, "--port", "1194", "-N", ns.Path(), "--settle", "1s"); code != exitDone {
		t.Fatal(talk)
	}
	only.Kill()
	testnet.StartServer(t, ns, options)
	var status struct {
		Groups []struct {
			Attached  bool              `json:"attached"`
			Listeners []json.RawMessage `json:"listeners"`
		} `json:"groups"`
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		code, out, talk := rpsel("status", "--bpffs", bpffs, "--port", "1194", "-N", ns.Path(), "--json")
		if code != exitDone {
			t.Fatal(talk)
		}
		if err := json.Unmarshal([]byte(out), &status); err != nil {
			t.Fatal(err)
		}
		if g := status.Groups[0]; g.Attached && len(g.Listeners) == 1 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not attached again: %s", out)
		}
	}
}

// What run says with --debug.
func TestRunDebug(t *testing.T) {
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	if _, err := exec.LookPath("perl"); err != nil {
		(&testnet.Unavailable{What: "a dynamically linked server", Err: err}).Skip(t)
	}
	path := buildCommand(t, "rpsel")
	const perl = `use Socket; $0 = "server";
		socket(S, PF_INET, SOCK_DGRAM, 0) and bind(S, sockaddr_in(1194, INADDR_LOOPBACK)) or die "$!\n";
		print STDERR "$$\n"; <STDIN>;`
	start := func() (said func() string) {
		cmd := exec.Command(path, "run", "--bpffs", bpffs, "--debug", "--port", "1194", "--reuseaddr", "off", "--", "perl", "-e", perl)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		log, err := os.CreateTemp(t.TempDir(), "log")
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		cmd.Stderr = log
		if err := ns.Start(cmd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			stdin.Close()
			cmd.Wait()
		})
		return func() string {
			text, err := os.ReadFile(log.Name())
			if err != nil {
				t.Fatal(err)
			}
			pid := cmd.Process.Pid // which may be a part of an address
			said := strings.ReplaceAll(string(text), fmt.Sprintf("(pid %d)", pid), "(pid PID)")
			return regexp.MustCompile(fmt.Sprintf(`(?m)^%d$`, pid)).ReplaceAllString(said, "PID")
		}
	}
	awaitSaid := func(said func() string, want string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !strings.Contains(said(), want); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("said %q\nnot  %q", said(), want)
			}
		}
	}
	const forced = "rpsel: server (pid PID): udp 127.0.0.1:1194: SO_REUSEADDR off, SO_REUSEPORT on\n"
	first := start()
	awaitSaid(first, forced)
	awaitSaid(first, "PID\n")
	if code, _, talk := rpsel("attach", "--bpffs", bpffs, "--port", "1194", "-N", ns.Path()); code != exitDone {
		t.Fatal(talk)
	}
	second := start()
	const registered = "rpsel: server (pid PID): udp 127.0.0.1:1194: registered in slot 1\n"
	awaitSaid(second, registered)
	if diff := cmp.Diff(forced+"PID\n", first()); diff != "" && first() != "PID\n"+forced {
		t.Errorf("the first said, -want +got:\n%s", diff)
	}
}

// buildCommand builds one of testnet.Builds where every user can execute it.
func buildCommand(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(testnet.RunDir(t), "rpsel")
	if err := testnet.BuildAt(path, name); err != nil {
		t.Fatal(err)
	}
	return path
}

// In another pid namespace the pid of an event is somebody else's: the cookie
// tells which socket it is.
func TestRegisterByCookie(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	bound := func() (cookies []uint64) {
		t.Helper()
		err := ns.Do(func() (err error) {
			cookies, err = sockets.Bound(sockets.UDP, 1194)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return cookies
	}
	r := registrar{fs: fs, found: map[sockets.Query][]sockets.Group{}}
	event := watch.Event{Proto: sockets.UDP, Addr: servers.Addr, Cookie: bound()[0], NetNS: ns.Cookie(), PID: servers.PID()}
	key, conn, err := r.borrow(event)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	group, err := fs.Attach(conn, loader.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()

	for _, pid := range []int{0, os.Getpid(), 1 << 30} {
		had := bound()
		servers.Add()
		event.PID = pid
		for _, cookie := range bound() {
			if !slices.Contains(had, cookie) {
				event.Cookie = cookie
			}
		}
		registered := false
		registerAll(fs, []watch.Event{event}, func(_ watch.Event, slot int, err error) {
			registered = err == nil && slot == len(had)
		})
		if !registered {
			t.Errorf("pid %d: not registered", pid)
		}
	}
	status, err := group.Status()
	if err != nil || len(status.Listeners) != 4 || status.Key != key {
		t.Fatalf("%+v, %v", status, err)
	}
	for _, l := range status.Listeners {
		if l.PID != servers.PID() {
			t.Errorf("slot %d: process %d, want %d", l.Slot, l.PID, servers.PID())
		}
	}
}

// The reaper on a group of an older rpsel: it says what there is to do. After that
// the next one registers.
func TestRegisterOlder(t *testing.T) {
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	servers := testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	key := layout1.Attach(t, bpffs, ns, 1194, layout1.Options{Flows: 1000})[0]
	servers.Add()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: 1194})
	if err != nil {
		t.Fatal(err)
	}
	event := watch.Event{Proto: sockets.UDP, Addr: servers.Addr, Cookie: groups[0].Members[2].Cookie, NetNS: ns.Cookie(), PID: servers.PID()}
	for _, want := range []string{`: "rpsel upgrade" brings it up to date`, ""} {
		told := 0
		registerAll(loader.FS(bpffs), []watch.Event{event}, func(_ watch.Event, slot int, err error) {
			told++
			if want != "" && (!errors.Is(err, loader.ErrOlder) || !strings.HasSuffix(err.Error(), want)) || want == "" && (err != nil || slot != 2) {
				t.Errorf("slot %d, %v, want %q", slot, err, want)
			}
		})
		if told != 1 {
			t.Errorf("told %d times", told)
		}
		if code, _, talk := rpsel("upgrade", "--bpffs", bpffs, "-N", ns.Path()); code != exitDone {
			t.Fatalf("%v: %s", key, talk)
		}
	}
}
