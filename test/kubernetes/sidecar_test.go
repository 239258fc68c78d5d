package kubernetes

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/testnet"
)

const (
	port    = 5300
	clients = 300
)

// The sidecar registers the servers of its pod, which run as another user; with
// it no flow moves when one of them dies, nor when the sidecar does, nor when another
// pod comes to the node. The next one removes what is left of pods that are gone.
func TestSidecar(t *testing.T) {
	testnet.Privileged(t)
	m := load(t, "sidecar.yaml")
	for _, with := range []bool{false, true} {
		t.Run(fmt.Sprintf("rpsel=%t", with), func(t *testing.T) {
			n := newNode(t)
			if !with {
				outside, inside := testnet.Pair(t)
				p := startPod(t, n, inside, m, "server")
				servers := []*testnet.Server{p.serve("a"), p.serve("b"), p.serve("c")}
				flows := testnet.NewClients(t, outside, clients, fmt.Sprintf("%s:%d", inside.IPv4, port))
				before := flows.AskAll()
				servers[0].Kill()
				if moved := testnet.Moved(before, flows.AskAll(), "a"); moved < 20 {
					t.Errorf("without rpsel %d flows moved", moved)
				}
				return
			}
			t.Run("pod", func(t *testing.T) {
				outside, inside := testnet.Pair(t)
				p := startPod(t, n, inside, m, "server")
				sidecar := p.start(p.rpsel(t))
				servers := []*testnet.Server{p.serve("a"), p.serve("b"), p.serve("c")}
				p.awaitListeners(3)
				if !strings.Contains(sidecar.said(), "mode=polling") {
					t.Errorf("the kernel tells of what it cannot see:\n%s", sidecar.said())
				}
				flows := testnet.NewClients(t, outside, clients, fmt.Sprintf("%s:%d", inside.IPv4, port))
				before := flows.AskAll()
				servers[0].Kill()
				now := flows.AskAll()
				if moved := testnet.Moved(before, now, "a"); moved != 0 || slices.Contains(now, "a") {
					t.Errorf("a server died: %d flows of others moved: %v", moved, testnet.Shares(now))
				}
				sidecar.kill()
				p.serve("d")
				p.start(p.rpsel(t))
				p.awaitListeners(3)
				if moved := testnet.Moved(now, flows.AskAll()); moved != 0 {
					t.Errorf("the sidecar died, a server came: %d flows moved", moved)
				}
				// Each agent keeps its pod's sockets, and sees none of the other's.
				second := startPod(t, n, testnet.New(t), m, "server")
				other := second.start(second.rpsel(t))
				second.serve("x")
				second.awaitListeners(1)
				second.await("it has looked at all", func() bool { return strings.Contains(other.said(), "msg=ready") })
				p.awaitListeners(3)
				if moved := testnet.Moved(now, flows.AskAll()); moved != 0 {
					t.Errorf("another pod came: %d flows moved", moved)
				}
				if states := states(t, n); len(states) != 2 {
					t.Errorf("state of %v", states)
				}
			})
			// The namespace goes when the kernel has the time.
			p := startPod(t, n, testnet.New(t), m, "server")
			p.start(p.rpsel(t))
			p.await("the state of the pod that is gone is removed", func() bool { return len(states(t, n)) == 0 })
		})
	}
}

// states lists the network namespaces that have state on a node.
func states(t testing.TB, n *node) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(n.bpffs, "rpsel-pods/rpsel/*"))
	must(t, err)
	return dirs
}

// Without any one of its capabilities the sidecar says which it lacks.
func TestSidecarCapabilities(t *testing.T) {
	testnet.Privileged(t)
	m := load(t, "sidecar.yaml")
	for i, lacks := range container(t, m.pods["server"], "rpsel").SecurityContext.Capabilities.Add {
		t.Run(string(lacks), func(t *testing.T) {
			p := startPod(t, newNode(t), testnet.New(t), m, "server")
			p.serve("a")
			c, image := p.rpsel(t)
			c.SecurityContext = c.SecurityContext.DeepCopy()
			all := c.SecurityContext.Capabilities
			all.Add = slices.Delete(all.Add, i, i+1)
			d := p.start(c, image)
			p.await("it complains", func() bool { return strings.Contains(d.said(), "CAP_"+string(lacks)) })
		})
	}
}

