package daemon

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/door"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// Containers come and go: each has its servers kept, and the state of one that is
// gone goes too. The port is one that no other test of this machine has.
func TestNamespaces(t *testing.T) {
	const port, addr = 27194, "127.0.0.1:27194"
	fs := testnet.BPFFS(t)
	a := start(t, fs, fmt.Sprintf("[[service]]\nport = %d\nnetns = \"all\"\n", port))
	serve := func(t *testing.T) (*testnet.NetNS, *testnet.Clients) {
		ns := testnet.New(t)
		servers := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
		a.awaitListeners(keyOf(ns, loader.UDP, addr), 3)
		clients := testnet.NewClients(t, ns, 100, addr)
		before := clients.Ask()
		servers.Close(0)
		if moved := testnet.Moved(before, clients.Ask(), "s0"); moved != 0 {
			t.Errorf("%d flows moved", moved)
		}
		return ns, clients
	}
	_, clients := serve(t)
	before := clients.Ask()
	var gone uint64
	t.Run("container", func(t *testing.T) {
		ns, _ := serve(t)
		gone = ns.Cookie()
	})
	state := filepath.Join(fs, "rpsel", fmt.Sprint(gone))
	await(t, "the state of the namespace to go", func() bool {
		_, err := os.Stat(state)
		return os.IsNotExist(err)
	})
	a.awaitSaid(`msg="state removed: its network namespace is gone" group="udp 127.0.0.1:27194" netns_cookie=` + fmt.Sprint(gone))
	if moved := testnet.Moved(before, clients.Ask()); moved != 0 {
		t.Errorf("%d flows of the other namespace moved", moved)
	}
	serve(t)
}

// The state of a namespace in which no server is left stays, as long as
// anything may start one there.
func TestNamespaceStays(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true}
	only := testnet.StartServer(t, ns, options)
	a := start(t, fs, service(ns, 1194))
	only.Kill()
	var gone string
	t.Run("another", func(t *testing.T) {
		other := testnet.New(t)
		testnet.StartServer(t, other, options)
		for _, g := range findPort(t, other, 1194) {
			conn, err := sockets.TakeMember(g)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			attached, err := a.fs.Attach(conn, loader.Options{})
			if err != nil {
				t.Fatal(err)
			}
			attached.Close()
		}
		gone = fmt.Sprint("netns_cookie=", other.Cookie())
	})
	a.awaitSaid(gone) // so it has looked at all
	if _, ok := status(t, a.fs, keyOf(ns, loader.UDP, addr)); !ok {
		t.Error("the state is gone")
	}
	testnet.StartServer(t, ns, options)
	a.awaitSaid(`msg="attached again"`)
}

// A command that was stopped while it had the lock of one namespace keeps the
// agent from that one only, and what was due there is done when it goes on.
func TestStoppedCommand(t *testing.T) {
	locked, other, fs := testnet.New(t), testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true}
	servers := testnet.StartGroup(t, locked, 2, options)
	testnet.StartServer(t, other, options)
	a := start(t, fs, service(locked, 1194, `settle = "0s"`)+service(other, 1194, `settle = "0s"`))
	a.awaitListeners(keyOf(locked, loader.UDP, addr), 2)
	a.awaitListeners(keyOf(other, loader.UDP, addr), 1)

	dir, err := os.Open(filepath.Join(fs, "rpsel", fmt.Sprint(locked.Cookie())))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	servers.Close(0)
	testnet.StartServer(t, locked, options)
	a.awaitSaid("locked by another rpsel command")
	for n := 2; n <= 5; n++ {
		testnet.StartServer(t, other, options)
		a.awaitListeners(keyOf(other, loader.UDP, addr), n)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	a.awaitListeners(keyOf(locked, loader.UDP, addr), 2)
}

