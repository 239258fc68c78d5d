package force_test

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/force"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/sockets"
)

// on forces SO_REUSEPORT on every bind.
func on() *order { return &order{Settings: force.Settings{Reuseport: force.On}} }

// with is on with other settings.
func with(change func(*force.Settings)) *order {
	o := on()
	change(&o.Settings)
	return o
}

// Two servers that know nothing of SO_REUSEPORT share a port, and without run
// the second does not start.
func TestTwoOnOnePort(t *testing.T) {
	for _, test := range []struct{ network, address, ask string }{
		{"udp4", "127.0.0.1:7777", "127.0.0.1:7777"},
		{"udp4", "0.0.0.0:7777", "127.0.0.1:7777"},
		{"udp6", "[::1]:7777", "[::1]:7777"},
		{"udp6", "[::]:7777", "[::1]:7777"},
		{"udp", ":7777", "127.0.0.1:7777"},
		{"udp", ":7777", "[::1]:7777"},
		{"tcp4", "127.0.0.1:7777", "127.0.0.1:7777"},
		{"tcp6", "[::1]:7777", "[::1]:7777"},
		{"tcp", ":7777", "127.0.0.1:7777"},
		{"tcp", ":7777", "[::1]:7777"},
	} {
		t.Run(test.network+" "+test.address+" asked at "+test.ask, func(t *testing.T) {
			w := newWorld(t)
			plain := w.serve(nil, test.network, test.address, "plain")
			w.failsInUse(nil, test.network, test.address, "plain")
			w.failsInUse(on(), test.network, test.address, "forced") // the first must have it, too
			plain.stop()

			w.serve(on(), test.network, test.address, "a")
			w.serve(on(), test.network, test.address, "b")
			got := w.answers(test.network[:3], test.ask)
			if diff := cmp.Diff([]string{"a", "b"}, got); diff != "" {
				t.Errorf("who answered, -want +got:\n%s", diff)
			}
		})
	}
}

// A dynamically linked program, which uses the C library.
func TestDynamic(t *testing.T) {
	perl, err := exec.LookPath("perl")
	if err != nil {
		(&testnet.Unavailable{What: "a dynamically linked server", Err: err}).Skip(t)
	}
	const program = `
		use Socket;
		socket(S, PF_INET, SOCK_DGRAM, 0) and bind(S, sockaddr_in(7777, INADDR_LOOPBACK)) or die "$!\n";
		$| = 1; print "$$ 127.0.0.1:7777\n"; <STDIN>;`
	w := newWorld(t)
	start := func(o *order) error {
		_, err := w.start(w.command(o, perl, "-e", program))
		return err
	}
	must(t, start(on()))
	must(t, start(on()))
	if err := start(nil); err == nil || !strings.Contains(err.Error(), "already in use") {
		t.Errorf("without run: %v", err)
	}
}

