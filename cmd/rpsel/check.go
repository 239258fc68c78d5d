package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/statedir"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func newCheckCmd(e *env) *cobra.Command {
	c := checker{}
	var asJSON, noHeader bool
	var file string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say what this machine can do, and what is missing",
		Long: `Say what this machine can do and what is missing; with --port also what sits on
the port and whether it can be attached, and with --config the same for each
service of an agent's file, if there is no mistake in it (exit code 2). The exit
code is 0 if attach can work, else that of the first thing in its way (4 or 5).
Nothing is changed.`,
		Example: `  rpsel check
  rpsel check --port 1194 -j
  rpsel check --config services.toml`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			if c.port == 0 && (c.proto != 0 || c.addr.IsValid() || c.netns != "") {
				return usageError("--proto, --addr and --netns need --port: use a number from 1 to 65535")
			}
			var agent config.File
			if file != "" {
				var err error
				if agent, err = config.Load(file); err != nil {
					return configError(err)
				}
			}
			c.machine()
			if c.port != 0 {
				if err := c.onPort(); err != nil {
					return err
				}
			}
			if c.obstacle == nil { // without those nothing is found
				c.onServices(agent.Services)
			}
			if err := c.print(e, asJSON, noHeader); err != nil {
				return err
			}
			if c.obstacle != nil {
				e.say("attach cannot work: %s: %s", c.obstacle.Name, c.obstacle.Detail)
				return &codedError{code: c.code}
			}
			return nil
		},
	}
	c.addServerFlags(cmd)
	addConfigFlag(cmd, &file, "look for mistakes in the agent's `FILE`, and what its services find")
	c.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	addNoHeaderFlag(cmd, &noHeader)
	addQuietFlag(cmd, e)
	return cmd
}

// checker gathers findings.
type checker struct {
	scope
	findings []finding
	admin    bool // CAP_SYS_ADMIN is in effect
	members  []memberFinding
	services []serviceFinding
	obstacle *finding // the first that attach cannot do without
	code     int      // its exit code
}

// finding is the answer to one question about the machine.
type finding struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	For    string `json:"needed_for"`
	Detail string `json:"detail"`
	// Commands are those that need a capability.
	Commands []string `json:"commands,omitempty"`
}

// memberFinding is a socket on the port.
type memberFinding struct {
	groupJSON
	PID     int    `json:"pid"`
	Command string `json:"command"`
	Cookie  uint64 `json:"cookie"`
	OK      bool   `json:"ok"`
	Detail  string `json:"detail"`

	group string
}

// note adds a finding that attach does not depend on.
func (c *checker) note(name, neededFor string, ok bool, format string, args ...any) {
	c.findings = append(c.findings, finding{Name: name, OK: ok, For: neededFor, Detail: fmt.Sprintf(format, args...)})
}

// need adds a finding without which attach ends with this exit code.
func (c *checker) need(name string, ok bool, code int, format string, args ...any) {
	c.note(name, "attach", ok, format, args...)
	if !ok {
		c.fail(c.findings[len(c.findings)-1], code)
	}
}

func (c *checker) fail(f finding, code int) {
	if c.obstacle == nil {
		c.obstacle, c.code = &f, code
	}
}

// try adds a finding that attach depends on and that err decides.
func (c *checker) try(name, works string, err error) {
	switch {
	case err == nil:
		c.need(name, true, exitDone, "%s", works)
	case errors.Is(err, unix.EPERM), errors.Is(err, sockets.ErrPermission):
		c.need(name, false, exitPermission, "%v", err)
	default:
		c.need(name, false, exitUnsupported, "%v", err)
	}
}

// machine looks at the kernel and at what this process may do.
func (c *checker) machine() {
	kernel, err := newKernel()
	c.need("Linux 5.14", err == nil && kernel.atLeast(5, 14), exitUnsupported, "%s", kernel.release)
	if runtime.GOARCH == "arm64" {
		// Before, the kernel's compiler for BPF had no compare-and-exchange there.
		c.need("Linux 5.18", kernel.atLeast(5, 18), exitUnsupported, "%s", kernel.release)
	}
	_, err = os.Stat("/sys/kernel/btf/vmlinux")
	c.need("BTF", err == nil, exitUnsupported, "%s", orElse(err, "/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF is off"))
	c.capabilities()
	c.try("sk_reuseport programs", "can be loaded", features.HaveProgramType(ebpf.SkReuseport))
	c.try("socket arrays", "can be made", features.HaveMapType(ebpf.ReusePortSockArray))
	c.try("selection program", "the verifier accepts it", tryLoad())
	_, err = sockets.Find(sockets.Query{Port: 1})
	c.try("socket search", "works", err)
	c.ptrace()
	c.bpffs()
	err = loader.CanCount()
	c.note("connection counts", "TCP: --policy least, drain --wait, CONNS", err == nil, "%s", orElse(err, "work", fmt.Sprint(err)))
	c.jit()
	c.cgroup2(kernel)
	c.note("bpf_timer", "housekeeping while no agent runs", loader.HaveTimer(), "Linux 5.15 or later")
	c.note("bpf_get_netns_cookie in egress hooks", "--confirm reply, if one cgroup serves a port in several network namespaces", loader.HaveSenderNetNS(), "in newer kernels")
	c.note("SO_REUSEADDR in bind hooks", "run --reuseaddr", kernel.atLeast(6, 1), "Linux 6.1 or later")
}

