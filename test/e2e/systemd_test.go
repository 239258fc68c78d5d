package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/testnet"
)

// boxUser is the user openvpn of testdata/box.sh.
const boxUser = 990

// box is a systemd with rpsel's and OpenVPN's units, in the servers' network
// namespace (testdata/box.sh).
type box struct {
	*daemon
	pid    int    // of that systemd
	cgroup string // of all that is in it
}

// startBox boots it, with a variant of the drop-ins of docs/systemd, and the
// configurations of three servers.
func startBox(t testing.TB, v *vpn, variant, services string) *box {
	t.Helper()
	tree := t.TempDir()
	put := func(path, text string) {
		path = filepath.Join(tree, path)
		v.must(os.MkdirAll(filepath.Dir(path), 0o755))
		v.must(os.WriteFile(path, []byte(text), 0o600))
	}
	const units = "etc/systemd/system"
	v.must(os.MkdirAll(filepath.Join(tree, units), 0o755))
	put("etc/rpsel/rpsel.toml", services)
	for n := 1; n <= 3; n++ {
		config := v.serverConfig(n)
		put(fmt.Sprintf("etc/openvpn/server/%d.conf", n), strings.ReplaceAll(config, v.pki.dir, "/etc/openvpn/server"))
	}
	for _, from := range []struct{ files, to string }{
		{"../../docs/systemd/rpsel-agent.service", units},
		{"../../docs/systemd/" + variant + "/.", units},
		{v.pki.dir + "/.", "etc/openvpn/server"},
		{testnet.Build(t), "usr/bin/rpsel"},
	} {
		v.must(os.MkdirAll(filepath.Join(tree, filepath.Dir(from.to)), 0o755))
		if out, err := exec.Command("cp", "-r", from.files, filepath.Join(tree, from.to)).CombinedOutput(); err != nil {
			t.Fatalf("copy %s: %v\n%s", from.files, err, out)
		}
	}
	v.must(filepath.WalkDir(filepath.Join(tree, "etc/openvpn/server"), func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chown(path, boxUser, boxUser)
	}))

	return boot(t, v.servers, tree)
}

// boot boots a systemd in a network namespace, with the files of tree beside the
// machine's /usr.
func boot(t testing.TB, ns *testnet.NetNS, tree string) *box {
	t.Helper()
	need(t, "systemd-analyze") // and the rest of systemd with it
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const target = "[Unit]\nDefaultDependencies=no\nRequires=systemd-journald.service\nAfter=systemd-journald.service\n"
	must(os.MkdirAll(filepath.Join(tree, "etc/systemd/system"), 0o755))
	must(os.WriteFile(filepath.Join(tree, "etc/systemd/system/box.target"), []byte(target), 0o600))
	own, err := cgroup.Own()
	must(err)
	path, err := os.MkdirTemp(own, "rpsel-e2e-")
	must(err)
	must(os.Chmod(path, 0o755)) // the root of what everybody in the box sees
	dir, err := cgroup.Open(path)
	must(err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := dir.AwaitEmpty(ctx); err != nil {
			t.Error(err)
		}
		if err := dir.Remove(); err != nil {
			t.Error(err)
		}
		dir.Close()
	})
	b := &box{daemon: startDaemon(t, ns, "systemd", "testdata/box.sh", tree, path), cgroup: path}
	children := fmt.Sprintf("/proc/%d/task/%[1]d/children", b.cmd.Process.Pid)
	b.until(t, "boot", func() bool {
		text, _ := os.ReadFile(children)
		b.pid, _ = strconv.Atoi(strings.TrimSpace(string(text)))
		return b.pid != 0 && b.command("systemctl", "is-active", "--quiet", "box.target").Run() == nil
	})
	return b
}

