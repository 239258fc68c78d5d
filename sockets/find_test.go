package sockets_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/sockets"
)

// The order Find gives is the one the kernel indexes, also after closes moved
// the last member into a hole.
func TestFindOrder(t *testing.T) {
	for _, network := range []string{"udp4", "udp6", "tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			netNS(t)
			first := bind(t, network, loopback(network), reuseport)
			ls := []listener{first}
			for range 5 {
				ls = append(ls, bind(t, network, local(first).String(), reuseport))
			}
			check := func() {
				t.Helper()
				order := memberCookies(findOne(t, ls[0]))
				if len(order) != len(ls) {
					t.Fatalf("found %d members, want %d", len(order), len(ls))
				}
				for i, want := range order {
					steer(t, ls[0], i)
					if got := cookies(t, ls[answering(t, ls)])[0]; got != want {
						t.Errorf("member %d of the kernel is socket %d, Find says %d", i, got, want)
					}
				}
			}
			check()
			for _, i := range []int{1, 3, 0} {
				ls[i].Close()
				ls = slices.Delete(ls, i, i+1)
				check()
			}
		})
	}
}

func loopback(network string) string {
	if network[len(network)-1] == '6' {
		return "[::1]:0"
	}
	return "127.0.0.1:0"
}

// One port may have many groups; each is found with its own key.
func TestFindGroups(t *testing.T) {
	for _, proto := range []sockets.Proto{sockets.UDP, sockets.TCP} {
		t.Run(proto.String(), func(t *testing.T) {
			netNS(t)
			lo, err := net.InterfaceByName("lo")
			must(t, err)
			onLo := func(fd int) error { return unix.BindToDevice(fd, "lo") }
			owned := func(fd int) error { return unix.Fchown(fd, 4711, -1) }
			const port = 1194
			at := func(addr string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(addr), port) }
			ns, err := sockets.OpenNetNS("")
			must(t, err)
			defer ns.Close()

			all := []struct {
				network, addr string
				options       []func(int) error
				key           sockets.Key
			}{
				{"4", "0.0.0.0", nil, sockets.Key{Addr: at("0.0.0.0")}},
				{"4", "0.0.0.0", []func(int) error{onLo}, sockets.Key{Addr: at("0.0.0.0"), Device: uint32(lo.Index)}},
				{"4", "127.0.0.1", nil, sockets.Key{Addr: at("127.0.0.1")}},
				{"4", "127.0.0.2", []func(int) error{owned}, sockets.Key{Addr: at("127.0.0.2"), UID: 4711}},
				{"", "::", nil, sockets.Key{Addr: at("::")}},
				{"6", "::", nil, sockets.Key{Addr: at("::"), V6Only: true}},
				{"6", "::1", nil, sockets.Key{Addr: at("::1"), V6Only: true}},
			}
			// Another user's may not overlap, so it comes without the wildcards.
			for _, alone := range []bool{false, true} {
				var want []sockets.Key
				var open []listener
				for _, g := range all {
					if (g.key.UID != 0) != alone {
						continue
					}
					for range 2 {
						l, err := tryBind(proto.String()+g.network, netip.AddrPortFrom(g.key.Addr.Addr(), port).String(), append(g.options, reuseport)...)
						must(t, err)
						defer l.Close()
						open = append(open, l)
						key := g.key
						key.Proto, key.NetNS = proto, ns.Cookie()
						if got, err := sockets.KeyOf(l); err != nil || got != key {
							t.Errorf("KeyOf: %+v, %v, want %+v", got, err, key)
						}
						want = append(want, key)
					}
				}
				var got []sockets.Key
				found := find(t, open[0])
				for _, g := range found {
					if g.Kernel == 0 || g.Unseen != 0 || g.HasProgram || g.IncomingCPU || uint64(g.NetNSInode) != ns.Inode() {
						t.Errorf("%s: %+v", g, g)
					}
					for _, m := range g.Members {
						if err := m.Check(); err != nil {
							t.Error(err)
						}
						got = append(got, g.Key)
					}
				}
				slices.SortFunc(want, func(a, b sockets.Key) int { return slices.Index(got, a) - slices.Index(got, b) })
				if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
					t.Error(diff)
				}
				if !slices.IsSortedFunc(found, func(a, b sockets.Group) int { return a.Addr.Compare(b.Addr) }) {
					t.Error("groups are not sorted by address")
				}
				for _, l := range open {
					l.Close()
				}
			}
		})
	}
}

