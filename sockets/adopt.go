package sockets

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/fault"
)

// Adoption is what Adopt did to a socket.
type Adoption struct {
	// Lost is how many packets went astray while the group was made: UDP
	// datagrams that are lost, TCP connection requests that the client
	// repeats after a second.
	Lost uint32

	reuseport int // SO_REUSEPORT before
}

// Undo sets SO_REUSEPORT of the adopted socket back, so that no further socket
// can join it. The group of one that remains changes nothing: without the
// option the kernel ignores it. For TCP, the kernel remembers with the port
// that sockets of this owner with SO_REUSEPORT may bind to it, for as long as
// it is in use (struct inet_bind_bucket, fastreuseport). Undo borrows conn.
func (a Adoption) Undo(conn syscall.Conn) error {
	return control(conn, func(fd int) error {
		return os.NewSyscallError("setsockopt SO_REUSEPORT", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, a.reuseport))
	})
}

// Adopt makes a reuseport group, with one member, of a live UDP socket or TCP
// listener that was bound without SO_REUSEPORT. The server need not know. It
// borrows conn, usually one that Take gave. A socket that is in a group
// already stays as it is. If Adopt fails, the socket is as before.
//
// The kernel makes a group when a second socket binds to the address, so Adopt
// binds one, in the same network namespace, with the same owner and options.
// It refuses every packet, and a program that steers all of them to the server
// follows at once; what the kernel's hash gave to it in that microsecond is
// counted in Adoption.Lost. Then helper and program go away again.
//
// Adopt fails with the errors of Socket.Check for a socket that can be in no
// group, and with ErrPermission without CAP_BPF and CAP_PERFMON, CAP_CHOWN (a
// socket of another user), CAP_NET_BIND_SERVICE (a port below 1024),
// CAP_NET_ADMIN (TCP), CAP_NET_ADMIN and CAP_SYS_ADMIN (another network
// namespace). With
// CAP_SYS_NICE it keeps the scheduler from making the microsecond longer.
func Adopt(conn syscall.Conn) (Adoption, error) {
	var a Adoption
	err := control(conn, func(fd int) (err error) {
		key, err := keyOf(fd)
		if err != nil {
			return fmt.Errorf("adopt: %w", err)
		}
		if a, err = adopt(conn, fd, key); err != nil {
			return fmt.Errorf("adopt %s: %w", key, err)
		}
		return nil
	})
	return a, err
}

func adopt(conn syscall.Conn, fd int, key Key) (Adoption, error) {
	reuseport, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT)
	if err != nil {
		return Adoption{}, os.NewSyscallError("getsockopt SO_REUSEPORT", err)
	}
	a := Adoption{reuseport: reuseport}

	grouped, err := adoptable(conn, key)
	if err != nil {
		return Adoption{}, err
	}
	if err := setReuseport(fd); err != nil {
		return Adoption{}, err
	}
	fault.Point("SO_REUSEPORT set")
	if grouped {
		return a, nil
	}
	if a.Lost, err = makeGroup(fd, key); err != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, reuseport)
		return Adoption{}, err
	}
	return a, nil
}

// adoptable tells whether the socket is in a group already, or why it can be
// in none.
func adoptable(conn syscall.Conn, key Key) (grouped bool, err error) {
	cookie, err := Cookie(conn)
	if err != nil {
		return false, err
	}
	groups, err := Find(Query{NetNS: key.NetNS, Proto: key.Proto, Port: key.Addr.Port()})
	if err != nil {
		return false, err
	}
	for _, g := range groups {
		for _, s := range g.Members {
			if s.Cookie != cookie {
				continue
			}
			if err := s.Check(); err != nil && !errors.Is(err, ErrNoReuseport) {
				return false, err
			}
			return g.Kernel != 0, nil
		}
	}
	return false, errors.New("neither a bound UDP socket nor a TCP listener")
}