// The lock of the agent is out of reach of those who may look at what it says: a
// lock for reading would keep the next agent from starting.
func TestLockOfOthers(t *testing.T) {
	fs := testnet.BPFFS(t)
	dir, err := agent.Dir(fs)
	if err != nil {
		t.Fatal(err)
	}
	if err := door.MakeDir(dir); err != nil {
		t.Fatal(err)
	}
	// As an agent left it that let everybody read.
	if err := os.WriteFile(filepath.Join(dir, lockName), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	start(t, fs, "")
	for name, can := range map[string]bool{lockName: false, infoName: true} {
		cmd := exec.Command("cat", filepath.Join(dir, name))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if err := cmd.Run(); (err == nil) != can {
			t.Errorf("another user opens %s: got %v, want success: %v", name, err, can)
		}
	}
}

// SIGHUP: what is new is attached, what is gone stays attached, times change
// without another time of settling, what is fixed is told, and a wrong file
// changes nothing.
func TestReload(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	for _, port := range []string{"1194", "1195"} {
		testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:" + port, ReusePort: true})
	}
	one, two := keyOf(ns, loader.UDP, "127.0.0.1:1194"), keyOf(ns, loader.UDP, "127.0.0.1:1195")
	a := start(t, fs, service(ns, 1194, `settle = "0s"`, `idle = "1m"`, `flows = 1000`))
	if s := a.awaitListeners(one, 2); s.Idle != time.Minute || s.Capacity != 1000 {
		t.Errorf("attached with %+v", s)
	}
	reload := func(services, said string) {
		t.Helper()
		before := strings.Count(a.said(), said)
		a.write(services)
		a.reload <- unix.SIGHUP
		await(t, "the agent to say "+said, func() bool { return strings.Count(a.said(), said) > before })
	}
	reload("[[service]]\nport = 0\n", "level=ERROR msg=\"the configuration stays as it was: "+a.config+":3: port: use a number from 1 to 65535\"")
	if s, _ := status(t, a.fs, one); s.Idle != time.Minute {
		t.Errorf("after a wrong file: %+v", s)
	}
	reload(service(ns, 1194, `settle = "1m"`, `idle = "2m"`, `flows = 2000`, `affinity = "client"`, `confirm = "reply"`)+service(ns, 1195, `settle = "0s"`), "flows 2000: fixed while attached, with 1000")
	a.awaitListeners(two, 2)
	await(t, "the new time", func() bool {
		s, _ := status(t, a.fs, one)
		return s.Idle == 2*time.Minute && s.Capacity == 1000 && s.Settling == 0
	})
	reload(service(ns, 1195, `settle = "0s"`), `msg="service removed: what is attached stays so, \"rpsel detach --port 1194\" ends that"`)
	if s, ok := status(t, a.fs, one); !ok || !s.Attached {
		t.Errorf("without its service: %+v", s)
	}
	testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	a.awaitListeners(one, 3)
}

// A policy that goes by connections which nobody counts is refused, and told; the rest
// of the service is in force, and who comes is registered.
func TestUncounted(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "tcp4", Addr: addr, ReusePort: true}
	key := keyOf(ns, loader.TCP, addr)
	servers := testnet.StartGroup(t, ns, 2, options)
	a := start(t, fs, service(ns, 1194, `proto = "tcp"`))
	a.awaitListeners(key, 2)
	// What tells a group whose connections are counted from another.
	if err := os.Remove(filepath.Join(fs, "rpsel", fmt.Sprint(ns.Cookie()), "tcp_7f000001_1194", "counting")); err != nil {
		t.Fatal(err)
	}
	a.write(service(ns, 1194, `proto = "tcp"`, `policy = "least"`, `idle = "2m"`))
	a.reload <- unix.SIGHUP
	await(t, "what is in force", func() bool {
		s, _ := status(t, a.fs, key)
		refused := running(t, fs).Refused
		return s.Policy == "hash" && s.Idle == 2*time.Minute && len(refused) == 1 && strings.Contains(refused[0], "policy least")
	})
	servers.Add()
	a.awaitListeners(key, 3)
}

