package loader_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// tree lists what is on a bpffs, with modes.
func tree(t *testing.T, root string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		// The kernel puts maps.debug and progs.debug onto every new bpffs.
		if err != nil || path == root || strings.HasSuffix(path, ".debug") {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		all = append(all, fmt.Sprint(info.Mode(), " ", strings.TrimPrefix(path, root)))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// foreign is another tool's selection program, on the group of conn.
func foreign(t *testing.T, conn *sockets.Conn) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "someone_elses", Type: ebpf.SkReuseport, License: "GPL",
		AttachType:   ebpf.AttachSkReuseportSelect,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, p.FD())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// P9: what is refused leaves pins, groups and flows as they were.
func TestAttachRefused(t *testing.T) {
	udp := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true}
	for _, c := range []struct {
		name    string
		servers testnet.ServerOptions
		before  func(*testing.T, *sockets.Conn)
		options loader.Options
		want    error
		way     string // the way out, named in the message
	}{
		{name: "foreign program", servers: udp, before: foreign, want: loader.ErrForeignProgram, way: "--replace"},
		{name: "incoming cpu", servers: testnet.ServerOptions{
			Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true,
			Sockopts: []testnet.Sockopt{{Level: unix.SOL_SOCKET, Name: unix.SO_INCOMING_CPU, Value: 0}},
		}, want: loader.ErrUnregistrable, way: "--partial"},
		{name: "no reuseport", servers: testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194"}, want: sockets.ErrNoReuseport, way: "--adopt"},
		{name: "flows", servers: udp, options: loader.Options{Flows: 3}, way: "use 64"},
		{name: "idle", servers: udp, options: loader.Options{Idle: 1}, way: "use 1s"},
		{name: "idle-new", servers: udp, options: loader.Options{IdleNew: 365 * 24 * 3600e9}, way: "use 1s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns, root := testnet.New(t), testnet.BPFFS(t)
			n := 2
			if !c.servers.ReusePort {
				n = 1
			}
			testnet.StartGroup(t, ns, n, c.servers)
			clients := testnet.NewClients(t, ns, 100, "127.0.0.1:1194")
			conn := member(t, ns)
			if c.before != nil {
				c.before(t, conn)
			}
			flows, groups := clients.Ask(), find(t, ns)

			for _, attempt := range []func() error{
				func() error { _, err := loader.FS(root).Plan(conn, c.options); return err },
				func() error { _, err := loader.FS(root).Attach(conn, c.options); return err },
			} {
				err := attempt()
				if err == nil || c.want != nil && !errors.Is(err, c.want) {
					t.Fatalf("got error %v, want %v", err, c.want)
				}
				if !strings.Contains(err.Error(), c.way) || strings.Contains(err.Error(), "\n") {
					t.Errorf("message %q: want one line that names %q", err, c.way)
				}
			}
			if left := tree(t, root); len(left) != 0 {
				t.Errorf("left behind: %s", left)
			}
			if diff := cmp.Diff(groups, find(t, ns)); diff != "" {
				t.Errorf("groups changed: %s", diff)
			}
			if diff := cmp.Diff(flows, clients.Ask()); diff != "" {
				t.Errorf("flows moved: %s", diff)
			}
		})
	}
}

// find describes the groups of a namespace, but for what traffic changes.
func find(t *testing.T, ns *testnet.NetNS) string {
	t.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie()})
	if err != nil {
		t.Fatal(err)
	}
	for i := range groups {
		for k := range groups[i].Members {
			groups[i].Members[k].RxQueue, groups[i].Members[k].Drops = 0, 0
		}
	}
	return fmt.Sprintf("%#v", groups)
}

