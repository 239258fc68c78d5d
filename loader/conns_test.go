package loader_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// tcpd is a server with listeners on one address, in the test itself: it accepts
// when it is told to.
type tcpd struct {
	t         *testing.T
	ns        *testnet.NetNS
	addr      string
	listeners []*net.TCPListener
	opened    atomic.Int64 // connections, by churn
}

// connection is both ends of one, and the listener that it came by.
type connection struct {
	client, server *net.TCPConn
	listener       int
}

func newTCPD(t *testing.T, ns *testnet.NetNS, n int, network, addr string) *tcpd {
	t.Helper()
	d := &tcpd{t: t, ns: ns, addr: addr}
	must(t, ns.Do(func() (err error) {
		d.listeners, err = sockets.Listen(context.Background(), n, network, addr)
		return err
	}))
	t.Cleanup(func() {
		for _, l := range d.listeners {
			l.Close()
		}
	})
	return d
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// dial opens connections, and leaves them waiting to be accepted.
func (d *tcpd) dial(n int, to string) (clients []*net.TCPConn) {
	d.t.Helper()
	for range n {
		must(d.t, d.ns.Do(func() error {
			c, err := net.DialTimeout("tcp", to, time.Minute)
			if err == nil {
				d.t.Cleanup(func() { c.Close() })
				clients = append(clients, c.(*net.TCPConn))
			}
			return err
		}))
	}
	return clients
}

// accept accepts what waits for a listener.
func (d *tcpd) accept(listener int) (conns []*net.TCPConn) {
	d.t.Helper()
	raw, err := d.listeners[listener].SyscallConn()
	must(d.t, err)
	for {
		var fd int
		var failed error
		must(d.t, raw.Control(func(l uintptr) { fd, _, failed = unix.Accept4(int(l), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC) }))
		if errors.Is(failed, unix.EAGAIN) {
			return conns
		}
		must(d.t, failed)
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(f)
		must(d.t, errors.Join(err, f.Close()))
		d.t.Cleanup(func() { c.Close() })
		conns = append(conns, c.(*net.TCPConn))
	}
}

// open opens connections, one after the other, and accepts them.
func (d *tcpd) open(n int) (conns []connection) {
	d.t.Helper()
	of := map[string]*net.TCPConn{}
	for _, c := range d.dial(n, d.addr) {
		of[c.LocalAddr().String()] = c
	}
	for deadline := time.Now().Add(time.Minute); len(of) > 0; {
		if time.Now().After(deadline) {
			d.t.Fatalf("%d connections are not accepted", len(of))
		}
		for i := range d.listeners {
			for _, c := range d.accept(i) {
				conns = append(conns, connection{of[c.RemoteAddr().String()], c, i})
				delete(of, c.RemoteAddr().String())
			}
		}
	}
	return conns
}

// by counts connections by the listener that has them.
func by(n int, conns []connection) []int {
	counts := make([]int, n)
	for _, c := range conns {
		counts[c.listener]++
	}
	return counts
}

// close closes a listener, and waits until it is gone: who searches all processes just
// now, in another package's test perhaps, keeps it for a moment.
func (d *tcpd) close(listener int) {
	d.t.Helper()
	gone, err := sockets.Cookie(d.listeners[listener])
	must(d.t, err)
	must(d.t, d.listeners[listener].Close())
	port := netip.MustParseAddrPort(d.addr).Port()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		var left []uint64
		must(d.t, d.ns.Do(func() (err error) {
			left, err = sockets.Bound(sockets.TCP, port)
			return err
		}))
		if !slices.Contains(left, gone) {
			return
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("listener %d is there after its close", listener)
		}
	}
}

// counts waits until the programs count so many connections in each slot, and then
// looks whether the sockets say the same.
func counts(t *testing.T, g *loader.Group, want ...int) {
	t.Helper()
	awaitCounts(t, g, func() {}, want...)
}

// looked is counts where somebody has to look, as often as changes come in between.
func looked(t *testing.T, g *loader.Group, want ...int) {
	t.Helper()
	awaitCounts(t, g, func() { status(t, g) }, want...)
}