// What is changed in the file and read again moves no tracked flow, neither does what
// cannot be changed keep the rest from being so, nor a group from being attached again.
func TestReloadMovesNothing(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true}
	key := keyOf(ns, loader.UDP, addr)
	servers := testnet.StartGroup(t, ns, 3, options)
	a := start(t, fs, service(ns, 1194, `settle = "0s"`, "flows = 1000"))
	a.awaitListeners(key, 3)
	clients := testnet.NewClients(t, ns, 300, addr)
	before := clients.Ask()
	// From now on a flow that is picked anew may go elsewhere.
	servers.Add()
	servers.Add()
	a.awaitListeners(key, 5)
	reload := func(want loader.Status, refused []string, more ...string) {
		t.Helper()
		a.write(service(ns, 1194, append(more, `settle = "0s"`)...))
		a.reload <- unix.SIGHUP
		await(t, fmt.Sprint("what is in force with ", more), func() bool {
			s, _ := status(t, a.fs, key)
			return s.Policy == want.Policy && s.Idle == want.Idle && s.IdleNew == want.IdleNew &&
				slices.Equal(running(t, fs).Refused, refused)
		})
		if s, _ := status(t, a.fs, key); s.Capacity != 1000 || s.Affinity != loader.AffinityFlow || !s.Attached {
			t.Errorf("with %v: %+v", more, s)
		}
		if moved := testnet.Moved(before, clients.Ask()); moved != 0 {
			t.Errorf("with %v: %d flows moved", more, moved)
		}
	}
	for _, policy := range []string{"least", "rr", "random", "cpu", "newest", "hash"} {
		reload(loader.Status{Policy: policy, Idle: 5 * time.Minute, IdleNew: 30 * time.Second}, nil, fmt.Sprintf("policy = %q", policy))
	}
	reload(loader.Status{Policy: "hash", Idle: time.Minute, IdleNew: 20 * time.Second}, nil, `idle = "1m"`, `idle-new = "20s"`)
	fixed := []string{
		key.String() + `: affinity client: fixed while attached, with flow: detach it, and attach it with that`,
		key.String() + `: flows 2000: fixed while attached, with 1000: "rpsel upgrade --flows 2000" changes it`,
	}
	changed := []string{"flows = 2000", `affinity = "client"`, `client-prefix = "24/56"`, `policy = "rr"`, `idle = "2m"`}
	for range 2 {
		// What is in the file no more stays as it was, as with "rpsel attach".
		reload(loader.Status{Policy: "rr", Idle: 2 * time.Minute, IdleNew: 20 * time.Second}, fixed, changed...)
	}
	also := []string{
		key.String() + `: confirm reply: fixed while attached, with client: detach it, and attach it with that`,
		key.String() + `: first openvpn: fixed while attached, with none: detach it, and attach it with that`,
	}
	reload(loader.Status{Policy: "least", Idle: 2 * time.Minute, IdleNew: 20 * time.Second}, also, `first = "openvpn"`, `confirm = "reply"`, `policy = "least"`)
	reload(loader.Status{Policy: "rr", Idle: 2 * time.Minute, IdleNew: 20 * time.Second}, fixed, changed...)
	for _, text := range append(also, fixed...) {
		if n := strings.Count(a.said(), fmt.Sprintf("msg=%q", text)); n != 1 {
			t.Errorf("said %d times: %s", n, text)
		}
	}

	// The last server ends, and the program with it.
	servers.Kill()
	again := testnet.StartGroup(t, ns, 4, options)
	a.awaitListeners(key, 4)
	before = clients.Ask()
	again.Close(0)
	if moved := testnet.Moved(before, clients.Ask(), "s0"); moved != 0 {
		t.Errorf("attached again: %d flows moved", moved)
	}
	before = clients.Ask()
	reload(loader.Status{Policy: "hash", Idle: 2 * time.Minute, IdleNew: 20 * time.Second}, nil, "flows = 1000", `policy = "hash"`)

	// The control: without a program they do move.
	a.stop()
	if _, err := a.fs.Detach(key); err != nil {
		t.Fatal(err)
	}
	before = clients.Ask()
	again.Close(3) // the first in the kernel's order, since s0 went
	if testnet.Moved(before, clients.Ask(), "s3") == 0 {
		t.Error("control: no flow moved without a program")
	}
}