func orElse(err error, good, bad string) string {
	if err != nil {
		return bad
	}
	return good
}

// capabilities lists those that rpsel makes use of.
func (c *checker) capabilities() {
	admin, err := capability.SysAdmin.Effective()
	if err != nil {
		c.need("capabilities", false, exitFailed, "%v", err)
		return
	}
	c.admin = admin
	for _, one := range capability.All {
		ok, err := one.Effective()
		detail := "in effect"
		switch {
		case err != nil:
			detail = err.Error()
		case ok:
		case admin && one.Covered():
			ok, detail = true, "in effect by CAP_SYS_ADMIN"
		default:
			detail = "missing: run as root"
		}
		f := finding{
			Name: one.Name, OK: ok, For: strings.Join(one.Commands(), "; "),
			Detail: fmt.Sprintf("%s (%s)", detail, one.Why), Commands: one.Commands(),
		}
		c.findings = append(c.findings, f)
		// CAP_SYS_PTRACE is for servers of other users only.
		if !ok && (one == capability.BPF || one == capability.Perfmon) {
			c.fail(f, exitPermission)
		}
	}
}

// tryLoad loads the selection program as attach would, and drops it.
func tryLoad() error {
	spec, err := bpf.LoadSelect()
	if err != nil {
		return err
	}
	collection, err := ebpf.NewCollection(spec)
	if err != nil {
		return err
	}
	collection.Close()
	return nil
}

// ptrace looks whether sockets may be borrowed from other processes at all.
func (c *checker) ptrace() {
	scope, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope")
	if err != nil {
		return // no Yama
	}
	value := strings.TrimSpace(string(scope))
	c.need("Yama", value != "3", exitPermission, "kernel.yama.ptrace_scope is %s%s", value, map[bool]string{true: ", which forbids it until the next boot"}[value == "3"])
}

func (c *checker) bpffs() {
	fs := statedir.FS(c.scope.bpffs)
	mount := fs.Mount()
	var stat unix.Statfs_t
	err := unix.Statfs(mount, &stat)
	switch {
	case err == nil && stat.Type == unix.BPF_FS_MAGIC:
		if stat.Flags&unix.ST_RDONLY != 0 {
			c.need("bpffs", false, exitUnsupported, "%s is mounted read-only: mount -o remount,rw it, or name another with --bpffs", mount)
			return
		}
		if err := unix.Access(mount, unix.W_OK); err != nil {
			c.need("bpffs", false, exitPermission, "%s: %v: run as root", mount, err)
			return
		}
		c.need("bpffs", true, exitDone, "%s", mount)
	case fs.Mountable() != nil:
		c.need("bpffs", false, exitUnsupported, "%v", fs.Mountable())
	case c.admin:
		// Whether it can be mounted only a mount would tell.
		c.need("bpffs", true, exitDone, "none on %s yet: attach mounts one", mount)
	default:
		c.need("bpffs", false, exitPermission, "none on %s: CAP_SYS_ADMIN is missing to mount one: run as root", mount)
	}
}

func (c *checker) jit() {
	const path = "/proc/sys/net/core/bpf_jit_enable"
	value, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		// Also so in every network namespace but the first.
		c.note("JIT", "speed", true, "cannot be told here: there is no %s", path)
		return
	}
	text := strings.TrimSpace(string(value))
	switch {
	case err != nil:
		c.note("JIT", "speed", true, "%v", err)
	case text == "0":
		c.note("JIT", "speed", false, "off: sysctl net.core.bpf_jit_enable=1")
	default:
		c.note("JIT", "speed", true, "on")
	}
}

// cgroup2 finds the hierarchy that run and confirm reply need, and the agent to be told of listeners.
func (c *checker) cgroup2(k kernel) {
	own, err := cgroup.Own()
	root := ""
	if err == nil {
		root, err = cgroup.Root()
	}
	if err == nil {
		err = cgroup.Everybody(root)
	}
	old := false
	if err == nil {
		old, err = cgroup.OldControllers()
	}
	ok, detail := err == nil, own
	switch {
	case err != nil:
		detail = err.Error()
	case old && !k.atLeast(5, 15):
		ok, detail = false, own+", but net_cls or net_prio of cgroup v1 is mounted: needs Linux 5.15"
	}
	c.note("cgroup2", "run; attach --confirm reply; agent, or it polls", ok, "%s", detail)
}