// makeGroup binds a socket beside fd's and closes it again. It gives the
// number of packets that this socket got.
func makeGroup(fd int, key Key) (lost uint32, err error) {
	helper, err := newHelper(fd, key)
	if err != nil {
		return 0, err
	}
	// The server is the first in the group that is made for it.
	first, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         bpf.AdoptProgram,
		Type:         ebpf.SocketFilter,
		License:      "Dual MIT/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		unix.Close(helper)
		if errors.Is(err, unix.EPERM) {
			return 0, capability.Denied("load program", capability.BPF)
		}
		return 0, fmt.Errorf("load program: %w", err)
	}
	defer first.Close()

	if err := join(helper, first.FD(), key); err != nil {
		unix.Close(helper)
		return 0, err
	}
	fault.Point("helper steered around")
	leave(helper)
	fault.Point("helper has left")
	lost, err = drops(helper)
	unix.Close(helper)
	fault.Point("helper closed")
	// Not before the helper is gone: now the server is the only choice.
	detachErr := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
	fault.Point("helper's program taken off")
	return lost, errors.Join(err, os.NewSyscallError("setsockopt SO_DETACH_REUSEPORT_BPF", detachErr))
}

// join binds the helper and attaches the program. Between the two the helper
// gets packets. So nothing but system calls happens there, and neither Go's
// scheduler nor, where that is permitted, the kernel's has a say.
func join(helper, program int, key Key) error {
	addr, size := sockaddr(key)
	value := int32(program)

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer realtime()()

	doing := "bind"
	_, _, errno := unix.RawSyscall(unix.SYS_BIND, uintptr(helper), uintptr(addr), size)
	if errno == 0 && key.Proto == TCP {
		doing = "listen"
		_, _, errno = unix.RawSyscall(unix.SYS_LISTEN, uintptr(helper), 1, 0)
	}
	if errno == 0 {
		fault.Point("helper bound")
		doing = "setsockopt SO_ATTACH_REUSEPORT_EBPF"
		_, _, errno = unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(helper), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF,
			uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
	}
	switch errno {
	case 0:
		return nil
	case unix.EADDRINUSE:
		return fmt.Errorf("%s beside it: %w: a third socket without SO_REUSEPORT is in the way", doing, errno)
	case unix.EACCES:
		return capability.Denied(doing+" beside it", capability.NetBind)
	default:
		return fmt.Errorf("%s beside it: %w", doing, errno)
	}
}

// leave takes the helper out of its group, and waits for packets on the way to
// it. A close alone takes a UDP socket out of the group a moment before it can
// no longer be found (net/ipv4/udp.c udp_lib_unhash); one that is bound to a
// device that does not exist gets nothing. Both are refinements: without
// CAP_NET_RAW or membarrier(2) a packet may be lost without being counted.
func leave(helper int) {
	unix.SetsockoptInt(helper, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, math.MaxInt32)
	const global = 1 // MEMBARRIER_CMD_GLOBAL waits for an RCU grace period
	unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
}

// realtime puts the calling thread before all ordinary ones, if it may, and
// returns the way back.
func realtime() (back func()) {
	before, err := unix.SchedGetAttr(0, 0)
	if err != nil {
		return func() {}
	}
	fifo := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}
	if unix.SchedSetAttr(0, &fifo, 0) != nil {
		return func() {}
	}
	return func() { unix.SchedSetAttr(0, before, 0) }
}

