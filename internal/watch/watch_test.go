package watch_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/sockets"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("RPSEL_TEST_WATCH"); dir != "" {
		_, err := watch.Open(dir)
		fmt.Println(err)
		select {} // until it is killed
	}
	testnet.Main(m)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// await waits until something is so.
func await(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// group makes a cgroup below a directory, or below the test's own cgroup ("").
func group(t testing.TB, below string) string {
	t.Helper()
	testnet.Privileged(t)
	if below == "" {
		own, err := cgroup.Own()
		must(t, err)
		below = own
	}
	dir, err := os.MkdirTemp(below, "rpsel-test-")
	must(t, err)
	t.Cleanup(func() {
		await(t, "processes to leave "+dir, func() bool { return !errors.Is(os.Remove(dir), unix.EBUSY) })
	})
	return dir
}

// open watches ports until the test ends.
func open(t testing.TB, dir string, ports ...watch.Port) *watch.Watcher {
	t.Helper()
	w, err := watch.Open(dir)
	must(t, err)
	t.Cleanup(func() { w.Close() })
	must(t, w.SetPorts(ports))
	return w
}

// events collects what a watcher reports, of the namespaces in netns if there
// are any: others test on this machine as well.
func events(t testing.TB, w *watch.Watcher, netns ...uint64) func() []watch.Event {
	t.Helper()
	var mu sync.Mutex
	var all []watch.Event
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- w.Run(ctx, func(batch []watch.Event) {
			mu.Lock()
			defer mu.Unlock()
			for _, e := range batch {
				if len(netns) == 0 || slices.Contains(netns, e.NetNS) {
					all = append(all, e)
				}
			}
		})
	}()
	t.Cleanup(func() {
		stop()
		must(t, <-done)
	})
	return func() []watch.Event {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

var both = []watch.Port{{Proto: sockets.UDP, Port: 1194}, {Proto: sockets.TCP, Port: 1194}}

// Each listener on a port that is watched is told of, and nothing else, with
// what is needed to find it; at that time it can be found in its group.
func TestEvents(t *testing.T) {
	dir, ns := group(t, ""), testnet.New(t)
	w := open(t, dir, both...)
	got := events(t, w)
	command := filepath.Base(os.Args[0])
	command = command[:min(len(command), 15)]

	var want []watch.Event
	for _, network := range []string{"udp4", "udp6", "tcp4", "tcp6"} {
		for _, addr := range []string{"127.0.0.1", "0.0.0.0", "[::1]", "[::]"} {
			if (addr[0] == '[') != strings.HasSuffix(network, "6") {
				continue
			}
			for _, port := range []int{1194, 1195} {
				s := testnet.StartServer(t, ns, testnet.ServerOptions{
					Network: network, Addr: fmt.Sprint(addr, ":", port), ReusePort: true, V6Only: true, Cgroup: dir,
				})
				if port != 1194 {
					continue
				}
				e := watch.Event{Addr: s.Addr, NetNS: ns.Cookie(), PID: s.PID(), Command: command}
				must(t, e.Proto.UnmarshalText([]byte(network[:3])))
				await(t, "the event", func() bool { return len(got()) > len(want) })
				groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Proto: e.Proto, Port: 1194, Addr: s.Addr.Addr(), PID: s.PID()})
				if err != nil || len(groups) != 1 || len(groups[0].Members) != 1 {
					t.Fatalf("found %+v, %v", groups, err)
				}
				e.Cookie = groups[0].Members[0].Cookie
				want = append(want, e)
			}
		}
	}
	// Not in the cgroup, and, being the last, after all that there is.
	testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.2:1194", ReusePort: true})
	last := testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.3:1194", ReusePort: true, Cgroup: dir})
	await(t, "the last event", func() bool {
		all := got()
		return len(all) > 0 && all[len(all)-1].PID == last.PID()
	})
	all := got()
	sameAddr := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	if diff := cmp.Diff(want, all[:len(all)-1], sameAddr); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if missed, err := w.Missed(); missed != 0 || err != nil {
		t.Errorf("missed %d, %v", missed, err)
	}
	if s := want[0].String(); s != fmt.Sprintf("%s (pid %d): udp 127.0.0.1:1194", command, want[0].PID) {
		t.Error(s)
	}
}

