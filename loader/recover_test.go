package loader_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

var udpServer = testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true}

func onSocket(t *testing.T, conn *sockets.Conn, f func(fd int) error) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil || inner != nil {
		t.Fatal(err, inner)
	}
}

// P6: an attach that was killed before its state was in place leaves the
// sockets in an array that is pinned aside.
func TestAttachAfterKilledAttach(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	testnet.StartGroup(t, ns, 2, udpServer)
	attach(t, loader.FS(root), ns, loader.Options{}).Close()
	onSocket(t, member(t, ns), func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
	})
	dir := filepath.Join(root, "rpsel", fmt.Sprint(ns.Cookie()))
	aside := filepath.Join(dir, "tmp_1_udp_7f000001_1194")
	if err := os.Rename(filepath.Join(dir, "udp_7f000001_1194"), aside); err != nil {
		t.Fatal(err)
	}
	g := attach(t, loader.FS(root), ns, loader.Options{})
	if s := status(t, g); !s.Attached || len(s.Listeners) != 2 || !g.Fresh() {
		t.Errorf("status %+v", s)
	}
	if _, err := os.Stat(aside); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left aside: %v", err)
	}
}

// Who keeps groups as they are attaches no group that was detached meanwhile.
func TestAttachAgainOnly(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	servers := testnet.StartGroup(t, ns, 1, udpServer)
	again := loader.Options{Again: true}
	conn := member(t, ns)
	g, err := loader.FS(root).Attach(conn, again)
	conn.Close() // it would keep the group alive
	if !errors.Is(err, loader.ErrNotAttached) {
		t.Fatalf("got %v, %v, want %v", g, err, loader.ErrNotAttached)
	}
	if left, err := filepath.Glob(filepath.Join(root, "rpsel*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	attach(t, loader.FS(root), ns, loader.Options{}).Close()
	servers.Close(0)
	servers.Add()
	if s := status(t, attach(t, loader.FS(root), ns, again)); !s.Attached {
		t.Errorf("status %+v", s)
	}
}

// P6: an adoption that was killed leaves its program, which is no other tool's.
func TestAttachAfterKilledAdoption(t *testing.T) {
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 2, udpServer)
	first, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: bpf.AdoptProgram, Type: ebpf.SocketFilter, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	onSocket(t, member(t, ns), func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, first.FD())
	})
	first.Close()
	g := attach(t, root, ns, loader.Options{})
	if s := status(t, g); !s.Attached || len(s.Listeners) != 2 {
		t.Errorf("status %+v", s)
	}
}

// P6: commands at the same time, of which some find the state of others half
// made or half removed, all do their work.
func TestAtTheSameTime(t *testing.T) {
	times := 8
	if testing.Short() {
		times = 2
	}
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 2, udpServer)
	conn := member(t, ns)
	key, err := sockets.KeyOf(conn)
	if err != nil {
		t.Fatal(err)
	}
	change := func() error {
		g, err := root.Attach(conn, loader.Options{})
		if err != nil {
			return err
		}
		g.Close()
		if _, err := root.Upgrade(key, loader.UpgradeOptions{Flows: 128}); err != nil && !errors.Is(err, loader.ErrNotAttached) {
			return err
		}
		_, err = root.Detach(key)
		return err
	}
	look := func() error {
		g, err := root.Open(key)
		if err != nil {
			return err
		}
		return g.Close()
	}
	check := func(err error) {
		if err != nil && !errors.Is(err, loader.ErrNotAttached) {
			t.Error(err)
		}
	}
	var changing, looking sync.WaitGroup
	changed := make(chan struct{})
	for range 3 {
		changing.Go(func() {
			for range times {
				check(change())
			}
		})
		looking.Go(func() {
			for {
				select {
				case <-changed:
					return
				default:
					check(look())
				}
			}
		})
	}
	changing.Wait()
	close(changed)
	looking.Wait()
	if left := tree(t, string(root)); len(left) != 0 {
		t.Errorf("left behind: %s", left)
	}
}

