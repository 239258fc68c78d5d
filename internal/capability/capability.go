// Package capability says which capabilities rpsel needs and what for, and
// which of them the process has.
package capability

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrPermission: a capability is missing. The message names it.
var ErrPermission = errors.New("permission denied")

// Capability is a right of root's, see capabilities(7).
type Capability struct {
	Name string
	Bit  uint
	// Why is what rpsel does with it.
	Why string
}

// The capabilities that rpsel makes use of.
var (
	BPF        = Capability{"CAP_BPF", unix.CAP_BPF, "loads programs, makes maps"}
	Perfmon    = Capability{"CAP_PERFMON", unix.CAP_PERFMON, "reads groups, sockets and names out of the kernel"}
	Ptrace     = Capability{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE, "borrows sockets from processes of other users"}
	NetAdmin   = Capability{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN, "attaches programs to cgroups, opens a socket's network namespace, filters a TCP socket"}
	SysAdmin   = Capability{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN, "mounts a bpffs, enters other namespaces"}
	Chown      = Capability{"CAP_CHOWN", unix.CAP_CHOWN, "gives a socket to the user it is for"}
	NetBind    = Capability{"CAP_NET_BIND_SERVICE", unix.CAP_NET_BIND_SERVICE, "binds to a port below 1024"}
	ReadSearch = Capability{"CAP_DAC_READ_SEARCH", unix.CAP_DAC_READ_SEARCH, "finds the cgroup of a socket"}
	SetUID     = Capability{"CAP_SETUID", unix.CAP_SETUID, "becomes another user"}
	SetGID     = Capability{"CAP_SETGID", unix.CAP_SETGID, "takes that user's groups"}
)

// All lists them in the order in which people are shown them.
var All = []Capability{BPF, Perfmon, Ptrace, NetAdmin, SysAdmin, Chown, NetBind, ReadSearch, SetUID, SetGID}

// Need is what a command cannot do without.
type Need struct {
	// Command is the command, and where it matters in which case.
	Command string
	All     []Capability
}

// Needs says which capabilities the commands need: all of those and no others,
// given that the servers are other users' and that the caller may read and write
// what is concerned of the bpffs, the run directory and cgroup2. The kernel
// takes CAP_SYS_ADMIN for those in covered, and to attach programs for
// CAP_NET_ADMIN, so they are not listed beside it.
// Commands that are not listed need nothing. TestCapabilities of cmd/rpsel tries
// each line.
var Needs = []Need{
	{"attach", []Capability{BPF, Perfmon, Ptrace}},
	{"attach --proto tcp", []Capability{BPF, Perfmon, Ptrace}},
	{"attach -N", []Capability{Ptrace, SysAdmin}},
	{"attach, where no bpffs is mounted", []Capability{Ptrace, SysAdmin}},
	{"attach --adopt", []Capability{BPF, Perfmon, Ptrace, Chown}},
	{"attach --adopt below port 1024", []Capability{BPF, Perfmon, Ptrace, Chown, NetBind}},
	{"attach --adopt --proto tcp", []Capability{BPF, Perfmon, Ptrace, NetAdmin, Chown}},
	{"attach --adopt -N", []Capability{Ptrace, NetAdmin, SysAdmin, Chown}},
	{"attach --confirm reply", []Capability{BPF, Perfmon, Ptrace, NetAdmin, ReadSearch}},
	{"detach", []Capability{BPF, Perfmon, Ptrace}},
	{"upgrade", []Capability{BPF, Perfmon, Ptrace}},
	{"status", []Capability{BPF, Perfmon}},
	{"status --proto tcp", []Capability{BPF, Perfmon}},
	{"flows", []Capability{BPF, Perfmon}},
	{"why", []Capability{BPF, Perfmon}},
	{"events", []Capability{BPF}},
	{"metrics", []Capability{BPF, Perfmon}},
	{"drain", []Capability{BPF, Perfmon}},
	{"drain --proto tcp", []Capability{BPF, Perfmon}},
	{"resume", []Capability{BPF, Perfmon}},
	{"weight", []Capability{BPF, Perfmon}},
	{"flush", []Capability{BPF, Perfmon}},
	{"run", []Capability{BPF, Perfmon, NetAdmin}},
	{"run --user", []Capability{BPF, Perfmon, NetAdmin, SetUID, SetGID}},
	{"run --user, on an attached port", []Capability{BPF, Perfmon, Ptrace, NetAdmin, SetUID, SetGID}},
	{"run --user, on a port with confirm reply", []Capability{BPF, Perfmon, Ptrace, NetAdmin, ReadSearch, SetUID, SetGID}},
	{"agent", []Capability{BPF, Perfmon, Ptrace, NetAdmin}},
	{"agent, for owners", []Capability{BPF, Perfmon, Ptrace, NetAdmin, Chown}},
	{"agent, with confirm reply", []Capability{BPF, Perfmon, Ptrace, NetAdmin, ReadSearch}},
	{"agent, with the netns of a service", []Capability{Ptrace, SysAdmin}},
	{"demo", []Capability{NetAdmin, SysAdmin}},
}

// covered lists what the kernel takes CAP_SYS_ADMIN for (include/linux/capability.h
// bpf_capable and perfmon_capable).
var covered = []Capability{BPF, Perfmon}

// Commands lists the commands that need a capability, each case only if the
// command does not need it anyway.
func (c Capability) Commands() []string {
	var commands []string
	for _, n := range Needs {
		said := func(command string) bool { return strings.HasPrefix(n.Command, command) }
		if n.needs(c) && !slices.ContainsFunc(commands, said) {
			commands = append(commands, n.Command)
		}
	}
	return commands
}

func (n Need) needs(c Capability) bool {
	return slices.ContainsFunc(n.All, func(other Capability) bool { return other.Bit == c.Bit })
}

// Effective tells whether the calling thread has the capability in effect, by
// itself.
func (c Capability) Effective() (bool, error) {
	var have [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &have[0]); err != nil {
		return false, fmt.Errorf("capget: %w", err)
	}
	return have[c.Bit/32].Effective&(1<<(c.Bit%32)) != 0, nil
}

// Covered tells whether the kernel takes CAP_SYS_ADMIN for the capability.
func (c Capability) Covered() bool { return slices.Contains(covered, c) }

// Missing names those of the capabilities that the calling thread does not have
// in effect, nor CAP_SYS_ADMIN that would cover them.
func Missing(needs ...Capability) (names []string) {
	for _, c := range needs {
		ok, err := c.Effective()
		if err == nil && !ok && c.Covered() {
			ok, err = SysAdmin.Effective()
		}
		if err == nil && !ok {
			names = append(names, c.Name)
		}
	}
	return names
}

// Denied is the error for something that was refused and needs these
// capabilities. It says which of them are missing.
func Denied(doing string, needs ...Capability) error {
	if lacks := Missing(needs...); len(lacks) > 0 {
		return fmt.Errorf("%s: %w without %s: run as root", doing, ErrPermission, strings.Join(lacks, " and "))
	}
	return fmt.Errorf("%s: %w: a security module, or capabilities only inside a user namespace", doing, ErrPermission)
}