// Another tool's program leaves no place for ours: the agent polls, says why, and
// goes back to events when the way is free.
func TestPolling(t *testing.T) {
	for _, kind := range []struct {
		name  string
		flags uint32
		mode  Mode
	}{
		{"exclusive", 0, Polling},
		{"override", unix.BPF_F_ALLOW_OVERRIDE, Polling},
		{"multi", unix.BPF_F_ALLOW_MULTI, Events},
	} {
		t.Run(kind.name, func(t *testing.T) {
			ns, fs := testnet.New(t), testnet.BPFFS(t)
			above := newCgroup(t, "")
			below := newCgroup(t, above)
			detach := occupy(t, above, kind.flags)
			options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true, Cgroup: below}
			key := keyOf(ns, loader.UDP, addr)

			a := start(t, fs, service(ns, 1194), func(o *Options) { o.Cgroup = below })
			info := running(t, fs)
			if info.Mode != kind.mode || (info.Mode == Polling) != strings.Contains(info.Reason, "other_tool") || info.PID != os.Getpid() {
				t.Errorf("it says %+v", info)
			}
			options.Name = "a"
			first := testnet.StartGroup(t, ns, 3, options)
			a.awaitListeners(key, 3)
			clients := testnet.NewClients(t, ns, 100, addr)
			before := clients.Ask()
			options.Name = "b"
			testnet.StartServer(t, ns, options)
			a.awaitListeners(key, 4)
			first.Close(0)
			if moved := testnet.Moved(before, clients.Ask(), "a0"); moved != 0 {
				t.Errorf("%d flows moved", moved)
			}
			if shares := testnet.Shares(testnet.NewClients(t, ns, 200, addr).Ask()); shares["b"] == 0 {
				t.Errorf("new flows: %v", shares)
			}

			detach()
			await(t, "events", func() bool { return running(t, fs).Mode == Events })
			options.Name = "c"
			testnet.StartServer(t, ns, options)
			a.awaitListeners(key, 4)
		})
	}
}

// A group that a sweep finds before a poll does is as new as others.
func TestPollingSweep(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	dir := newCgroup(t, "")
	occupy(t, dir, 0)
	a := start(t, fs, service(ns, 1194), func(o *Options) { o.Cgroup, o.pace.poll = dir, time.Hour })
	testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
	a.awaitSaid("msg=attached")
	if s, ok := status(t, a.fs, keyOf(ns, loader.UDP, addr)); !ok || s.Settling > bornSettle {
		t.Errorf("it settles for %v, want %v at most", s.Settling, bornSettle)
	}
}

func running(t *testing.T, fs string) Info {
	t.Helper()
	info, err := Running(fs)
	if err != nil || info == nil {
		t.Fatal(info, err)
	}
	return *info
}

// newCgroup makes a cgroup below a directory, or below the test's own ("").
func newCgroup(t *testing.T, below string) string {
	t.Helper()
	testnet.Privileged(t)
	if below == "" {
		own, err := cgroup.Own()
		if err != nil {
			t.Fatal(err)
		}
		below = own
	}
	dir, err := os.MkdirTemp(below, "rpsel-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		await(t, "processes to leave "+dir, func() bool { return os.Remove(dir) == nil })
	})
	return dir
}