// until waits for a condition that nothing tells of.
func (b *box) until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !condition(); time.Sleep(50 * time.Millisecond) {
		select {
		case <-b.ended:
			t.Fatalf("systemd ended before: %s", what)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// command is a command line that runs in the box.
func (b *box) command(argv ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(b.pid), "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--"}
	return exec.Command("nsenter", append(enter, argv...)...)
}

// run runs a command line that must succeed and returns what it says.
func (b *box) run(t testing.TB, argv ...string) string {
	t.Helper()
	cmd := b.command(argv...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", argv, err, out)
	}
	return strings.TrimSpace(string(out))
}

// said tells whether a unit's journal has a text.
func (b *box) said(unit, text string) bool {
	journal, err := b.command("journalctl", "--no-pager", "--output=cat", "--unit", unit).Output()
	return err == nil && bytes.Contains(journal, []byte(text))
}

// server names the unit of server n.
func server(n int) string { return fmt.Sprintf("openvpn-server@%d.service", n) }

// mainPID is the process of server n, as the box numbers it.
func (b *box) mainPID(t testing.TB, n int) int {
	t.Helper()
	pid, err := strconv.Atoi(b.run(t, "systemctl", "show", "-P", "MainPID", server(n)))
	if err != nil || pid == 0 {
		t.Fatalf("%s has no process: %v", server(n), err)
	}
	return pid
}

// A systemd with the units of docs/systemd: OpenVPN servers that share their
// port, also when they are restarted while there is no agent, and are drained
// before they stop.
func TestSystemd(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ variant, services, verify string }{
		{"bpfprogram", "[[service]]\nport = 1194\nforce = true\nsettle = \"5s\"\n", "openvpn.slice"},
		{"run", "[[service]]\nport = 1194\nsettle = \"5s\"\n", ""},
	} {
		t.Run(test.variant, func(t *testing.T) {
			t.Parallel()
			v := newVPN(t)
			for n := 1; n <= 3; n++ {
				v.options[n] = "explicit-exit-notify 1"
			}
			r := newRpsel(t, v.servers, vpnPort)
			b := startBox(t, v, test.variant, test.services)
			r.box = b
			defer func() {
				r.explain()
				if t.Failed() {
					out, _ := b.command("journalctl", "--no-pager", "--lines=300").CombinedOutput()
					t.Logf("journal:\n%s", out)
				}
			}()

			verify := append([]string{"systemd-analyze", "verify", "--man=no", "rpsel-agent.service", server(1)}, strings.Fields(test.verify)...)
			if said := b.run(t, verify...); said != "" {
				t.Errorf("systemd-analyze verify says\n%s", said)
			}
			b.run(t, "systemctl", "start", server(1), server(2), server(3))
			first := b.mainPID(t, 1)
			for n := 1; n <= 3; n++ {
				r.awaitActive(b.mainPID(t, n))
			}
			r.awaitSettled()
			clients := v.connectUntil(9, 3, 2)
			own, others := on(clients, 1), append(on(clients, 2), on(clients, 3)...)

			b.run(t, "systemctl", "mask", "--runtime", "--now", "rpsel-agent.service")
			from := v.round()
			b.run(t, "systemctl", "restart", server(1))
			again := b.mainPID(t, 1)
			if again == first {
				t.Errorf("%s is process %d as before", server(1), first)
			}
			if !b.said(server(1), fmt.Sprintf("(pid %d): draining", first)) {
				t.Error("the server was not drained before it was stopped")
			}
			back := v.awaitBack(own, from)

			b.run(t, "systemctl", "unmask", "--runtime", "rpsel-agent.service")
			b.run(t, "systemctl", "start", "rpsel-agent.service")
			r.awaitActive(again)
			r.awaitSettled()
			v.connectUntil(0, 1, 1)

			b.run(t, "systemctl", "kill", "--signal=KILL", server(1))
			b.until(t, "systemd starts the killed server anew", func() bool {
				pid, _ := b.command("systemctl", "show", "-P", "MainPID", server(1)).Output()
				n, _ := strconv.Atoi(string(bytes.TrimSpace(pid)))
				return n != 0 && n != again
			})
			r.awaitActive(b.mainPID(t, 1))

			end := v.round() + 3
			v.finish(end)
			v.lostNone("after restarts", others, from, end)
			v.lostNone("once they were back", own, back, end)
		})
	}
}

// Without the agent's pins a unit with BPFProgram= starts alone, and a second one
// fails; once they are there, units share the port, and need no agent for that.
func TestSystemdWithoutPins(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	r := newRpsel(t, v.servers, vpnPort)
	b := startBox(t, v, "bpfprogram", "[[service]]\nport = 1194\n")
	r.box = b
	b.run(t, "systemctl", "start", server(1))
	b.until(t, "the first server serves", func() bool { return b.said(server(1), vpnUp) })
	b.run(t, "systemctl", "start", server(2)) // OpenVPN says that it is ready before it binds
	b.until(t, "the second server fails", func() bool { return b.said(server(2), "Address already in use") })
	b.run(t, "systemctl", "stop", server(1), server(2), "openvpn.slice")

	b.run(t, "sh", "-c", "echo 'force = true' >>/etc/rpsel/rpsel.toml")
	b.run(t, "systemctl", "reload", "rpsel-agent.service")
	b.until(t, "the agent pins the programs", func() bool {
		return b.command("test", "-e", "/sys/fs/bpf/rpsel/bind/udp_1194/settings").Run() == nil
	})
	b.run(t, "systemctl", "start", server(1), server(2))
	r.awaitActive(b.mainPID(t, 1))
	r.awaitActive(b.mainPID(t, 2))
}
