package sockets

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/comm"
	"github.com/rpsel/rpsel/internal/iterator"
)

// Query says which sockets to find. The zero value finds every bound UDP
// socket and every TCP listener.
type Query struct {
	// NetNS is the cookie of a network namespace, or 0 for all of them.
	NetNS uint64
	// Proto is UDP, TCP, or 0 for both.
	Proto Proto
	// Port is the local port, or 0 for all.
	Port uint16
	// Addr is the exact local address; invalid means every address.
	Addr netip.Addr
	// PID is the only process to look into, in the caller's pid namespace, or
	// 0 for all. Groups then still have all their members, those that only
	// others hold as unseen ones. It is much cheaper than a look into all.
	PID int
}

// Group is a kernel reuseport group, or a socket that is in none.
type Group struct {
	Key
	// NetNSInode is what people know a network namespace by
	// (stat /proc/PID/ns/net). Unlike the cookie it is reused.
	NetNSInode uint32
	// Kernel identifies the group in the kernel, for comparison only. It is
	// 0 if the only member is in no group.
	Kernel uint64
	// Members are in the order of sock_reuseport.socks[], by which the kernel
	// picks (net/core/sock_reuseport.c reuseport_select_sock_by_hash): without
	// a program, a packet goes to the member at hash * len(Members) >> 32.
	Members []Socket
	// Unseen is how many Members have no Holders.
	Unseen int
	// HasProgram tells whether a program picks the member, eBPF or classic.
	HasProgram bool
	// Program is the id of that program, 0 if it is classic BPF.
	Program uint32
	// IncomingCPU tells that a member has set SO_INCOMING_CPU. The kernel
	// (6.2 and later) then prefers that member on that CPU.
	IncomingCPU bool
}

// Connected reports whether every member has a peer, so that the group serves
// nobody else.
func (g Group) Connected() bool {
	return !slices.ContainsFunc(g.Members, func(s Socket) bool { return !s.Connected.IsValid() })
}

// Socket is a UDP socket or TCP listener.
type Socket struct {
	// Cookie identifies the socket until the next boot (SO_COOKIE). It is 0
	// for an unseen member whose cookie nobody has asked for yet. That of an
	// MPTCP listener is not the one of the TCP socket below it.
	Cookie uint64
	// Inode is the number in /proc/PID/fd/FD, 0 if unseen.
	Inode uint64
	// Holders are the descriptors of the socket, those of the oldest process first,
	// and the caller's own last: it may have borrowed them. None if no process holds
	// it that is visible in the caller's pid namespace.
	Holders []Holder
	// Reuseport tells that the socket is in a group and has SO_REUSEPORT on.
	Reuseport bool
	// Connected is the peer of a connected UDP socket, else invalid.
	Connected netip.AddrPort
	// MPTCP tells that the listener is an MPTCP socket.
	MPTCP bool
	// Cgroup is the id of the socket's cgroup in the cgroup2 hierarchy: that of
	// the process that opened it, as it was then. It is 0 in the root cgroup.
	Cgroup uint64
	// Encap is not 0 if the kernel takes the datagrams out of the socket
	// (UDP_ENCAP_* in include/uapi/linux/udp.h, 1 for WireGuard and VXLAN).
	Encap uint8
	// UserData tells what sk_user_data is used for.
	UserData UserData
	// RxQueue is what waits in the socket: bytes for UDP, as ss shows them,
	// connections not accepted yet for TCP.
	RxQueue uint32
	// Drops counts packets the socket had no room for, or refused, since it
	// was opened. It wraps around.
	Drops uint32
}

// Holder is a descriptor in a process.
type Holder struct {
	// PID is the process in the caller's pid namespace.
	PID int
	// FD is the descriptor's number there.
	FD int
	// Command is the process's name (/proc/PID/comm), which may be any. What is not
	// printable in it is a question mark.
	Command string
}

// String renders a holder as people write it, such as "openvpn (pid 4711)".
func (h Holder) String() string { return fmt.Sprintf("%s (pid %d)", h.Command, h.PID) }

// UserData is what a socket's sk_user_data is used for.
type UserData uint8

// The users of sk_user_data that can be told apart.
const (
	UserDataFree    UserData = iota
	UserDataArray            // a slot of a REUSEPORT_SOCKARRAY
	UserDataSockmap          // a SOCKMAP or SOCKHASH; before Linux 6.0 reported as UserDataKernel
	UserDataKernel           // anything else
)

