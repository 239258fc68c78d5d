package force_test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/force"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/sockets"
)

// server is the static Go server of testdata, where every user may execute it.
var server string

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "force-") {
		if err := asCommand(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(withServer(testnet.Checked{M: m}.Run))
}

// withServer builds the server for as long as the tests run.
func withServer(run func() int) int {
	dir, err := os.MkdirTemp("", "rpsel-force")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		panic(err)
	}
	server = filepath.Join(dir, "server")
	if err := testnet.BuildAt(server, "force-server"); err != nil {
		panic(err)
	}
	return run()
}

// order is what a test asks a process of the test binary to do.
type order struct {
	Settings force.Settings
	User     string
	Log      string // where the reaper writes what it is told
	Reaper   string // another one than force-reap
	Cgroup   string // of force-watch
}

// report is a line of the log.
type report struct {
	Event   watch.Event
	Binding bool
	Err     string
}

// asCommand does what rpsel does, for these tests.
func asCommand(name string, args []string) error {
	detach := len(args) > 1 && args[1] == force.DetachFlag
	switch {
	case name == "force-ends", name == "force-ends-detached" && !detach:
		return errors.New("no reaper")
	case detach:
		return force.Detach()
	case name == "force-reap":
		return force.Reap(args[1], logHandler(args[0]))
	}
	var o order
	encoded, err := hex.DecodeString(args[0])
	if err != nil {
		return err
	}
	if err := gob.NewDecoder(bytes.NewReader(encoded)).Decode(&o); err != nil {
		return err
	}
	if name == "force-watch" {
		ctx, stop := context.WithCancel(context.Background())
		go func() {
			io.Copy(io.Discard, os.Stdin)
			stop()
		}()
		return force.Watch(ctx, o.Cgroup, o.Settings, logHandler(o.Log))
	}
	command := force.Command{
		Args: args[1:], User: o.User, Settings: o.Settings, Reaper: []string{cmp.Or(o.Reaper, "force-reap"), o.Log},
	}
	return command.Run()
}

func logHandler(path string) force.Handler {
	write := func(r report) {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err == nil {
			err = json.NewEncoder(f).Encode(r)
			f.Close()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "reaper's log:", err)
		}
	}
	return force.Handler{
		Start: func() { fmt.Fprintln(os.Stderr, "reaper started") },
		Listening: func(events []watch.Event) {
			for _, e := range events {
				write(report{Event: e})
			}
		},
		Binding: func(e watch.Event, err error) {
			r := report{Event: e, Binding: true}
			if err != nil {
				r.Err = err.Error()
			}
			write(r)
		},
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// await waits for a condition that no descriptor tells of.
func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s in vain", what)
		}
	}
}

// world is where a test's commands live: a network namespace and a cgroup, in
// which nothing may be left at the end.
type world struct {
	*testnet.NetNS
	t   testing.TB
	dir *cgroup.Dir
	log string
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{NetNS: testnet.New(t), t: t, log: filepath.Join(t.TempDir(), "log")}
	own, err := cgroup.Own()
	must(t, err)
	path, err := os.MkdirTemp(own, fmt.Sprintf("rpsel-test-%d-", os.Getpid()))
	must(t, err)
	w.dir, err = cgroup.Open(path)
	must(t, err)
	t.Cleanup(func() {
		defer w.dir.Close()
		await(t, "cgroups to go, there are "+strings.Join(w.cgroups(), ", "), func() bool { return len(w.cgroups()) == 0 })
		await(t, "reapers to go", func() bool { return os.Remove(path) == nil })
	})
	return w
}

// cgroups lists what commands made.
func (w *world) cgroups() []string {
	entries, err := os.ReadDir(w.dir.Path())
	must(w.t, err)
	var found []string
	for _, e := range entries {
		if e.IsDir() {
			found = append(found, filepath.Join(w.dir.Path(), e.Name()))
		}
	}
	return found
}

// process is a server, or a command that becomes one.
type process struct {
	*exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	stderr *os.File
	pid    int // of the server
	addr   netip.AddrPort
}

// enter lets a command start in the world's cgroup.
func (w *world) enter(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(w.dir.File().Fd())
}

