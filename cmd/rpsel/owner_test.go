package main

import (
	"bufio"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/internal/testnet"
)

// startAgent starts an agent that is ready when startAgent returns.
func startAgent(t *testing.T, ns *testnet.NetNS, bpffs string, flags uintptr) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := &exec.Cmd{Path: self, Args: []string{"rpsel", "agent", "--bpffs", bpffs}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { endAgent(cmd, syscall.SIGKILL) })
	defer time.AfterFunc(2*time.Minute, func() { cmd.Process.Kill() }).Stop()
	log := bufio.NewReader(stderr)
	for talk := ""; ; {
		line, err := log.ReadString('\n')
		if err != nil {
			t.Fatalf("the agent: %v\n%s", err, talk)
		}
		talk += line
		if strings.Contains(line, "msg=ready") {
			go log.WriteTo(os.Stderr)
			return cmd
		}
	}
}

// endAgent sends a signal and returns when the agent is gone.
func endAgent(cmd *exec.Cmd, s os.Signal) error {
	if cmd.ProcessState != nil {
		return nil
	}
	cmd.Process.Signal(s)
	return cmd.Wait()
}

// A server without privileges registers itself with an agent that cannot see it,
// since that lives in a pid namespace of its own: the control is that it gets no
// flow before, although the agent has looked. It is so too after the agent was
// killed and started again.
func TestOwnerAndAgent(t *testing.T) {
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	dir, err := agent.Dir(bpffs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	const addr = "127.0.0.1:1194"
	serve := func(name string, n int) *testnet.Server {
		return testnet.StartGroup(t, ns, n, testnet.ServerOptions{Name: name, Network: "udp4", Addr: addr, ReusePort: true, UID: 65534})
	}
	old := serve("old", 3)
	if code, _, talk := rpsel("attach", "--port", "1194", "-N", ns.Path(), "--bpffs", bpffs, "--settle", "0s", "--owner", "nobody"); code != exitDone {
		t.Fatal(code, talk)
	}
	clients := testnet.NewClients(t, ns, 500, addr)
	before := clients.Ask()
	unmoved := func(when string, except ...string) {
		t.Helper()
		if n := testnet.Moved(before, clients.Ask(), except...); n != 0 {
			t.Errorf("%s: %d flows moved", when, n)
		}
	}
	share := func(name string) int {
		t.Helper()
		shares := testnet.Shares(testnet.NewClients(t, ns, 400, addr).Ask())
		if shares[""] != 0 {
			t.Errorf("no answer: %v", shares)
		}
		return shares[name]
	}

	late := serve("late", 1)
	if _, err := late.AskAgent(0, "register", dir); err == nil || !strings.Contains(err.Error(), agent.ErrNoAgent.Error()) {
		t.Errorf("no agent yet: %v", err)
	}
	first := startAgent(t, ns, bpffs, unix.CLONE_NEWPID)
	if n := share("late0"); n != 0 {
		t.Fatalf("%d flows although the agent cannot see it", n)
	}
	if _, err := late.AskAgent(0, "register", dir); err != nil {
		t.Fatal(err)
	}
	if n := share("late0"); n < 40 {
		t.Errorf("%d of 400 new flows", n)
	}
	unmoved("it registered")

	// kill -9: nothing changes but that nobody answers; the next one does.
	endAgent(first, syscall.SIGKILL)
	if _, err := late.AskAgent(0, "drain", dir); err == nil || !strings.Contains(err.Error(), agent.ErrNoAgent.Error()) {
		t.Errorf("the agent is dead: %v", err)
	}
	if n := share("late0"); n < 40 {
		t.Errorf("%d of 400 new flows without an agent", n)
	}
	second := startAgent(t, ns, bpffs, unix.CLONE_NEWPID)
	if _, err := late.AskAgent(0, "drain", dir); err != nil {
		t.Fatal(err)
	}
	if n := share("late0"); n != 0 {
		t.Errorf("%d flows while it drains", n)
	}
	if _, err := late.AskAgent(0, "resume", dir); err != nil {
		t.Fatal(err)
	}
	if n := share("late0"); n < 40 {
		t.Errorf("%d of 400 new flows after it resumed", n)
	}
	old.Close(0)
	unmoved("the first-bound closed", "old0")

	// The owner is taken back: the door closes.
	if code, _, talk := rpsel("attach", "--port", "1194", "-N", ns.Path(), "--bpffs", bpffs, "--owner", "none"); code != exitDone {
		t.Fatal(code, talk)
	}
	if _, err := late.AskAgent(0, "drain", dir); err == nil {
		t.Error("drained by one who owns nothing any more")
	}
	unmoved("the owner was taken back", "old0")
	if err := endAgent(second, syscall.SIGTERM); err != nil {
		t.Errorf("the agent ends: %v", err)
	}
}