// String names the user.
func (u UserData) String() string {
	switch u {
	case UserDataFree:
		return "free"
	case UserDataArray:
		return "a BPF socket array"
	case UserDataSockmap:
		return "a BPF sockmap"
	default:
		return "the kernel"
	}
}

// Check tells why the socket cannot be registered in a socket array, or nil.
// The error wraps ErrMPTCP, ErrTunnel, ErrConnected, ErrInUse, ErrNoReuseport
// or ErrUnseen and names the process.
//
// ErrInUse is also the answer for a member that is registered in the caller's
// own array; compare the cookies first.
func (s Socket) Check() error {
	var err error
	switch {
	case len(s.Holders) == 0:
		return fmt.Errorf("socket %d: %w", s.Cookie, ErrUnseen)
	case s.MPTCP:
		err = ErrMPTCP
	case s.Encap != 0:
		err = ErrTunnel
	case s.Connected.IsValid():
		err = fmt.Errorf("%w (peer %s)", ErrConnected, s.Connected)
	case s.UserData == UserDataArray:
		err = fmt.Errorf("%w by %s: detach the tool it belongs to, or restart the server", ErrInUse, s.UserData)
	case s.UserData != UserDataFree:
		err = fmt.Errorf("%w by %s: a socket has room for one user", ErrInUse, s.UserData)
	case !s.Reuseport:
		err = ErrNoReuseport
	default:
		return nil
	}
	return fmt.Errorf("%s: %w", s.Holders[0], err)
}

// Find lists the groups, and the sockets in no group, that match the query in
// the sockets that visible processes hold, in every network namespace. A
// group is listed if a visible process holds at least one member. Nothing
// found is an empty list.
//
// The list is sorted by key. Find assigns a cookie to each socket it sees,
// and needs CAP_BPF and CAP_PERFMON (else ErrPermission) and a kernel with
// BTF (else ErrUnsupported). The iterator it uses stays loaded until
// Unload. It may be called concurrently; calls wait for each other.
func Find(q Query) ([]Group, error) {
	theFinder.Lock()
	defer theFinder.Unlock()
	groups, err := theFinder.find(q)
	if err != nil {
		return nil, fmt.Errorf("find sockets: %w", err)
	}
	if q.Addr.IsValid() {
		groups = slices.DeleteFunc(groups, func(g Group) bool { return g.Addr.Addr() != q.Addr.WithZone("") })
	}
	return groups, nil
}

// theFinder is kept because the load takes twenty times as long as a search:
// most of it goes into decoding the kernel's BTF.
var theFinder finder

type finder struct {
	sync.Mutex
	objects bpf.FindObjects
	link    *link.Iter // nil: not loaded
}

// maxReads bounds how often find looks again. Two are needed if a cookie was
// not assigned yet, another if a socket came or went meanwhile.
const maxReads = 3

func (f *finder) find(q Query) ([]Group, error) {
	for reads := 1; ; reads++ {
		records, members, err := f.read(q)
		if err != nil {
			return nil, err
		}
		groups, settled := assemble(records, members, q.PID != 0)
		if settled || reads == maxReads {
			return groups, nil
		}
	}
}

// read runs the iterator once over all open files.
func (f *finder) read(q Query) ([]bpf.FindRecord, []bpf.FindMember, error) {
	if f.link == nil {
		if err := f.load(0); err != nil {
			return nil, nil, err
		}
	}
	for {
		records, err := f.session(q)
		if err != nil {
			return nil, nil, err
		}
		var used uint32
		if err := f.objects.UsedMembers.Get(&used); err != nil {
			return nil, nil, fmt.Errorf("read used_members: %w", err)
		}
		if used > f.objects.Members.MaxEntries() {
			if err := f.load(2 * used); err != nil {
				return nil, nil, err
			}
			continue
		}
		members, err := f.members(used)
		if err != nil {
			return nil, nil, err
		}
		return records, members, nil
	}
}

