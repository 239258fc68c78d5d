package kubernetes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/testnet"
)

func TestMain(m *testing.M) {
	maybeContain()
	if len(os.Args) > 1 && os.Args[1] == "pause" {
		for {
			time.Sleep(time.Hour)
		}
	}
	testnet.Main(m)
}

// node is a machine: what its pods share.
type node struct {
	bpffs string            // its /sys/fs/bpf
	run   map[string]string // other host paths
}

func newNode(t testing.TB) *node {
	t.Helper()
	return &node{testnet.BPFFS(t), map[string]string{}}
}

// path is where a path of the node is.
func (n *node) path(t testing.TB, path string) string {
	t.Helper()
	if rest, ok := strings.CutPrefix(path, "/sys/fs/bpf"); ok {
		return n.bpffs + rest
	}
	if n.run[path] == "" {
		n.run[path] = testnet.RunDir(t)
	}
	return n.run[path]
}

// pod is one that runs: its pause container, and the volumes.
type pod struct {
	t       testing.TB
	ns      *testnet.NetNS
	spec    corev1.PodSpec
	pause   int // the process; this one, where the pod has the node's processes
	cgroup  string
	volumes map[string]string
}

// startPod starts a pod of a manifest. Its network namespace is the node's for
// hostNetwork.
func startPod(t testing.TB, n *node, ns *testnet.NetNS, m manifest, name string) *pod {
	t.Helper()
	spec, ok := m.pods[name]
	if !ok {
		t.Fatalf("there is no pod %s", name)
	}
	own, err := cgroup.Own()
	must(t, err)
	p := &pod{t: t, ns: ns, spec: spec, pause: os.Getpid(), cgroup: testnet.Cgroup(t, own), volumes: map[string]string{}}
	must(t, os.Chmod(p.cgroup, 0o755))
	for _, v := range spec.Volumes {
		switch {
		case v.ConfigMap != nil:
			dir := testnet.RunDir(t)
			for name, text := range m.configs[v.ConfigMap.Name] {
				// On a busy machine no flow may be forgotten before it is asked again.
				text += "\nidle = \"1h\"\nidle-new = \"1h\"\n"
				must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
			}
			p.volumes[v.Name] = dir
		case v.EmptyDir != nil:
			p.volumes[v.Name] = testnet.RunDir(t)
		case v.HostPath != nil:
			p.volumes[v.Name] = n.path(t, v.HostPath.Path)
			if *v.HostPath.Type == corev1.HostPathDirectoryOrCreate {
				must(t, os.MkdirAll(p.volumes[v.Name], 0o755))
			}
		default:
			t.Fatalf("volume %s: the test does not know what to do with it", v.Name)
		}
	}
	if !spec.HostPID {
		p.startPause()
	}
	return p
}

func (p *pod) startPause() {
	p.t.Helper()
	must(p.t, p.ns.StartIn(os.Getpid()))
	cmd := exec.Command(executable(p.t), "pause")
	dir, err := os.Open(testnet.Cgroup(p.t, p.cgroup))
	must(p.t, err)
	defer dir.Close()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		UseCgroupFD: true, CgroupFD: int(dir.Fd()),
	}
	must(p.t, p.ns.Start(cmd))
	p.t.Cleanup(func() {
		cmd.Process.Kill() // and all others with it
		cmd.Wait()
	})
	p.pause = cmd.Process.Pid
}

// wrap is the command line that makes a container of the pod of what is appended
// to it. To be started by start, or in the namespaces of the pod.
func (p *pod) wrap(c corev1.Container, image map[string]string, args ...string) []string {
	p.t.Helper()
	s := c.SecurityContext
	made := contained{
		Files: image, UID: int(*s.RunAsUser), Args: args,
		NoNewPrivs: !*s.AllowPrivilegeEscalation, ReadOnly: *s.ReadOnlyRootFilesystem,
		Seccomp: s.SeccompProfile.Type == corev1.SeccompProfileTypeRuntimeDefault,
	}
	if !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		p.t.Errorf("container %s does not drop all capabilities", c.Name)
	}
	for _, name := range s.Capabilities.Add {
		i := slices.IndexFunc(capability.All, func(known capability.Capability) bool { return known.Name == "CAP_"+string(name) })
		if i < 0 {
			p.t.Fatalf("container %s: rpsel has no use for capability %s", c.Name, name)
		}
		made.Capabilities = append(made.Capabilities, capability.All[i].Bit)
	}
	for _, v := range c.VolumeMounts {
		made.Mounts = append(made.Mounts, mount{p.volumes[v.Name], v.MountPath})
	}
	text, err := json.Marshal(made)
	must(p.t, err)
	return []string{executable(p.t), "contain", string(text)}
}

