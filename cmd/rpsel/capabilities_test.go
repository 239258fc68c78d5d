package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/door"
	"github.com/rpsel/rpsel/internal/testnet"
)

// onlyCmd runs a command as root with some capabilities and no others:
// only bpf,perfmon CMD…
func onlyCmd() {
	runtime.LockOSThread()
	keep := strings.Split(os.Args[1], ",")
	for bit := uintptr(0); ; bit++ {
		on, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, bit, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // there are no more
		}
		if on == 1 && !slices.Contains(keep, fmt.Sprint(bit)) {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, bit, 0, 0, 0); err != nil {
				panic(err)
			}
		}
	}
	panic(syscall.Exec(os.Args[2], os.Args[2:], os.Environ()))
}

// The users of these tests. Servers are never the caller's.
const (
	capCaller = 65534
	capServer = 33
)

// capWorld is what a case of TestCapabilities is tried in.
type capWorld struct {
	t      *testing.T
	ns     *testnet.NetNS
	bpffs  string
	built  string // the command
	uid    int
	cgroup *os.File // nil: the test's
}

// command is the built command with some capabilities and no others.
func (w *capWorld) command(have []capability.Capability, args ...string) *exec.Cmd {
	w.t.Helper()
	cmd := exec.Command(w.built, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if w.cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(w.cgroup.Fd())
	}
	if w.uid == 0 {
		self, err := os.Executable()
		if err != nil {
			w.t.Fatal(err)
		}
		var bits []string
		for _, c := range have {
			bits = append(bits, fmt.Sprint(c.Bit))
		}
		cmd.Path, cmd.Args = self, append([]string{"only", strings.Join(bits, ","), w.built}, args...)
		return cmd
	}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(w.uid), Gid: uint32(w.uid)}
	for _, c := range have {
		cmd.SysProcAttr.AmbientCaps = append(cmd.SysProcAttr.AmbientCaps, uintptr(c.Bit))
	}
	return cmd
}

