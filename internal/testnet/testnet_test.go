package testnet

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// envLeave says what TestLeave leaves.
const envLeave = "RPSEL_TEST_LEAVE"

func TestMain(m *testing.M) {
	if os.Getenv(envLeave) != "" {
		leavePatience = time.Second
	}
	Main(m)
}

// Every combination of client and listener family has its answers.
var cases = []struct{ network, listen, remote string }{
	{"udp4", "127.0.0.1:1194", "127.0.0.1:1194"},
	{"udp4", "0.0.0.0:1194", "127.0.0.1:1194"},
	{"udp6", "[::1]:1194", "[::1]:1194"},
	{"udp6", "[::]:1194", "[::1]:1194"},
	{"udp6", "[::]:1194", "127.0.0.1:1194"},
	{"tcp4", "0.0.0.0:1194", "127.0.0.1:1194"},
	{"tcp6", "[::]:1194", "127.0.0.1:1194"},
}

func newClients(t *testing.T, ns *NetNS, n int, network, remote string) *Clients {
	t.Helper()
	if strings.HasPrefix(network, "tcp") {
		return NewTCPClients(t, ns, n, remote)
	}
	return NewClients(t, ns, n, remote)
}

// Plain Linux moves flows of healthy servers, and here it is seen to. The
// kernel's rule is hash*n>>32 over the sockets in the order they were bound,
// where the last takes the place of one that is closed.
func TestPlainLinuxMovesFlows(t *testing.T) {
	for _, c := range cases {
		t.Run(fmt.Sprint(c.network, " ", c.listen, " from ", c.remote), func(t *testing.T) {
			const n = 2000
			ns := New(t)
			o := ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true}
			group := StartGroup(t, ns, 3, o)
			clients := newClients(t, ns, n, c.network, c.remote)
			before := clients.Ask()
			for _, name := range group.Names {
				if share := Shares(before)[name]; share < n/5 {
					t.Fatalf("%s answers %d of %d: not a spread", name, share, n)
				}
			}
			if diff := cmp.Diff(before, clients.Ask()); diff != "" {
				t.Fatal("flows moved while nothing happened: ", diff)
			}

			group.Close(0)
			closed := clients.Ask()
			if moved := Moved(before, closed, "s0"); moved < n/5 {
				t.Errorf("closing s0 moved %d of the others' flows, want most of %d", moved, n*2/3)
			}
			if share := Shares(closed)["s0"]; share != 0 {
				t.Errorf("s0 answers %d flows after its end", share)
			}

			o.Name = "new"
			StartServer(t, ns, o)
			if moved := Moved(closed, clients.Ask()); moved < n/5 {
				t.Errorf("a third server moved %d flows, want about %d", moved, n/2)
			}
		})
	}
}

// The first process of three is killed.
func TestKill(t *testing.T) {
	const n = 1000
	ns := New(t)
	o := ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true}
	var servers []*Server
	for _, o.Name = range []string{"a", "b", "c"} {
		servers = append(servers, StartServer(t, ns, o))
	}
	clients := NewClients(t, ns, n, o.Addr)
	before := clients.Ask()
	servers[0].Kill()
	if err := unix.Kill(servers[0].PID(), 0); !errors.Is(err, unix.ESRCH) {
		t.Error("the process is still there: ", err)
	}
	after := clients.Ask()
	if moved := Moved(before, after, "a"); moved < n/5 {
		t.Errorf("%d flows of healthy servers moved, want about %d", moved, n/2)
	}
	shares := Shares(after)
	if shares["b"]+shares["c"] != n {
		t.Errorf("answers %v, want b and c", shares)
	}
	servers[1].Stop()
	servers[2].Stop()
	if diff := cmp.Diff(map[string]int{"": n}, Shares(clients.Ask())); diff != "" {
		t.Error("with all servers gone: ", diff)
	}
}

func TestManyFlows(t *testing.T) {
	const n = 20000
	ns := New(t)
	group := StartGroup(t, ns, 64, ServerOptions{Network: "udp6", Addr: "[::]:0", ReusePort: true})
	clients := NewClients(t, ns, n, netip.AddrPortFrom(ns.IPv4, group.Addr.Port()).String())
	answers := clients.Ask()
	if got := len(Shares(answers)); got != 64 || Shares(answers)[""] != 0 {
		t.Errorf("%d servers answer, want 64: %v", got, Shares(answers))
	}
	if name := group.Add(); name != "s64" {
		t.Errorf("Add gave %s, want s64", name)
	}
	if Moved(answers, clients.Ask()) == 0 {
		t.Error("a 65th server moved no flow")
	}
}