// command makes a command line that runs args as ordered; nil runs them plainly.
func (w *world) command(o *order, args ...string) *exec.Cmd {
	w.t.Helper()
	if o != nil {
		o.Log = w.log
		args = append([]string{self(w.t), "force-run", encode(w.t, *o)}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	w.enter(cmd)
	return cmd
}

func self(t testing.TB) string {
	t.Helper()
	path, err := os.Executable()
	must(t, err)
	return path
}

func encode(t testing.TB, o order) string {
	t.Helper()
	var b bytes.Buffer
	must(t, gob.NewEncoder(&b).Encode(o))
	return hex.EncodeToString(b.Bytes())
}

// start starts a server and returns when it is bound. The error has what it
// wrote on standard error.
func (w *world) start(cmd *exec.Cmd) (*process, error) {
	w.t.Helper()
	p := &process{Cmd: cmd}
	// A file, for a daemon would keep a pipe open, and so Wait waiting.
	var err error
	p.stderr, err = os.CreateTemp(w.t.TempDir(), "stderr")
	must(w.t, err)
	// Not StdinPipe, which Wait would close.
	childIn, stdin, err := os.Pipe()
	must(w.t, err)
	p.stdin = stdin
	stdout, childOut, err := os.Pipe()
	must(w.t, err)
	p.stdout = bufio.NewReader(stdout)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = childIn, childOut, p.stderr
	must(w.t, w.Start(cmd))
	childIn.Close()
	childOut.Close()
	w.t.Cleanup(func() {
		p.stop()
		stdout.Close()
		p.stderr.Close()
	})
	return p, p.ready()
}

// ready waits until the server is bound.
func (p *process) ready() error {
	line, err := p.stdout.ReadString('\n')
	if err != nil {
		p.Wait()
		said, err := os.ReadFile(p.stderr.Name())
		return errors.Join(err, errors.New(strings.TrimSpace(string(said))))
	}
	fields := strings.Fields(line)
	if p.pid, err = strconv.Atoi(fields[0]); err != nil {
		return err
	}
	p.addr, err = netip.ParseAddrPort(fields[1])
	return err
}

// stop ends the server and what was left of the command.
func (p *process) stop() {
	p.stdin.Close()
	io.Copy(io.Discard, p.stdout)
	if p.ProcessState == nil {
		p.Wait()
	}
}

// serve starts a server that has to come up.
func (w *world) serve(o *order, args ...string) *process {
	w.t.Helper()
	p, err := w.start(w.command(o, append([]string{server}, args...)...))
	must(w.t, err)
	return p
}

// fails starts a server that must not come up, and returns what it says.
func (w *world) fails(o *order, args ...string) string {
	w.t.Helper()
	_, err := w.start(w.command(o, append([]string{server}, args...)...))
	if err == nil {
		w.t.Errorf("%q came up", args)
		return ""
	}
	return err.Error()
}

const inUse = "address already in use"

func (w *world) failsInUse(o *order, args ...string) {
	w.t.Helper()
	if said := w.fails(o, args...); !strings.Contains(said, inUse) {
		w.t.Errorf("it said %q", said)
	}
}

// answers asks a port often enough to hear of every server there, and returns
// who answered.
func (w *world) answers(network, address string) []string {
	w.t.Helper()
	var names []string
	must(w.t, w.Do(func() error {
		for range 64 {
			c, err := net.Dial(network, address)
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Minute))
			if network == "udp" {
				c.Write([]byte("who?"))
			}
			answer := make([]byte, 64)
			n, err := c.Read(answer)
			if err != nil {
				return err
			}
			names = append(names, string(answer[:n]))
		}
		return nil
	}))
	slices.Sort(names)
	return slices.Compact(names)
}

// reports reads the log.
func (w *world) reports() []report {
	w.t.Helper()
	f, err := os.Open(w.log)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	must(w.t, err)
	defer f.Close()
	var all []report
	for d := json.NewDecoder(f); ; {
		var r report
		// The last line may be half there.
		if err := d.Decode(&r); err != nil {
			return all
		}
		all = append(all, r)
	}
}

// socket finds the only socket of a process on a port.
func (w *world) socket(p *process) (sockets.Group, sockets.Socket) {
	w.t.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: w.Cookie(), Port: p.addr.Port()})
	must(w.t, err)
	for _, g := range groups {
		for _, m := range g.Members {
			if slices.ContainsFunc(m.Holders, func(h sockets.Holder) bool { return h.PID == p.pid }) {
				return g, m
			}
		}
	}
	w.t.Fatalf("process %d has no socket on port %d: %+v", p.pid, p.addr.Port(), groups)
	panic("unreachable")
}

// option reads an option of a server's socket.
func (w *world) option(p *process, option int) int {
	w.t.Helper()
	_, s := w.socket(p)
	conn, err := s.Take()
	must(w.t, err)
	defer conn.Close()
	raw, err := conn.SyscallConn()
	must(w.t, err)
	var value int
	must(w.t, raw.Control(func(fd uintptr) {
		value, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, option)
	}))
	must(w.t, err)
	return value
}

// reaper finds the reaper of the only command.
func (w *world) reaper() int {
	w.t.Helper()
	cgroups := w.cgroups()
	if len(cgroups) != 1 {
		w.t.Fatalf("cgroups: %q", cgroups)
	}
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(w.t, err)
	for _, path := range lines {
		line, _ := os.ReadFile(path)
		if strings.HasSuffix(string(line), filepath.Base(cgroups[0])+"\x00") {
			pid, err := strconv.Atoi(strings.Split(path, "/")[2])
			must(w.t, err)
			return pid
		}
	}
	w.t.Fatalf("no reaper of %s", cgroups[0])
	panic("unreachable")
}

func alive(pid int) bool { return ended(pid, 0) != nil }

// ended waits so many milliseconds for the end of a process that is not ours.
func ended(pid, timeout int) error {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, timeout)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = fmt.Errorf("process %d lives", pid)
		}
		return err
	}
}