// run runs a command that ends by itself.
func (w *capWorld) run(have []capability.Capability, args ...string) (code int, out, talk string) {
	w.t.Helper()
	cmd := w.command(have, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := w.ns.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if exit := (&exec.ExitError{}); err != nil && !errors.As(err, &exit) {
		w.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

// until runs a command up to a line on its standard error that has the last of
// these words, and then ends it. The others have to be met by then. The exit code is that of a missing permission
// if the command has lived with one and said so.
func (w *capWorld) until(words []string, have []capability.Capability, args ...string) (code int, out, talk string) {
	w.t.Helper()
	cmd := w.command(have, args...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.ns.Start(cmd); err != nil {
		w.t.Fatal(err)
	}
	defer time.AfterFunc(2*time.Minute, func() { cmd.Process.Kill() }).Stop()
	met, complaint := false, ""
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "permission denied") {
			complaint += lines.Text() + " "
		}
		if !met {
			talk += lines.Text() + "\n"
		}
		if met = met || strings.Contains(lines.Text(), words[len(words)-1]); met {
			stdin.Close() // ends a listener
			if args[0] == "agent" || args[0] == "events" {
				cmd.Process.Signal(syscall.SIGTERM)
			}
		}
	}
	err = cmd.Wait()
	if exit := (&exec.ExitError{}); err != nil && !errors.As(err, &exit) {
		w.t.Fatal(err)
	}
	switch {
	case complaint != "":
		return exitPermission, "", complaint + "\n"
	case !met:
		return cmd.ProcessState.ExitCode(), "it ended early", talk
	}
	for _, word := range words {
		if !strings.Contains(talk, word) {
			return exitFailed, "it never said " + word, talk
		}
	}
	return cmd.ProcessState.ExitCode(), "", talk
}

// own gives what is on the bpffs to the caller.
func (w *capWorld) own() {
	w.t.Helper()
	err := filepath.WalkDir(w.bpffs, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, w.uid, w.uid))
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// rpsel runs the built command as root with all capabilities.
func (w *capWorld) rpsel(args ...string) {
	w.t.Helper()
	if out, err := w.ns.Command(w.built, args...).CombinedOutput(); err != nil {
		w.t.Fatalf("rpsel %v: %v: %s", args, err, out)
	}
	w.own()
}

func (w *capWorld) serve(addr string, o testnet.ServerOptions) {
	w.t.Helper()
	o.Network, o.Addr = "udp4", addr
	if w.cgroup != nil && o.Cgroup == "" {
		o.Cgroup = w.cgroup.Name()
	}
	testnet.StartServer(w.t, w.ns, o)
}

// ownCgroup gives the commands a cgroup of their own.
func (w *capWorld) ownCgroup() {
	w.t.Helper()
	own, err := cgroup.Own()
	if err != nil {
		w.t.Fatal(err)
	}
	dir, err := os.MkdirTemp(own, "rpsel-test-")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		// The reaper removes what is in there, some time after the command.
		deadline := time.Now().Add(time.Minute)
		for os.Remove(dir) != nil {
			if time.Now().After(deadline) {
				w.t.Error("left: ", dir)
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	for _, name := range []string{"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
		if err := os.Chown(filepath.Join(dir, name), w.uid, w.uid); err != nil {
			w.t.Fatal(err)
		}
	}
	if w.cgroup, err = os.Open(dir); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { w.cgroup.Close() })
}

// subCgroup makes one below that for servers.
func (w *capWorld) subCgroup() string {
	w.t.Helper()
	dir := filepath.Join(w.cgroup.Name(), "below")
	if err := os.Mkdir(dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			w.t.Error(err)
		}
	})
	return dir
}

// runOnAttached tries whether the listener of a command is registered. That the
// command itself runs all the same is what it is for.
func runOnAttached(args ...string) capTrial {
	return func(w *capWorld) func([]capability.Capability) (int, string, string) {
		w.ownCgroup()
		w.attach(args...)
		return func(have []capability.Capability) (int, string, string) {
			return w.until([]string{"registered"}, have, "run", "--port", "1194", "--debug", "--user", fmt.Sprint(capServer), "--bpffs", w.bpffs,
				"--", w.built, demoListener, "late")
		}
	}
}

// agentTrial tries whether an agent registers a listener, opens the owners'
// doors and watches for events. Where it cannot it goes on all the same.
func agentTrial(args ...string) capTrial {
	return func(w *capWorld) func([]capability.Capability) (int, string, string) {
		w.ownCgroup()
		w.attach(args...)
		w.ownRunDir()
		below := w.subCgroup()
		return func(have []capability.Capability) (int, string, string) {
			o := shared
			o.Cgroup = below
			w.serve("127.0.0.1:1194", o)
			return w.until([]string{"msg=registered", "mode=events", "msg=ready"}, have, "agent", "--bpffs", w.bpffs, "--cgroup", w.cgroup.Name())
		}
	}
}

// ownRunDir gives the agents their run directory.
func (w *capWorld) ownRunDir() {
	w.t.Helper()
	dir, err := agent.Dir(w.bpffs)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			w.t.Error(err)
		}
	})
	if err := errors.Join(door.MakeDir(dir), os.Chown(dir, w.uid, w.uid)); err != nil {
		w.t.Fatal(err)
	}
}

// capTrial is how to try what a line of needs is about: it makes what is there
// before, and returns what runs the command with some capabilities.
type capTrial func(w *capWorld) func(have []capability.Capability) (code int, out, talk string)