// occupy attaches a program to a cgroup as tools do that know nothing of links.
func occupy(t *testing.T, dir string, flags uint32) (detach func()) {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "other_tool", Type: ebpf.CGroupSock, AttachType: ebpf.AttachCGroupInet4PostBind, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: int(f.Fd()), Program: program, Attach: ebpf.AttachCGroupInet4PostBind, Flags: flags,
	}); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := link.RawDetachProgram(link.RawDetachProgramOptions{
			Target: int(f.Fd()), Program: program, Attach: ebpf.AttachCGroupInet4PostBind,
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// A server closes its socket and binds another, as OpenVPN does at SIGUSR1: a
// listener left, and one came. Nobody else's flows move.
func TestRebind(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	key := keyOf(ns, loader.UDP, addr)
	a := start(t, fs, service(ns, 1194))
	server := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
	a.awaitListeners(key, 3)
	clients := testnet.NewClients(t, ns, 200, addr)
	before := clients.Ask()
	server.Close(0)
	server.Add()
	a.awaitListeners(key, 3)
	if moved := testnet.Moved(before, clients.Ask(), "s0"); moved != 0 {
		t.Errorf("%d flows moved", moved)
	}
	if shares := testnet.Shares(testnet.NewClients(t, ns, 200, addr).Ask()); shares["s3"] == 0 {
		t.Errorf("new flows: %v", shares)
	}
}

// A group that a command attaches while the agent runs is kept, too.
func TestAttachedMeanwhile(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	key := keyOf(ns, loader.UDP, addr)
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true}
	a := start(t, fs, "")
	testnet.StartServer(t, ns, options)
	conn, err := sockets.TakeMember(findPort(t, ns, 1194)[0])
	if err != nil {
		t.Fatal(err)
	}
	g, err := a.fs.Attach(conn, loader.Options{Settle: -1})
	conn.Close()
	if err != nil {
		t.Fatal(err)
	}
	g.Close()
	testnet.StartServer(t, ns, options)
	a.awaitListeners(key, 2)
	if _, err := a.fs.Detach(key); err != nil {
		t.Fatal(err)
	}
	a.awaitSaid("msg=detached")
	if found := findPort(t, ns, 1194); found[0].HasProgram {
		t.Error("it is attached again, and nobody asked for it")
	}
}

// Listeners that died are buried, and their share dealt, at the next tick. That
// expired flows are forgotten, where the program has no timer, is Housekeep's.
func TestHousekeeping(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	servers := testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
	a := start(t, fs, service(ns, 1194, `settle = "0s"`))
	a.awaitListeners(keyOf(ns, loader.UDP, addr), 2)
	servers.Close(1)
	a.awaitSaid(`msg="listeners left" group="udp 127.0.0.1:1194" listeners=1`)
}

// What a killed command left behind is gone when the agent is ready, also in a
// namespace where nothing is attached.
func TestRecovers(t *testing.T) {
	fs := testnet.BPFFS(t)
	aside := filepath.Join(fs, "rpsel", "4711", "tmp_4711_udp_7f000001_1194")
	if err := os.MkdirAll(aside, 0o700); err != nil {
		t.Fatal(err)
	}
	start(t, fs, "")
	if _, err := os.Stat(aside); !os.IsNotExist(err) {
		t.Errorf("%s: %v", aside, err)
	}
}

// writeConfig writes into the configuration of the group on addr.
func writeConfig(t *testing.T, fs string, ns *testnet.NetNS, at int, data []byte) {
	t.Helper()
	config, err := ebpf.LoadPinnedMap(filepath.Join(fs, "rpsel", fmt.Sprint(ns.Cookie()), "udp_7f000001_1194", "config"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer config.Close()
	value, err := config.LookupBytes(uint32(0))
	if err != nil {
		t.Fatal(err)
	}
	copy(value[at:], data)
	if err := config.Put(uint32(0), value); err != nil {
		t.Fatal(err)
	}
}

// State that somebody else wrote to, while the agent has it open, is told of; other
// groups are kept as before, and it is well again after a detach.
func TestDamagedState(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true}
	other := options
	other.Addr = "127.0.0.2:1194"
	testnet.StartServer(t, ns, options)
	testnet.StartServer(t, ns, other)
	a := start(t, fs, service(ns, 1194, `settle = "0s"`))
	key := keyOf(ns, loader.UDP, addr)
	a.awaitListeners(key, 1)
	writeConfig(t, fs, ns, 0, bytes.Repeat([]byte{0xff}, 8)) // where the pick table is
	a.awaitSaid("somebody else wrote to it: detach the group")
	testnet.StartServer(t, ns, options)
	testnet.StartServer(t, ns, other)
	a.awaitListeners(keyOf(ns, loader.UDP, other.Addr), 2)
	if shares := testnet.Shares(testnet.NewClients(t, ns, 100, addr).Ask()); shares[""] != 0 {
		t.Errorf("answers %v", shares)
	}
	if _, err := a.fs.Detach(key); err != nil {
		t.Fatal(err)
	}
	a.awaitListeners(key, 2)
}

// State of a newer rpsel is told of by name and left alone; other groups are kept
// as before.
func TestNewerState(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true}
	other := options
	other.Addr = "127.0.0.2:1194"
	testnet.StartServer(t, ns, options)
	testnet.StartServer(t, ns, other)
	services := service(ns, 1194, `settle = "0s"`)
	a := start(t, fs, services)
	setLayout := func(n uint32) { writeConfig(t, fs, ns, 8, binary.NativeEndian.AppendUint32(nil, n)) }
	clients := testnet.NewClients(t, ns, 100, addr)
	before := clients.Ask()
	setLayout(3)
	a.stop()
	a = start(t, fs, services)
	const newer = "state of a newer rpsel (layout 3, this one speaks 2): use that one"
	a.awaitSaid(newer)
	testnet.StartServer(t, ns, options)
	testnet.StartServer(t, ns, other)
	a.awaitListeners(keyOf(ns, loader.UDP, other.Addr), 2)
	if n := testnet.Moved(before, clients.Ask()); n != 0 {
		t.Errorf("%d flows moved", n)
	}
	setLayout(2)
	if s, ok := status(t, a.fs, keyOf(ns, loader.UDP, addr)); !ok || len(s.Listeners) != 1 {
		t.Errorf("it was not left alone: %+v", s)
	}
	a.awaitListeners(keyOf(ns, loader.UDP, addr), 2)
}

// A live server without SO_REUSEPORT is adopted if its service says so, and told
// of once if not.
func TestAdopt(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, Name: "a"}
	key := keyOf(ns, loader.UDP, addr)
	testnet.StartServer(t, ns, options)
	clients := testnet.NewClients(t, ns, 100, addr)
	before := clients.Ask()
	a := start(t, fs, service(ns, 1194, `settle = "0s"`))
	const refused = "socket was bound without SO_REUSEPORT"
	a.awaitSaid(refused)
	a.write(service(ns, 1194, `settle = "0s"`, "adopt = true"))
	a.reload <- unix.SIGHUP
	a.awaitListeners(key, 1)
	if n := strings.Count(a.said(), refused); n != 1 {
		t.Errorf("said %d times %q", n, refused)
	}
	if moved := testnet.Moved(before, clients.Ask()); moved != 0 { // and all are tracked
		t.Errorf("%d flows moved by adopting", moved)
	}
	options.Name, options.ReusePort = "b", true
	testnet.StartServer(t, ns, options)
	a.awaitListeners(key, 2)
	if moved := testnet.Moved(before, clients.Ask()); moved != 0 {
		t.Errorf("%d flows moved", moved)
	}
	if shares := testnet.Shares(testnet.NewClients(t, ns, 200, addr).Ask()); shares["b"] == 0 {
		t.Errorf("new flows: %v", shares)
	}
}