// What is asked for explicitly is done.
func TestReplaceAndPartial(t *testing.T) {
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	o := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true}
	servers := testnet.StartGroup(t, ns, 3, o)
	clients := testnet.NewClients(t, ns, 300, "127.0.0.1:1194")
	conn := member(t, ns)
	foreign(t, conn)
	conn.Close() // or the socket outlives its server
	g := attach(t, root, ns, loader.Options{Replace: true, Settle: -1})
	before := clients.Ask()
	servers.Close(0)
	after := clients.Ask()
	if moved := testnet.Moved(before, after, "s0"); moved != 0 || testnet.Shares(after)[""] != 0 || !status(t, g).Attached {
		t.Errorf("%d flows moved, answers from %v", moved, testnet.Shares(after))
	}

	ns = testnet.New(t)
	o.Sockopts = []testnet.Sockopt{{Level: unix.SOL_SOCKET, Name: unix.SO_INCOMING_CPU, Value: 0}}
	testnet.StartGroup(t, ns, 2, o)
	if g := attach(t, root, ns, loader.Options{Partial: true}); len(status(t, g).Listeners) != 2 {
		t.Error("not all registered")
	}
}

// State is for root alone, and each group's is one directory.
func TestModes(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp6", Addr: "[::1]:1194", ReusePort: true, V6Only: true})
	attach(t, loader.FS(root), ns, loader.Options{})
	dir := fmt.Sprintf("/rpsel/%d/udp_00000000000000000000000000000001_1194_v6only", ns.Cookie())
	want := []string{"drwx------ /rpsel", fmt.Sprintf("drwx------ /rpsel/%d", ns.Cookie()), "drwx------ " + dir}
	for _, name := range []string{"clock", "config", "conns", "counters", "details", "flows", "house", "listeners", "live", "loads", "moved_conns", "peers", "picks", "prog", "reader", "reports", "rows", "slot_counters", "slots", "socks", "turns"} {
		want = append(want, "-rw------- "+dir+"/"+name)
	}
	if diff := cmp.Diff(want, tree(t, root)); diff != "" {
		t.Error(diff)
	}
	keys, err := loader.FS(root).Keys(0)
	if err != nil || len(keys) != 1 || !keys[0].V6Only || keys[0].NetNS != ns.Cookie() {
		t.Errorf("keys %v, %v", keys, err)
	}
}

func TestFixedWhileAttached(t *testing.T) {
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	attach(t, root, ns, loader.Options{Flows: 1000})
	conn := member(t, ns)
	if _, err := root.Attach(conn, loader.Options{Flows: 2000}); !errors.Is(err, loader.ErrFixed) {
		t.Errorf("got %v, want %v", err, loader.ErrFixed)
	}
	if s := status(t, attach(t, root, ns, loader.Options{Flows: 1000, Idle: 7e9})); s.Capacity != 1000 || s.Idle != 7e9 {
		t.Errorf("status %+v", s)
	}
}

func TestDetachHalfOfIt(t *testing.T) {
	for _, gone := range []string{"config", "prog", "socks", "everything"} {
		t.Run(gone, func(t *testing.T) {
			ns, root := testnet.New(t), testnet.BPFFS(t)
			testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
			g := attach(t, loader.FS(root), ns, loader.Options{})
			key := g.Key()
			g.Close()
			dir := filepath.Join(root, "rpsel", fmt.Sprint(ns.Cookie()), "udp_7f000001_1194")
			pins, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, pin := range pins {
				if gone == "everything" || pin.Name() == gone {
					if err := os.Remove(filepath.Join(dir, pin.Name())); err != nil {
						t.Fatal(err)
					}
				}
			}
			if _, err := loader.FS(root).Open(key); !errors.Is(err, loader.ErrIncompatible) {
				t.Errorf("open: got %v, want %v", err, loader.ErrIncompatible)
			}
			d, err := loader.FS(root).Detach(key)
			if err != nil || !d.Program {
				t.Errorf("detached %+v, %v", d, err)
			}
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("state is still there: %v", err)
			}
			if groups := find(t, ns); !strings.Contains(groups, "HasProgram:false") {
				t.Errorf("the program is still attached: %s", groups)
			}
			if _, err := loader.FS(root).Detach(key); !errors.Is(err, loader.ErrNotAttached) {
				t.Errorf("detach again: got %v, want %v", err, loader.ErrNotAttached)
			}
		})
	}
}