var capTrials = map[string]capTrial{
	"attach": line(func(w *capWorld) []string {
		w.serve("127.0.0.1:1194", shared)
		return []string{"attach", "--port", "1194", "--bpffs", w.bpffs}
	}),
	"attach --proto tcp": line(func(w *capWorld) []string {
		w.serveTCP()
		return []string{"attach", "--port", "1194", "--proto", "tcp", "--policy", "least", "--bpffs", w.bpffs}
	}),
	"attach -N": line(func(w *capWorld) []string {
		w.serve("127.0.0.1:1194", shared)
		return []string{"attach", "--port", "1194", "--bpffs", w.bpffs, "-N", w.outside()}
	}),
	unmounted: line(func(w *capWorld) []string {
		w.serve("127.0.0.1:1194", shared)
		dir := testnet.RunDir(w.t)
		if err := os.Chown(dir, w.uid, w.uid); err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				w.t.Error(err)
			}
		})
		return []string{"attach", "--port", "1194", "--bpffs", dir}
	}),
	"attach --adopt": line(func(w *capWorld) []string {
		w.serve("127.0.0.1:1194", lone)
		return []string{"attach", "--port", "1194", "--adopt", "--bpffs", w.bpffs}
	}),
	"attach --adopt below port 1024": line(func(w *capWorld) []string {
		w.unprivilegedPorts(0)
		w.serve("127.0.0.1:53", lone)
		w.unprivilegedPorts(1024)
		return []string{"attach", "--port", "53", "--adopt", "--bpffs", w.bpffs}
	}),
	"attach --adopt --proto tcp": line(func(w *capWorld) []string {
		testnet.StartServer(w.t, w.ns, testnet.ServerOptions{Network: "tcp4", Addr: "127.0.0.1:4433", UID: capServer})
		return []string{"attach", "--port", "4433", "--proto", "tcp", "--adopt", "--bpffs", w.bpffs}
	}),
	"attach --adopt -N": line(func(w *capWorld) []string {
		w.serve("127.0.0.1:1194", lone)
		return []string{"attach", "--port", "1194", "--adopt", "--bpffs", w.bpffs, "-N", w.outside()}
	}),
	"attach --confirm reply": line(func(w *capWorld) []string {
		w.ownCgroup()
		w.serve("127.0.0.1:1194", shared)
		return []string{"attach", "--port", "1194", "--confirm", "reply", "--bpffs", w.bpffs}
	}),
	"detach":             attached("detach", "--port", "1194"),
	"upgrade":            attached("upgrade", "--flows", "1000"),
	"status":             attached("status"),
	"status --proto tcp": attachedTCP("status", "--proto", "tcp"),
	"flows":              attached("flows", "--port", "1194"),
	"why":                attached("why", "127.0.0.1"),
	"events": func(w *capWorld) func([]capability.Capability) (int, string, string) {
		w.attach()
		return func(have []capability.Capability) (int, string, string) {
			return w.until([]string{"reading events"}, have, "events", "--port", "1194", "--bpffs", w.bpffs)
		}
	},
	"metrics":           attached("metrics", "--port", "1194"),
	"drain":             attached("drain", "--port", "1194", "--slot", "0"),
	"drain --proto tcp": attachedTCP("drain", "--port", "1194", "--proto", "tcp", "--slot", "0", "--wait"),
	"resume":            attached("resume", "--port", "1194", "--slot", "0"),
	"weight":            attached("weight", "--port", "1194", "--slot", "0", "2"),
	"flush":             attached("flush", "--port", "1194", "--all"),
	"run": line(func(w *capWorld) []string {
		w.ownCgroup()
		return []string{"run", "--port", "1194", "--", "true"}
	}),
	"run --user": line(func(w *capWorld) []string {
		w.ownCgroup()
		return []string{"run", "--port", "1194", "--user", fmt.Sprint(capServer), "--", "true"}
	}),
	"run --user, on an attached port":          runOnAttached(),
	"run --user, on a port with confirm reply": runOnAttached("--confirm", "reply"),
	"agent, with confirm reply":                agentTrial("--confirm", "reply"),
	"agent":                                    agentTrial(),
	"agent, for owners":                        agentTrial("--owner", fmt.Sprint(capServer)),
	"agent, with the netns of a service": func(w *capWorld) func([]capability.Capability) (int, string, string) {
		w.ownRunDir()
		w.ownCgroup()
		servers := w.ns
		path := w.outside()
		config := filepath.Join(filepath.Dir(path), "rpsel.toml")
		if err := os.WriteFile(config, fmt.Appendf(nil, "[[service]]\nport = 1194\nnetns = %q\n", path), 0o644); err != nil {
			w.t.Fatal(err)
		}
		more := []capability.Capability{}
		if !sysAdminQueries(w.t, w.cgroup) {
			more = append(more, capability.NetAdmin)
		}
		return func(have []capability.Capability) (int, string, string) {
			have = slices.Concat(have, more)
			agents := w.ns
			w.ns = servers
			w.serve("127.0.0.1:1194", shared)
			w.ns = agents
			return w.until([]string{"msg=attached", "mode=events", "msg=ready"}, have, "agent", "--bpffs", w.bpffs, "--cgroup", w.cgroup.Name(), "--config", config)
		}
	},
	"demo": line(func(*capWorld) []string { return []string{"demo", "-q"} }),
}

