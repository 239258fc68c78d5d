package loader_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// replied is noSettle with ConfirmReply.
var replied = loader.Options{Settle: -1, Confirm: loader.ConfirmReply}

// inCgroup makes a cgroup for servers, which are started after it.
func inCgroup(t testing.TB) string {
	t.Helper()
	testnet.Privileged(t)
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	return testnet.Cgroup(t, root)
}

// links lists the cgroups in which a group's replies are looked for.
func links(t *testing.T, fs loader.FS) (n int) {
	t.Helper()
	for _, path := range tree(t, string(fs)) {
		if strings.HasPrefix(filepath.Base(path), "reply_") {
			n++
		}
	}
	return n
}

// states counts the flows by state.
func states(t *testing.T, g *loader.Group) string {
	t.Helper()
	s := status(t, g)
	return fmt.Sprintf("%d new, %d established", s.Tracked-s.Established, s.Established)
}

// twice sends to nobody's answer, in two seconds that are far enough from each
// other to confirm a flow by the client alone.
func twice(t *testing.T, fs loader.FS, key loader.Key, clients *testnet.Clients) {
	t.Helper()
	clients.Send(testnet.Silence)
	await(t, fs, key, "two seconds begin", passed(t, 2))
	clients.Send(testnet.Silence)
}

// What the client alone says leaves a flow new, and the answer makes it an
// established one. The control is ConfirmClient, with which it is the other way
// round.
func TestReply(t *testing.T) {
	for _, c := range some(cases) {
		for _, confirm := range []loader.Confirm{loader.ConfirmReply, loader.ConfirmClient} {
			t.Run(fmt.Sprintf("%s from %s, %s", c.listen, c.remote, confirm), func(t *testing.T) {
				t.Parallel()
				dir := inCgroup(t)
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true, Cgroup: dir})
				g := attach(t, fs, ns, loader.Options{Settle: -1, Confirm: confirm})
				silent, answered := testnet.NewClients(t, ns, 20, c.remote), testnet.NewClients(t, ns, 30, c.remote)
				twice(t, fs, g.Key(), silent)
				before := answered.Ask()
				want := "20 new, 30 established"
				if confirm == loader.ConfirmClient {
					want = "30 new, 20 established"
				}
				if got := states(t, g); got != want {
					t.Errorf("%s, want %s", got, want)
				}
				if diff := cmp.Diff(before, answered.Ask()); diff != "" || len(testnet.Shares(before)) != 2 {
					t.Errorf("shares %v, flows moved: %s", testnet.Shares(before), diff)
				}
				if s := status(t, g); s.Confirm != confirm || s.Counters.Hit != 20+30 || s.Counters.New != 50 || s.Counters.Runs != 100 {
					t.Errorf("status %+v", s)
				}
			})
		}
	}
}

// It does not matter by which system call a server answers.
func TestReplyWays(t *testing.T) {
	for _, c := range some(cases) {
		for _, how := range testnet.Replies {
			t.Run(fmt.Sprintf("%s from %s, %s", c.listen, c.remote, how), func(t *testing.T) {
				t.Parallel()
				dir := inCgroup(t)
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true, Cgroup: dir, Reply: how})
				g := attach(t, fs, ns, replied)
				testnet.NewClients(t, ns, 10, c.remote).Send(testnet.Silence)
				shares := testnet.Shares(testnet.NewClients(t, ns, 30, c.remote).Ask())
				if got := states(t, g); got != "10 new, 30 established" || shares[""] != 0 {
					t.Errorf("%s, shares %v", got, shares)
				}
			})
		}
	}
}

// Affinity client: the answer to one port confirms the client.
func TestReplyClient(t *testing.T) {
	for _, remote := range []string{"127.0.0.1:1194", "[::1]:1194"} {
		t.Run(remote, func(t *testing.T) {
			dir := inCgroup(t)
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			anyAddress(t, ns)
			testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp6", Addr: "[::]:1194", ReusePort: true, Cgroup: dir})
			o := replied
			o.Affinity, o.ClientPrefix = loader.AffinityClient, loader.ClientPrefix{V4: 24, V6: 56}
			g := attach(t, fs, ns, o)
			before := askFrom(t, ns, address(remote, 1, 1), remote, []byte("0123"))
			for h := range 20 {
				if server := askFrom(t, ns, address(remote, 1, 2+h), remote, []byte("0123")); server != before {
					t.Errorf("from %s by %s, the first by %s", address(remote, 1, 2+h), server, before)
				}
			}
			askFrom(t, ns, address(remote, 2, 1), remote, []byte("0123"))
			if got := states(t, g); got != "0 new, 2 established" {
				t.Error(got)
			}
		})
	}
}