func awaitCounts(t *testing.T, g *loader.Group, look func(), want ...int) {
	t.Helper()
	got := make([]int, len(want))
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		look()
		for slot := range want {
			got[slot] = g.Counted(slot)
		}
		if slices.Equal(got, want) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the programs count %v, want %v", got, want)
		}
	}
	for _, l := range status(t, g).Listeners {
		if l.Slot < len(want) && l.Connections != want[l.Slot] {
			t.Errorf("slot %d: status counts %d connections, want %d", l.Slot, l.Connections, want[l.Slot])
		}
	}
}

func sum(counts []int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

func spread(counts []int) int { return slices.Max(counts) - slices.Min(counts) }

// With policy least who lost his connections gets the next ones, with no process of
// ours and no descriptor open. The control is policy hash.
func TestLeastTCP(t *testing.T) {
	const n, connections = 4, 400
	for _, policy := range []loader.Policy{loader.PolicyLeast, loader.PolicyHash} {
		t.Run(policy.String(), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			d := newTCPD(t, ns, n, "tcp4", fleetAddr)
			must(t, attach(t, fs, ns, loader.Options{Settle: -1, Policy: policy}).Close())
			first := d.open(connections)
			even := by(n, first)
			var kept []connection
			for _, c := range first {
				if c.listener == 0 {
					c.client.Close()
					c.server.Close()
				} else {
					kept = append(kept, c)
				}
			}
			skewed := by(n, kept)
			all := by(n, append(kept, d.open(connections)...))
			t.Logf("%d connections: %v; those of the first closed: %v; %d more: %v", connections, even, skewed, connections, all)
			balanced := spread(all) <= 30
			if least := policy == loader.PolicyLeast; balanced != least {
				t.Errorf("balanced: %v", balanced)
			}
			g := attach(t, fs, ns, loader.Options{})
			counts(t, g, all...)
		})
	}
}

// Connections are counted while they are open, whoever ends them and how.
func TestConnectionsAreCounted(t *testing.T) {
	for _, c := range []struct{ network, listen, remote string }{
		{"tcp4", "127.0.0.1:1194", "127.0.0.1:1194"},
		{"tcp6", "[::]:1194", "[::1]:1194"},
		{"tcp", "[::]:1194", "127.0.0.1:1194"},
	} {
		t.Run(fmt.Sprintf("%s from %s", c.listen, c.remote), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			d := newTCPD(t, ns, 1, c.network, c.listen)
			d.addr = c.remote
			before := d.open(3)
			g := attach(t, fs, ns, noSettle)
			counts(t, g, 3) // of before the attach

			waiting := d.dial(2, d.addr)
			counts(t, g, 5) // not accepted yet
			d.accept(0)
			counts(t, g, 5)

			before[0].client.Close()
			counts(t, g, 5) // the server has it still
			before[0].server.Close()
			counts(t, g, 4)

			before[1].server.Close()
			before[1].client.Close() // the server has it in TIME_WAIT
			counts(t, g, 3)

			must(t, before[2].client.SetLinger(0))
			before[2].client.Close() // a reset
			counts(t, g, 2)

			must(t, waiting[0].CloseWrite())
			counts(t, g, 2)
			must(t, waiting[0].SetLinger(0))
			waiting[0].Close()
			counts(t, g, 1)
			waiting[1].Close()
			counts(t, g, 1)

			// Another group's are none of these.
			other := newTCPD(t, ns, 1, "tcp4", "127.0.0.1:1195")
			other.open(2)
			counts(t, g, 1)
		})
	}
}