// rpsel is the container of that name, and what image it has: nothing but the
// command.
func (p *pod) rpsel(t testing.TB) (corev1.Container, map[string]string) {
	return container(t, p.spec, "rpsel"), map[string]string{"/rpsel": testnet.Build(t)}
}

// start starts a container's command.
func (p *pod) start(c corev1.Container, image map[string]string) *process {
	p.t.Helper()
	argv := p.wrap(c, image, c.Command...)
	return p.launch(argv)
}

func (p *pod) launch(argv []string) *process {
	p.t.Helper()
	must(p.t, p.ns.StartIn(p.pause))
	d := &process{cmd: exec.Command(argv[0], argv[1:]...), ended: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = d, d
	dir, err := os.Open(testnet.Cgroup(p.t, p.cgroup))
	must(p.t, err)
	defer dir.Close()
	d.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	must(p.t, p.ns.Start(d.cmd))
	go func() {
		defer close(d.ended)
		d.cmd.Wait()
	}()
	p.t.Cleanup(func() {
		d.kill()
		if p.t.Failed() {
			p.t.Logf("it said\n%s", d.said())
		}
	})
	return d
}

// exec runs a command in a container of its own that is like the one of rpsel.
func (p *pod) exec(args ...string) string {
	p.t.Helper()
	c, image := p.rpsel(p.t)
	d := p.launch(p.wrap(c, image, append([]string{"/rpsel"}, args...)...))
	<-d.ended
	if code := d.cmd.ProcessState.ExitCode(); code != 0 {
		p.t.Fatalf("%q: exit code %d: %s", args, code, d.said())
	}
	return d.said()
}

// serve starts a server in a container of its own.
func (p *pod) serve(name string) *testnet.Server {
	p.t.Helper()
	must(p.t, p.ns.StartIn(p.pause))
	image := map[string]string{"/server": executable(p.t)}
	for _, dir := range []string{"/lib", "/lib64", "/usr/lib"} { // for a dynamically linked one
		if _, err := os.Stat(dir); err == nil {
			image[dir] = dir
		}
	}
	return testnet.StartServer(p.t, p.ns, testnet.ServerOptions{
		Network: "udp4", Addr: fmt.Sprintf("0.0.0.0:%d", port), ReusePort: true, Name: name,
		Cgroup: testnet.Cgroup(p.t, p.cgroup),
		Wrap:   p.wrap(container(p.t, p.spec, "server"), image, "/server"),
	})
}

// awaitListeners returns when so many listeners of the port are active.
func (p *pod) awaitListeners(n int) {
	p.t.Helper()
	p.await(fmt.Sprintf("%d listeners", n), func() bool {
		var status struct {
			Groups []struct{ Listeners []struct{ State string } }
		}
		must(p.t, json.Unmarshal([]byte(p.exec("status", "--json", "-q")), &status))
		active := 0
		for _, g := range status.Groups {
			for _, l := range g.Listeners {
				if l.State == "active" {
					active++
				}
			}
		}
		return active == n
	})
}

// await waits for what nothing tells of.
func (p *pod) await(what string, condition func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); !condition(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("waited in vain: %s", what)
		}
	}
}

func executable(t testing.TB) string {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	return self
}

// process is one that runs in a container, and what it has said.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it is reaped

	mu  sync.Mutex
	log bytes.Buffer
}

func (d *process) Write(line []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.Write(line)
}

func (d *process) said() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log.String()
}

func (d *process) kill() {
	d.cmd.Process.Kill()
	<-d.ended
}
