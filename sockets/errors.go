package sockets

import (
	"errors"
	"fmt"
	"strings"

	"github.com/rpsel/rpsel/internal/capability"
)

// Why something cannot be done at all.
var (
	// ErrPermission: a capability is missing. The message names it.
	ErrPermission = capability.ErrPermission
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