// What is bound when Sync is called has been told of when it returns, again and again.
// Without a Run there is nothing to wait for.
func TestSync(t *testing.T) {
	dir, ns := group(t, ""), testnet.New(t)
	w := open(t, dir, both...)
	w.Sync()
	got := events(t, w)
	s := testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Cgroup: dir})
	await(t, "the first event", func() bool { return len(got()) == 1 }) // so it runs
	for n := 2; n <= 50; n++ {
		s.Add()
		w.Sync()
		if len(got()) != n {
			t.Fatalf("%d events of %d listeners", len(got()), n)
		}
	}
}

// The watched ports can be changed, and those that stay are watched on.
func TestSetPorts(t *testing.T) {
	dir, ns := group(t, ""), testnet.New(t)
	w := open(t, dir)
	got := events(t, w)
	port := func(proto sockets.Proto, n uint16) watch.Port { return watch.Port{Proto: proto, Port: n} }
	var want []string
	for _, ports := range [][]watch.Port{
		{port(sockets.UDP, 1), port(sockets.UDP, 2)},
		{port(sockets.UDP, 2), port(sockets.TCP, 2)},
		{port(sockets.UDP, 3), port(sockets.UDP, 2)}, // 3 is there to be the last
	} {
		must(t, w.SetPorts(ports))
		for _, n := range []uint16{1, 2, 3} {
			for _, network := range []string{"tcp4", "udp4"} {
				s := testnet.StartServer(t, ns, testnet.ServerOptions{Network: network, Addr: fmt.Sprint("127.0.0.1:", n), Cgroup: dir})
				s.Kill()
				var p watch.Port
				must(t, p.Proto.UnmarshalText([]byte(network[:3])))
				p.Port = n
				if slices.Contains(ports, p) {
					want = append(want, fmt.Sprint(network[:3], " ", n))
				}
			}
		}
	}
	await(t, "the last event", func() bool {
		all := got()
		return len(all) > 0 && all[len(all)-1].Addr.Port() == 3
	})
	var seen []string
	for _, e := range got() {
		seen = append(seen, fmt.Sprint(e.Proto, " ", e.Addr.Port()))
	}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Of a TCP socket that was bound before its port was watched it is not known by
// whom, nor where; it is told of all the same. The root of the hierarchy is what
// is watched by default.
func TestUnknownBinder(t *testing.T) {
	ns := testnet.New(t)
	const port = 39157 // nobody else's
	w := open(t, "")
	fd := -1
	must(t, ns.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	}))
	defer unix.Close(fd)
	must(t, w.SetPorts([]watch.Port{{Proto: sockets.TCP, Port: port}}))
	got := events(t, w)
	must(t, unix.Listen(fd, 1))
	await(t, "the event", func() bool { return len(got()) > 0 })
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	must(t, err)
	want := watch.Event{Proto: sockets.TCP, Addr: netip.MustParseAddrPort(fmt.Sprint("127.0.0.1:", port)), Cookie: cookie}
	if e := got()[0]; e != want {
		t.Errorf("got %+v, want %+v", e, want)
	} else if e.String() != fmt.Sprintf("socket %d: tcp 127.0.0.1:%d", cookie, port) {
		t.Error(e)
	}
}