// P5: of a table that is too small, flows without an answer give way, and those
// with one stay where they are. The control is ConfirmClient, for which all are
// new: then answered flows give way too, and some go to who has joined.
func TestReplyTableFull(t *testing.T) {
	for _, confirm := range []loader.Confirm{loader.ConfirmReply, loader.ConfirmClient} {
		t.Run(string(confirm), func(t *testing.T) {
			dir := inCgroup(t)
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: dir})
			g := attach(t, fs, ns, loader.Options{Flows: 128, Settle: -1, Confirm: confirm})
			const n = 80
			answered := testnet.NewClients(t, ns, n, "127.0.0.1:1194")
			before := answered.Ask()
			testnet.NewClients(t, ns, 2000, "127.0.0.1:1194").Send(testnet.Silence)
			servers.Add()
			attach(t, fs, ns, loader.Options{})
			testnet.NewClients(t, ns, 2000, "127.0.0.1:1194").Send(testnet.Silence)
			var s loader.Status
			await(t, fs, g.Key(), "the servers to have read all, so that there is room for more", func(*loader.Group) bool {
				s = status(t, g)
				return s.Counters.Runs == n+4000 && !slices.ContainsFunc(s.Listeners, func(l loader.Listener) bool { return l.RxQueue != 0 })
			})
			if s.Counters.Evicted < 1000 {
				t.Errorf("%d gave way", s.Counters.Evicted)
			}
			moved := testnet.Moved(before, answered.Ask())
			if confirm == loader.ConfirmReply && (moved != 0 || s.Established != n) || confirm == loader.ConfirmClient && moved == 0 {
				t.Errorf("%d flows moved, %d established", moved, s.Established)
			}
		})
	}
}

// Groups on one port, with listeners in one cgroup, and one client that has a flow
// in each: the answer of one group confirms the flow of that one alone.
func TestReplyTwoGroups(t *testing.T) {
	for _, c := range []struct {
		name         string
		answers      string // what the group is bound to that answers
		other        string // and the one that does not
		host         string // of the client
		to, silently string
		apart        bool // in two namespaces
	}{
		{name: "two addresses", answers: "127.0.0.1:1194", other: "127.0.0.2:1194", host: "127.0.0.9", to: "127.0.0.1:1194", silently: "127.0.0.2:1194"},
		{name: "the wildcard answers", answers: "0.0.0.0:1194", other: "127.0.0.2:1194", host: "127.0.0.9", to: "127.0.0.1:1194", silently: "127.0.0.2:1194"},
		{name: "an address answers", answers: "127.0.0.2:1194", other: "0.0.0.0:1194", host: "127.0.0.9", to: "127.0.0.2:1194", silently: "127.0.0.1:1194"},
		{name: "two families", answers: "0.0.0.0:1194", other: "[::]:1194", host: "127.0.0.9", to: "127.0.0.1:1194", silently: "127.0.0.1:1194"},
		{name: "two ports", answers: "127.0.0.1:1195", other: "127.0.0.1:1194", host: "127.0.0.9", to: "127.0.0.1:1195", silently: "127.0.0.1:1194"},
		{name: "two namespaces", answers: "127.0.0.1:1194", other: "127.0.0.1:1194", host: "127.0.0.9", to: "127.0.0.1:1194", silently: "127.0.0.1:1194", apart: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := inCgroup(t)
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			there := ns
			if c.apart {
				there = testnet.New(t)
			}
			serve := func(ns *testnet.NetNS, addr string) *loader.Group {
				network := "udp4"
				if strings.HasPrefix(addr, "[") {
					network = "udp6"
				}
				s := testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: network, Addr: addr, ReusePort: true, Cgroup: dir})
				conn := borrow(t, sockets.Query{NetNS: ns.Cookie(), PID: s.PID()})
				defer conn.Close()
				g, err := fs.Attach(conn, replied)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { g.Close() })
				return g
			}
			other := serve(there, c.other)
			say(t, there, c.host, c.silently, testnet.Silence)
			if got := states(t, other); got != "1 new, 0 established" {
				t.Fatalf("before: %s", got)
			}
			g := serve(ns, c.answers)
			say(t, ns, c.host, c.to, "0123")
			if got := states(t, g); got != "0 new, 1 established" {
				t.Errorf("of the group that answers: %s", got)
			}
			want := "1 new, 0 established"
			if c.apart && !loader.HaveSenderNetNS() {
				want = "0 new, 1 established" // a limit, see ARCHITECTURE.md
			}
			if got := states(t, other); got != want {
				t.Errorf("of the other: %s, want %s", got, want)
			}
		})
	}
}