// OpenVPN with "user nobody" binds as another user at SIGUSR1, and is no member
// of its group any more.
func TestOtherOwner(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{
		Network: "udp4", Addr: addr, ReusePort: true,
		Sockopts: []testnet.Sockopt{{Level: unix.SOL_SOCKET, Name: unix.SO_REUSEADDR, Value: 1}},
	}
	testnet.StartServer(t, ns, options)
	a := start(t, fs, service(ns, 1194))
	options.UID = 65534
	testnet.StartServer(t, ns, options)
	const warning = `sockets of different users (uid 0, 65534) share no group: start all servers as one user (OpenVPN: no \"user nobody\", but User= in its unit)`
	a.awaitSaid(warning)
	a.awaitSaid(`msg=attached group="udp 127.0.0.1:1194 uid 65534"`)
	testnet.StartServer(t, ns, options)
	other := keyOf(ns, loader.UDP, addr)
	other.UID = 65534
	a.awaitListeners(other, 2)
	if n := strings.Count(a.said(), warning); n != 1 {
		t.Errorf("warned %d times", n)
	}
}

// The first server of a service registers as soon as it is bound, and drains: its
// owner's door is open before there is any group, and the request waits for the
// attach.
func TestOwnerAtOnce(t *testing.T) {
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	start(t, bpffs, service(ns, 1194, `owner = "nobody"`))
	dir, err := agent.Dir(bpffs)
	if err != nil {
		t.Fatal(err)
	}
	s := testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, UID: 65534})
	for _, ask := range []string{"register", "drain", "resume"} {
		if _, err := s.AskAgent(0, ask, dir); err != nil {
			t.Errorf("%s: %v", ask, err)
		}
	}
	// Another port of the same user is nobody's to give.
	other := testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1195", ReusePort: true, UID: 65534})
	if _, err := other.AskAgent(0, "register", dir); !strings.Contains(fmt.Sprint(err), "no rpsel state") {
		t.Errorf("a port without a service: %v", err)
	}
}