// A process that cannot be told in time is not kept waiting: what does not fit
// into the buffer is counted, and nothing else is lost.
func TestMissed(t *testing.T) {
	ns := testnet.New(t)
	const port, n = 39158, 4500
	w := open(t, "", watch.Port{Proto: sockets.UDP, Port: port})
	must(t, ns.Do(func() error {
		for range n {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			// The socket before may still be closing, if a search looks at it.
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			if err == nil {
				err = unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
			}
			unix.Close(fd)
			if err != nil {
				return err
			}
		}
		return nil
	}))
	missed, err := w.Missed()
	must(t, err)
	if missed == 0 || missed >= n {
		t.Fatalf("missed %d of %d", missed, n)
	}
	got := events(t, w, ns.Cookie())
	await(t, "the rest", func() bool { return len(got()) >= n-int(missed) })
	if len(got()) != n-int(missed) {
		t.Errorf("%d events came and %d were missed, of %d", len(got()), missed, n)
	}
}

// hooks are where the programs are.
var hooks = []ebpf.AttachType{ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind, ebpf.AttachCGroupSockOps}

// attached lists the programs on a cgroup itself, by hook.
func attached(t testing.TB, dir string) (n [3]int) {
	t.Helper()
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	for i, hook := range hooks {
		result, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: hook})
		must(t, err)
		n[i] = len(result.Programs)
	}
	return n
}

// What is attached goes with the Watcher, or with the process that was killed.
func TestGoneWithTheProcess(t *testing.T) {
	dir := group(t, "")
	w, err := watch.Open(dir)
	must(t, err)
	if n := attached(t, dir); n != [3]int{1, 1, 1} {
		t.Errorf("%d programs are attached", n)
	}
	must(t, w.Close())
	if n := attached(t, dir); n != [3]int{} {
		t.Errorf("%d programs are attached after Close", n)
	}

	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"RPSEL_TEST_WATCH=" + dir}
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	said := make([]byte, 100)
	if n, err := out.Read(said); err != nil || string(said[:n]) != "<nil>\n" {
		t.Fatalf("%q, %v", said[:n], err)
	}
	if n := attached(t, dir); n != [3]int{1, 1, 1} {
		t.Errorf("%d programs are attached by another process", n)
	}
	cmd.Process.Kill()
	await(t, "the programs to go", func() bool { return attached(t, dir) == [3]int{} })
}

// Close ends a Run, and may be called again.
func TestCloseEndsRun(t *testing.T) {
	dir, ns := group(t, ""), testnet.New(t)
	w := open(t, dir, both...)
	came, done := make(chan struct{}, 1), make(chan error, 1)
	go func() { done <- w.Run(context.Background(), func([]watch.Event) { came <- struct{}{} }) }()
	testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", Cgroup: dir})
	<-came
	must(t, w.Close())
	must(t, <-done)
	must(t, w.Close())
}

func TestOpenRefused(t *testing.T) {
	testnet.Privileged(t)
	if _, err := watch.Open("/tmp"); !errors.Is(err, cgroup.ErrNotCgroup2) {
		t.Errorf("%v, want %v", err, cgroup.ErrNotCgroup2)
	}
	if _, err := watch.Open("/nowhere"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, want %v", err, os.ErrNotExist)
	}
}

// tool is another tool's program, which counts how often it runs.
type tool struct {
	t     testing.TB
	count *ebpf.Map
	hook  ebpf.AttachType
	prog  *ebpf.Program
}

func newTool(t testing.TB, hook ebpf.AttachType) *tool {
	t.Helper()
	count, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	must(t, err)
	t.Cleanup(func() { count.Close() })
	kind := ebpf.CGroupSock
	if hook == ebpf.AttachCGroupSockOps {
		kind = ebpf.SockOps
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "other_tool", Type: kind, AttachType: hook, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{
			asm.StoreImm(asm.R10, -4, 0, asm.Word),
			asm.Mov.Reg(asm.R2, asm.R10),
			asm.Add.Imm(asm.R2, -4),
			asm.LoadMapPtr(asm.R1, count.FD()),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.Mov.Imm(asm.R1, 1),
			asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
			asm.Return(),
		},
	})
	must(t, err)
	t.Cleanup(func() { prog.Close() })
	return &tool{t, count, hook, prog}
}

