package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// realAgent is an agent in a process of its own.
type realAgent struct {
	*exec.Cmd
	t   testing.TB
	log string
}

// startRealAgent starts the binary as an agent and returns when it is ready.
func startRealAgent(t testing.TB, binary, bpffs, services string) *realAgent {
	t.Helper()
	dir := t.TempDir()
	a := &realAgent{t: t, log: filepath.Join(dir, "log")}
	file := filepath.Join(dir, "rpsel.toml")
	if err := os.WriteFile(file, []byte(services), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(a.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	a.Cmd = exec.Command(binary, "agent", "--bpffs", bpffs, "--config", file)
	a.Stderr = log
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.kill()
		if t.Failed() {
			t.Logf("the agent said:\n%s", a.said())
		}
	})
	for deadline := time.Now().Add(time.Minute); !strings.Contains(a.said(), "msg=ready"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the agent is not ready")
		}
	}
	return a
}

func (a *realAgent) said() string {
	text, err := os.ReadFile(a.log)
	if err != nil {
		a.t.Fatal(err)
	}
	return string(text)
}

// kill is kill -9. Only the first call does something.
func (a *realAgent) kill() {
	if a.ProcessState == nil {
		a.Process.Kill()
		a.Wait()
	}
}

// awaitListeners waits until a group is attached, has settled and has exactly so
// many living listeners, all registered.
func awaitListeners(t testing.TB, ns *testnet.NetNS, bpffs string, port uint16, n int) {
	t.Helper()
	if err := await(scope{port: port, netns: ns.Path(), bpffs: bpffs}, n); err != nil {
		t.Fatal(err)
	}
}

// await is awaitListeners for a port that is given otherwise.
func await(s scope, n int) error {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		groups, err := s.open()
		var list []loader.Status
		if err == nil {
			list, err = statuses(groups)
			closeAll(groups)
		}
		alive := 0
		for _, status := range list {
			if !status.Attached || status.Settling > 0 || len(status.Unregistered) > 0 {
				continue
			}
			for _, l := range status.Listeners {
				if l.State != "dead" {
					alive++
				}
			}
		}
		if alive == n {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited in vain for %d listeners: %s has %d, %v, %+v", n, &s, alive, err, list)
		}
	}
}

// The agent is killed again and again, and servers die and come while it is dead
// and while it lives: no flow moves but of those that died, each flow is
// answered all the time, and the next agent registers what has come.
func TestAgentKilled(t *testing.T) {
	testnet.Privileged(t)
	binary := buildCommand(t, "rpsel")
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true, Name: "a"}
	services := fmt.Sprintf("[[service]]\nport = 1194\nnetns = %q\nsettle = \"0s\"\n", ns.Path())
	servers := testnet.StartGroup(t, ns, 4, options)
	clients := testnet.NewClients(t, ns, 300, options.Addr)
	a := startRealAgent(t, binary, bpffs, services)
	before := clients.Ask()
	ask := func(when string, gone ...string) {
		t.Helper()
		after := clients.Ask()
		if moved := testnet.Moved(before, after, gone...); moved != 0 || testnet.Shares(after)[""] != 0 {
			t.Errorf("%s: %d flows moved, answers from %v", when, moved, testnet.Shares(after))
		}
		before = after
	}
	for i := range 3 {
		a.kill()
		ask("the agent is dead")
		servers.Close(i)
		ask("a server left while it was dead", servers.Names[i])
		name := servers.Add()
		ask("a server came while it was dead")
		a = startRealAgent(t, binary, bpffs, services)
		ask("the agent is back")
		awaitListeners(t, ns, bpffs, 1194, 4)
		if shares := testnet.Shares(testnet.NewClients(t, ns, 200, options.Addr).Ask()); shares[name] == 0 {
			t.Errorf("%s gets no new flows: %v", name, shares)
		}
		// Killed at a time that nobody chose, while a server comes.
		servers.Add()
		a.kill()
		ask("the agent was killed while a server came")
		a = startRealAgent(t, binary, bpffs, services)
		awaitListeners(t, ns, bpffs, 1194, 5)
		servers.Close(len(servers.Names) - 1)
	}
	a.Process.Signal(unix.SIGTERM)
	if err := a.Wait(); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
	ask("the agent has ended", servers.Names[len(servers.Names)-1])

	// The control: plain Linux moves flows when a server leaves.
	if code, _, talk := rpsel("detach", "--bpffs", bpffs, "-N", ns.Path(), "--port", "1194"); code != exitDone {
		t.Fatal(talk)
	}
	before = clients.Ask()
	servers.Close(3)
	if moved := testnet.Moved(before, clients.Ask(), servers.Names[3]); moved == 0 {
		t.Error("no flow moved without a program")
	}
}