// What does not match is left alone: its second server does not start.
func TestFilters(t *testing.T) {
	addr := netip.MustParseAddr
	for _, test := range []struct {
		name             string
		settings         force.Settings
		network, address string
		matches          bool
	}{
		{"port", force.Settings{Port: 7777}, "udp4", "127.0.0.1:7777", true},
		{"port IPv6", force.Settings{Port: 7777}, "udp6", "[::1]:7777", true},
		{"port TCP", force.Settings{Port: 7777}, "tcp4", "127.0.0.1:7777", true},
		{"other port", force.Settings{Port: 7778}, "udp4", "127.0.0.1:7777", false},
		{"other port, its bytes swapped", force.Settings{Port: 0x1234}, "udp4", "127.0.0.1:13330", false},
		{"other port IPv6", force.Settings{Port: 7778}, "udp6", "[::1]:7777", false},
		{"other port TCP", force.Settings{Port: 7778}, "tcp4", "127.0.0.1:7777", false},
		{"address", force.Settings{Addr: addr("127.0.0.1")}, "udp4", "127.0.0.1:7777", true},
		{"address as IPv6", force.Settings{Addr: addr("::ffff:127.0.0.1")}, "udp4", "127.0.0.1:7777", true},
		{"other address", force.Settings{Addr: addr("127.0.0.2")}, "udp4", "127.0.0.1:7777", false},
		{"wildcard is an address", force.Settings{Addr: addr("0.0.0.0")}, "udp4", "127.0.0.1:7777", false},
		{"wildcard", force.Settings{Addr: addr("0.0.0.0")}, "udp4", "0.0.0.0:7777", true},
		{"wildcard of the other family", force.Settings{Addr: addr("0.0.0.0")}, "udp6", "[::]:7777", false},
		{"IPv6 wildcard", force.Settings{Addr: addr("::")}, "udp6", "[::]:7777", true},
		{"IPv6 address", force.Settings{Addr: addr("::1")}, "udp6", "[::1]:7777", true},
		{"other IPv6 address", force.Settings{Addr: addr("::2")}, "udp6", "[::1]:7777", false},
		{"UDP", force.Settings{Proto: sockets.UDP}, "udp4", "127.0.0.1:7777", true},
		{"TCP", force.Settings{Proto: sockets.TCP}, "tcp4", "127.0.0.1:7777", true},
		{"UDP for TCP", force.Settings{Proto: sockets.UDP}, "tcp4", "127.0.0.1:7777", false},
		{"TCP for UDP", force.Settings{Proto: sockets.TCP}, "udp4", "127.0.0.1:7777", false},
		{"address of another port", force.Settings{Addr: addr("127.0.0.1"), Port: 7778}, "udp4", "127.0.0.1:7777", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			test.settings.Reuseport = force.On
			w.serve(&order{Settings: test.settings}, test.network, test.address, "a")
			if test.matches {
				w.serve(&order{Settings: test.settings}, test.network, test.address, "b")
			} else {
				w.failsInUse(&order{Settings: test.settings}, test.network, test.address, "b")
			}
		})
	}
}

func TestPortZero(t *testing.T) {
	for _, network := range []string{"udp4", "udp6", "tcp4"} {
		t.Run(network, func(t *testing.T) {
			w := newWorld(t)
			host := map[string]string{"udp4": "127.0.0.1", "udp6": "[::1]", "tcp4": "127.0.0.1"}[network]
			chosen := w.serve(on(), "-mptcp=false", network, host+":0", "a")
			if got := w.option(chosen, unix.SO_REUSEPORT); got != 0 {
				t.Errorf("SO_REUSEPORT is %d", got)
			}
			specific := w.serve(on(), "-mptcp=false", network, host+":7777", "a")
			if got := w.option(specific, unix.SO_REUSEPORT); got != 1 {
				t.Errorf("SO_REUSEPORT of the control is %d", got)
			}
		})
	}
}

// A server that sets SO_REUSEPORT itself is kept from sharing its port.
func TestReuseportOff(t *testing.T) {
	for _, test := range []struct {
		to     force.Switch
		shares bool
	}{{force.Off, false}, {force.Leave, true}, {force.On, true}} {
		t.Run(test.to.String(), func(t *testing.T) {
			w := newWorld(t)
			o := &order{Settings: force.Settings{Reuseport: test.to}}
			w.serve(o, "-reuseport", "udp4", "127.0.0.1:7777", "a")
			if test.shares {
				w.serve(o, "-reuseport", "udp4", "127.0.0.1:7777", "b")
			} else {
				w.failsInUse(o, "-reuseport", "udp4", "127.0.0.1:7777", "b")
			}
		})
	}
}

func TestReuseaddr(t *testing.T) {
	for _, test := range []struct {
		network string
		to      force.Switch
		want    int
	}{
		{"udp4", force.Leave, 0}, {"udp4", force.On, 1}, {"udp4", force.Off, 0},
		{"tcp4", force.Leave, 1}, {"tcp4", force.On, 1}, {"tcp4", force.Off, 0}, // Go sets it for TCP
	} {
		t.Run(test.network+" "+test.to.String(), func(t *testing.T) {
			w := newWorld(t)
			o := &order{Settings: force.Settings{Reuseaddr: test.to}}
			p := w.serve(o, "-mptcp=false", test.network, "127.0.0.1:7777", "a")
			if got := w.option(p, unix.SO_REUSEADDR); got != test.want {
				t.Errorf("SO_REUSEADDR is %d, want %d", got, test.want)
			}
			if got := w.option(p, unix.SO_REUSEPORT); got != 0 {
				t.Errorf("SO_REUSEPORT is %d", got)
			}
		})
	}
}