func TestPair(t *testing.T) {
	a, b := Pair(t)
	for network, remote := range map[string]netip.Addr{"udp4": b.IPv4, "udp6": b.IPv6} {
		addr := netip.AddrPortFrom(remote, 1194).String()
		StartServer(t, b, ServerOptions{Network: network, Addr: addr, Name: "far"})
		if diff := cmp.Diff([]string{"far"}, NewClients(t, a, 1, addr).Ask()); diff != "" {
			t.Error(network, ": ", diff)
		}
	}
	if a.Cookie() == b.Cookie() {
		t.Error("both namespaces have the cookie ", a.Cookie())
	}
}

// A command, and a server in a wrapper, run in the namespace and not outside.
func TestCommand(t *testing.T) {
	ns := New(t)
	var want, outside unix.Stat_t
	must(t, unix.Stat(ns.Path(), &want))
	must(t, unix.Stat("/proc/self/ns/net", &outside))
	if want.Ino == outside.Ino {
		t.Fatal("the namespace is the test's own")
	}
	out, err := ns.Command("readlink", "/proc/self/ns/net").Output()
	must(t, err)
	if got := strings.TrimSpace(string(out)); got != fmt.Sprintf("net:[%d]", want.Ino) {
		t.Errorf("the command ran in %s, want inode %d", got, want.Ino)
	}
	s := StartServer(t, ns, ServerOptions{
		Network: "udp4", Addr: "127.0.0.1:1194", Name: "wrapped", Wrap: []string{"env", "WRAPPED=1"}, UID: 65534,
	})
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", s.PID()))
	must(t, err)
	if !strings.Contains(string(env), "WRAPPED=1\x00") {
		t.Error("the server did not run in its wrapper")
	}
	if answers := NewClients(t, ns, 1, s.Addr.String()).Ask(); answers[0] != "wrapped" {
		t.Errorf("%q answered, want wrapped", answers[0])
	}
}

func TestTryServer(t *testing.T) {
	ns := New(t)
	o := ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194"}
	StartServer(t, ns, o)
	if _, err := TryServer(t, ns, o); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("error %v, want address already in use", err)
	}
}

func TestBPFFS(t *testing.T) {
	var dir string
	t.Run("mounted", func(t *testing.T) {
		dir = BPFFS(t)
		var fs unix.Statfs_t
		must(t, unix.Statfs(dir, &fs))
		if fs.Type != unix.BPF_FS_MAGIC {
			t.Errorf("file system type %#x, want %#x", fs.Type, unix.BPF_FS_MAGIC)
		}
		must(t, os.Mkdir(filepath.Join(dir, "rpsel"), 0o700))
	})
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Error("after the test: ", err)
	}
}

func TestMoved(t *testing.T) {
	before := []string{"a", "a", "b", "b", "", "c"}
	after := []string{"b", "a", "c", "", "a", "c"}
	for _, c := range []struct {
		except []string
		want   int
	}{
		{nil, 3},
		{[]string{"a"}, 2},
		{[]string{"a", "b"}, 0},
	} {
		if got := Moved(before, after, c.except...); got != c.want {
			t.Errorf("Moved except %v = %d, want %d", c.except, got, c.want)
		}
	}
}

// What is left open is named, and so is who still runs.
func TestLeaks(t *testing.T) {
	Privileged(t)
	before, err := descriptors()
	must(t, err)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(t, err)
	if err := leaks(before, 0); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("\n%d: anon_inode:bpf-map", m.FD())) {
		t.Errorf("error %v, want the open map", err)
	}
	must(t, m.Close())
	end := make(chan struct{})
	go func() { <-end }()
	if err := leaks(before, 0); err == nil || !strings.Contains(err.Error(), "TestLeaks.func1") {
		t.Errorf("error %v, want the goroutine", err)
	}
	close(end)
	if err := leaks(before, patience); err != nil {
		t.Error(err)
	}
}

// A package fails for what its tests leave, though each of them passed.
func TestMainFails(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	for leave, want := range map[string]string{"nothing": "PASS\n", "descriptor": "1 open descriptors:", "goroutine": "TestLeave"} {
		cmd := exec.Command(self, "-test.run=^TestLeave$")
		cmd.Env = append(os.Environ(), envLeave+"="+leave)
		out, err := cmd.CombinedOutput()
		if failed := cmd.ProcessState.ExitCode() == 1; failed != (leave != "nothing") || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, want %q: %s", leave, err, want, out)
		}
	}
}

// TestLeave leaves what TestMainFails wants.
func TestLeave(t *testing.T) {
	switch os.Getenv(envLeave) {
	case "descriptor":
		_, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		must(t, err)
	case "goroutine":
		go func() { select {} }()
	}
}

// The main thread is in no test's namespace.
func TestMainThread(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	ns := New(t)
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			if err := ns.Do(func() error { time.Sleep(time.Millisecond); return nil }); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if now, err := os.Readlink("/proc/self/ns/net"); err != nil || now != before {
		t.Errorf("the main thread is in %s, not in %s: %v", now, before, err)
	}
}