// What is counted when a connection comes about in an unusual way.
func TestUnusualConnectionsAreCounted(t *testing.T) {
	sysctl := func(ns *testnet.NetNS, name, value string) {
		t.Helper()
		must(t, ns.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0o644) }))
	}
	t.Run("syncookies", func(t *testing.T) {
		ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
		sysctl(ns, "tcp_syncookies", "2")
		d := newTCPD(t, ns, 2, "tcp4", fleetAddr)
		g := attach(t, fs, ns, noSettle)
		conns := d.open(20)
		counts(t, g, by(2, conns)...)
		for _, c := range conns {
			c.server.Close()
			c.client.Close()
		}
		counts(t, g, 0, 0)
	})
	t.Run("fast open", func(t *testing.T) {
		ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
		sysctl(ns, "tcp_fastopen", "1543") // both sides, without a cookie, without the option
		d := newTCPD(t, ns, 1, "tcp4", fleetAddr)
		g := attach(t, fs, ns, noSettle)
		var fd int
		must(t, ns.Do(func() (err error) {
			if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			return unix.Sendto(fd, []byte("hello"), unix.MSG_FASTOPEN, &unix.SockaddrInet4{Port: 1194, Addr: [4]byte{127, 0, 0, 1}})
		}))
		counts(t, g, 1)
		conns := d.accept(0)
		if len(conns) != 1 {
			t.Fatalf("%d connections were accepted", len(conns))
		}
		counts(t, g, 1)
		unix.Close(fd)
		conns[0].Close()
		counts(t, g, 0)
	})
}

// A server that is killed has no connections any more, and who comes in its slot
// begins with none.
func TestConnectionsOfKilled(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	o := testnet.ServerOptions{Network: "tcp4", Addr: fleetAddr, ReusePort: true}
	a, b := testnet.StartServer(t, ns, o), testnet.StartServer(t, ns, o)
	d := &tcpd{t: t, ns: ns, addr: fleetAddr}
	for _, c := range d.dial(50, fleetAddr) {
		_, err := c.Read(make([]byte, 1)) // what waits to be accepted is nobody's yet
		must(t, err)
	}
	g := attach(t, fs, ns, noSettle)
	first, second := g.Counted(0), g.Counted(1)
	if first == 0 || second == 0 || first+second != 50 {
		t.Fatalf("%d and %d connections of before the attach", first, second)
	}
	a.Kill()
	counts(t, g, 0, second)
	testnet.StartServer(t, ns, o)
	attach(t, fs, ns, loader.Options{})
	counts(t, g, 0, second)
	b.Kill()
	counts(t, g, 0, 0)
}

// A connection that waits in a closing listener is counted with the one that it
// goes to, in whatever state it moves.
func TestMigratedAreCounted(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	d := newTCPD(t, ns, 3, "tcp4", fleetAddr)
	g := attach(t, fs, ns, noSettle)
	d.dial(90, d.addr)
	waiting := acknowledged(t, g, 3, 90)
	if slices.Min(waiting) == 0 {
		t.Fatalf("connections %v", waiting)
	}
	d.close(0)
	if got := g.Counted(1) + g.Counted(2); got != 90 {
		t.Errorf("%d connections are counted with who has them", got)
	}
	conns := [][]*net.TCPConn{1: d.accept(1), 2: d.accept(2)}
	looked(t, g, 0, len(conns[1]), len(conns[2])) // what is nobody's any more is only seen by that
	if len(conns[1])+len(conns[2]) != 90 || len(conns[1]) <= waiting[1] || len(conns[2]) <= waiting[2] {
		t.Errorf("%d and %d were accepted", len(conns[1]), len(conns[2]))
	}
	for _, c := range conns[1] {
		must(t, c.SetLinger(0))
		c.Close()
	}
	counts(t, g, 0, 0, len(conns[2]))
	if got := status(t, g).Counters.Migrated; int(got) != waiting[0] {
		t.Errorf("%d migrated, %d waited", got, waiting[0])
	}
}

// acknowledged waits until so many connections are counted, after which none is in its
// handshake, and returns the counts.
func acknowledged(t *testing.T, g *loader.Group, listeners, n int) []int {
	t.Helper()
	counts := make([]int, listeners)
	for deadline := time.Now().Add(30 * time.Second); sum(counts) != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the programs count %v, want %d", counts, n)
		}
		for slot := range counts {
			counts[slot] = g.Counted(slot)
		}
	}
	return counts
}