func TestLocked(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	g := attach(t, loader.FS(root), ns, loader.Options{})
	dir, err := os.Open(filepath.Join(root, "rpsel", fmt.Sprint(ns.Cookie())))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	defer loader.LosePatience()()
	err = g.Drain(0)
	if !errors.Is(err, loader.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("got %v, want %v and who holds it", err, loader.ErrLocked)
	}
	if s := status(t, g); s.Listeners[0].State != "active" {
		t.Errorf("status %+v", s)
	}
}

func TestRegisterRefused(t *testing.T) {
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	g := attach(t, root, ns, loader.Options{})
	other := testnet.New(t)
	testnet.StartGroup(t, other, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	if _, err := g.Register(member(t, other)); !errors.Is(err, sockets.ErrOtherGroup) {
		t.Errorf("another namespace's socket: got %v, want %v", err, sockets.ErrOtherGroup)
	}
	if slot, err := g.Register(member(t, ns)); slot != 0 || err != nil {
		t.Errorf("a registered socket: slot %d, %v", slot, err)
	}
	for _, slot := range []int{-1, 1, 4095, 4096} {
		if err := g.Drain(slot); !errors.Is(err, loader.ErrNoListener) {
			t.Errorf("drain slot %d: got %v, want %v", slot, err, loader.ErrNoListener)
		}
	}
	for _, weight := range []int{-1, 0, loader.MaxWeight + 1} {
		if err := g.SetWeight(0, weight); err == nil {
			t.Errorf("weight %d is accepted", weight)
		}
	}
	key := g.Key()
	if _, err := root.Detach(key); err != nil {
		t.Fatal(err)
	}
	if err := g.Drain(0); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("detached: got %v, want %v", err, loader.ErrNotAttached)
	}
}

func TestFlush(t *testing.T) {
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	clients := testnet.NewClients(t, ns, 300, "127.0.0.1:1194")
	g := attach(t, root, ns, noSettle)
	before := clients.Ask()
	if n, err := g.Flush(func(f loader.Flow) bool { return f.Slot == 1 }); err != nil || n != testnet.Shares(before)["s1"] {
		t.Errorf("flushed %d, %v, want those of s1: %v", n, err, testnet.Shares(before))
	}
	if tracked, _, err := g.CountFlows(); err != nil || tracked != testnet.Shares(before)["s0"] {
		t.Errorf("%d flows left, %v", tracked, err)
	}
	if diff := cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("the pick table gives another answer: %s", diff)
	}
	seen := map[int]bool{}
	for f, err := range g.Flows() {
		if err != nil || f.Local.String() != "127.0.0.1:1194" || f.Client.Addr().String() != "127.0.0.1" {
			t.Fatalf("%+v, %v", f, err)
		}
		seen[int(f.Client.Port())] = true
	}
	for i := range 300 {
		if !seen[clients.Port(i)] {
			t.Errorf("client port %d is not listed", clients.Port(i))
		}
	}
	if n, err := g.Flush(nil); err != nil || n != 300 {
		t.Errorf("flushed %d, %v", n, err)
	}
}

// A group of 4096 is attached; one more member is one too many, and said so.
func TestSlotsRunOut(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	servers := testnet.StartGroup(t, ns, 4097, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	conn := member(t, ns)
	if _, err := loader.FS(root).Attach(conn, loader.Options{}); !errors.Is(err, loader.ErrFull) {
		t.Errorf("got %v, want %v", err, loader.ErrFull)
	}
	if left := tree(t, root); len(left) != 0 {
		t.Errorf("left behind: %s", left)
	}
	servers.Close(4096)
	clients := testnet.NewClients(t, ns, 5000, "127.0.0.1:1194")
	before := clients.Ask()
	g := attach(t, loader.FS(root), ns, loader.Options{})
	if diff := cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
	if n := len(status(t, g).Listeners); n != 4096 {
		t.Errorf("%d listeners", n)
	}
}