// The agent ends although somebody else has the lock that it waits for, and would
// for long.
func TestEndsWhileLocked(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true}
	key := keyOf(ns, loader.UDP, addr)
	first := testnet.StartGroup(t, ns, 2, options)
	a := start(t, fs, service(ns, 1194, `settle = "0s"`), func(o *Options) { o.pace.lock = 10 * time.Minute })
	a.awaitListeners(key, 2)
	dir, err := os.Open(filepath.Join(fs, "rpsel", fmt.Sprint(ns.Cookie())))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	await(t, "the lock", func() bool { return unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil })
	clients := testnet.NewClients(t, ns, 100, addr)
	before := clients.Ask()
	testnet.StartServer(t, ns, options)
	first.Close(0)
	awaitWaiter(t, dir)
	a.stop()
	if strings.Contains(a.said(), "locked by another") {
		t.Error("it waited for the lock as long as anybody does")
	}
	if moved := testnet.Moved(before, clients.Ask(), "s0"); moved != 0 {
		t.Errorf("%d flows moved", moved)
	}
}

// awaitWaiter returns when the agent, which is in this process, waits for the lock of
// a directory that the test has locked: then it has the directory open, too.
func awaitWaiter(t *testing.T, dir *os.File) {
	t.Helper()
	locked, err := dir.Stat()
	if err != nil {
		t.Fatal(err)
	}
	await(t, "the agent to wait for the lock", func() bool {
		descriptors, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, fd := range descriptors {
			if info, err := os.Stat(fd); err == nil && os.SameFile(info, locked) {
				n++
			}
		}
		return n > 1
	})
}

// There is one agent per BPF file system, and whoever looks finds it as long as
// it lives.
func TestOneAtATime(t *testing.T) {
	fs := testnet.BPFFS(t)
	if info, err := Running(fs); info != nil || err != nil {
		t.Errorf("before: %+v, %v", info, err)
	}
	a := start(t, fs, "")
	if diff := cmp.Diff(Info{PID: os.Getpid(), Mode: Events, Refused: []string{}}, running(t, fs)); diff != "" {
		t.Errorf("it says %s", diff)
	}
	err := Run(t.Context(), Options{FS: loader.FS(fs), Config: a.config, Log: slog.New(slog.DiscardHandler)})
	if want := fmt.Sprintf("an agent is running (pid %d)", os.Getpid()); !errors.Is(err, ErrRunning) || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("the second: %v, want %s", err, want)
	}
	start(t, testnet.BPFFS(t), "") // another file system is another agent's
	a.stop()
	if info, err := Running(fs); info != nil || err != nil {
		t.Errorf("after: %+v, %v", info, err)
	}
}