var (
	shared = testnet.ServerOptions{ReusePort: true, UID: capServer}
	lone   = testnet.ServerOptions{UID: capServer}
)

// line tries a command line that does one thing and ends.
func line(before func(w *capWorld) []string) capTrial {
	return func(w *capWorld) func([]capability.Capability) (int, string, string) {
		args := before(w)
		return func(have []capability.Capability) (int, string, string) { return w.run(have, args...) }
	}
}

// attached is a command on a port that is attached.
func attached(args ...string) capTrial {
	return line(func(w *capWorld) []string {
		w.attach()
		testnet.NewClients(w.t, w.ns, 10, "127.0.0.1:1194").Ask()
		return append(args, "--bpffs", w.bpffs)
	})
}

// attachedTCP is a command on a TCP port that is attached.
func attachedTCP(args ...string) capTrial {
	return line(func(w *capWorld) []string {
		w.serveTCP()
		w.rpsel("attach", "--port", "1194", "--proto", "tcp", "--bpffs", w.bpffs)
		testnet.NewTCPClients(w.t, w.ns, 10, "127.0.0.1:1194").Ask()
		return append(args, "--bpffs", w.bpffs)
	})
}

func (w *capWorld) serveTCP() {
	w.t.Helper()
	o := shared
	o.Network, o.Addr = "tcp4", "127.0.0.1:1194"
	testnet.StartServer(w.t, w.ns, o)
}

// attach serves port 1194, and attaches it with all capabilities.
func (w *capWorld) attach(args ...string) {
	w.t.Helper()
	w.serve("127.0.0.1:1194", shared)
	w.rpsel(append([]string{"attach", "--port", "1194", "--bpffs", w.bpffs}, args...)...)
}

// outside moves the commands out of the namespace of the server, and returns
// a path by which everybody may enter that.
func (w *capWorld) outside() string {
	w.t.Helper()
	path := filepath.Join(testnet.RunDir(w.t), "netns")
	if err := errors.Join(os.WriteFile(path, nil, 0o644), unix.Mount(w.ns.Path(), path, "", unix.MS_BIND, "")); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			w.t.Error(err)
		}
	})
	w.ns = testnet.New(w.t)
	return path
}

// unprivilegedPorts says from which port on everybody may bind.
func (w *capWorld) unprivilegedPorts(first int) {
	w.t.Helper()
	err := w.ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte(fmt.Sprint(first)), 0)
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

func newCapWorld(t *testing.T, built string, uid int) *capWorld {
	w := &capWorld{t: t, ns: testnet.New(t), built: built, uid: uid}
	w.bpffs = testnet.RunDir(t)
	if err := unix.Mount("bpf", w.bpffs, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(w.bpffs, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	w.own()
	return w
}

// free lists the commands that need no capability.
var free = []string{"check", "version", "completion", "help"}

// Every command is in the table, or does without.
func TestCapabilitiesAreListed(t *testing.T) {
	for _, cmd := range newRootCmd(&env{}).Commands() {
		listed := func(n capability.Need) bool { return n.Command == cmd.Name() }
		if !cmd.Hidden && slices.ContainsFunc(capability.Needs, listed) == slices.Contains(free, cmd.Name()) {
			t.Errorf("does %s need a capability?", cmd.Name())
		}
	}
}

// What needs no capability works without any. check says what is missing.
func TestNoCapability(t *testing.T) {
	testnet.Privileged(t)
	w := newCapWorld(t, buildCommand(t, "rpsel"), capCaller)
	for _, args := range [][]string{{"version"}, {"completion", "bash"}, {"help"}} {
		if code, out, talk := w.run(nil, args...); code != exitDone || out == "" {
			t.Errorf("%v: exit code %d, stdout %q, stderr %q", args, code, out, talk)
		}
	}
	code, out, talk := w.run(nil, "check", "--bpffs", w.bpffs)
	if code != exitPermission {
		t.Errorf("check: exit code %d, stderr %q", code, talk)
	}
	for _, c := range capability.All {
		if !regexp.MustCompile(`(?m)^` + c.Name + ` +missing  ` + regexp.QuoteMeta(c.Commands()[0])).MatchString(out) {
			t.Errorf("check does not say that %s is missing: %s", c.Name, out)
		}
	}
}

// inThread calls f in a thread that ends with it, and so with what f made of its
// user and its capabilities.
func inThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		done <- f()
	}()
	return <-done
}