// The query selects by protocol, address and namespace.
func TestFindQuery(t *testing.T) {
	netNS(t)
	ns, err := sockets.OpenNetNS("")
	must(t, err)
	defer ns.Close()
	for _, network := range []string{"udp4", "tcp4"} {
		bind(t, network, "127.0.0.1:53", reuseport)
		bind(t, network, "127.0.0.2:53", reuseport)
	}
	bind(t, "udp4", "127.0.0.1:54", reuseport)

	for _, c := range []struct {
		query sockets.Query
		want  int
	}{
		{sockets.Query{}, 5},
		{sockets.Query{Port: 53}, 4},
		{sockets.Query{Port: 55}, 0},
		{sockets.Query{Port: 53, Proto: sockets.UDP}, 2},
		{sockets.Query{Proto: sockets.TCP}, 2},
		{sockets.Query{Port: 53, Addr: netip.MustParseAddr("127.0.0.1")}, 2},
		{sockets.Query{Port: 53, Proto: sockets.TCP, Addr: netip.MustParseAddr("127.0.0.2")}, 1},
		{sockets.Query{Addr: netip.MustParseAddr("::ffff:127.0.0.1")}, 0},
	} {
		t.Run(fmt.Sprintf("%+v", c.query), func(t *testing.T) {
			c.query.NetNS = ns.Cookie()
			groups, err := sockets.Find(c.query)
			must(t, err)
			if len(groups) != c.want {
				t.Errorf("%d groups, want %d: %+v", len(groups), c.want, groups)
			}
			// Without a namespace, the ones of all are found.
			c.query.NetNS = 0
			everywhere, err := sockets.Find(c.query)
			must(t, err)
			everywhere = slices.DeleteFunc(everywhere, func(g sockets.Group) bool { return g.NetNS != ns.Cookie() })
			if len(everywhere) != c.want {
				t.Errorf("%d groups in all namespaces, want %d", len(everywhere), c.want)
			}
		})
	}
}