// However often a connection moves, whoever listens again, and whatever is known of
// it, it counts once.
func TestMigratedAreCountedOnce(t *testing.T) {
	for _, affinity := range []loader.Affinity{loader.AffinityNone, loader.AffinityClient} {
		o := loader.Options{Settle: -1, Affinity: affinity}
		t.Run(fmt.Sprintf("of before, %s", affinity), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			d := newTCPD(t, ns, 2, "tcp4", fleetAddr)
			d.dial(40, d.addr)
			g := attach(t, fs, ns, o)
			d.close(0)
			if n := len(d.accept(1)); n != 40 {
				t.Fatalf("%d were accepted", n)
			}
			attach(t, fs, ns, loader.Options{}) // adopts them
			counts(t, g, 0, 40)
		})
		t.Run(fmt.Sprintf("listens again, %s", affinity), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			d := newTCPD(t, ns, 3, "tcp4", fleetAddr)
			g := attach(t, fs, ns, o)
			d.dial(60, d.addr)
			acknowledged(t, g, 3, 60)
			ended := map[int]bool{}
			for range 2 {
				most := -1
				for slot := range 3 {
					if !ended[slot] && (most < 0 || g.Counted(slot) > g.Counted(most)) {
						most = slot
					}
				}
				ended[most] = true
				d.control(most, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RD) })
			}
			want := []int{60, 60, 60}
			for slot := range ended {
				want[slot] = 0
				d.control(slot, func(fd int) error { return unix.Listen(fd, 100) })
			}
			attach(t, fs, ns, loader.Options{})
			counts(t, g, want...)
		})
	}
}

// control runs f on the descriptor of a listener.
func (d *tcpd) control(listener int, f func(fd int) error) {
	d.t.Helper()
	raw, err := d.listeners[listener].SyscallConn()
	must(d.t, err)
	var failed error
	must(d.t, raw.Control(func(fd uintptr) { failed = f(int(fd)) }))
	must(d.t, failed)
}

// Connections of before belong to the group that has their family, also where one
// process has listeners of both.
func TestOfBeforeByFamily(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	v4, v6 := newTCPD(t, ns, 1, "tcp4", "0.0.0.0:1194"), newTCPD(t, ns, 1, "tcp", "[::]:1194")
	v4.addr, v6.addr = "127.0.0.1:1194", "[::1]:1194"
	v4.open(3)
	v6.open(2)
	for _, c := range []struct {
		d    *tcpd
		want int
	}{{v4, 3}, {v6, 2}} {
		g, err := fs.Attach(c.d.listeners[0], noSettle)
		must(t, err)
		t.Cleanup(func() { g.Close() })
		counts(t, g, c.want)
	}
}

// A connection of which the kernel left out to say that it began counts when
// somebody looks.
func TestUnseenAreCounted(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	d := newTCPD(t, ns, 1, "tcp4", fleetAddr)
	g := attach(t, fs, ns, noSettle)
	conns := d.open(5)
	counts(t, g, 5)
	must(t, g.Overlook(0, conns[0].server))
	if got := g.Counted(0); got != 4 {
		t.Fatalf("control: %d are counted", got)
	}
	if got := status(t, g).Listeners[0].Connections; got != 5 {
		t.Errorf("status counts %d connections", got)
	}
	counts(t, g, 5)
	for _, c := range conns {
		c.server.Close()
		c.client.Close()
	}
	counts(t, g, 0)
}

// A count that is wrong is right again when somebody looks.
func TestCountHeals(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	d := newTCPD(t, ns, 2, "tcp4", fleetAddr)
	g := attach(t, fs, ns, noSettle)
	want := by(2, d.open(20))
	counts(t, g, want...)
	for _, wrong := range []int{0, 1000, want[0] + 1} {
		g.Miscount(0, wrong)
		if got := g.Counted(0); got != wrong {
			t.Fatalf("control: %d are counted", got)
		}
		if _, err := g.Housekeep(); err != nil {
			t.Fatal(err)
		}
		counts(t, g, want...)
	}
}