// So many sockets are bound while the agent cannot run that reports are dropped,
// that on a server among them. It looks for itself then.
func TestAgentMissesEvents(t *testing.T) {
	testnet.Privileged(t)
	binary := buildCommand(t, "rpsel")
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	const port, bursts = 28194, 4500 // the buffer holds some 3600
	options := testnet.ServerOptions{Network: "udp4", Addr: fmt.Sprint("127.0.0.1:", port), ReusePort: true, Name: "a"}
	testnet.StartServer(t, ns, options)
	a := startRealAgent(t, binary, bpffs, fmt.Sprintf("[[service]]\nport = %d\nnetns = %q\nsettle = \"0s\"\n", port, ns.Path()))
	clients := testnet.NewClients(t, ns, 200, options.Addr)
	before := clients.Ask()
	if err := a.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := ns.Do(func() error {
		for i := range bursts {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			// One address each: a socket may outlive its close for a moment.
			err = unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 1, byte(i >> 8), byte(i)}})
			unix.Close(fd)
			if err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	options.Name = "b"
	testnet.StartServer(t, ns, options)
	if err := a.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	awaitListeners(t, ns, bpffs, port, 2)
	if said := a.said(); !strings.Contains(said, `msg="events were missed: looking for all listeners"`) {
		t.Error("it has not noticed that it missed events")
	}
	if moved := testnet.Moved(before, clients.Ask()); moved != 0 {
		t.Errorf("%d flows moved", moved)
	}
	if shares := testnet.Shares(testnet.NewClients(t, ns, 200, options.Addr).Ask()); shares["b"] == 0 {
		t.Errorf("new flows: %v", shares)
	}
}

// What the agent takes while nothing happens, over half a minute: four groups of
// eight listeners, tables of the default size.
func BenchmarkAgentAtRest(b *testing.B) {
	testnet.Privileged(b)
	binary := buildCommand(b, "rpsel")
	ns, bpffs := testnet.New(b), testnet.BPFFS(b)
	services := ""
	const first = 29194 // no other test of this machine makes events there
	for port := first; port < first+4; port++ {
		testnet.StartGroup(b, ns, 8, testnet.ServerOptions{Network: "udp4", Addr: fmt.Sprint("127.0.0.1:", port), ReusePort: true})
		services += fmt.Sprintf("[[service]]\nport = %d\nnetns = %q\nsettle = \"0s\"\n", port, ns.Path())
	}
	a := startRealAgent(b, binary, bpffs, services)
	for port := uint16(first); port < first+4; port++ {
		awaitListeners(b, ns, bpffs, port, 8)
	}
	const time30 = 30 * time.Second
	for b.Loop() {
		before := a.ticks()
		time.Sleep(time30)
		b.ReportMetric(100*(a.ticks()-before)/100/time30.Seconds(), "%core") // USER_HZ is 100
	}
	for _, line := range []string{"VmRSS", "RssAnon", "RssFile", "VmHWM"} {
		b.ReportMetric(a.status(line)/1024, "MiB-"+line)
	}
}

// ticks is the processor time the agent has taken (proc_pid_stat(5)).
func (a *realAgent) ticks() float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", a.Process.Pid))
	if err != nil {
		a.t.Fatal(err)
	}
	f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return user + system
}

// status reads a line of kB (proc_pid_status(5)).
func (a *realAgent) status(name string) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.Process.Pid))
	if err != nil {
		a.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			n, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return n
		}
	}
	return 0
}