// kernel is the running one.
type kernel struct {
	release      string
	major, minor int
}

func newKernel() (kernel, error) {
	release, err := kernelRelease()
	k := kernel{release: release}
	if err != nil {
		return k, err
	}
	if _, err := fmt.Sscanf(release, "%d.%d", &k.major, &k.minor); err != nil {
		return k, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return k, nil
}

func (k kernel) atLeast(major, minor int) bool {
	return k.major > major || k.major == major && k.minor >= minor
}

// onPort looks at what sits on the port.
func (c *checker) onPort() error {
	if c.obstacle != nil {
		return nil // without those nothing is found
	}
	groups, err := c.find()
	if err != nil {
		return err
	}
	owners := map[uint32]bool{}
	for _, g := range groups {
		owners[g.UID] = true
		c.group(g)
	}
	c.note("one owner", "one group", len(owners) == 1, "%s own the sockets on the port", plural(len(owners), "user"))
	return nil
}

// group looks at one group, or lone socket.
func (c *checker) group(g sockets.Group) {
	name := c.groupName(g.Key)
	var planErr error
	var plan loader.Plan
	if g.Kernel != 0 {
		planErr = withMember(g, func(conn *sockets.Conn) (err error) {
			plan, err = c.fs().Plan(conn, loader.Options{})
			return err
		})
	} else {
		planErr = g.Members[0].Check()
	}
	switch {
	case planErr != nil:
		f := finding{Name: name, For: "attach", Detail: strings.TrimPrefix(planErr.Error(), name+": ")}
		c.findings = append(c.findings, f)
		c.fail(f, exitCode(planErr))
	case plan.Attached:
		c.note(name, "attach", true, "attached, %s to register", plural(len(plan.Register), "listener"))
	default:
		c.note(name, "attach", true, "%s to register", plural(len(plan.Register), "listener"))
	}
	for _, warning := range g.Mixed() {
		c.note(name, "every listener", false, "%s", warning)
	}
	refused := map[uint64]error{}
	for _, u := range plan.Skipped {
		refused[u.Socket.Cookie] = u.Reason
	}
	open := map[uint64]bool{}
	for _, m := range plan.Register {
		open[m.Cookie] = true
	}
	for _, m := range g.Members {
		f := memberFinding{groupJSON: c.scope.groupJSON(g.Key, uint64(g.NetNSInode)), Cookie: m.Cookie, OK: true, group: name}
		if len(m.Holders) > 0 {
			f.PID, f.Command = m.Holders[0].PID, m.Holders[0].Command
		}
		err := refused[m.Cookie]
		if g.Kernel == 0 || m.MPTCP {
			err = m.Check()
		}
		switch {
		case err != nil:
			f.OK, f.Detail = false, err.Error()
		case open[m.Cookie]:
			f.Detail = "can be registered"
		case planErr == nil:
			f.Detail = "registered"
		default:
			f.Detail = "in its group"
		}
		c.members = append(c.members, f)
	}
}

func (c *checker) print(e *env, asJSON, noHeader bool) error {
	if asJSON {
		if c.members == nil {
			c.members = []memberFinding{}
		}
		return writeJSON(e.out, struct {
			Schema   int              `json:"schema"`
			Attach   bool             `json:"attach"`
			Checks   []finding        `json:"checks"`
			Services []serviceFinding `json:"services"`
			Sockets  []memberFinding  `json:"sockets"`
		}{schema, c.obstacle == nil, c.findings, slices.Concat([]serviceFinding{}, c.services), c.members})
	}
	t := table{columns: []column{{"CHECK", false}, {"STATE", false}, {"NEEDED FOR", false}, {"DETAIL", false}}}
	for _, f := range c.findings {
		t.add(f.Name, okText(f.OK), f.For, f.Detail)
	}
	if err := t.write(e.out, !noHeader); err != nil {
		return err
	}
	if len(c.services) > 0 {
		fmt.Fprintln(e.out)
		t = table{columns: []column{{"LINE", true}, {"SERVICE", false}, {"STATE", false}, {"DETAIL", false}}}
		for _, s := range c.services {
			t.add(strconv.Itoa(s.Line), s.Service, okText(s.OK), s.Detail)
		}
		if err := t.write(e.out, !noHeader); err != nil {
			return err
		}
	}
	if len(c.members) == 0 {
		return nil
	}
	fmt.Fprintln(e.out)
	t = table{columns: []column{{"GROUP", false}, {"PID", true}, {"COMMAND", false}, {"STATE", false}, {"DETAIL", false}}}
	for _, m := range c.members {
		t.add(m.group, strconv.Itoa(m.PID), m.Command, okText(m.OK), m.Detail)
	}
	return t.write(e.out, !noHeader)
}

func okText(ok bool) string {
	if ok {
		return "ok"
	}
	return "missing"
}