// newHelper opens a socket that can bind beside fd's.
func newHelper(fd int, key Key) (_ int, err error) {
	domain, kind := unix.AF_INET, unix.SOCK_DGRAM
	if key.Addr.Addr().Is6() {
		domain = unix.AF_INET6
	}
	if key.Proto == TCP {
		kind = unix.SOCK_STREAM
	}
	netns, err := netNSOfSocket(fd, key.NetNS)
	if err != nil {
		return -1, err
	}
	defer netns.Close()

	helper := -1
	err = netns.Do(func() (err error) {
		helper, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(key.Proto))
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(helper)
		}
	}()
	if err := unix.Fchown(helper, int(key.UID), -1); errors.Is(err, unix.EPERM) {
		return -1, capability.Denied("give socket to its owner", capability.Chown)
	} else if err != nil {
		return -1, os.NewSyscallError("fchown", err)
	}
	reuseaddr, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR)
	if err != nil {
		return -1, os.NewSyscallError("getsockopt SO_REUSEADDR", err)
	}
	type option struct {
		name              string
		level, opt, value int
	}
	options := []option{
		{"SO_REUSEPORT", unix.SOL_SOCKET, unix.SO_REUSEPORT, 1},
		{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, reuseaddr},
		{"SO_BINDTOIFINDEX", unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, int(key.Device)},
	}
	// The address may have left the host since the server bound it.
	if domain == unix.AF_INET6 {
		v6only := 0
		if key.V6Only {
			v6only = 1
		}
		options = append(options,
			option{"IPV6_V6ONLY", unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, v6only},
			option{"IPV6_FREEBIND", unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1})
	} else {
		options = append(options, option{"IP_FREEBIND", unix.IPPROTO_IP, unix.IP_FREEBIND, 1})
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(helper, o.level, o.opt, o.value); err != nil {
			return -1, os.NewSyscallError("setsockopt "+o.name, err)
		}
	}
	if key.Proto == TCP {
		// Connections that the server accepted while it had neither
		// SO_REUSEADDR nor SO_REUSEPORT would make bind fail. A socket in
		// repair mode binds all the same (net/ipv4/tcp.c SK_FORCE_REUSE). It
		// needs CAP_NET_ADMIN; without it most servers can be adopted.
		err := unix.SetsockoptInt(helper, unix.IPPROTO_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_ON)
		if err != nil && !errors.Is(err, unix.EPERM) {
			return -1, os.NewSyscallError("setsockopt TCP_REPAIR", err)
		}
	}
	// Refuse every packet: a SYN that is dropped is sent again, a connection
	// that nobody accepts would be reset; and refusals are counted.
	filter := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err = unix.SetsockoptSockFprog(helper, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog)
	if errors.Is(err, unix.EPERM) {
		// Of a TCP socket, seen on Linux 6.18.44.
		return -1, capability.Denied("refuse packets beside it", capability.NetAdmin)
	}
	if err != nil {
		return -1, os.NewSyscallError("setsockopt SO_ATTACH_FILTER", err)
	}
	return helper, nil
}

// netNSOfSocket opens the network namespace of a socket. It asks the socket:
// its server may be in another by now.
func netNSOfSocket(fd int, cookie uint64) (*NetNS, error) {
	own, err := OpenNetNS("")
	if err != nil || own.Cookie() == cookie {
		return own, err
	}
	own.Close()
	ns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if errors.Is(err, unix.EPERM) {
		return nil, capability.Denied("open network namespace", capability.NetAdmin)
	} else if err != nil {
		return nil, os.NewSyscallError("ioctl SIOCGSKNS", err)
	}
	return netNSOf(ns, "")
}

// sockaddr makes the argument of bind(2).
func sockaddr(key Key) (addr unsafe.Pointer, size uintptr) {
	ip := key.Addr.Addr()
	var port uint16
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&port))[:], key.Addr.Port())
	if ip.Is4() {
		return unsafe.Pointer(&unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: ip.As4()}), unix.SizeofSockaddrInet4
	}
	a := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: ip.As16()}
	if ip.IsLinkLocalUnicast() {
		a.Scope_id = key.Device
	}
	return unsafe.Pointer(&a), unix.SizeofSockaddrInet6
}

// drops reads how many packets a socket refused (SO_MEMINFO, SK_MEMINFO_DROPS
// in include/uapi/linux/sock_diag.h).
func drops(fd int) (uint32, error) {
	var info [9]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, os.NewSyscallError("getsockopt SO_MEMINFO", errno)
	}
	return info[8], nil
}