// The containers have what the manifest says, and no more.
func TestContained(t *testing.T) {
	testnet.Privileged(t)
	p := startPod(t, newNode(t), testnet.New(t), load(t, "sidecar.yaml"), "server")
	sidecar := p.start(p.rpsel(t))
	p.await("it is ready", func() bool { return strings.Contains(sidecar.said(), "msg=ready") })
	server := p.serve("a")
	const none = "0000000000000000"
	mask := fmt.Sprintf("%016x", 1<<capability.BPF.Bit|1<<capability.Perfmon.Bit|1<<capability.Ptrace.Bit)
	for _, test := range []struct {
		pid  int
		want map[string]string
	}{
		{sidecar.cmd.Process.Pid, map[string]string{"Uid": "0", "CapEff": mask, "CapBnd": mask}},
		{server.PID(), map[string]string{"Uid": "1000", "CapEff": none, "CapBnd": none}},
	} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", test.pid))
		must(t, err)
		has := map[string]string{}
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) > 1 {
				has[strings.TrimSuffix(f[0], ":")] = f[1]
			}
		}
		test.want["NoNewPrivs"], test.want["Seccomp"] = "1", "2"
		for what, want := range test.want {
			if has[what] != want {
				t.Errorf("process %d: %s is %s, not %s", test.pid, what, has[what], want)
			}
		}
	}
}

// A bpffs of the sidecar's own goes with it: the page says so.
func TestOwnBPFFS(t *testing.T) {
	testnet.Privileged(t)
	p := startPod(t, newNode(t), testnet.New(t), load(t, "sidecar.yaml"), "server")
	p.serve("a")
	c, image := p.rpsel(t)
	c = *c.DeepCopy()
	c.VolumeMounts = slices.DeleteFunc(c.VolumeMounts, func(v corev1.VolumeMount) bool { return v.Name == "state" })
	d := p.start(c, image)
	<-d.ended
	if code := d.cmd.ProcessState.ExitCode(); code != 4 || !strings.Contains(d.said(), "CAP_SYS_ADMIN") {
		t.Errorf("without CAP_SYS_ADMIN: exit code %d: %s", code, d.said())
	}
	s := c.SecurityContext
	s.Capabilities.Add = append(s.Capabilities.Add, "SYS_ADMIN")
	s.SeccompProfile.Type = corev1.SeccompProfileTypeUnconfined
	d = p.start(c, image)
	p.await("it has attached", func() bool { return strings.Contains(d.said(), "msg=attached") })
	d.kill()
	d = p.start(c, image)
	p.await("it says why not again", func() bool { return strings.Contains(d.said(), "--replace") })
}

// With the machine's cgroups in sight the kernel tells of listeners.
func TestMachineCgroups(t *testing.T) {
	testnet.Privileged(t)
	p := startPod(t, newNode(t), testnet.New(t), load(t, "sidecar.yaml"), "server")
	root, err := cgroup.Root()
	must(t, err)
	if _, err := os.Stat(filepath.Join(root, "cgroup.events")); err == nil {
		(&testnet.Unavailable{What: "the root cgroup", Err: errors.New("this is a cgroup namespace")}).Skip(t)
	}
	c, image := p.rpsel(t)
	c = *c.DeepCopy()
	c.SecurityContext.Capabilities.Add = append(c.SecurityContext.Capabilities.Add, "NET_ADMIN")
	p.volumes["cgroups"] = root
	c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "cgroups", MountPath: "/machine/cgroup"})
	d := p.start(c, image)
	p.await("it is ready", func() bool { return strings.Contains(d.said(), "msg=ready") })
	if !strings.Contains(d.said(), "mode=events") {
		t.Errorf("it polls: %s", d.said())
	}
	p.serve("a")
	p.awaitListeners(1)
}