// The oldest process that holds a socket comes first, whatever its number: it is the
// master of those that have inherited the socket.
func TestOldestHolderFirst(t *testing.T) {
	got := sockets.HoldersOf([]bpf.FindRecord{
		{Pid: 7, Fd: 3, Started: 20}, {Pid: 8, Fd: 3, Started: 30}, {Pid: 32000, Fd: 4, Started: 10}, {Pid: 32000, Fd: 3, Started: 10},
	})
	want := []sockets.Holder{{PID: 32000, FD: 3}, {PID: 32000, FD: 4}, {PID: 7, FD: 3}, {PID: 8, FD: 3}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// A socket of several processes is one socket.
func TestFindHolders(t *testing.T) {
	netNS(t)
	l := bind(t, "udp4", "127.0.0.1:0", reuseport)
	f := file(t, l)
	one, two := child(t, f), child(t, f)
	g := findOne(t, l)
	if len(g.Members) != 1 {
		t.Fatalf("%d members, want 1", len(g.Members))
	}
	m := g.Members[0]
	self := os.Getpid()
	command, err := os.ReadFile("/proc/self/comm")
	must(t, err)
	comm := string(command[:len(command)-1])
	want := []sockets.Holder{
		{one.Process.Pid, 3, "cat"}, {two.Process.Pid, 3, "cat"},
		{self, descriptor(t, l), comm}, {self, int(f.Fd()), comm},
	}
	byNumber := func(a, b sockets.Holder) int { return slices.Compare([]int{a.PID, a.FD}, []int{b.PID, b.FD}) }
	slices.SortFunc(want[2:], byNumber) // its own come last: it may have borrowed them
	if diff := cmp.Diff(want, m.Holders); diff != "" {
		t.Error(diff)
	}
	var stat unix.Stat_t
	must(t, unix.Fstat(int(f.Fd()), &stat))
	if m.Inode != stat.Ino || m.Cookie != cookies(t, l)[0] {
		t.Errorf("inode %d, cookie %d, want %d, %d", m.Inode, m.Cookie, stat.Ino, cookies(t, l)[0])
	}
}

// In a pid namespace, the numbers are those of that namespace.
func TestFindPIDNamespace(t *testing.T) {
	netNS(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"RPSEL_TEST_AS=pid"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "1\n1\n" {
		t.Errorf("%v, %q, want the first process twice", err, out)
	}
}

// A look into one process finds its sockets and no others, and all the members
// of their groups.
func TestFindInOneProcess(t *testing.T) {
	netNS(t)
	ours := bind(t, "udp4", "127.0.0.1:53", reuseport)
	shared := bind(t, "udp4", "127.0.0.1:53", reuseport)
	theirs := bind(t, "udp4", "127.0.0.1:53", reuseport)
	elsewhere := bind(t, "udp4", "127.0.0.2:53", reuseport)
	order := cookies(t, ours, shared, theirs)
	other := cookies(t, elsewhere)
	files := []*os.File{file(t, shared), file(t, theirs), file(t, elsewhere)}
	server := child(t, files...)
	for _, f := range files {
		f.Close()
	}
	theirs.Close()
	elsewhere.Close()
	ns, err := sockets.OpenNetNS("")
	must(t, err)
	defer ns.Close()

	for _, c := range []struct {
		name   string
		pid    int
		held   []bool // of order
		groups int
	}{
		{"this", os.Getpid(), []bool{true, true, false}, 1},
		{"the other", server.Process.Pid, []bool{false, true, true}, 2},
		{"nobody", 1 << 30, nil, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: 53, PID: c.pid})
			must(t, err)
			if len(groups) != c.groups {
				t.Fatalf("%d groups, want %d: %+v", len(groups), c.groups, groups)
			}
			// Older kernels leave it to the program to look into this one only.
			filtered, err := sockets.FilteredHolders()
			must(t, err)
			stranger := func(pid int) bool { return pid != c.pid }
			if slices.ContainsFunc(filtered, stranger) || (len(filtered) > 0) != (c.groups > 0) {
				t.Errorf("the program found descriptors of %v", filtered)
			}
			if c.groups == 0 {
				return
			}
			if diff := cmp.Diff(order, memberCookies(groups[0])); diff != "" {
				t.Error(diff)
			}
			unseen := 0
			for i, m := range groups[0].Members {
				if held := len(m.Holders) > 0; held != c.held[i] {
					t.Errorf("member %d: %+v", i, m)
				}
				for _, h := range m.Holders {
					if h.PID != c.pid {
						t.Errorf("member %d: found in %v", i, h)
					}
				}
				if len(m.Holders) == 0 {
					unseen++
				}
			}
			if groups[0].Unseen != unseen {
				t.Errorf("%d unseen members, want %d", groups[0].Unseen, unseen)
			}
			if c.groups == 2 && groups[1].Members[0].Cookie != other[0] {
				t.Errorf("found %+v", groups[1])
			}
		})
	}
}

// A member that no process holds keeps its place in the order.
func TestFindUnseen(t *testing.T) {
	netNS(t)
	ls := []listener{bind(t, "udp4", "127.0.0.1:0", reuseport)}
	for range 2 {
		ls = append(ls, bind(t, "udp4", local(ls[0]).String(), reuseport))
	}
	want := cookies(t, ls...)

	// In flight between two ends of a socket pair, it is in no file table.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	must(t, unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(descriptor(t, ls[1])), nil, 0))
	ls[1].Close()

	g := findOne(t, ls[0])
	if diff := cmp.Diff(want, memberCookies(g)); diff != "" {
		t.Error(diff)
	}
	if g.Unseen != 1 || len(g.Members[1].Holders) != 0 {
		t.Errorf("%d unseen members, want the second: %+v", g.Unseen, g.Members)
	}
	if err := g.Members[1].Check(); !errors.Is(err, sockets.ErrUnseen) {
		t.Errorf("Check: %v, want %v", err, sockets.ErrUnseen)
	}
}

