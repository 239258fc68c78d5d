package sockets

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Why something cannot be done at all.
var (
	// ErrPermission: a capability is missing. The message names it.
	ErrPermission = errors.New("permission denied")
	// ErrUnsupported: the kernel lacks a feature. The message names it.
	ErrUnsupported = errors.New("not supported by this kernel")
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
	ErrMPTCP = errors.New("MPTCP listener cannot be registered: start a Go server with GODEBUG=multipathtcp=0, or use ListenConfig.SetMultipathTCP(false)")
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

// DescribeOwners says what comes of servers of one address that belong to
// different users.
func DescribeOwners(uids []uint32) string {
	return fmt.Sprintf("sockets of different users (uid %s) share no group: start all servers as one user (OpenVPN: no \"user nobody\", but User= in its unit)",
		strings.Trim(strings.ReplaceAll(fmt.Sprint(uids), " ", ", "), "[]"))
}

// permission says which of the capabilities an operation needs are missing.
func permission(doing string, needs ...capability) error {
	if lacks := missing(needs); len(lacks) > 0 {
		return fmt.Errorf("%s: %w without %s: run as root", doing, ErrPermission, strings.Join(lacks, " and "))
	}
	return fmt.Errorf("%s: %w: a security module, or capabilities only inside a user namespace", doing, ErrPermission)
}

type capability struct {
	name string
	bit  uint
}

var (
	capChown    = capability{"CAP_CHOWN", unix.CAP_CHOWN}
	capNetAdmin = capability{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN}
	capNetBind  = capability{"CAP_NET_BIND_SERVICE", unix.CAP_NET_BIND_SERVICE}
	capPtrace   = capability{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE}
	capAdmin    = capability{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN}
	capPerfmon  = capability{"CAP_PERFMON", unix.CAP_PERFMON}
	capBPF      = capability{"CAP_BPF", unix.CAP_BPF}
)

// missing names the capabilities the calling thread does not have in effect.
func missing(needs []capability) []string {
	var have [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &have[0]); err != nil {
		return nil
	}
	var lacks []string
	for _, c := range needs {
		if have[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			lacks = append(lacks, c.name)
		}
	}
	return lacks
}
