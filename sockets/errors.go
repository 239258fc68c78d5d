package sockets

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/capability"
)

// Why something cannot be done at all.
var (
	// ErrPermission: a capability is missing. The message names it.
	ErrPermission = capability.ErrPermission
	// ErrUnsupported: the kernel lacks a feature. The message names it.
	ErrUnsupported = bpf.ErrUnsupported
	// ErrGone: the process, its descriptor or the socket behind it is no
	// longer the one that was found. Find again.
	ErrGone = errors.New("socket is gone")
	// ErrNoNetNS: there is no such network namespace.
	ErrNoNetNS = errors.New("no such network namespace")
)

// Why a socket cannot be registered in a socket array.
var (
	// ErrMPTCP: the kernel keeps MPTCP sockets out of socket arrays
	// (kernel/bpf/reuseport_array.c reuseport_array_update_check), while the
	// TCP socket below takes its part in the reuseport group.
	ErrMPTCP = errors.New("MPTCP listener cannot be registered: " + plainTCP)
	// ErrTunnel: a tunnel in the kernel receives this socket's packets.
	ErrTunnel = errors.New("socket of a kernel tunnel cannot be registered: start OpenVPN with --disable-dco; WireGuard, VXLAN and IPsec ports cannot be shared")
	// ErrInUse: sk_user_data, of which a socket has one, is taken. A member
	// that is registered already is in use too: by its own array.
	ErrInUse = errors.New("socket is in use")
	// ErrConnected: connect(2) takes a UDP socket out of its group.
	ErrConnected = errors.New("connected socket cannot be registered: only sockets that serve every peer can")
	// ErrNoReuseport: the socket was bound without SO_REUSEPORT.
	ErrNoReuseport = errors.New("socket was bound without SO_REUSEPORT: use --adopt, or start the server with rpsel run")
	// ErrUnseen: no process that can be seen from here holds the socket.
	ErrUnseen = errors.New("no visible process holds the socket: run rpsel in the initial pid namespace")
	// ErrOtherGroup: the socket and the group differ in something other than
	// the owner. The message says in what.
	ErrOtherGroup = errors.New("socket of another group")
	// ErrOtherUID: the socket and the group differ in the owner.
	ErrOtherUID = errors.New("socket of another user: start all servers of the port as one user")
)

// plainTCP is the way out of trouble with MPTCP.
const plainTCP = "start a Go server with GODEBUG=multipathtcp=0, or use ListenConfig.SetMultipathTCP(false), or start it after sysctl net.mptcp.enabled=0"

// Mixed says of each MPTCP listener of a group that has others, in a line, what
// comes of it: the kernel's hash gives it its share, a program cannot pick it.
func (g Group) Mixed() (warnings []string) {
	if !slices.ContainsFunc(g.Members, func(m Socket) bool { return !m.MPTCP }) {
		return nil
	}
	for _, m := range g.Members {
		if m.MPTCP {
			warnings = append(warnings, m.Starves())
		}
	}
	return warnings
}

// Starves says what comes of an MPTCP listener in a group with others.
func (s Socket) Starves() string {
	name := fmt.Sprintf("socket %d", s.Cookie)
	if len(s.Holders) > 0 {
		name = s.Holders[0].String()
	}
	return fmt.Sprintf("%s has an MPTCP listener, others of the group have not: while the program is attached it gets no connection: %s", name, plainTCP)
}

// oneUser is the way out of trouble with owners.
const oneUser = `start all servers as one user (OpenVPN: no "user nobody", but User= in its unit)`

// DescribeOwners says what comes of servers of one address that belong to
// different users.
func DescribeOwners(uids []uint32) string {
	return fmt.Sprintf("sockets of different users (uid %s) share no group: %s",
		strings.Trim(strings.ReplaceAll(fmt.Sprint(uids), " ", ", "), "[]"), oneUser)
}

// Renounced says of each member whose processes have all become another user
// than its owner, in a line, what comes of it: that a socket it binds anew, as
// OpenVPN does at SIGUSR1, cannot join the group.
func (g Group) Renounced() (warnings []string) {
	for _, m := range g.Members {
		become, all := uint32(0), len(m.Holders) > 0
		for _, h := range m.Holders {
			uid, err := fsuid(h.PID)
			become, all = uid, all && err == nil && uid != g.UID
		}
		if all {
			warnings = append(warnings, fmt.Sprintf("%s has become uid %d since its socket was opened by uid %d: a socket that it binds anew cannot join the group: %s",
				m.Holders[0], become, g.UID, oneUser))
		}
	}
	return warnings
}

// fsuid is the user whom the sockets of a process belong to (proc_pid_status(5),
// Uid; net/socket.c sock_alloc).
func fsuid(pid int) (uint32, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 5 && f[0] == "Uid:" {
			uid, err := strconv.ParseUint(f[4], 10, 32)
			return uint32(uid), err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status names no user", pid)
}