// session sets the filter and reads what the iterator writes.
func (f *finder) session(q Query) ([]bpf.FindRecord, error) {
	err := errors.Join(
		f.objects.FilterNetns.Set(q.NetNS),
		f.objects.FilterPid.Set(uint32(q.PID)),
		f.objects.FilterPort.Set(q.Port),
		f.objects.FilterProtocol.Set(uint8(q.Proto)),
		f.objects.UsedMembers.Set(uint32(0)),
	)
	if err != nil {
		return nil, fmt.Errorf("set filter: %w", err)
	}
	r, err := f.open(q.PID)
	if err != nil {
		return nil, fmt.Errorf("open iterator: %w", err)
	}
	defer r.Close()
	records, err := iterator.ReadAll[bpf.FindRecord](r)
	if err != nil {
		return nil, fmt.Errorf("read iterator: %w", err)
	}
	for i, r := range records {
		if r.Group == 0 || i > 0 && r.Group == records[i-1].Group {
			continue
		}
		if err := f.objects.Groups.Delete(r.Group); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("forget group: %w", err)
		}
	}
	return records, nil
}

// open opens the iterator, over the files of one process or (0) of all.
func (f *finder) open(pid int) (io.ReadCloser, error) {
	if pid == 0 {
		return f.link.Open()
	}
	return iterator.Files(f.objects.RpselFind, pid) // before Linux 6.1 the program leaves out the others
}

// members reads the first n entries of the map of members.
func (f *finder) members(n uint32) ([]bpf.FindMember, error) {
	if n == 0 {
		return nil, nil
	}
	var cursor ebpf.MapBatchCursor
	keys, members := make([]uint32, n), make([]bpf.FindMember, n)
	if _, err := f.objects.Members.BatchLookup(&cursor, keys, members, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, fmt.Errorf("read members: %w", err)
	}
	return members, nil
}

// load loads the iterator with room for some members, 0 for the default.
func (f *finder) load(members uint32) error {
	f.close()
	spec, err := bpf.LoadFind()
	if err != nil {
		return fmt.Errorf("load iterator: %w", err)
	}
	if members != 0 {
		spec.Maps[bpf.FindMapMembers].MaxEntries = members
	}
	if err := spec.LoadAndAssign(&f.objects, nil); err != nil {
		return loadError(err)
	}
	f.link, err = link.AttachIter(link.IterOptions{Program: f.objects.RpselFind})
	if err != nil {
		f.objects.Close()
		return loadError(err)
	}
	return nil
}

func (f *finder) close() {
	if f.link == nil {
		return
	}
	f.link.Close()
	f.objects.Close()
	f.link, f.objects = nil, bpf.FindObjects{}
}

// loadError says what the refusal to load an iterator means.
func loadError(err error) error {
	err = bpf.Refused("iterator", err)
	if _, statErr := os.Stat("/sys/kernel/btf/vmlinux"); errors.Is(statErr, os.ErrNotExist) && !errors.Is(err, ErrPermission) {
		return fmt.Errorf("load iterator: %w: it has no BTF in /sys/kernel/btf (CONFIG_DEBUG_INFO_BTF)", ErrUnsupported)
	}
	return err
}

// The flags of bpf/find.c.
const (
	flagReuseport = 1 << iota
	flagV6Only
	flagHasProgram
	flagIncomingCPU
	flagMPTCP
)

// assemble makes groups of one session of the iterator. They are settled if
// nothing suggests that another session would say more: each member of a
// group was seen in a process, under the same cookie, and the other way round.
// In a part of the processes it need not have been seen.
func assemble(records []bpf.FindRecord, members []bpf.FindMember, part bool) (groups []Group, settled bool) {
	settled = true
	inGroup := map[uint64][]bpf.FindRecord{}
	alone := map[uint64][]bpf.FindRecord{}
	for _, r := range records {
		if r.Group == 0 {
			alone[r.Cookie] = append(alone[r.Cookie], r)
		} else {
			inGroup[r.Group] = append(inGroup[r.Group], r)
		}
	}
	for _, held := range alone {
		g := groupOf(held[0])
		g.Members = []Socket{socketOf(held)}
		groups = append(groups, g)
	}
	for _, seen := range inGroup {
		g := groupOf(seen[0])
		bySock := map[uint64][]bpf.FindRecord{}
		for _, r := range seen {
			bySock[r.Member] = append(bySock[r.Member], r)
		}
		for _, m := range members[seen[0].FirstMember:][:seen[0].NumMembers] {
			held := bySock[m.Sk]
			delete(bySock, m.Sk)
			// The cookie below an MPTCP socket is not the one of its file.
			mptcp := len(held) > 0 && held[0].Flags&flagMPTCP != 0
			switch {
			case len(held) == 0:
				g.Members = append(g.Members, Socket{Cookie: m.Cookie})
				g.Unseen++
				settled = settled && part
			case held[0].Cookie != m.Cookie && !mptcp:
				settled = false
				fallthrough
			default:
				g.Members = append(g.Members, socketOf(held))
			}
		}
		// What joined after the order was read is the last.
		for _, sock := range slices.Sorted(maps.Keys(bySock)) {
			g.Members = append(g.Members, socketOf(bySock[sock]))
			settled = false
		}
		groups = append(groups, g)
	}
	slices.SortFunc(groups, func(a, b Group) int {
		return cmp.Or(compareKeys(a.Key, b.Key), cmp.Compare(a.Members[0].Cookie, b.Members[0].Cookie))
	})
	return groups, settled
}