func TestBindDevice(t *testing.T) {
	for _, network := range []string{"udp4", "udp6", "tcp4"} {
		t.Run(network, func(t *testing.T) {
			w := newWorld(t)
			host := map[string]string{"udp4": "127.0.0.1", "udp6": "[::1]", "tcp4": "127.0.0.1"}[network]
			o := with(func(s *force.Settings) { s.Device, s.Port = "lo", 7777 })
			bound := w.serve(o, "-mptcp=false", network, host+":7777", "a")
			w.serve(o, "-mptcp=false", network, host+":7777", "b")
			if got := w.option(bound, unix.SO_BINDTOIFINDEX); got != 1 {
				t.Errorf("it is bound to interface %d, lo is 1", got)
			}
			other := w.serve(o, "-mptcp=false", network, host+":7778", "a")
			if got := w.option(other, unix.SO_BINDTOIFINDEX); got != 0 {
				t.Errorf("another port is bound to interface %d", got)
			}
			if got := w.answers(network[:3], host+":7777"); len(got) != 2 {
				t.Errorf("who answered: %q", got)
			}
		})
	}
}

// A device that has gone refuses the bind, and says so.
func TestBindDeviceGone(t *testing.T) {
	w := newWorld(t)
	device := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "rpseltest"}, PeerName: "peer"}
	must(t, w.Do(func() error { return netlink.LinkAdd(device) }))
	o := with(func(s *force.Settings) { s.Device, s.Trace = "rpseltest", true })
	cmd := w.command(o, "sh", "-c", `echo 0 0.0.0.0:0; read line; exec "$0" udp4 127.0.0.1:7777 a`, server)
	p, err := w.start(cmd)
	must(t, err)
	must(t, w.Do(func() error { return netlink.LinkDel(device) }))
	fmt.Fprintln(p.stdin)
	if err := p.ready(); err == nil || !strings.Contains(err.Error(), "operation not permitted") {
		t.Errorf("bind: %v", err)
	}
	await(t, "the report", func() bool { return len(w.reports()) > 0 })
	got := w.reports()[0]
	got.Event.PID, got.Event.Cookie, got.Event.NetNS = 0, 0, 0
	want := report{
		Event:   watch.Event{Proto: sockets.UDP, Addr: netip.MustParseAddrPort("127.0.0.1:7777"), Command: "server"},
		Binding: true, Err: "setsockopt SO_BINDTODEVICE: no such device",
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestUser(t *testing.T) {
	w := newWorld(t)
	nobody := on()
	nobody.User = "nobody"
	first := w.serve(nobody, "udp4", "127.0.0.1:7777", "a")
	nobody.User = "65534"
	w.serve(nobody, "udp4", "127.0.0.1:7777", "b")
	w.failsInUse(on(), "udp4", "127.0.0.1:7777", "root") // a group has one user

	group, _ := w.socket(first)
	if group.UID != 65534 {
		t.Errorf("the socket's user is %d", group.UID)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", first.pid))
	must(t, err)
	for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534\n", "Gid:\t65534\t65534\t65534\t65534\n", "Groups:\t65534 \n", "CapEff:\t0000000000000000\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("no %q in its status:\n%s", want, status)
		}
	}
}

// A program that gains rights by execve is covered all the same.
func TestSetuid(t *testing.T) {
	w := newWorld(t)
	setuid := filepath.Join(filepath.Dir(server), "setuid")
	must(t, exec.Command("cp", server, setuid).Run())
	must(t, os.Chmod(setuid, 0o755|os.ModeSetuid))
	o := on()
	o.User = "nobody"
	for _, name := range []string{"a", "b"} {
		p, err := w.start(w.command(o, setuid, "udp4", "127.0.0.1:7777", name))
		must(t, err)
		if group, _ := w.socket(p); group.UID != 0 {
			t.Errorf("the socket's user is %d: the program is not setuid, is its file system?", group.UID)
		}
	}
}

