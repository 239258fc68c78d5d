package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
	page := testnet.OpenPage(t, "tcp.md")
	reload, drained, stop, slots, policy := page.Next(), page.Next(), page.Next(), page.Next(), page.Next()

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
			old := d.daemonPID("haproxy.pid")
			d.awaitListeners(old.pid, shards)
			d.run(script)
			old.awaitEnd(t)
			if d.daemonPID("haproxy.pid").pid == old.pid {
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

// The commands of docs/openvpn.md: a busy server becomes one of eight, and whoever is
// on none that dies or is stopped loses nothing.
func TestOpenVPNDocs(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	d := &docs{newRpsel(t, v.servers, vpnPort), v.dir}
	defer d.explain()
	page := testnet.OpenPage(t, "openvpn.md")
	first := startDaemon(t, v.servers, "first", v.openvpn, "--config", v.config("1", v.serverConfig(1)))
	first.await(t, vpnUp)
	old := v.connect(4)

	from := v.round()
	d.run(page.Next()) // before
	d.run(page.Next()) // adopt
	d.run(page.Next()) // the other seven
	var second process
	for n := 2; n <= 8; n++ {
		server := d.daemonPID(fmt.Sprint(n, ".pid"))
		d.awaitActive(server.pid)
		if n == 2 {
			second = server
		}
	}
	d.run(page.Next()) // status
	clients := v.connect(8)
	if len(on(clients, 1)) == len(clients) {
		t.Error("the first server has all new clients")
	}
	clients = append(clients, old...)
	d.run(page.Next()) // drain and resume

	stop := v.round()
	v.finish(stop)
	v.lostNone("while one became eight", old, from, stop)
	d.run(page.Next()) // the second is replaced
	second.awaitEnd(t)
	others := slices.DeleteFunc(clients, func(c *client) bool { return c.first == 2 })
	crash := v.round() + quiet
	v.finish(crash - 1)
	v.lostNone("after one was stopped", others, stop, crash)
	first.kill()
	others = slices.DeleteFunc(others, func(c *client) bool { return c.first == 1 })
	end := crash + quiet
	v.finish(end - 1)
	v.lostNone("after the first crashed", others, crash, end)
	d.run(page.Next()) // detach
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

// run runs a script in the place.
func (d *docs) run(script string, env ...string) {
	d.t.Helper()
	d.ns.Script(d.t, d.bpffs, "cd '"+d.dir+"'\n"+script, env...)
}

// process is one that is nobody's child here.
type process struct {
	pid, fd int
}

// daemonPID is the process in a file. It is killed when the test ends.
func (d *docs) daemonPID(file string) process {
	d.t.Helper()
	text, err := os.ReadFile(filepath.Join(d.dir, file))
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
	for deadline := time.Now().Add(2 * time.Minute); ; {
		n, err := unix.Poll(wait, int(time.Until(deadline).Milliseconds()))
		if n > 0 {
			return
		}
		if err != unix.EINTR || time.Now().After(deadline) {
			t.Fatalf("process %d runs on: %v", p.pid, err)
		}
	}
}