// attach attaches as tools do that know nothing of links, until the test ends.
func (o *tool) attach(dir string, flags uint32) {
	o.t.Helper()
	f, err := os.Open(dir)
	must(o.t, err)
	o.t.Cleanup(func() {
		link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(f.Fd()), Program: o.prog, Attach: o.hook})
		f.Close()
	})
	must(o.t, link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(f.Fd()), Program: o.prog, Attach: o.hook, Flags: flags}))
}

func (o *tool) runs() (n uint64) {
	o.t.Helper()
	must(o.t, o.count.Lookup(uint32(0), &n))
	return n
}

// kinds are how other tools attach.
var kinds = []struct {
	name  string
	flags uint32
}{{"exclusive", 0}, {"override", unix.BPF_F_ALLOW_OVERRIDE}, {"multi", unix.BPF_F_ALLOW_MULTI}}

// networks say what runs a hook.
var networks = map[ebpf.AttachType]struct{ network, addr string }{
	ebpf.AttachCGroupInet4PostBind: {"udp4", "127.0.0.1:1194"},
	ebpf.AttachCGroupInet6PostBind: {"udp6", "[::1]:1194"},
	ebpf.AttachCGroupSockOps:       {"tcp4", "127.0.0.1:1194"},
}

// Another tool's program on the cgroup, or above, runs on in every case: beside
// ours, or without ours, which is refused by name.
func TestBesideOthers(t *testing.T) {
	for _, hook := range hooks {
		for _, kind := range kinds {
			for _, where := range []string{"on it", "above"} {
				t.Run(fmt.Sprint(hook, " ", kind.name, " ", where), func(t *testing.T) {
					ns, top := testnet.New(t), group(t, "")
					dir := top
					if where == "above" {
						dir = group(t, top)
					}
					other := newTool(t, hook)
					other.attach(top, kind.flags)
					before := attached(t, dir)

					w, err := watch.Open(dir)
					if err == nil {
						defer w.Close()
						must(t, w.SetPorts(both))
					}
					runs := other.runs()
					s := testnet.StartServer(t, ns, testnet.ServerOptions{Network: networks[hook].network, Addr: networks[hook].addr, Cgroup: dir})
					if other.runs() == runs {
						t.Error("the other tool's program did not run")
					}
					if kind.flags == unix.BPF_F_ALLOW_MULTI {
						must(t, err)
						got := events(t, w)
						await(t, "the event", func() bool { return len(got()) == 1 && got()[0].PID == s.PID() })
						return
					}
					if !errors.Is(err, cgroup.ErrOccupied) || !strings.Contains(err.Error(), "other_tool") || !strings.Contains(err.Error(), top) {
						t.Errorf("%v, want %v with its name and place", err, cgroup.ErrOccupied)
					}
					if after := attached(t, dir); after != before {
						t.Errorf("%d programs on the cgroup became %d", before, after)
					}
				})
			}
		}
	}
}

// Another tool may attach below, before or after, in whatever way: its program
// runs, and ours is told of what happens there.
func TestOthersBelow(t *testing.T) {
	for _, hook := range hooks {
		for _, kind := range kinds {
			for _, first := range []bool{true, false} {
				t.Run(fmt.Sprint(hook, " ", kind.name, " first ", first), func(t *testing.T) {
					ns, top := testnet.New(t), group(t, "")
					below := group(t, top)
					other := newTool(t, hook)
					if first {
						other.attach(below, kind.flags)
					}
					got := events(t, open(t, top, both...))
					if !first {
						other.attach(below, kind.flags)
					}
					s := testnet.StartServer(t, ns, testnet.ServerOptions{Network: networks[hook].network, Addr: networks[hook].addr, Cgroup: below})
					await(t, "the event", func() bool { return len(got()) == 1 && got()[0].PID == s.PID() })
					if other.runs() == 0 {
						t.Error("the other tool's program did not run")
					}
				})
			}
		}
	}
}