// A bpffs that was unmounted takes the state along, but not the program.
func TestReplaceLost(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	testnet.StartGroup(t, ns, 2, udpServer)
	attach(t, loader.FS(root), ns, loader.Options{}).Close()
	if err := os.RemoveAll(filepath.Join(root, "rpsel")); err != nil {
		t.Fatal(err)
	}
	conn := member(t, ns)
	_, err := loader.FS(root).Attach(conn, loader.Options{})
	if !errors.Is(err, loader.ErrForeignProgram) || !strings.Contains(err.Error(), "--bpffs") {
		t.Errorf("got %v, want %v and where it may be", err, loader.ErrForeignProgram)
	}
	g := attach(t, loader.FS(root), ns, loader.Options{Replace: true})
	if s := status(t, g); !s.Attached || len(s.Listeners) != 2 || len(s.Unregistered) != 0 {
		t.Errorf("status %+v", s)
	}
}

// What somebody else keeps is not taken: the program is put back.
func TestReplaceKept(t *testing.T) {
	ns, root, other := testnet.New(t), loader.FS(testnet.BPFFS(t)), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 2, udpServer)
	g := attach(t, root, ns, loader.Options{})
	if _, err := other.Attach(member(t, ns), loader.Options{Replace: true}); !errors.Is(err, loader.ErrUnregistrable) {
		t.Errorf("got %v, want %v", err, loader.ErrUnregistrable)
	}
	if !status(t, g).Attached || len(tree(t, string(other))) != 0 {
		t.Errorf("attached %t, left behind: %s", status(t, g).Attached, tree(t, string(other)))
	}
}

// A mount would hide what is in the directory.
func TestMountHidesNothing(t *testing.T) {
	ns, dir := testnet.New(t), t.TempDir()
	testnet.StartGroup(t, ns, 1, udpServer)
	if err := os.Mkdir(filepath.Join(dir, "precious"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := loader.FS(dir).Attach(member(t, ns), loader.Options{})
	if !errors.Is(err, loader.ErrNoBPFFS) || !strings.Contains(err.Error(), "--bpffs") {
		t.Errorf("got %v, want %v", err, loader.ErrNoBPFFS)
	}
	if err == nil {
		unix.Unmount(dir, unix.MNT_DETACH)
	}
}

func TestReadOnly(t *testing.T) {
	ns, root := testnet.New(t), testnet.BPFFS(t)
	testnet.StartGroup(t, ns, 1, udpServer)
	g := attach(t, loader.FS(root), ns, loader.Options{})
	if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	conn := member(t, ns)
	for name, f := range map[string]func() error{
		"attach": func() error { _, err := loader.FS(root).Attach(conn, loader.Options{}); return err },
		"open":   func() error { _, err := loader.FS(root).Open(g.Key()); return err },
		"detach": func() error { _, err := loader.FS(root).Detach(g.Key()); return err },
	} {
		if err := f(); !errors.Is(err, loader.ErrNoBPFFS) || !strings.Contains(err.Error(), "remount") {
			t.Errorf("%s: got %v, want %v", name, err, loader.ErrNoBPFFS)
		}
	}
	if !status(t, g).Attached {
		t.Error("the program is off")
	}
}

// A socket that closes between the plan and the attach changes the kernel's
// order; what it was when the program took over counts.
func TestSettleFollowsClose(t *testing.T) {
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 3, udpServer)
	g := attach(t, root, ns, loader.Options{})
	live := func() []sockets.Socket {
		groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie()})
		if err != nil {
			t.Fatal(err)
		}
		return groups[0].Members
	}
	slots := map[uint64]uint16{}
	for _, l := range status(t, g).Listeners {
		slots[l.Cookie] = uint16(l.Slot)
	}
	conn := member(t, ns) // the first socket: another one is to close
	got, err := g.SettleAfter(conn, func() { servers.Close(1) })
	conn.Close()
	if err != nil {
		t.Fatal(err)
	}
	var order []uint16
	for _, m := range live() {
		order = append(order, slots[m.Cookie])
	}
	want := maps.KernelTable(order, maps.PickPairs(3))
	if diff := cmp.Diff(want, got); len(order) != 2 || diff != "" {
		t.Errorf("order %v: the table is not the kernel's", order)
	}
}