// say sends a payload from port 20000 of an address. It waits for the answer,
// unless there will be none.
func say(t *testing.T, ns *testnet.NetNS, host, remote, payload string) {
	t.Helper()
	err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		to := netip.MustParseAddrPort(remote)
		err = errors.Join(
			unix.Bind(fd, &unix.SockaddrInet4{Addr: netip.MustParseAddr(host).As4(), Port: 20000}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30}),
			unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}))
		if err != nil {
			return err
		}
		if payload == testnet.Silence {
			_, err := unix.Write(fd, []byte(payload))
			return err
		}
		_, err = question(fd, []byte(payload))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A listener of another cgroup joins, and its replies count from its first flow
// on; when it is gone, the link to its cgroup goes.
func TestReplyJoin(t *testing.T) {
	dir, another := inCgroup(t), inCgroup(t)
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: dir})
	g := attach(t, fs, ns, replied)
	if n := links(t, fs); n != 1 {
		t.Errorf("%d links", n)
	}
	joined := testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: another, Name: "j"})
	attach(t, fs, ns, loader.Options{})
	clients := testnet.NewClients(t, ns, 100, "127.0.0.1:1194")
	before := clients.Ask()
	if shares := testnet.Shares(before); len(shares) != 4 || states(t, g) != "0 new, 100 established" || links(t, fs) != 2 {
		t.Errorf("%s, shares %v, %d links", states(t, g), shares, links(t, fs))
	}
	joined.Kill()
	if moved := testnet.Moved(before, clients.Ask(), "j0", "j1"); moved != 0 {
		t.Errorf("%d flows of others moved", moved)
	}
	for range 2 {
		if _, err := g.Housekeep(); err != nil {
			t.Fatal(err)
		}
		if n := links(t, fs); n != 1 {
			t.Errorf("%d links", n)
		}
	}
	servers.Kill()
	if _, err := fs.Detach(g.Key()); err != nil {
		t.Fatal(err)
	}
	if left := tree(t, string(fs)); len(left) != 0 {
		t.Errorf("left behind: %s", left)
	}
}

// A listener in the root cgroup has no place: not at the attach, nor later.
func TestReplyRoot(t *testing.T) {
	dir := inCgroup(t)
	root := filepath.Dir(dir)
	if _, err := os.Stat(filepath.Join(root, "cgroup.events")); err == nil {
		(&testnet.Unavailable{What: "the root cgroup", Err: errors.New("this is a cgroup namespace")}).Skip(t)
	}
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	o := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: root, Name: "r"}
	inRoot := testnet.StartGroup(t, ns, 1, o)
	conn := member(t, ns)
	for range 2 {
		_, err := fs.Attach(conn, replied)
		if !errors.Is(err, loader.ErrRootCgroup) || !errors.Is(err, loader.ErrUnregistrable) || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d): its socket is in the root cgroup", inRoot.PID())) ||
			!strings.Contains(err.Error(), "rpsel run") || !strings.Contains(err.Error(), "--confirm client") {
			t.Errorf("%v", err)
		}
		if left := tree(t, string(fs)); len(left) != 0 {
			t.Errorf("left behind: %s", left)
		}
	}
	o.Cgroup, o.Name = dir, "s"
	testnet.StartGroup(t, ns, 2, o)
	partial := replied
	partial.Partial = true
	g, err := fs.Attach(conn, partial)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	refused := func() {
		t.Helper()
		if _, err := g.Register(conn); !errors.Is(err, loader.ErrRootCgroup) {
			t.Errorf("register: %v", err)
		}
		if s := status(t, g); len(s.Listeners) != 2 || len(s.Unregistered) != 1 || !errors.Is(s.Unregistered[0].Reason, loader.ErrRootCgroup) {
			t.Errorf("status %+v", s)
		}
		if shares := testnet.Shares(testnet.NewClients(t, ns, 40, "127.0.0.1:1194").Ask()); len(shares) != 2 || shares["r0"] != 0 {
			t.Errorf("shares %v", shares)
		}
	}
	refused()
	refused()
}