// The service manager hears what it asks for, and of the watchdog only from the
// loop.
func TestNotify(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	path := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "200000")
	var heard []string
	hears := func(what string) {
		t.Helper()
		buf := make([]byte, 4096)
		manager.SetReadDeadline(time.Now().Add(time.Minute))
		for {
			n, err := manager.Read(buf)
			if err != nil {
				t.Fatalf("%v, want %q, heard %q", err, what, heard)
			}
			lines := strings.Split(string(buf[:n]), "\n")
			heard = append(heard, lines...)
			if slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, what) }) {
				return
			}
		}
	}
	a := start(t, fs, service(ns, 1194))
	hears("READY=1")
	if slices.Contains(heard, "WATCHDOG=1") {
		t.Error("the watchdog was told before the agent was ready")
	}
	if !slices.Contains(heard, "STATUS=0 groups, 1 services") {
		t.Errorf("heard %q", heard)
	}
	hears("WATCHDOG=1")
	a.reload <- unix.SIGHUP
	hears("RELOADING=1")
	if !slices.ContainsFunc(heard, func(l string) bool { return strings.HasPrefix(l, "MONOTONIC_USEC=") }) {
		t.Errorf("heard %q", heard)
	}
	hears("READY=1")
	testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
	hears("STATUS=1 groups, 1 services")
	a.stop()
	hears("STOPPING=1")
}

// Whoever may bind the port of a service cannot make the agent take all memory
// by a group for each address there is.
func TestGroupsOfService(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	a := start(t, fs, service(ns, 1194, "flows = 64", `settle = "0s"`))
	addrOf := func(n int) string { return fmt.Sprintf("127.0.1.%d:1194", n) }
	for n := 1; n <= maxGroups+1; n++ {
		testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: addrOf(n), ReusePort: true})
		if n <= maxGroups {
			a.awaitListeners(keyOf(ns, loader.UDP, addrOf(n)), 1)
		}
	}
	a.awaitSaid(fmt.Sprintf("has %d groups, more are not attached", maxGroups))
	if keys, err := loader.FS(fs).Keys(ns.Cookie()); err != nil || len(keys) != maxGroups {
		t.Errorf("%d groups are attached, %v", len(keys), err)
	}
}

// A service's group takes no memory for long when its servers are gone, and is
// made anew when they come back. One that was attached by hand stays: nobody
// else knows how it was attached.
func TestForgetsEmpty(t *testing.T) {
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	const mine = "127.0.0.2:1195"
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true}
	a := start(t, fs, service(ns, 1194, `idle = "1s"`))
	first := testnet.StartServer(t, ns, options)
	byHand := testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: mine, ReusePort: true})
	conn, err := sockets.TakeMember(findPort(t, ns, 1195)[0])
	if err != nil {
		t.Fatal(err)
	}
	g, err := loader.FS(fs).Attach(conn, loader.Options{Settle: -1})
	conn.Close()
	if err != nil {
		t.Fatal(err)
	}
	g.Close()
	a.awaitListeners(keyOf(ns, loader.UDP, addr), 1)
	a.awaitListeners(keyOf(ns, loader.UDP, mine), 1)
	byHand.Kill()
	first.Kill()
	a.awaitSaid("state removed: its servers have been gone for longer than idle")
	if keys, err := loader.FS(fs).Keys(ns.Cookie()); err != nil || len(keys) != 1 || keys[0].Addr.String() != mine {
		t.Errorf("state is left of %v, %v", keys, err)
	}
	testnet.StartServer(t, ns, options)
	a.awaitListeners(keyOf(ns, loader.UDP, addr), 1)
}