func groupOf(r bpf.FindRecord) Group {
	return Group{
		Key: Key{
			NetNS:  r.NetnsCookie,
			Proto:  Proto(r.Protocol),
			Addr:   addrPort(r.Family, r.Local, r.LocalPort),
			V6Only: r.Flags&flagV6Only != 0,
			Device: r.Device,
			UID:    r.Uid,
		},
		NetNSInode:  r.NetnsInum,
		Kernel:      r.Group,
		HasProgram:  r.Flags&flagHasProgram != 0,
		Program:     r.Program,
		IncomingCPU: r.Flags&flagIncomingCPU != 0,
	}
}

// socketOf makes one socket of the records of its descriptors.
func socketOf(held []bpf.FindRecord) Socket {
	r := held[0]
	s := Socket{
		Cookie:    r.Cookie,
		Inode:     r.Inode,
		Reuseport: r.Group != 0 && r.Flags&flagReuseport != 0,
		MPTCP:     r.Flags&flagMPTCP != 0,
		Cgroup:    r.Cgroup,
		Encap:     r.Encap,
		UserData:  userData(r.UserData),
		RxQueue:   r.RxQueue,
		Drops:     r.Drops,
	}
	if r.RemotePort != 0 {
		s.Connected = addrPort(r.Family, r.Remote, r.RemotePort)
	}
	// A master is older than its workers, but may have a higher pid: they wrap.
	held = slices.SortedFunc(slices.Values(held), func(a, b bpf.FindRecord) int {
		return cmp.Or(cmp.Compare(own(a), own(b)), cmp.Compare(a.Started, b.Started), cmp.Compare(a.Pid, b.Pid), cmp.Compare(a.Fd, b.Fd))
	})
	for _, h := range held {
		name, _, _ := bytes.Cut(h.Comm[:], []byte{0})
		s.Holders = append(s.Holders, Holder{PID: int(h.Pid), FD: int(h.Fd), Command: comm.Printable(name)})
	}
	return s
}

// own is 1 for a descriptor of this process, which may have borrowed it.
func own(h bpf.FindRecord) int {
	if int(h.Pid) == os.Getpid() {
		return 1
	}
	return 0
}

// userData reads the low bits of sk_user_data (include/net/sock.h
// SK_USER_DATA_BPF, SK_USER_DATA_PSOCK) plus one; 0 is a null pointer.
func userData(bits uint8) UserData {
	switch {
	case bits == 0:
		return UserDataFree
	case (bits-1)&2 != 0:
		return UserDataArray
	case (bits-1)&4 != 0:
		return UserDataSockmap
	default:
		return UserDataKernel
	}
}

func addrPort(family uint16, addr [16]byte, port uint16) netip.AddrPort {
	if family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(addr[:4])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(addr), port)
}

func compareKeys(a, b Key) int {
	v6only := func(k Key) int {
		if k.V6Only {
			return 1
		}
		return 0
	}
	return cmp.Or(
		cmp.Compare(a.NetNS, b.NetNS),
		cmp.Compare(a.Proto, b.Proto),
		a.Addr.Compare(b.Addr),
		cmp.Compare(v6only(a), v6only(b)),
		cmp.Compare(a.Device, b.Device),
		cmp.Compare(a.UID, b.UID),
	)
}
