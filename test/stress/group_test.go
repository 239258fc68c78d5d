package stress

import (
	"context"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
	rpsel "github.com/rpsel/rpsel/maps"
)

// group is a reuseport group with the selection program, on maps as small as
// the test wants them. It does what package loader does, without pins and with
// nothing checked, so that a test can have two buckets.
type group struct {
	objects   bpf.SelectObjects
	config    *rpsel.Config
	flows     *rpsel.Flows
	picks     *rpsel.Picks
	listeners *rpsel.Listeners
	sockets   *rpsel.Sockets
	members   map[uint32]bool // the slots that have a share

	tables [2]uint64  // where the pick map has two tables that agree on nothing
	mu     sync.Mutex // held while one of them is in force and neither changes
}

// newGroup loads the program with a table of that many buckets.
func newGroup(t *testing.T, buckets uint32) *group {
	t.Helper()
	spec, err := bpf.LoadSelect()
	if err != nil {
		t.Fatal(err)
	}
	spec.Maps["flows"].MaxEntries = buckets
	spec.Maps["details"].MaxEntries = buckets * rpsel.BucketSize
	spec.Maps["picks"].MaxEntries = rpsel.PickPairs(8)
	for name, value := range map[string]uint32{"buckets": buckets, "clock_mult": clockMult(t)} {
		if err := spec.Variables[name].Set(value); err != nil {
			t.Fatal(err)
		}
	}
	g := &group{members: make(map[uint32]bool)}
	if err := spec.LoadAndAssign(&g.objects, nil); err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { g.objects.Close() })
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	g.config, err = rpsel.OpenConfig(g.objects.Config)
	must(err)
	t.Cleanup(func() { g.config.Close() })
	g.flows, err = rpsel.OpenFlows(g.objects.Flows, g.objects.Details)
	must(err)
	t.Cleanup(func() { g.flows.Close() })
	g.picks, err = rpsel.OpenPicks(g.objects.Picks, g.config)
	must(err)
	t.Cleanup(func() { g.picks.Close() })
	g.listeners, err = rpsel.OpenListeners(g.objects.Slots, g.objects.Live, g.objects.Listeners)
	must(err)
	t.Cleanup(func() { g.listeners.Close() })
	g.sockets = rpsel.NewSockets(g.objects.Socks)

	g.config.SetLimits(rpsel.Limits{New: 30, Established: 300})
	empty := rpsel.KernelTable(nil, g.picks.Limit())
	must(g.picks.Store(empty, empty))
	return g
}

// attach puts the program on the group of a bound socket.
func (g *group) attach(conn *net.UDPConn) error {
	return control(conn, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, g.objects.RpselSelect.FD())
	})
}

// join registers a socket in a slot that is empty, and gives it a share.
func (g *group) join(slot uint32, conn *net.UDPConn) error {
	g.listeners.NextIncarnation(slot)
	g.listeners.SetState(slot, rpsel.SlotJoining)
	if err := control(conn, func(fd int) error { return g.sockets.Insert(slot, fd) }); err != nil {
		return err
	}
	g.listeners.SetState(slot, rpsel.SlotActive)
	g.listeners.SetRank(slot, rpsel.RankFirst)
	g.members[slot] = true
	return g.deal(uint16(slot))
}

// bury deals the share of a dead listener to the others.
func (g *group) bury(slot uint32) error {
	g.listeners.Bury(slot)
	delete(g.members, slot)
	return g.deal()
}

// deal repairs the pick table and puts another beside it, in which every entry
// has the listener that follows.
func (g *group) deal(level ...uint16) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	weights := make(map[uint16]uint32)
	for slot := range g.members {
		weights[uint16(slot)] = 1
	}
	_, table, err := g.picks.Load()
	if err != nil {
		return err
	}
	table.Deal(weights, level...)
	slots := slices.Sorted(maps.Keys(weights))
	other := slices.Clone(table)
	for k, slot := range other {
		i, _ := slices.BinarySearch(slots, slot)
		other[k] = slots[(i+1)%len(slots)]
	}
	for i, t := range []rpsel.Table{other, table} {
		if err := g.picks.Store(t, t); err != nil {
			return err
		}
		g.tables[i] = g.config.Values().Table
	}
	return nil
}

// unrest makes the pick of each packet a matter of chance, as policies like
// "random" will: it exchanges the two tables as fast as it can.
func (g *group) unrest(stop *atomic.Bool) {
	for i := 0; !stop.Load(); i++ {
		g.mu.Lock()
		atomic.StoreUint64(&g.config.Values().Table, g.tables[i%2])
		g.mu.Unlock()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	atomic.StoreUint64(&g.config.Values().Table, g.tables[1])
}

// now reads the program's clock.
func (g *group) now(t *testing.T) uint32 {
	t.Helper()
	now, err := g.objects.RpselClock.Run(&ebpf.RunOptions{Data: make([]byte, 14)})
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// totals are the sums over CPUs and slots.
func (g *group) totals(t *testing.T) (slots bpf.SelectSlotCounters, all bpf.SelectCounters) {
	t.Helper()
	for slot := range uint32(rpsel.Slots) {
		var perCPU []bpf.SelectSlotCounters
		if err := g.objects.SlotCounters.Lookup(slot, &perCPU); err != nil {
			t.Fatal(err)
		}
		for _, c := range perCPU {
			slots.Hit += c.Hit
			slots.Bytes += c.Bytes
			slots.New += c.New
			slots.Rehomed += c.Rehomed
			slots.Untracked += c.Untracked
			slots.Migrated += c.Migrated
		}
	}
	var perCPU []bpf.SelectCounters
	if err := g.objects.Counters.Lookup(uint32(0), &perCPU); err != nil {
		t.Fatal(err)
	}
	for _, c := range perCPU {
		all.Fallback += c.Fallback
		all.ParseError += c.ParseError
		all.TableFull += c.TableFull
		all.Evicted += c.Evicted
	}
	return slots, all
}

func control(conn *net.UDPConn, do func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	if err := raw.Control(func(fd uintptr) { doErr = do(int(fd)) }); err != nil {
		return err
	}
	return doErr
}

// clockMult is 2^32 / CONFIG_HZ.
func clockMult(t *testing.T) uint32 {
	t.Helper()
	var spec unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &spec); err != nil {
		t.Fatal(err)
	}
	return uint32((1 << 32) * spec.Nano() / 1e9)
}

// listen binds a socket of the group in the namespace, with room for a burst.
func listen(t *testing.T, ns *testnet.NetNS, address string) *net.UDPConn {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var setErr error
		err := c.Control(func(fd uintptr) {
			setErr = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20))
		})
		return errors.Join(err, setErr)
	}}
	var conn net.PacketConn
	if err := ns.Do(func() (err error) {
		conn, err = lc.ListenPacket(context.Background(), "udp4", address)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.UDPConn)
}

// dial opens client sockets, each a flow, and returns their descriptors.
func dial(t *testing.T, ns *testnet.NetNS, n int) []int {
	t.Helper()
	var fds []int
	t.Cleanup(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	if err := ns.Do(func() error {
		for range n {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
			if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: port}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return fds
}