// Each kind of socket that cannot be registered says why.
func TestCheck(t *testing.T) {
	array := func(t *testing.T, l listener) {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ReusePortSockArray, KeySize: 4, ValueSize: 8, MaxEntries: 1})
		must(t, err)
		t.Cleanup(func() { m.Close() })
		must(t, m.Put(uint32(0), uint64(descriptor(t, l))))
	}
	sockmap := func(t *testing.T, l listener) {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SockMap, KeySize: 4, ValueSize: 8, MaxEntries: 1})
		must(t, err)
		t.Cleanup(func() { m.Close() })
		must(t, m.Put(uint32(0), uint64(descriptor(t, l))))
	}
	encap := func(fd int) error {
		const udpEncap, l2tp = 100, 3 // UDP_ENCAP, UDP_ENCAP_L2TPINUDP in include/uapi/linux/udp.h
		return unix.SetsockoptInt(fd, unix.IPPROTO_UDP, udpEncap, l2tp)
	}
	connected := func(t *testing.T, l listener) {
		control(t, l, func(fd int) {
			must(t, unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}))
		})
	}
	for _, c := range []struct {
		name, network string
		option        func(int) error
		then          func(*testing.T, listener)
		want          error
	}{
		{"fit", "udp4", reuseport, nil, nil},
		{"fit", "tcp4", reuseport, nil, nil},
		{"no reuseport", "udp4", nil, nil, sockets.ErrNoReuseport},
		{"no reuseport", "tcp4", nil, nil, sockets.ErrNoReuseport},
		{"late reuseport", "udp4", nil, func(t *testing.T, l listener) { control(t, l, func(fd int) { must(t, reuseport(fd)) }) }, sockets.ErrNoReuseport},
		{"array", "udp4", reuseport, array, sockets.ErrInUse},
		{"array", "tcp4", reuseport, array, sockets.ErrInUse},
		{"sockmap", "udp4", reuseport, sockmap, sockets.ErrInUse},
		{"encap", "udp4", func(fd int) error { return errors.Join(reuseport(fd), encap(fd)) }, nil, sockets.ErrTunnel},
		{"connected", "udp4", reuseport, connected, sockets.ErrConnected},
	} {
		t.Run(c.network+" "+c.name, func(t *testing.T) {
			netNS(t)
			var options []func(int) error
			if c.option != nil {
				options = append(options, c.option)
			}
			l := bind(t, c.network, "127.0.0.1:0", options...)
			if c.then != nil {
				c.then(t, l)
			}
			g := findOne(t, l)
			if len(g.Members) != 1 {
				t.Fatalf("%d members, want 1", len(g.Members))
			}
			if err := g.Members[0].Check(); !errors.Is(err, c.want) {
				t.Errorf("Check: %v, want %v", err, c.want)
			} else {
				t.Log(err)
			}
		})
	}
}