// The command has run's pid, and with it its parent, descriptors and exit code.
func TestSameProcess(t *testing.T) {
	w := newWorld(t)
	t.Run("pid, directory, environment, arguments", func(t *testing.T) {
		cmd := w.command(on(), "sh", "-c", `echo $$ "$PWD" "$IN_ENV" "$0" "$1"; cat; echo err >&2; exit 42`, "a b", "")
		cmd.Dir = "/usr"
		cmd.Env = append(os.Environ(), "IN_ENV=x y")
		cmd.Stdin = strings.NewReader("through stdin\n")
		var out, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &stderr
		must(t, w.Start(cmd))
		cmd.Wait()
		if got, want := out.String(), fmt.Sprintf("%d /usr x y a b \nthrough stdin\n", cmd.Process.Pid); got != want {
			t.Errorf("stdout is %q, want %q", got, want)
		}
		if stderr.String() != "err\n" || cmd.ProcessState.ExitCode() != 42 {
			t.Errorf("stderr is %q, exit code %d", stderr.String(), cmd.ProcessState.ExitCode())
		}
	})
	for _, sent := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		t.Run(sent.String(), func(t *testing.T) {
			heed(t, sent)
			p := w.serve(on(), "udp4", "127.0.0.1:7777", "a")
			if p.pid != p.Process.Pid {
				t.Fatalf("the server is %d, run was %d", p.pid, p.Process.Pid)
			}
			must(t, p.Process.Signal(sent))
			p.Wait()
			if status := p.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != sent {
				t.Errorf("it ended with %v", p.ProcessState)
			}
		})
	}
	t.Run("no child it has not started", func(t *testing.T) {
		p := w.serve(on(), "udp4", "127.0.0.1:7777", "a")
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", p.pid))
		must(t, err)
		if len(children) > 0 {
			t.Errorf("children: %s", children)
		}
		p.stop()
	})
}

// heed has processes that are started from now on heed a signal: who is started by
// one that ignores it, as nohup makes of SIGHUP, does so, too.
func heed(t *testing.T, s os.Signal) {
	if signal.Ignored(s) {
		caught := make(chan os.Signal, 1)
		signal.Notify(caught, s)
		t.Cleanup(func() { signal.Ignore(s) })
	}
}

// A script that does not name its interpreter is the shell's, as for execvp(3).
func TestScript(t *testing.T) {
	w := newWorld(t)
	script := filepath.Join(t.TempDir(), "script")
	must(t, os.WriteFile(script, []byte(`echo "$1 in $0"; exit 3`), 0o755))
	cmd := w.command(on(), script, "argument")
	var out bytes.Buffer
	cmd.Stdout = &out
	must(t, w.Start(cmd))
	cmd.Wait()
	if got, want := out.String(), "argument in "+script+"\n"; got != want || cmd.ProcessState.ExitCode() != 3 {
		t.Errorf("got %q, exit code %d", got, cmd.ProcessState.ExitCode())
	}
}

// Whoever reads what a command writes gets the end when the command has closed
// it, whatever is left of run; also for descriptors run knows nothing of.
func TestOutputEnds(t *testing.T) {
	w := newWorld(t)
	reads := make([]*os.File, 3)
	writes := make([]*os.File, 3)
	for i := range reads {
		var err error
		reads[i], writes[i], err = os.Pipe()
		must(t, err)
		defer reads[i].Close()
	}
	stdin, in, err := os.Pipe()
	must(t, err)
	cmd := w.command(on(), "sh", "-c", `echo out; echo err >&2; echo more >&3; exec cat >/dev/null 2>&1 3>&-`)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = stdin, writes[0], writes[1], writes[2:]
	must(t, w.Start(cmd))
	stdin.Close()
	for i, want := range []string{"out\n", "err\n", "more\n"} {
		writes[i].Close()
		got, err := io.ReadAll(reads[i])
		must(t, err)
		if string(got) != want {
			t.Errorf("descriptor %d gave %q", i+1, got)
		}
	}
	if !alive(w.reaper()) {
		t.Error("the reaper has gone, so it proves nothing")
	}
	in.Close()
	must(t, cmd.Wait())
}

// A server that becomes a daemon is covered as before, and the last process
// takes the cgroup with it.
func TestDaemon(t *testing.T) {
	w := newWorld(t)
	cmd := w.command(on(), server, "-fork", "udp4", "127.0.0.1:7777", "a")
	daemon, err := w.start(cmd)
	must(t, err)
	must(t, cmd.Wait())
	if daemon.pid == cmd.Process.Pid || !alive(daemon.pid) {
		t.Fatalf("process %d is no daemon of %d", daemon.pid, cmd.Process.Pid)
	}
	if got := len(w.cgroups()); got != 1 {
		t.Fatalf("%d cgroups", got)
	}
	w.serve(on(), "udp4", "127.0.0.1:7777", "b").stop()
	await(t, "the second's cgroup to go", func() bool { return len(w.cgroups()) == 1 })
	reaper := w.reaper()
	daemon.stop()
	must(t, ended(reaper, 60_000))
	if got := w.cgroups(); len(got) != 0 {
		t.Errorf("left: %q", got)
	}
}