// churn opens connections and closes them, from several threads, in all the ways in
// which they can end, until done. It returns how many there were.
func (d *tcpd) churn(done func(opened int) bool) int {
	d.t.Helper()
	var all sync.WaitGroup
	d.opened.Store(0)
	for _, l := range d.listeners {
		must(d.t, l.SetDeadline(time.Time{}))
		all.Go(func() {
			for {
				c, err := l.AcceptTCP()
				if err != nil {
					return
				}
				all.Go(func() {
					how := make([]byte, 1)
					if c.Read(how); how[0] == 'r' {
						c.SetLinger(0)
					}
					c.Close()
				})
			}
		})
	}
	var clients sync.WaitGroup
	for i := range 6 {
		clients.Go(func() {
			err := d.ns.Do(func() error {
				for n := i; !done(int(d.opened.Load())); n++ {
					c, err := net.Dial("tcp", d.addr)
					if err != nil {
						return err
					}
					d.opened.Add(1)
					tcp := c.(*net.TCPConn)
					switch n % 4 {
					case 0: // the server first
						c.Write([]byte("x"))
						io.Copy(io.Discard, c)
					case 1:
						c.Write([]byte("r"))
						io.Copy(io.Discard, c)
					case 2:
						tcp.SetLinger(0)
					}
					c.Close()
				}
				return nil
			})
			if err != nil {
				d.t.Error(err)
			}
		})
	}
	clients.Wait()
	for _, l := range d.listeners {
		l.SetDeadline(time.Now())
	}
	all.Wait()
	for i := range d.listeners {
		for _, c := range d.accept(i) { // whose client has closed it already
			c.Close()
		}
	}
	return int(d.opened.Load())
}

// It is right, too, while connections come and go all the time, but for those.
func TestCountHealsUnderLoad(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	d := newTCPD(t, ns, 1, "tcp4", fleetAddr)
	g := attach(t, fs, ns, noSettle)
	var done atomic.Bool
	go func() {
		defer done.Store(true)
		const wrong = 1_000_000
		for range 50 {
			before := d.opened.Load()
			g.Miscount(0, wrong)
			if got := g.Counted(0); got < wrong/2 {
				t.Errorf("control: %d are counted", got)
			}
			if _, err := g.Housekeep(); err != nil {
				t.Error(err)
			}
			// A dozen or so are open, and those count wrong that came or went meanwhile.
			got, some := g.Counted(0), 100+2*int(d.opened.Load()-before)
			if got < -some || got > some {
				t.Errorf("%d are counted, of %d at most", got, some)
			}
		}
	}()
	n := d.churn(func(opened int) bool { return opened >= 200 && done.Load() })
	t.Logf("%d connections", n)
	looked(t, g, 0)
}

// The counts are right after many connections on all CPUs, as soon as somebody looks:
// where packets interrupt what they would be counted by, some are missed.
func TestCountedUnderLoad(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	// Packets on the loopback are to interrupt the other CPU, as a network card would.
	spread := ns.Command("unshare", "-m", "sh", "-c", fmt.Sprintf("mount -t sysfs sysfs /sys && echo %x >/sys/class/net/lo/queues/rx-0/rps_cpus", 1<<min(32, runtime.NumCPU())-1))
	if out, err := spread.CombinedOutput(); err != nil {
		t.Logf("without interrupts: %v: %s", err, out)
	}
	d := newTCPD(t, ns, 3, "tcp4", fleetAddr)
	g := attach(t, fs, ns, loader.Options{Settle: -1, Policy: loader.PolicyLeast})
	kept := by(3, d.open(30))
	n := d.churn(func(opened int) bool { return opened >= 5000 })
	t.Logf("%d connections, and 30 that are kept: %d %d %d are counted", n, g.Counted(0), g.Counted(1), g.Counted(2))
	looked(t, g, kept...)
}

// The counts are kept while a group is upgraded, and those of a layout that had none
// are made, also while connections come and go.
func TestUpgradeConnections(t *testing.T) {
	for _, from := range []int{1, maps.ABI} {
		for _, flows := range []int{0, 2000} {
			t.Run(fmt.Sprintf("layout %d, %d flows", from, flows), func(t *testing.T) {
				ns, root := testnet.New(t), testnet.BPFFS(t)
				d := newTCPD(t, ns, 1, "tcp4", fleetAddr)
				kept := len(d.open(30))
				key := attachFrom(t, root, ns, from, 1000)
				kept += len(d.open(10))
				var upgraded atomic.Bool
				var u loader.Upgraded
				var err error
				go func() {
					defer upgraded.Store(true)
					u, err = loader.FS(root).Upgrade(key, loader.UpgradeOptions{Flows: flows})
				}()
				d.churn(func(opened int) bool { return opened >= 200 && upgraded.Load() })
				if err != nil || u.UpToDate {
					t.Fatalf("%+v, %v", u, err)
				}
				g := open(t, root, key)
				looked(t, g, kept) // before layout 2 what waited to be accepted was not counted
				d.open(3)
				counts(t, g, kept+3)
			})
		}
	}
}