// lacking calls f in a thread that lacks capabilities.
func lacking(f func() error, caps ...capability.Capability) error {
	return inThread(func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var have [2]unix.CapUserData
		if err := unix.Capget(&header, &have[0]); err != nil {
			return err
		}
		for _, c := range caps {
			have[c.Bit/32].Effective &^= 1 << (c.Bit % 32)
		}
		if err := unix.Capset(&header, &have[0]); err != nil {
			return err
		}
		return f()
	})
}

// readsNames reports whether the kernel lets programs at bind(2) read a process's name without
// CAP_PERFMON: 6.12 does, 6.1 and 6.18 do not.
func readsNames() bool {
	var objects bpf.BindObjects
	err := lacking(func() error { return bpf.LoadBindObjects(&objects, nil) }, capability.Perfmon, capability.SysAdmin)
	if err == nil {
		objects.Close()
	}
	return err == nil
}

// sysAdminQueries reports whether the kernel takes CAP_SYS_ADMIN for CAP_NET_ADMIN
// of who asks what is attached to a cgroup. Linux 6.1 does not.
func sysAdminQueries(t *testing.T, dir *os.File) bool {
	t.Helper()
	err := lacking(func() error {
		_, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: ebpf.AttachCGroupInet4Bind})
		return err
	}, capability.NetAdmin)
	// The library takes a refusal for a kernel that does not know the command.
	if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, ebpf.ErrNotSupported) {
		t.Fatal(err)
	}
	return err == nil
}

const unmounted = "attach, where no bpffs is mounted"

// ownMount reports whether a bpffs belongs to the user who mounts it: before Linux
// 6.8 it is root's (kernel/bpf/inode.c, bpf_init_fs_context).
func ownMount(t *testing.T, uid int) bool {
	t.Helper()
	dir := testnet.RunDir(t)
	err := inThread(func() error {
		if _, err := unix.SetfsuidRetUid(uid); err != nil {
			return err
		}
		return unix.Mount("bpf", dir, "bpf", 0, "")
	})
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(dir)
	if err := errors.Join(err, unix.Unmount(dir, 0)); err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Uid == uint32(uid)
}

// Each command works with the capabilities that are listed, as root and as
// another user, and without any one of them it ends with exit code 4 and says
// which one that is.
func TestCapabilities(t *testing.T) {
	testnet.Privileged(t)
	callers := []int{0, capCaller}
	if testing.Short() {
		callers = callers[1:]
	}
	built := buildCommand(t, "rpsel")
	for _, n := range capability.Needs {
		trial, ok := capTrials[n.Command]
		if !ok {
			t.Errorf("%s is not tried", n.Command)
			continue
		}
		for _, uid := range callers {
			if uid != 0 && (n.Command == unmounted || n.Command == "demo") && !ownMount(t, uid) {
				continue
			}
			t.Run(fmt.Sprintf("%s as uid %d", n.Command, uid), func(t *testing.T) {
				w := newCapWorld(t, built, uid)
				try := trial(w)
				for i, c := range n.All {
					rest := slices.Delete(slices.Clone(n.All), i, i+1)
					if c == capability.SysAdmin {
						// It is missed for itself, not for what it covers.
						rest = append(rest, capability.BPF, capability.Perfmon, capability.NetAdmin)
					}
					code, out, talk := try(rest)
					if c == capability.Perfmon && (n.Command == "run" || n.Command == "run --user") && readsNames() {
						if code != exitDone {
							t.Errorf("without %s, which this kernel does not ask for: exit code %d, stderr %q", c.Name, code, talk)
						}
						continue
					}
					if code != exitPermission || !strings.Contains(talk, c.Name) || out != "" || strings.Count(talk, "\n") != 1 {
						t.Errorf("without %s: exit code %d, stdout %q, stderr %q", c.Name, code, out, talk)
					}
				}
				if code, out, talk := try(n.All); code != exitDone {
					t.Errorf("with all: exit code %d, stdout %q, stderr %q", code, out, talk)
				}
			})
		}
	}
}