// Another tool's program that admits no other beside it, on the listeners' cgroup
// or above, and a cgroup that is gone.
func TestReplyRefused(t *testing.T) {
	for _, c := range []struct {
		name string
		want error
		way  string
	}{{"occupied", cgroup.ErrOccupied, "BPF_F_ALLOW_MULTI"}, {"removed", cgroup.ErrRemoved, "restart the server"}} {
		t.Run(c.name, func(t *testing.T) {
			dir := inCgroup(t)
			below := filepath.Join(dir, "below")
			if err := os.Mkdir(below, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.Remove(below) })
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			s := testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: below})
			if c.want == cgroup.ErrRemoved {
				err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(s.PID())), 0)
				if err = errors.Join(err, os.Remove(below)); err != nil {
					t.Fatal(err)
				}
			} else {
				exclusive(t, dir)
			}
			_, err := fs.Attach(member(t, ns), replied)
			if !errors.Is(err, c.want) || !errors.Is(err, loader.ErrUnregistrable) || !strings.Contains(err.Error(), c.way) || strings.Contains(err.Error(), "\n") ||
				strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
				t.Errorf("%v", err)
			}
			if left := tree(t, string(fs)); len(left) != 0 {
				t.Errorf("left behind: %s", left)
			}
			if shares := testnet.Shares(testnet.NewClients(t, ns, 10, "127.0.0.1:1194").Ask()); shares["s0"] != 10 {
				t.Errorf("shares %v", shares)
			}
		})
	}
}

// exclusive attaches a program as another tool may.
func exclusive(t *testing.T, dir string) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "other_tool", Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	o := link.RawAttachProgramOptions{Target: int(d.Fd()), Program: p, Attach: ebpf.AttachCGroupInetEgress}
	if err := link.RawAttachProgram(o); err != nil {
		t.Fatal(err)
	}
}

// An upgrade takes the links along, also to a cgroup that is removed while its
// socket lives on; states and keys stay.
func TestReplyUpgrade(t *testing.T) {
	for _, flows := range []int{0, 2000} {
		t.Run(fmt.Sprint(flows, " flows"), func(t *testing.T) {
			dir, removed := inCgroup(t), filepath.Join(inCgroup(t), "below")
			if err := os.Mkdir(removed, 0o755); err != nil {
				t.Fatal(err)
			}
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			o := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: dir}
			testnet.StartGroup(t, ns, 2, o)
			o.Cgroup, o.Name = removed, "r"
			s := testnet.StartGroup(t, ns, 2, o)
			g := attach(t, fs, ns, replied)
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(s.PID())), 0); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(removed); err != nil {
				t.Fatal(err)
			}
			silent := testnet.NewClients(t, ns, 20, "127.0.0.1:1194")
			silent.Send(testnet.Silence)
			clients := testnet.NewClients(t, ns, 100, "127.0.0.1:1194")
			before := clients.Ask()
			want := "20 new, 100 established"
			if got := states(t, g); got != want {
				t.Fatalf("%s, want %s", got, want)
			}
			old, err := g.ReplyID()
			if err != nil {
				t.Fatal(err)
			}
			defer loader.OtherProgram()()
			if u, err := fs.Upgrade(g.Key(), loader.UpgradeOptions{Flows: flows}); err != nil || u.UpToDate || u.Flows != 120 {
				t.Fatalf("upgraded %+v, %v", u, err)
			}
			now := clients.Ask()
			if diff := cmp.Diff(before, now); diff != "" || len(testnet.Shares(now)) != 4 {
				t.Errorf("flows moved: %s", diff)
			}
			silent.Ask()
			testnet.NewClients(t, ns, 30, "127.0.0.1:1194").Ask()
			if got := states(t, g); got != "0 new, 150 established" {
				t.Error(got)
			}
			if n := links(t, fs); n != 2 {
				t.Errorf("%d links", n)
			}
			g.Close()
			freed(t, old)
		})
	}
}

// Whoever looks after the links takes no lock: that the group is detached, or a link
// removed, meanwhile, is nothing to complain of.
func TestReplyLook(t *testing.T) {
	dir := inCgroup(t)
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: dir})
	g := attach(t, fs, ns, replied)
	for range 2 {
		if err := g.Look(); err != nil {
			t.Error(err)
		}
		if _, err := fs.Detach(g.Key()); err != nil && !errors.Is(err, loader.ErrNotAttached) {
			t.Fatal(err)
		}
	}
	if err := fs.NoLink(g.Key()); err != nil {
		t.Error(err)
	}
}

