package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

// The commands of docs/tcp.md, as they stand.
func TestTCPDocs(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/tcp.md")
	if err != nil {
		t.Fatal(err)
	}
	var scripts []string
	for _, m := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		scripts = append(scripts, m[1])
	}
	if len(scripts) != 5 {
		t.Fatalf("docs/tcp.md has %d scripts, the test knows 5", len(scripts))
	}
	reload, drained, stop, slots, policy := scripts[0], scripts[1], scripts[2], scripts[3], scripts[4]

	t.Run("haproxy", func(t *testing.T) {
		d := newDocs(t)
		d.agent()
		const shards = 2
		config := filepath.Join(d.dir, "haproxy.cfg")
		if err := os.WriteFile(config, []byte(haproxyConfig(webAddr.String(), shards)), 0o600); err != nil {
			t.Fatal(err)
		}
		need(t, "haproxy")
		d.run("haproxy -D -f haproxy.cfg -p haproxy.pid\n")
		for _, script := range []string{reload, drained} {
			old := d.daemonPID()
			d.awaitListeners(old.pid, shards)
			d.run(script)
			old.awaitEnd(t)
			if d.daemonPID().pid == old.pid {
				t.Errorf("process %d was not replaced", old.pid)
			}
			awaitServer(t, d.ns, webAddr)
		}
	})

	t.Run("one thread", func(t *testing.T) {
		d := newDocs(t)
		d.agent()
		first, second := startSingle(t, d.ns, webAddr), startSingle(t, d.ns, webAddr)
		d.awaitActive(first.cmd.Process.Pid)
		d.awaitActive(second.cmd.Process.Pid)
		d.run(stop, "pid="+strconv.Itoa(first.cmd.Process.Pid))
		<-first.ended
		awaitServer(t, d.ns, webAddr)
	})

	t.Run("nginx", func(t *testing.T) {
		d := newDocs(t)
		startNginx(t, d.ns)
		d.run(slots)
		d.run(policy)
		const connections = 210 // open at once; with weights 4, 1, 1 and 1
		for range connections {
			var fd int
			if err := d.ns.Do(func() (err error) { fd, err = dialTCP(webAddr); return err }); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Close(fd) })
		}
		d.await("the first of nginx's listeners has four times what another has", func(s status) bool {
			for _, l := range s.Groups[0].Listeners {
				if share := connections * []int{4, 1, 1, 1}[l.Slot] / 7; l.Connections < share-5 || l.Connections > share+5 {
					return false
				}
			}
			return len(s.Groups[0].Listeners) == nginxWorkers
		})
	})
}

// docs is a place in which scripts of the documentation run.
type docs struct {
	*rpsel
	dir string
}

func newDocs(t *testing.T) *docs {
	t.Helper()
	r := newRpsel(t, testnet.New(t), int(webAddr.Port()))
	r.proto = "tcp"
	return &docs{r, t.TempDir()}
}

// run runs a script in the namespace, where the state is on /sys/fs/bpf.
func (d *docs) run(script string, env ...string) {
	d.t.Helper()
	const enter = `mount --bind "$BPFFS" /sys/fs/bpf && exec sh -euc "$SCRIPT"`
	cmd := exec.Command("unshare", "--mount", "sh", "-euc", enter)
	cmd.Dir = d.dir
	cmd.Env = append(os.Environ(), append(env, "BPFFS="+d.bpffs, "SCRIPT="+script,
		"PATH="+filepath.Dir(d.path)+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second // a daemon has its standard error
	if err := d.ns.Start(cmd); err != nil {
		d.t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() != 0 {
		d.t.Fatalf("%s\n%v\n%s", script, err, out.String())
	}
}

// process is one that is nobody's child here.
type process struct {
	pid, fd int
}

// daemonPID is the process in haproxy.pid. It is killed when the test ends.
func (d *docs) daemonPID() process {
	d.t.Helper()
	text, err := os.ReadFile(filepath.Join(d.dir, "haproxy.pid"))
	if err != nil {
		d.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		d.t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		d.t.Fatalf("process %d: %v", pid, os.NewSyscallError("pidfd_open", err))
	}
	d.t.Cleanup(func() {
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		unix.Close(fd)
	})
	return process{pid, fd}
}

// awaitEnd returns when the process has ended.
func (p process) awaitEnd(t testing.TB) {
	t.Helper()
	wait := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(time.Minute); ; {
		n, err := unix.Poll(wait, int(time.Until(deadline).Milliseconds()))
		if n > 0 {
			return
		}
		if err != unix.EINTR || time.Now().After(deadline) {
			t.Fatalf("process %d runs on: %v", p.pid, err)
		}
	}
}
