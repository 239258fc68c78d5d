package owner_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/door"
	"github.com/rpsel/rpsel/internal/owner"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func TestMain(m *testing.M) { testnet.Main(m) }

const nobody = 65534

var udp = testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, UID: nobody}

// serve starts a server with n sockets as a user, with another name each time.
func serve(t *testing.T, ns *testnet.NetNS, name string, n int, o testnet.ServerOptions) *testnet.Server {
	t.Helper()
	o.Name = name
	return testnet.StartGroup(t, ns, n, o)
}

// take borrows a socket of the group that a server's sockets are in.
func take(t *testing.T, ns *testnet.NetNS, s *testnet.Server) *sockets.Conn {
	t.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Addr: s.Addr.Addr(), Port: s.Addr.Port()})
	if err != nil || len(groups) != 1 {
		t.Fatalf("groups on %s: %v, %v", s.Addr, groups, err)
	}
	conn, err := sockets.TakeMember(groups[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// attach attaches that group.
func attach(t *testing.T, fs loader.FS, ns *testnet.NetNS, s *testnet.Server, o loader.Options) *loader.Group {
	t.Helper()
	o.Settle = -1
	conn := take(t, ns, s)
	defer conn.Close()
	g, err := fs.Attach(conn, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// open opens doors for owners, as the agent does.
func open(t *testing.T, fs loader.FS, dir string, uids ...uint32) {
	t.Helper()
	d, err := door.Open(dir, owner.Groups{FS: fs})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if err := d.SetOwners(uids); err != nil {
		t.Fatal(err)
	}
}

func ptr(uid uint32) *uint32 { return &uid }

// powerless fails the test if the server has a capability, or can see a bpffs.
func powerless(t *testing.T, s *testnet.Server, bpffs string) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n", "CapAmb:\t0000000000000000\n", "Uid:\t65534\t65534\t65534\t65534\n"} {
		if !strings.Contains(string(status), want) {
			t.Fatalf("the server may do too much for this test:\n%s", status)
		}
	}
	info, err := os.Stat(bpffs)
	if err != nil || info.Mode().Perm() != 0o700 || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Fatalf("the bpffs is open to the server: %v, %v", info, err)
	}
}

// A server without a capability and without access to the bpffs registers its
// socket and gets flows; before that, and that is the control, it gets none. It
// drains and resumes, and none of that moves a flow.
func TestWithoutPrivileges(t *testing.T) {
	ns, bpffs, dir := testnet.New(t), testnet.BPFFS(t), testnet.RunDir(t)
	fs := loader.FS(bpffs)
	old := serve(t, ns, "old", 3, udp)
	g := attach(t, fs, ns, old, loader.Options{Owner: ptr(nobody)})
	open(t, fs, dir, nobody)

	late := serve(t, ns, "late", 1, udp)
	powerless(t, late, bpffs)
	early := testnet.NewClients(t, ns, 400, udp.Addr)
	before := early.Ask()
	if got := testnet.Shares(before); got["late0"] != 0 || got[""] != 0 {
		t.Fatalf("not registered, and yet: %v", got)
	}

	slot, err := late.AskAgent(0, "register", dir)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := late.AskAgent(0, "register", dir); err != nil || again != slot {
		t.Errorf("registered again in slot %d, %v, want %d", again, err, slot)
	}
	status, err := g.Status()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(status.Listeners); n != 4 || status.Listeners[slot].PID != late.PID() || status.Listeners[slot].Command == "" {
		t.Errorf("%d listeners, slot %d: %+v, want pid %d", n, slot, status.Listeners[slot], late.PID())
	}
	joined := testnet.NewClients(t, ns, 400, udp.Addr)
	shares := joined.Ask()
	if got := testnet.Shares(shares); got["late0"] < 40 || got[""] != 0 {
		t.Errorf("shares after it registered: %v", got)
	}

	if _, err := late.AskAgent(0, "drain", dir); err != nil {
		t.Fatal(err)
	}
	if _, err := late.AskAgent(0, "drain", dir); err != nil {
		t.Errorf("drain again: %v", err)
	}
	if got := testnet.Shares(testnet.NewClients(t, ns, 400, udp.Addr).Ask()); got["late0"] != 0 || got[""] != 0 {
		t.Errorf("shares while it drains: %v", got)
	}
	if _, err := late.AskAgent(0, "resume", dir); err != nil {
		t.Fatal(err)
	}
	if got := testnet.Shares(testnet.NewClients(t, ns, 400, udp.Addr).Ask()); got["late0"] < 40 {
		t.Errorf("shares after it resumed: %v", got)
	}

	// The agent holds nothing of it, and who was bound first takes nothing along.
	old.Close(0)
	if n := testnet.Moved(before, early.Ask(), "old0"); n != 0 {
		t.Errorf("%d flows moved", n)
	}
	if n := testnet.Moved(shares, joined.Ask(), "old0"); n != 0 {
		t.Errorf("%d flows moved", n)
	}
	late.Kill()
	if got := testnet.Shares(joined.Ask()); got["late0"] != 0 || got[""] != 0 {
		t.Errorf("shares after it was killed: %v", got)
	}
}

// What is refused: sockets of others, groups that were not given away, slots of
// others. It leaves the group as it is.
func TestRefused(t *testing.T) {
	ns, fs, dir := testnet.New(t), loader.FS(testnet.BPFFS(t)), testnet.RunDir(t)
	given := serve(t, ns, "given", 2, udp)
	g := attach(t, fs, ns, given, loader.Options{Owner: ptr(nobody)})
	tcp := testnet.ServerOptions{Network: "tcp4", Addr: "127.0.0.1:4433", ReusePort: true, UID: nobody}
	stream := serve(t, ns, "stream", 1, tcp)
	attach(t, fs, ns, stream, loader.Options{Owner: ptr(nobody)})
	kept := udp
	kept.Addr = "127.0.0.2:1194"
	attach(t, fs, ns, serve(t, ns, "kept", 1, kept), loader.Options{})
	roots := udp
	roots.Addr, roots.UID = "127.0.0.3:1194", 0
	attach(t, fs, ns, serve(t, ns, "roots", 1, roots), loader.Options{Owner: ptr(0)})
	others := udp
	others.Addr, others.UID = "127.0.0.4:1194", 1000
	attach(t, fs, ns, serve(t, ns, "others", 1, others), loader.Options{})
	lone := udp
	lone.Addr = "127.0.0.5:1194"
	open(t, fs, dir, nobody, 0)
	before, err := g.Status()
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct {
		name   string
		server *testnet.Server
		what   string
		want   string
	}{
		{"a group without owner", serve(t, ns, "kept-more", 1, kept), "register", `udp 127.0.0.2:1194 uid 65534: not yours: the group has no owner: "rpsel attach --port 1194 --owner 65534" gives it one`},
		{"no state", serve(t, ns, "lone", 1, lone), "register", `udp 127.0.0.5:1194 uid 65534: no rpsel state: "rpsel attach --port 1194 --owner 65534" makes it`},
		{"a user without a door", serve(t, ns, "others-more", 1, others), "register", "no group has this user as its owner (uid 1000, in " + dir + ")"},
		{"drain what is not registered", serve(t, ns, "idle", 1, udp), "drain", "no such listener: register it first"},
		{"resume what is not registered", serve(t, ns, "idler", 1, udp), "resume", "no such listener: register it first"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := c.server.AskAgent(0, c.what, dir); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}

	// Files that no server of the user's would send, as that user and as root,
	// who may connect everywhere but is not the user.
	h := owner.Groups{FS: fs}
	dial := func(network, address string) syscall.Conn {
		t.Helper()
		var conn net.Conn
		if err := ns.Do(func() (err error) {
			conn, err = net.Dial(network, address)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn.(syscall.Conn)
	}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	local := os.NewFile(uintptr(pair[0]), "socket pair")
	defer local.Close()
	defer unix.Close(pair[1])
	client := dial("udp4", "127.0.0.1:1194")
	for _, c := range []struct {
		name string
		peer door.Peer
		conn syscall.Conn
		want string
	}{
		{"no socket", door.Peer{UID: nobody}, file, "the descriptor is not a socket"},
		{"neither UDP nor TCP", door.Peer{UID: nobody}, local, "neither IPv4 nor IPv6"},
		{"another user's socket", door.Peer{UID: nobody}, client, "the socket is uid 0's, you are uid 65534"},
		{"the user's socket, sent by root", door.Peer{UID: 0}, take(t, ns, given), "the socket is uid 65534's, you are uid 0"},
		{"the user's socket, sent by another", door.Peer{UID: 1000}, take(t, ns, given), "the socket is uid 65534's, you are uid 1000"},
		{"root's connection to a given port", door.Peer{UID: 0}, dial("tcp4", "127.0.0.1:4433"), "no rpsel state"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := h.Register(c.peer, c.conn)
			errs := []error{err, h.Drain(c.peer, c.conn), h.Resume(c.peer, c.conn)}
			for _, err := range errs {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %q", err, c.want)
				}
			}
		})
	}

	after, err := g.Status()
	if err != nil {
		t.Fatal(err)
	}
	if len(after.Listeners) != len(before.Listeners) || len(after.Listeners) != 2 {
		t.Errorf("%d listeners before, %d after", len(before.Listeners), len(after.Listeners))
	}
	for _, l := range after.Listeners {
		if l.State != "active" {
			t.Errorf("slot %d is %s", l.Slot, l.State)
		}
	}
}

// A connection that was accepted has the address of its group and is no member.
func TestAccepted(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	var conn net.Conn
	var l net.Listener
	if err := ns.Do(func() error {
		ls, err := sockets.Listen(t.Context(), 1, "tcp4", "127.0.0.1:4433")
		if err != nil {
			return err
		}
		l = ls[0]
		to, err := net.Dial("tcp4", "127.0.0.1:4433")
		if err != nil {
			return err
		}
		t.Cleanup(func() { to.Close() })
		conn, err = l.Accept()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer conn.Close()
	g, err := fs.Attach(l.(syscall.Conn), loader.Options{Owner: ptr(0)})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	h, root := owner.Groups{FS: fs}, door.Peer{UID: 0, PID: os.Getpid()}
	if _, err := h.Register(root, conn.(syscall.Conn)); !errors.Is(err, sockets.ErrGone) {
		t.Errorf("register: %v", err)
	}
	if err := h.Drain(root, conn.(syscall.Conn)); !errors.Is(err, loader.ErrNoListener) {
		t.Errorf("drain: %v", err)
	}
	if slot, err := h.Register(root, l.(syscall.Conn)); err != nil || slot != 0 {
		t.Errorf("the listener: slot %d, %v", slot, err)
	}
}

// A group that is detached while its owner registers a socket stays detached.
func TestDetachedMeanwhile(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	server := serve(t, ns, "server", 2, udp)
	conn := take(t, ns, server)
	h, peer := owner.Groups{FS: fs}, door.Peer{UID: nobody, PID: server.PID()}
	refused := 0
	for range 10 {
		g := attach(t, fs, ns, server, loader.Options{Owner: ptr(nobody)})
		g.Close()
		registered := make(chan error)
		go func() {
			_, err := h.Register(peer, conn)
			registered <- err
		}()
		if _, err := fs.Detach(g.Key()); err != nil {
			t.Fatal(err)
		}
		if err := <-registered; errors.Is(err, loader.ErrNotAttached) {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
		if keys, err := fs.Keys(0); err != nil || len(keys) != 0 {
			t.Fatalf("attached again by its owner: %v, %v", keys, err)
		}
	}
	t.Logf("%d of 10 came too late", refused)
}

// Whoever is not the owner does not get as far as the agent, and root, who may
// connect, is told that he is somebody else.
func TestAnotherUser(t *testing.T) {
	ns, fs, dir := testnet.New(t), loader.FS(testnet.BPFFS(t)), testnet.RunDir(t)
	given := serve(t, ns, "given", 1, udp)
	attach(t, fs, ns, given, loader.Options{Owner: ptr(nobody)})
	open(t, fs, dir, nobody)
	path := door.Path(dir, nobody)

	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil || stat.Uid != nobody || stat.Mode != unix.S_IFSOCK|0o600 {
		t.Fatalf("%s: uid %d, mode %o, %v", path, stat.Uid, stat.Mode, err)
	}
	// One who pretends that the door is his.
	other := testnet.RunDir(t)
	if err := os.Symlink(path, filepath.Join(other, filepath.Base(door.Path(other, 1000)))); err != nil {
		t.Fatal(err)
	}
	stranger := udp
	stranger.Addr, stranger.UID = "127.0.0.2:1194", 1000
	if _, err := serve(t, ns, "stranger", 1, stranger).AskAgent(0, "register", other); err == nil || !strings.Contains(err.Error(), "no group has this user as its owner") {
		t.Errorf("a stranger: %v", err)
	}
	if err := asUser(1000, func() error {
		c, err := net.Dial(door.Network, path)
		if err == nil {
			c.Close()
		}
		return err
	}); !errors.Is(err, unix.EACCES) {
		t.Errorf("a stranger connects: %v", err)
	}
	c, err := net.Dial(door.Network, path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// The user hands it his own socket through root's connection: the kernel noted root.
	raw, err := take(t, ns, given).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		_, _, err = c.(*net.UnixConn).WriteMsgUnix(door.Request{Op: door.Drain}.Marshal(), unix.UnixRights(int(fd)), nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, door.MaxAnswer)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := door.ParseAnswer(buf[:n]); err != nil || a.Done || a.Text != "you are uid 0, this socket is uid 65534's" {
		t.Errorf("root: %+v, %v", a, err)
	}
}

// asUser runs f on a thread with the rights of a user and no capability.
func asUser(uid int, f func() error) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with this goroutine.
		runtime.LockOSThread()
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			done <- errno
			return
		}
		done <- f()
	}()
	return <-done
}

// The last socket of a group had closed, and the program went with the kernel's
// group. The first that comes back attaches it again by registering; the control
// is that plain Linux moves its flows when it has company.
func TestComesBack(t *testing.T) {
	ns, fs, dir := testnet.New(t), loader.FS(testnet.BPFFS(t)), testnet.RunDir(t)
	old := serve(t, ns, "old", 1, udp)
	g := attach(t, fs, ns, old, loader.Options{Owner: ptr(nobody)})
	open(t, fs, dir, nobody)
	old.Kill()
	back := serve(t, ns, "back", 3, udp)
	if s, err := g.Status(); err != nil || s.Attached {
		t.Fatalf("%+v, %v", s, err)
	}
	if _, err := back.AskAgent(0, "register", dir); err != nil {
		t.Fatal(err)
	}
	if s, err := g.Status(); err != nil || !s.Attached || len(s.Unregistered) > 0 {
		t.Errorf("%+v, %v", s, err)
	}
	clients := testnet.NewClients(t, ns, 200, udp.Addr)
	before := clients.Ask()
	back.Close(0)
	after := clients.Ask()
	if moved := testnet.Moved(before, after, "back0"); moved != 0 || testnet.Shares(after)[""] != 0 {
		t.Errorf("%d flows moved, answers from %v", moved, testnet.Shares(after))
	}
	if _, err := fs.Detach(g.Key()); err != nil {
		t.Fatal(err)
	}
	before = clients.Ask()
	serve(t, ns, "more", 1, udp)
	if moved := testnet.Moved(before, clients.Ask()); moved == 0 {
		t.Error("no flow moved without a program")
	}
}

// A server in another network namespace, another mount namespace, where only its
// socket is, under another path, and another pid namespace: all is read from the
// descriptor.
func TestOtherNamespaces(t *testing.T) {
	ns, fs, dir := testnet.New(t), loader.FS(testnet.BPFFS(t)), testnet.RunDir(t)
	old := serve(t, ns, "old", 2, udp)
	g := attach(t, fs, ns, old, loader.Options{Owner: ptr(nobody)})
	open(t, fs, dir, nobody)

	contained := udp
	inside := testnet.RunDir(t)
	contained.Wrap = []string{"unshare", "--mount", "--pid", "--fork", "sh", "-ec",
		`touch "$2" && mount --bind "$1" "$2" && mount -t tmpfs none "$3" && shift 3 && exec "$@"`,
		"sh", door.Path(dir, nobody), door.Path(inside, nobody), dir}
	late := serve(t, ns, "late", 1, contained)
	child := onlyChild(t, late.PID())
	t.Cleanup(func() { syscall.Kill(child, syscall.SIGKILL) })
	if _, err := late.AskAgent(0, "register", dir); err == nil || !strings.Contains(err.Error(), "no group has this user as its owner") {
		t.Errorf("it sees the agent's run directory, which this test has hidden from it: %v", err)
	}
	slot, err := late.AskAgent(0, "register", inside)
	if err != nil {
		t.Fatal(err)
	}
	status, err := g.Status()
	if err != nil {
		t.Fatal(err)
	}
	if l := status.Listeners[slot]; len(status.Listeners) != 3 || l.State != "active" || l.PID != child {
		t.Errorf("listener %+v, want pid %d", l, child)
	}
	if got := testnet.Shares(testnet.NewClients(t, ns, 400, udp.Addr).Ask()); got["late0"] < 40 || got[""] != 0 {
		t.Errorf("shares: %v", got)
	}
}

// onlyChild is the process that a wrapper started.
func onlyChild(t *testing.T, pid int) int {
	t.Helper()
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		t.Fatal(err)
	}
	return child
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		text string
		want uint32
	}{{"root", 0}, {"0", 0}, {"nobody", nobody}, {"65534", nobody}, {"4294967294", 4294967294}, {"none", loader.NoOwner}} {
		if uid, err := owner.Parse(c.text); err != nil || uid != c.want {
			t.Errorf("%q: %d, %v", c.text, uid, err)
		}
	}
	for _, text := range []string{"", "-1", "+1", "4294967295", "1.5", "root ", "rpsel-nobody"} {
		if uid, err := owner.Parse(text); err == nil {
			t.Errorf("%q: %d", text, uid)
		}
	}
	if owner.Name(nobody) != "nobody" || owner.Name(4294967294) != "4294967294" {
		t.Error(owner.Name(nobody), owner.Name(4294967294))
	}
}
