package testnet

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NetNS is a network namespace whose loopback is up. Its methods may be called
// concurrently until the test that made it ends.
type NetNS struct {
	// IPv4 and IPv6 are the addresses by which the other namespace of a Pair
	// reaches this one, and those of the loopback without such.
	IPv4, IPv6 netip.Addr

	handle netns.NsHandle
	cookie uint64
	starts chan func() // run in the namespace, on a thread that lives as long as it
	// elsewhere: that thread starts commands in another pid namespace.
	elsewhere bool

	mu       sync.Mutex
	nextPort int // of the clients
}

// New makes a network namespace. It calls Privileged first.
func New(t testing.TB) *NetNS {
	t.Helper()
	Privileged(t)
	n := &NetNS{
		IPv4:     netip.AddrFrom4([4]byte{127, 0, 0, 1}),
		IPv6:     netip.IPv6Loopback(),
		starts:   make(chan func()),
		nextPort: firstClientPort,
	}
	made := make(chan error)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		made <- n.unshare()
		for f := range n.starts {
			f()
		}
	}()
	must(t, <-made)
	t.Cleanup(func() {
		close(n.starts)
		<-ended
		n.handle.Close()
	})
	links, err := netlink.NewHandleAt(n.handle, unix.NETLINK_ROUTE)
	must(t, err)
	defer links.Close()
	lo, err := links.LinkByName("lo")
	must(t, err)
	must(t, links.LinkSetUp(lo))
	return n
}

// init keeps the tests off the main thread, which does not end with a goroutine
// that is locked to it: it would stay in a test's namespace, and keep that.
func init() { runtime.LockOSThread() }

// unshare moves the calling thread into a namespace of its own.
func (n *NetNS) unshare() (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if n.handle, err = netns.Get(); err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	// Only a socket knows the cookie of its namespace.
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(s)
	n.cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return os.NewSyscallError("getsockopt SO_NETNS_COOKIE", err)
}

// Pair makes two network namespaces with a cable between them: 192.0.2.1 and
// 2001:db8::1 at one end, 192.0.2.2 and 2001:db8::2 at the other.
func Pair(t testing.TB) (a, b *NetNS) {
	t.Helper()
	a, b = New(t), New(t)
	for i, n := range []*NetNS{a, b} {
		n.IPv4 = netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
		n.IPv6 = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: byte(i + 1)})
	}
	end := func(n *NetNS) End { return End{n, "veth", []string{n.IPv4.String() + "/24", n.IPv6.String() + "/64"}} }
	Cable(t, end(a), end(b))
	return a, b
}

// End is an end of a cable: the device that it makes in a namespace, and its
// addresses, with the lengths of their prefixes.
type End struct {
	NS     *NetNS
	Device string
	Addrs  []string
}

// cables is how many there have been.
var cables atomic.Int32

// Cable connects two namespaces. It returns when packets get through.
func Cable(t testing.TB, a, b End) {
	t.Helper()
	atA, err := netlink.NewHandleAt(a.NS.handle, unix.NETLINK_ROUTE)
	must(t, err)
	defer atA.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = a.Device
	attrs.Index = 100 + int(cables.Add(1)) // unlike its peer's, else the carrier may wait a second (linkwatch_urgent_event)
	must(t, atA.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: b.Device, PeerNamespace: netlink.NsFd(b.NS.handle)}))
	ends := []End{a, b}
	for _, e := range ends {
		links, err := netlink.NewHandleAt(e.NS.handle, unix.NETLINK_ROUTE)
		must(t, err)
		defer links.Close()
		veth, err := links.LinkByName(e.Device)
		must(t, err)
		for _, prefix := range e.Addrs {
			addr, err := netlink.ParseAddr(prefix)
			must(t, err)
			addr.Flags = unix.IFA_F_NODAD // usable at once
			must(t, links.AddrAdd(veth, addr))
		}
		must(t, links.LinkSetUp(veth))
	}
	for _, e := range ends {
		e.awaitCarrier(t)
	}
}

// awaitCarrier returns when packets get through the cable.
func (e End) awaitCarrier(t testing.TB) {
	t.Helper()
	links, err := netlink.NewHandleAt(e.NS.handle, unix.NETLINK_ROUTE)
	must(t, err)
	defer links.Close()
	for {
		veth, err := links.LinkByName(e.Device)
		must(t, err)
		if veth.Attrs().OperState == netlink.OperUp {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// Cookie is the namespace's number, never reused before the next boot.
func (n *NetNS) Cookie() uint64 { return n.cookie }

// Path names the namespace for other processes, as in "rpsel -N PATH", as long
// as the test runs.
func (n *NetNS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.handle) }

// Do runs f on a fresh thread in the namespace and returns its error. Sockets
// f opens stay in the namespace; goroutines it starts run outside. f must not
// end the test.
func (n *NetNS) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("the function did not return") // runtime.Goexit
		defer func() { done <- err }()
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		if err = netns.Set(n.handle); err != nil {
			err = os.NewSyscallError("setns", err)
			return
		}
		err = errors.New("the function did not return")
		err = f()
	}()
	return <-done
}

// Start starts the command in the namespace. It is killed when the test
// process ends or the namespace is cleaned up; the caller waits for it.
func (n *NetNS) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	err := make(chan error)
	n.starts <- func() {
		// Sent when the starting thread ends, hence the long-lived one. Who does
		// not see his parent takes it for dead (forkAndExecInChild1).
		if !n.elsewhere {
			cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
		}
		err <- cmd.Start()
	}
	return <-err
}

// StartIn makes Start start its commands in the pid namespace of a process, too,
// which this process's one has to contain. They end with the first process of that.
func (n *NetNS) StartIn(pid int) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	done := make(chan error)
	n.starts <- func() {
		n.elsewhere = pid != os.Getpid()
		done <- os.NewSyscallError("setns", unix.Setns(int(ns.Fd()), unix.CLONE_NEWPID))
	}
	return <-done
}

// Cmd is an exec.Cmd that runs in a network namespace.
type Cmd struct {
	*exec.Cmd
	ns *NetNS
}

// Command is exec.Command in the namespace.
func (n *NetNS) Command(name string, args ...string) *Cmd {
	return &Cmd{exec.Command(name, args...), n}
}

// Start is NetNS.Start.
func (c *Cmd) Start() error { return c.ns.Start(c.Cmd) }

// Run starts the command and waits for its end.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the command and returns its standard output.
func (c *Cmd) Output() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout = &out
	err := c.Run()
	return out.Bytes(), err
}

// CombinedOutput runs the command and returns its output and errors.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