// The TCP socket below an MPTCP listener has its place in the group.
func TestFindMPTCP(t *testing.T) {
	netNS(t)
	plain := bind(t, "tcp4", "127.0.0.1:0", reuseport)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ENOPROTOOPT) {
		(&testnet.Unavailable{What: "MPTCP", Err: err}).Skip(t)
	}
	must(t, err)
	mptcp := os.NewFile(uintptr(fd), "mptcp")
	defer mptcp.Close()
	must(t, reuseport(fd))
	must(t, unix.Bind(fd, &unix.SockaddrInet4{Port: int(local(plain).Port()), Addr: [4]byte{127, 0, 0, 1}}))
	must(t, unix.Listen(fd, 8))
	cookie, err := sockets.Cookie(mptcp)
	must(t, err)
	last := bind(t, "tcp4", local(plain).String(), reuseport)

	g := findOne(t, plain)
	want := []uint64{cookies(t, plain)[0], cookie, cookies(t, last)[0]}
	if diff := cmp.Diff(want, memberCookies(g)); diff != "" {
		t.Fatal(diff)
	}
	if !g.Members[1].MPTCP || g.Members[0].MPTCP || g.Unseen != 0 {
		t.Errorf("%+v", g)
	}
	if err := g.Members[1].Check(); !errors.Is(err, sockets.ErrMPTCP) {
		t.Errorf("Check: %v, want %v", err, sockets.ErrMPTCP)
	}
	if _, err := sockets.KeyOf(mptcp); !errors.Is(err, sockets.ErrMPTCP) {
		t.Errorf("KeyOf: %v, want %v", err, sockets.ErrMPTCP)
	}
	if _, err := sockets.Adopt(mptcp); !errors.Is(err, sockets.ErrMPTCP) {
		t.Errorf("Adopt: %v, want %v", err, sockets.ErrMPTCP)
	}
	conn, err := sockets.Take(g.Members[1].Holders[0], cookie)
	must(t, err)
	must(t, conn.Close())
}

// A connected UDP socket on the port is found beside the group it left.
func TestFindConnected(t *testing.T) {
	netNS(t)
	l := bind(t, "udp4", "0.0.0.0:0", reuseport)
	c := bind(t, "udp4", local(l).String(), reuseport)
	control(t, c, func(fd int) {
		must(t, unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}))
	})
	var got []string
	for _, g := range find(t, l) {
		for _, m := range g.Members {
			got = append(got, fmt.Sprintf("%s group %t peer %s", g.Addr.Addr(), g.Kernel != 0, m.Connected))
		}
	}
	want := []string{"0.0.0.0 group true peer invalid AddrPort", "127.0.0.1 group false peer 127.0.0.1:9"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// A program of another tool is found, and so is SO_INCOMING_CPU.
func TestFindProgram(t *testing.T) {
	netNS(t)
	l := bind(t, "udp4", "127.0.0.1:0", reuseport)
	if g := findOne(t, l); g.HasProgram || g.IncomingCPU {
		t.Errorf("%+v", g)
	}
	steer(t, l, 0)
	if g := findOne(t, l); !g.HasProgram || g.Program != 0 {
		t.Errorf("classic program: HasProgram %t, Program %d, want true, 0", g.HasProgram, g.Program)
	}
	for _, kind := range []ebpf.ProgramType{ebpf.SocketFilter, ebpf.SkReuseport} {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type:         kind,
			License:      "MIT",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		})
		must(t, err)
		defer prog.Close()
		control(t, l, func(fd int) {
			must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, prog.FD()))
		})
		info, err := prog.Info()
		must(t, err)
		id, _ := info.ID()
		if g := findOne(t, l); !g.HasProgram || g.Program != uint32(id) {
			t.Errorf("%s: HasProgram %t, Program %d, want true, %d", kind, g.HasProgram, g.Program, id)
		}
	}
	control(t, l, func(fd int) { must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_INCOMING_CPU, 0)) })
	if g := findOne(t, l); !g.IncomingCPU {
		t.Error("SO_INCOMING_CPU is not reported")
	}
}

// The queue and the drops are those of the socket.
func TestFindUsage(t *testing.T) {
	netNS(t)
	l := bind(t, "udp4", "127.0.0.1:0", reuseport, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096)
	})
	c, err := net.Dial("udp", local(l).String())
	must(t, err)
	defer c.Close()
	for range 100 {
		_, err := c.Write(make([]byte, 1000))
		must(t, err)
	}
	var queued int
	for buf := make([]byte, 2000); ; queued++ {
		m := findOne(t, l).Members[0]
		if m.Drops == 0 || m.Drops > 100 {
			t.Fatalf("%d drops of 100", m.Drops)
		}
		if m.RxQueue == 0 {
			if queued+int(m.Drops) != 100 {
				t.Errorf("%d queued and %d dropped, want 100 together", queued, m.Drops)
			}
			break
		}
		_, _, err := l.(*net.UDPConn).ReadFrom(buf)
		must(t, err)
	}

	tcp := bind(t, "tcp4", "127.0.0.1:0", reuseport)
	for range 3 {
		c, err := net.Dial("tcp", local(tcp).String())
		must(t, err)
		defer c.Close()
	}
	if m := findOne(t, tcp).Members[0]; m.RxQueue != 3 {
		t.Errorf("%d connections wait, want 3", m.RxQueue)
	}
}