// A listener dies, and its cgroup goes, while an upgrade is about to make its link run
// the new program.
func TestReplyUpgradeGone(t *testing.T) {
	dir, below := inCgroup(t), filepath.Join(inCgroup(t), "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	o := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: dir}
	testnet.StartGroup(t, ns, 1, o)
	o.Cgroup, o.Name = below, "r"
	s := testnet.StartGroup(t, ns, 1, o)
	g := attach(t, fs, ns, replied)
	// As if it lived when the upgrade looked.
	if err := g.SameCgroup(0, 1); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	if err := os.Remove(below); err != nil {
		t.Fatal(err)
	}
	await(t, fs, g.Key(), "the kernel to let go of the cgroup", func(*loader.Group) bool {
		for _, path := range tree(t, string(fs)) {
			if !strings.HasPrefix(filepath.Base(path), "reply_") {
				continue
			}
			_, path, _ = strings.Cut(path, " ")
			l, err := link.LoadPinnedLink(filepath.Join(string(fs), path), nil)
			if err != nil {
				t.Fatal(err)
			}
			info, err := l.Info()
			l.Close()
			if err != nil {
				t.Fatal(err)
			}
			if info.Cgroup().CgroupId == 0 {
				return true
			}
		}
		return false
	})
	defer loader.OtherProgram()()
	if u, err := fs.Upgrade(g.Key(), loader.UpgradeOptions{}); err != nil || !u.Program {
		t.Errorf("upgraded %+v, %v", u, err)
	}
}

// What it does not go with; and what a detach would move cannot be told.
func TestReplyOptions(t *testing.T) {
	dir := inCgroup(t)
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: dir})
	refuses(t, fs, member(t, ns),
		refusal{loader.Options{Confirm: "maybe"}, "use client or reply"},
		refusal{loader.Options{Confirm: loader.ConfirmReply, Affinity: loader.AffinityNone}, "no flows to confirm: use flow or client"},
		refusal{loader.Options{Confirm: loader.ConfirmReply, Affinity: loader.AffinityBytes(0, 8)}, "which flow it is of: use flow or client"})
	for confirm, want := range map[loader.Confirm]loader.Forecast{"": {Flows: 10}, loader.ConfirmReply: {Flows: 10, Move: -1}} {
		g := attach(t, fs, ns, loader.Options{Confirm: confirm})
		testnet.NewClients(t, ns, 10, "127.0.0.1:1194").Ask()
		if f, err := g.DetachForecast(); err != nil || f != want {
			t.Errorf("forecast %+v, %v, want %+v", f, err, want)
		}
		if _, err := fs.Detach(g.Key()); err != nil {
			t.Fatal(err)
		}
	}
	tcp := testnet.StartServer(t, ns, testnet.ServerOptions{Network: "tcp4", Addr: "127.0.0.1:4433", ReusePort: true, Cgroup: dir})
	listener := borrow(t, sockets.Query{NetNS: ns.Cookie(), PID: tcp.PID(), Proto: loader.TCP})
	none := replied
	none.Affinity = loader.AffinityNone
	refuses(t, fs, listener, refusal{replied, "the kernel that answers"}, refusal{none, "no flows to confirm"})
}

// P0: with ConfirmReply an attach moves nothing either.
func TestReplyMovesNothing(t *testing.T) {
	for _, c := range some(cases) {
		t.Run(fmt.Sprintf("%s from %s", c.listen, c.remote), func(t *testing.T) {
			dir := inCgroup(t)
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true, Cgroup: dir})
			servers.Close(0)
			clients := testnet.NewClients(t, ns, 300, c.remote)
			before := clients.Ask()
			g := attach(t, fs, ns, loader.Options{Confirm: loader.ConfirmReply})
			if s := status(t, g); s.Settling == 0 {
				t.Error("it does not settle")
			}
			servers.Add()
			attach(t, fs, ns, loader.Options{})
			for range 2 {
				if diff := cmp.Diff(before, clients.Ask()); diff != "" {
					t.Errorf("flows moved: %s", diff)
				}
			}
			if got := states(t, g); got != "0 new, 300 established" {
				t.Error(got)
			}
		})
	}
}