// A change to policy least finds the connections that were opened before it, while
// nobody counted on that.
func TestLeastLater(t *testing.T) {
	const n, connections = 4, 200
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	d := newTCPD(t, ns, 1, "tcp4", fleetAddr)
	must(t, attach(t, fs, ns, noSettle).Close())
	before := d.open(connections / 2)
	must(t, ns.Do(func() error {
		more, err := sockets.Listen(context.Background(), n-1, "tcp4", fleetAddr)
		d.listeners = append(d.listeners, more...)
		return err
	}))
	must(t, attach(t, fs, ns, loader.Options{}).Close())
	before = append(before, d.open(connections/2)...)
	uneven := by(n, before)
	if spread(uneven) < connections/3 {
		t.Fatalf("control: %v is not uneven", uneven)
	}
	g := attach(t, fs, ns, loader.Options{Policy: loader.PolicyLeast})
	counts(t, g, uneven...)
	after := by(n, append(before, d.open(4*connections)...))
	t.Logf("with hash %v, then with least %v", uneven, after)
	if spread(after) > 10 {
		t.Errorf("%v is not even", after)
	}
	counts(t, g, after...)
}

// Where the kernel cannot count connections all works that does not need it; what
// does is refused by name, and an upgrade counts as soon as it can be.
func TestUncounted(t *testing.T) {
	restore := loader.NoTracing()
	defer restore()
	ns, root := testnet.New(t), testnet.BPFFS(t)
	fs := loader.FS(root)
	d := newTCPD(t, ns, 2, "tcp4", fleetAddr)
	conn := d.listeners[0]
	least := loader.Options{Policy: loader.PolicyLeast}
	refused := func() {
		t.Helper()
		for name, attach := range map[string]func() error{
			"attach": func() error { _, err := fs.Attach(conn, least); return err },
			"plan":   func() error { _, err := fs.Plan(conn, least); return err },
		} {
			if err := attach(); !errors.Is(err, loader.ErrUncounted) || !errors.Is(err, loader.ErrUnsupported) || !strings.Contains(err.Error(), "policy least") {
				t.Errorf("%s: got %v, want %v of policy least", name, err, loader.ErrUncounted)
			}
		}
	}
	refused()
	if _, err := os.Stat(filepath.Join(root, "rpsel")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a refused attach left state: %v", err)
	}
	g := attach(t, fs, ns, noSettle)
	refused()
	for _, l := range status(t, g).Listeners {
		if l.Connections != -1 {
			t.Errorf("slot %d: %d connections, want none known", l.Slot, l.Connections)
		}
	}
	if got := status(t, g).Policy; got != "hash" {
		t.Errorf("the policy is %s", got)
	}
	first := d.open(40)
	if _, err := g.Housekeep(); err != nil {
		t.Error(err)
	}

	// Draining and migration.
	must(t, g.Drain(0))
	if got := by(2, d.open(20)); got[0] > 0 {
		t.Errorf("%d connections for who drains", got[0])
	}
	must(t, g.Resume(0))
	d.dial(20, d.addr)
	d.close(1)
	d.listeners = d.listeners[:1]
	if moved := len(d.accept(0)); moved != 20 {
		t.Errorf("%d of 20 connections are there after a close", moved)
	}

	if u, err := fs.Upgrade(g.Key(), loader.UpgradeOptions{}); err != nil || !u.UpToDate {
		t.Errorf("upgrade: %+v, %v", u, err)
	}
	restore()
	refused()
	if u, err := fs.Upgrade(g.Key(), loader.UpgradeOptions{}); err != nil || u.UpToDate {
		t.Errorf("upgrade where it can count: %+v, %v", u, err)
	}
	for _, c := range first {
		c.client.Close()
		c.server.Close()
	}
	counts(t, g, 20+20) // opened while the other drained, and moved as it closed
	must(t, attach(t, fs, ns, least).Close())
	d.open(5)
	counts(t, g, 20+20+5)
}