// Connected sockets at the address, which may have groups of their own, do not
// stand in for the group, and what is in a group with them does not get into its
// state.
func TestConnectedBeside(t *testing.T) {
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 2, udpServer)
	err := ns.Do(func() error {
		for port := range 3 {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			t.Cleanup(func() { unix.Close(fd) })
			local := unix.SockaddrInet4{Port: 1194, Addr: [4]byte{127, 0, 0, 1}}
			err = errors.Join(
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
				unix.Bind(fd, &local),
				unix.Connect(fd, &unix.SockaddrInet4{Port: 9 + port, Addr: [4]byte{127, 0, 0, 1}}),
			)
			if err != nil {
				return err
			}
			// Who has the first cookies is found first.
			if _, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie()})
	if err != nil {
		t.Fatal(err)
	}
	groups = slices.DeleteFunc(groups, sockets.Group.Connected)
	if len(groups) != 1 {
		t.Fatalf("groups %v, want one that is not connected", groups)
	}
	server := groups[0].Members[0]
	conn, err := server.Take()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	g, err := root.Attach(conn, loader.Options{Partial: true}) // before Linux 6.13 they are members
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	conn.Close()
	if s := status(t, g); !s.Attached || len(s.Listeners) != 2 {
		t.Errorf("status %+v", s)
	}

	// Who binds now may get into a group with a connected socket.
	testnet.StartServer(t, ns, udpServer)
	groups, err = sockets.Find(sockets.Query{NetNS: ns.Cookie()})
	if err != nil {
		t.Fatal(err)
	}
	for _, beside := range groups {
		if beside.Connected() || beside.HasProgram {
			continue
		}
		late := beside.Members[len(beside.Members)-1]
		conn, err := late.Take()
		if err != nil {
			t.Fatal(err)
		}
		_, err = root.Attach(conn, loader.Options{Partial: true})
		conn.Close()
		if !errors.Is(err, loader.ErrUnregistrable) || !strings.Contains(err.Error(), "restart it") {
			t.Errorf("attach a second group: got %v, want %v", err, loader.ErrUnregistrable)
		}
	}
	if s := status(t, g); !s.Attached || len(s.Listeners) != 2 {
		t.Errorf("status %+v", s)
	}
	if d, err := root.Detach(g.Key()); err != nil || !d.Program {
		t.Errorf("detached %+v, %v", d, err)
	}
}

// A slot that has been dead for more than half of the clock's round is free all
// the same.
func TestVacancy(t *testing.T) {
	const half = 1 << 23
	records := map[uint32]maps.Listener{}
	for slot := range uint32(maps.Slots) {
		records[slot] = maps.Listener{}
	}
	records[7] = maps.Listener{Dead: 1, Died: 5}
	for _, now := range []uint32{6, 5 + half - 1, 5 + half, 5 + half + 100} {
		if slot, err := loader.Vacancy(records, now); slot != 7 || err != nil {
			t.Errorf("at %d: slot %d, %v, want 7", now, slot, err)
		}
	}
}

// Settling anew takes no share away from those that have one.
func TestSettleAgain(t *testing.T) {
	ns, root := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 1, udpServer)
	attach(t, root, ns, loader.Options{Settle: time.Second})
	servers.Add()
	g := attach(t, root, ns, loader.Options{})
	for status(t, g).Settling > 0 {
		time.Sleep(10 * time.Millisecond)
	}
	attach(t, root, ns, loader.Options{Settle: time.Minute})
	shares := testnet.Shares(testnet.NewClients(t, ns, 100, "127.0.0.1:1194").Ask())
	if status(t, g).Settling == 0 || len(shares) != 2 || shares["s0"] < 20 {
		t.Errorf("settling %v, new flows %v, want them spread over both", status(t, g).Settling, shares)
	}
}