// Without its reaper a command runs on, covered as before, and the next run
// removes the cgroup that it leaves.
func TestReaperKilled(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(signal.String(), func(t *testing.T) {
			w := newWorld(t)
			first := w.serve(on(), "udp4", "127.0.0.1:7777", "a")
			reaper := w.reaper()
			must(t, unix.Kill(reaper, signal))
			must(t, ended(reaper, 60_000))
			if got := w.answers("udp", "127.0.0.1:7777"); len(got) != 1 {
				t.Errorf("who answered: %q", got)
			}
			w.serve(on(), "udp4", "127.0.0.1:7777", "b").stop()
			await(t, "the second's cgroup to go", func() bool { return len(w.cgroups()) == 1 })

			first.stop()
			left := w.cgroups()
			if len(left) != 1 {
				t.Fatalf("left: %q", left)
			}
			w.serve(on(), "udp4", "127.0.0.1:7777", "c")
			if slices.Contains(w.cgroups(), left[0]) {
				t.Errorf("%s is still there", left[0])
			}
		})
	}
}

// Every listener is told of once it can be registered, however many come at
// once, and nothing else is.
func TestListening(t *testing.T) {
	const each = 32
	w := newWorld(t)
	o := with(func(s *force.Settings) { s.Port = 7777 })
	var want []report
	expect := func(p *process) {
		group, socket := w.socket(p)
		want = append(want, report{Event: watch.Event{
			Proto: group.Proto, Addr: group.Addr, Cookie: socket.Cookie, NetNS: group.NetNS, PID: p.pid, Command: "server",
		}})
	}
	var started []*process
	for i := range each {
		for _, network := range []string{"udp4", "udp6"} {
			cmd := w.command(o, server, network, map[string]string{"udp4": "127.0.0.1:7777", "udp6": ":7777"}[network], fmt.Sprint(i))
			p, err := w.start(cmd)
			must(t, err)
			started = append(started, p)
		}
	}
	w.serve(o, "udp4", "127.0.0.1:7778", "other port")
	w.serve(o, "udp4", "127.0.0.1:0", "any port")
	tcp := w.serve(o, "-mptcp=false", "tcp4", "127.0.0.1:7777", "tcp")
	for _, p := range append(started, tcp) {
		expect(p)
	}
	await(t, "all reports", func() bool { return len(w.reports()) >= len(want) })
	byCookie := func(a, b report) int { return int(a.Event.Cookie) - int(b.Event.Cookie) }
	got := w.reports()
	slices.SortFunc(got, byCookie)
	slices.SortFunc(want, byCookie)
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// A run within a run is within its cgroup as well.
func TestNested(t *testing.T) {
	w := newWorld(t)
	inner := *on()
	inner.Log = w.log
	for _, name := range []string{"a", "b"} {
		_, err := w.start(w.command(on(), self(t), "force-run", encode(t, inner), server, "udp4", "127.0.0.1:7777", name))
		must(t, err)
	}
	if got := w.answers("udp", "127.0.0.1:7777"); len(got) != 2 {
		t.Errorf("who answered: %q", got)
	}
}

// A cgroup that shares its processes' controllers with others, as nspawn and
// some container managers make them.
func TestThreaded(t *testing.T) {
	w := newWorld(t)
	must(t, os.WriteFile(w.dir.Path()+"/cgroup.type", []byte("threaded"), 0))
	w.serve(on(), "udp4", "127.0.0.1:7777", "a")
	w.serve(on(), "udp4", "127.0.0.1:7777", "b")
}

// A command may make cgroups of its own and leave them.
func TestCgroupsBelow(t *testing.T) {
	w := newWorld(t)
	p := w.serve(on(), "udp4", "127.0.0.1:7777", "a")
	must(t, os.MkdirAll(w.cgroups()[0]+"/one/two", 0o755))
	p.stop() // the world checks that nothing is left
}

func TestWatch(t *testing.T) {
	for _, test := range []string{"stopped", "killed", "cgroup gone"} {
		t.Run(test, func(t *testing.T) {
			w := newWorld(t)
			below := w.dir.Path() + "/service"
			must(t, os.Mkdir(below, 0o755))
			dir, err := os.Open(below)
			must(t, err)
			defer dir.Close()
			t.Cleanup(func() { os.Remove(below) })
			inside := func(name string) (*process, error) {
				cmd := exec.Command(server, "udp4", "127.0.0.1:7777", name)
				cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
				return w.start(cmd)
			}

			o := on()
			o.Cgroup, o.Log = below, w.log
			watch := exec.Command(self(t), "force-watch", encode(t, *o))
			stdin, err := watch.StdinPipe()
			must(t, err)
			stderr, err := watch.StderrPipe()
			must(t, err)
			must(t, w.Start(watch))
			defer watch.Wait()
			defer stdin.Close()
			started := make([]byte, len("reaper started\n"))
			_, err = io.ReadFull(stderr, started)
			must(t, err)

			a, err := inside("a")
			must(t, err)
			b, err := inside("b")
			must(t, err)
			w.failsInUse(nil, "udp4", "127.0.0.1:7777", "outside")
			await(t, "reports", func() bool { return len(w.reports()) == 2 })

			switch test {
			case "stopped":
				stdin.Close()
				must(t, watch.Wait())
			case "killed":
				watch.Process.Kill()
				watch.Wait()
			case "cgroup gone":
				a.stop()
				b.stop()
				must(t, os.Remove(below))
				must(t, watch.Wait())
				return
			}
			if _, err := inside("c"); err == nil || !strings.Contains(err.Error(), inUse) {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// What cannot be done leaves nothing behind, which the world checks.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	orders := map[string]func(*order){
		"":       func(*order) {},
		"user":   func(o *order) { o.User = "no-such-user" },
		"uid":    func(o *order) { o.User = "4294967294" },
		"device": func(o *order) { o.Settings.Device = "nodev" },
		"long":   func(o *order) { o.Settings.Device = "a-name-that-is-too-long" },
	}
	notExecutable := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(notExecutable, nil, 0o644))
	noInterpreter := filepath.Join(t.TempDir(), "script")
	must(t, os.WriteFile(noInterpreter, []byte("#!/no/such/interpreter\n"), 0o755))
	for _, test := range []struct {
		name, order string
		args        []string
		want        string
	}{
		{"no such command", "", []string{"no-such-command"}, "no-such-command: command not found"},
		{"no such file", "", []string{"/no/such/command"}, "/no/such/command: command not found"},
		{"empty", "", []string{""}, ": command not found"},
		{"not executable", "", []string{notExecutable}, notExecutable + ": command cannot be executed: permission denied"},
		{"directory", "", []string{"/tmp"}, "/tmp: command cannot be executed: is a directory"},
		{"no interpreter", "", []string{noInterpreter}, noInterpreter + ": command not found: no such file, or no such interpreter"},
		{"user", "user", []string{"true"}, `"no-such-user": no such user: use a name or number of the user database`},
		{"uid", "uid", []string{"true"}, `"4294967294": no such user: use a name or number of the user database`},
		{"device", "device", []string{"true"}, `"nodev": no such network interface: ip link lists them`},
		{"device with a long name", "long", []string{"true"}, `"a-name-that-is-too-long": no such network interface: names have at most 15 bytes`},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := on()
			orders[test.order](o)
			out, err := runCommand(w, w.command(o, test.args...))
			if got := strings.TrimSpace(out); err == nil || got != test.want {
				t.Errorf("error %v, got %q\nwant %q", err, got, test.want)
			}
		})
	}
}

func runCommand(w *world, cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := w.Start(cmd); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// Surroundings in which it works, or says why not.
func TestSurroundings(t *testing.T) {
	for _, test := range []struct {
		name, unshare, prepare string
		want                   string // in the error; "" for none
	}{
		{"a new /sys, as by ip netns exec", "--mount", "mount -t sysfs sysfs /sys", ""},
		{"read-only", "--mount", "mount -o remount,bind,ro CGROUP2", "cgroup2 is mounted read-only: remount it"},
		{"a cgroup namespace", "--cgroup", "true", "cgroup is not visible in any cgroup2 mount of this cgroup namespace"},
		{"a cgroup namespace and its mount", "--mount --cgroup", "mount -t cgroup2 none /mnt", ""},
		{"no capability", "", "", "permission denied without CAP_BPF and CAP_PERFMON and CAP_NET_ADMIN: run as root"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			mount := w.dir.Path()
			for isCgroup2(t, filepath.Dir(mount)) {
				mount = filepath.Dir(mount)
			}
			o := on()
			o.Log = w.log
			script := strings.ReplaceAll(test.prepare, "CGROUP2", mount) + ` && exec "$@"`
			args := slices.Concat([]string{"unshare"}, strings.Fields(test.unshare), []string{"sh", "-c", script, "sh"})
			if test.name == "no capability" {
				args = []string{"setpriv", "--bounding-set=-all", "--inh-caps=-all"}
			}
			args = append(args, self(t), "force-run", encode(t, *o), "sh", "-c", "grep -q rpsel-run /proc/self/cgroup && echo done")
			out, err := runCommand(w, w.command(nil, args...))
			if test.want == "" {
				if err != nil || out != "done\n" {
					t.Errorf("error %v, it said %q", err, out)
				}
			} else if err == nil || !strings.Contains(out, test.want) {
				t.Errorf("error %v, it said %q\nwant %q", err, out, test.want)
			}
		})
	}
}

func isCgroup2(t testing.TB, dir string) bool {
	t.Helper()
	var fs unix.Statfs_t
	must(t, unix.Statfs(dir, &fs))
	return fs.Type == unix.CGROUP2_SUPER_MAGIC
}

// Other tools' programs, on a hook that is in use; package cgroup has the rest.
func TestBesideOthers(t *testing.T) {
	for _, test := range []struct {
		name  string
		hook  ebpf.AttachType
		kind  ebpf.ProgramType
		flags uint32
		proto sockets.Proto
		want  string
	}{
		{"multi", ebpf.AttachCGroupInet4Bind, ebpf.CGroupSockAddr, unix.BPF_F_ALLOW_MULTI, 0, ""},
		{"override", ebpf.AttachCGroupInet4Bind, ebpf.CGroupSockAddr, unix.BPF_F_ALLOW_OVERRIDE, 0, "ours would switch off program"},
		{"exclusive", ebpf.AttachCGroupInet6Bind, ebpf.CGroupSockAddr, 0, 0, "exclusively"},
		{"exclusive sockops", ebpf.AttachCGroupSockOps, ebpf.SockOps, 0, 0, "exclusively"},
		{"exclusive sockops, for UDP alone", ebpf.AttachCGroupSockOps, ebpf.SockOps, 0, sockets.UDP, ""},
		{"exclusive post_bind, for TCP alone", ebpf.AttachCGroupInet4PostBind, ebpf.CGroupSock, 0, sockets.TCP, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			other, err := ebpf.NewProgram(&ebpf.ProgramSpec{
				Name: "other", Type: test.kind, AttachType: test.hook,
				Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
			})
			must(t, err)
			defer other.Close()
			must(t, link.RawAttachProgram(link.RawAttachProgramOptions{
				Target: int(w.dir.File().Fd()), Program: other, Attach: test.hook, Flags: test.flags,
			}))
			o := with(func(s *force.Settings) { s.Proto = test.proto })
			out, err := runCommand(w, w.command(o, "true"))
			if test.want == "" {
				if err != nil {
					t.Errorf("%v: %s", err, out)
				}
			} else if err == nil || !strings.Contains(out, test.want) || !strings.Contains(out, "other") || !strings.Contains(out, w.dir.Path()) {
				t.Errorf("error %v, it said %q", err, out)
			}
		})
	}
}

// If the reaper cannot start, the command does not either.
func TestNoReaper(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct{ reaper, want string }{
		{"", "started"}, // the control
		{"force-ends", "start reaper: it ended early"},
		{"force-ends-detached", "start reaper: it ended early"},
	} {
		t.Run(test.reaper, func(t *testing.T) {
			o := on()
			o.Reaper = test.reaper
			out, _ := runCommand(w, w.command(o, "echo", "started"))
			if got := strings.TrimSpace(out); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