// A group may have more members than the iterator first has room for.
func TestFindLarge(t *testing.T) {
	netNS(t)
	const n = 5000
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	if limit.Max < n+100 {
		more := unix.Rlimit{Cur: n + 100, Max: n + 100}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &more); errors.Is(err, unix.EPERM) {
			(&testnet.Unavailable{What: fmt.Sprintf("%d descriptors", more.Max), Err: err}).Skip(t)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	ls := []listener{bind(t, "udp4", "127.0.0.1:0", reuseport)}
	for len(ls) < n {
		ls = append(ls, bind(t, "udp4", local(ls[0]).String(), reuseport))
	}
	want := cookies(t, ls...)
	g := findOne(t, ls[0])
	if diff := cmp.Diff(want, memberCookies(g)); diff != "" {
		t.Error(diff)
	}
	if g.Unseen != 0 {
		t.Errorf("%d members unseen", g.Unseen)
	}
}

// Without capabilities the error names them, not RLIMIT_MEMLOCK.
func TestFindPermission(t *testing.T) {
	netNS(t)
	out := asNobody(t, "find")
	want := "find sockets: load iterator: permission denied without CAP_BPF and CAP_PERFMON: run as root\n"
	if out != want {
		t.Errorf("got  %swant %s", out, want)
	}
}

func TestFindLeaksNothing(t *testing.T) {
	netNS(t)
	l := bind(t, "udp4", "127.0.0.1:0", reuseport)
	find(t, l) // loads the iterator, which stays
	before := openFiles(t)
	for range 10 {
		find(t, l)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors became %d", before, after)
	}
}

// What a search costs beside many processes, in all of them and in one.
func BenchmarkFind(b *testing.B) {
	for _, processes := range []int{100, 2000} {
		b.Run(fmt.Sprintf("processes=%d", processes), func(b *testing.B) {
			netNS(b)
			testnet.Idle(b, processes)
			first := bind(b, "udp4", "127.0.0.1:0", reuseport)
			for range 99 {
				bind(b, "udp4", local(first).String(), reuseport)
			}
			ns, err := sockets.OpenNetNS("")
			must(b, err)
			defer ns.Close()
			for _, pid := range []int{0, os.Getpid()} {
				b.Run(map[bool]string{true: "all", false: "one"}[pid == 0], func(b *testing.B) {
					for b.Loop() {
						groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: local(first).Port(), PID: pid})
						if err != nil || len(groups) != 1 {
							b.Fatal(groups, err)
						}
					}
				})
			}
		})
	}
}

// A process may give itself any name. Those who look at it see one line, and no
// escape sequence.
func TestCommandName(t *testing.T) {
	testnet.Privileged(t)
	const comm = "/proc/self/comm"
	name, err := os.ReadFile(comm)
	if err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(comm, bytes.TrimSuffix(name, []byte("\n")), 0)
	if err := os.WriteFile(comm, []byte("\x1b[31m\né\xff 9"), 0); err != nil {
		t.Fatal(err)
	}
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	port := conn.LocalAddr().(*net.UDPAddr).Port
	groups, err := sockets.Find(sockets.Query{Proto: sockets.UDP, Port: uint16(port), PID: os.Getpid()})
	if err != nil || len(groups) != 1 {
		t.Fatalf("got %d groups, %v", len(groups), err)
	}
	if got := groups[0].Members[0].Holders[0].Command; got != "?[31m?é? 9" {
		t.Errorf("got %q", got)
	}
}
