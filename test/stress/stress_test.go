package stress

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/maps"
)

const (
	port    = 4711
	address = "127.0.0.1:4711"
)

func TestMain(m *testing.M) { testnet.Main(m) }

// listener is a socket of the group and whether it is about to be closed.
type listener struct {
	slot    uint32
	conn    *net.UDPConn
	closing atomic.Bool
}

func (l *listener) String() string { return fmt.Sprintf("listener %p in slot %d", l, l.slot) }

// ledger knows which listener has which flow, by who received its packets.
type ledger struct {
	owners   []atomic.Pointer[listener] // of the flows that must not move
	received atomic.Uint64
	moved    atomic.Uint64
	complain func(flow uint32, was, is *listener)
}

// receive reads packets until the socket is closed. The first four bytes of a
// packet number its flow.
func (g *ledger) receive(l *listener) {
	packet := make([]byte, 64)
	for {
		n, err := l.conn.Read(packet)
		if err != nil {
			return
		}
		g.received.Add(1)
		flow := binary.NativeEndian.Uint32(packet[:n])
		if flow < uint32(len(g.owners)) {
			g.credit(flow, l)
		}
	}
}

// credit notes that the listener got a packet of the flow. It is wrong if
// another one has the flow, and neither has begun to close.
func (g *ledger) credit(flow uint32, l *listener) {
	for {
		owner := g.owners[flow].Load()
		switch {
		case owner == l || l.closing.Load():
			return
		case owner == nil || owner.closing.Load():
			if g.owners[flow].CompareAndSwap(owner, l) {
				return
			}
		default:
			g.moved.Add(1)
			g.complain(flow, owner, l)
			return
		}
	}
}

// lockstep lets senders on several CPUs send the same packets at the same time.
type lockstep []atomic.Int64

// send sends packets of the flows over and over from one CPU until told to
// stop. It waits for the others before each packet, so that all run the
// program for the same flow at once.
func (l lockstep) send(t *testing.T, me, cpu int, fds []int, order []uint32, stop *atomic.Bool) (sent uint64) {
	testnet.Pin(t, cpu)
	var packet [8]byte
	for ; !stop.Load(); sent++ {
		l[me].Store(int64(sent))
		for other := range l {
			for l[other].Load() < int64(sent) && !stop.Load() {
			}
		}
		flow := order[sent%uint64(len(order))]
		binary.NativeEndian.PutUint32(packet[:], flow)
		// An error is the refusal of an earlier packet: not of interest here.
		unix.Write(fds[flow], packet[:])
	}
	return sent
}

// TestFlowsStay: in a table of few buckets, that other flows flood from every
// CPU, no established flow is ever given to another listener while its own is
// open, whoever dies, joins and is flushed.
func TestFlowsStay(t *testing.T) {
	const (
		buckets = 24
		tracked = 80  // of the 192 entries
		others  = 400 // that fight for the rest
		slots   = 6
	)
	ns := testnet.New(t)
	g := newGroup(t, buckets)
	rng := rand.New(rand.NewPCG(1, 0))

	book := &ledger{owners: make([]atomic.Pointer[listener], tracked)}
	var complaints sync.Mutex
	book.complain = func(flow uint32, was, is *listener) {
		complaints.Lock()
		defer complaints.Unlock()
		if !t.Failed() {
			t.Errorf("a packet of flow %d went to %v, though %v has it and is open", flow, is, was)
		}
	}
	var receivers sync.WaitGroup
	var group [slots]*listener
	join := func(slot uint32) {
		t.Helper()
		l := &listener{slot: slot, conn: listen(t, ns, address)}
		if err := g.join(slot, l.conn); err != nil {
			t.Fatal(err)
		}
		group[slot] = l
		receivers.Go(func() { book.receive(l) })
	}
	kill := func(slot uint32) {
		group[slot].closing.Store(true)
		group[slot].conn.Close()
		group[slot] = nil
	}
	defer receivers.Wait()
	defer func() {
		for slot, l := range group {
			if l != nil {
				kill(uint32(slot))
			}
		}
	}()
	for slot := range uint32(slots) {
		join(slot)
		if slot == 0 {
			if err := g.attach(group[0].conn); err != nil {
				t.Fatal(err)
			}
		}
	}

	fds := dial(t, ns, tracked+others)
	established(t, g, fds[:tracked])

	var stop atomic.Bool
	var senders sync.WaitGroup
	var sent atomic.Uint64
	var order []uint32 // the tracked flows as often as the others
	for flow := range uint32(others) {
		order = append(order, tracked+flow, flow%tracked)
	}
	rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	all := testnet.CPUs(t)
	step := make(lockstep, len(all))
	for i, cpu := range all {
		senders.Go(func() { sent.Add(step.send(t, i, cpu, fds, order, &stop)) })
	}
	senders.Go(func() { g.unrest(&stop) }) // beside the senders where there is a CPU for it
	mine := make(map[uint16]bool)
	for _, fd := range fds[:tracked] {
		mine[localPort(t, fd)] = true
	}
	deaths, flushed := 0, 0
	var atFlush uint64 // how many packets had been received
	for end := time.Now().Add(testnet.Soak(t, 10*time.Second)); time.Now().Before(end) && !t.Failed(); {
		slot := rng.Uint32N(slots)
		alive := 0
		for _, l := range group {
			if l != nil {
				alive++
			}
		}
		switch {
		case group[slot] == nil:
			join(slot)
		case alive > 2:
			kill(slot)
			deaths++
			if rng.Uint32N(2) == 0 {
				// User space is late with the repair of the pick table as often as not.
				if err := g.bury(slot); err != nil {
					t.Fatal(err)
				}
			}
		}
		// The table is to be full before that.
		if book.received.Load() < atFlush+5*others {
			continue
		}
		atFlush = book.received.Load()
		for e := range g.flows.All(g.now(t), g.config.Limits()) {
			if !mine[e.Client.Port()] && g.flows.Forget(e) {
				flushed++
			}
		}
	}
	stop.Store(true)
	senders.Wait()

	slotTotals, totals := g.totals(t)
	t.Logf("%d packets sent, %d received, %d deaths, %d flushed, %+v, %+v", sent.Load(), book.received.Load(), deaths, flushed, slotTotals, totals)
	for name, n := range map[string]uint64{
		"hit": slotTotals.Hit, "new": slotTotals.New, "rehomed": slotTotals.Rehomed, "evicted": totals.Evicted,
		"deaths": uint64(deaths), "flushed": uint64(flushed),
	} {
		if n == 0 {
			t.Errorf("%s is 0: not the stress it should be", name)
		}
	}
	if totals.Fallback != 0 {
		t.Errorf("%d packets fell back to the kernel's hash with listeners alive", totals.Fallback)
	}
	if n := book.moved.Load(); n > 0 {
		t.Errorf("%d packets went to another listener", n)
	}
	atRest(t, g)
}

// established sends from each flow until the table has all of them confirmed.
func established(t *testing.T, g *group, fds []int) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		for flow, fd := range fds {
			var packet [8]byte
			binary.NativeEndian.PutUint32(packet[:], uint32(flow))
			if _, err := unix.Write(fd, packet[:]); err != nil {
				t.Fatal(err)
			}
		}
		confirmed := 0
		for w := range g.flows.Words(g.now(t), g.config.Limits()) {
			if w.State() == maps.Established {
				confirmed++
			}
		}
		if confirmed == len(fds) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d flows are established", confirmed, len(fds))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// atRest checks the table once nobody sends: every entry is empty or whole, and
// no flow has two.
func atRest(t *testing.T, g *group) {
	t.Helper()
	seen := make(map[uint64]bool)
	for b := range g.objects.Flows.MaxEntries() {
		var bucket bpf.SelectBucket
		if err := g.objects.Flows.Lookup(b, &bucket); err != nil {
			t.Fatal(err)
		}
		for _, f := range bucket.Flows {
			w := maps.Word(f.Word)
			switch {
			case w == 0:
				continue
			case w.State() < maps.New:
				t.Errorf("bucket %d: an entry is %v, %#x", b, w.State(), f.Word)
			case w.Tag() != uint32(f.Identity&0xffff):
				t.Errorf("bucket %d: the word %#x does not belong to the identity %#x", b, f.Word, f.Identity)
			case seen[f.Identity]:
				t.Errorf("bucket %d: flow %#x has two entries", b, f.Identity)
			}
			seen[f.Identity] = true
			first, second := maps.Buckets(f.Identity, g.objects.Flows.MaxEntries())
			if b != first && b != second {
				t.Errorf("flow %#x is in bucket %d, not in %d or %d", f.Identity, b, first, second)
			}
		}
	}
}

func localPort(t *testing.T, fd int) uint16 {
	t.Helper()
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(name.(*unix.SockaddrInet4).Port)
}

// TestTwins: first packets that come on all CPUs at once get one listener,
// though the pick table changes under them all the time.
func TestTwins(t *testing.T) {
	const flows = 500
	ns := testnet.New(t)
	g := newGroup(t, flows)
	book := &ledger{owners: make([]atomic.Pointer[listener], flows)}
	book.complain = func(flow uint32, was, is *listener) {
		if book.moved.Load() == 1 {
			t.Errorf("first packets of flow %d went to %v and to %v", flow, was, is)
		}
	}
	var receivers sync.WaitGroup
	defer receivers.Wait()
	for slot := range uint32(4) {
		l := &listener{slot: slot, conn: listen(t, ns, address)}
		if slot == 0 {
			if err := g.attach(l.conn); err != nil {
				t.Fatal(err)
			}
		}
		if err := g.join(slot, l.conn); err != nil {
			t.Fatal(err)
		}
		receivers.Go(func() { book.receive(l) })
		defer l.conn.Close()
	}

	fds := dial(t, ns, flows)
	var stop atomic.Bool
	var turner sync.WaitGroup
	turner.Go(func() { g.unrest(&stop) })
	defer turner.Wait()
	defer stop.Store(true)

	senders := testnet.CPUs(t)
	for end, round := time.Now().Add(testnet.Soak(t, 10*time.Second)), uint64(1); time.Now().Before(end) && !t.Failed(); round++ {
		for flow := range book.owners {
			book.owners[flow].Store(nil)
		}
		// Each flow starts on all CPUs at once: they wait for each other.
		var ready [flows]atomic.Int32
		var done sync.WaitGroup
		for _, cpu := range senders {
			done.Go(func() {
				testnet.Pin(t, cpu)
				var packet [8]byte
				for flow, fd := range fds {
					binary.NativeEndian.PutUint32(packet[:], uint32(flow))
					ready[flow].Add(1)
					for int(ready[flow].Load()) < len(senders) {
					}
					unix.Write(fd, packet[:])
				}
			})
		}
		done.Wait()
		want := round * flows * uint64(len(senders))
		for deadline := time.Now().Add(time.Minute); book.received.Load() < want; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d of %d packets received", book.received.Load(), want)
			}
		}
		atRest(t, g)
		for e := range g.flows.All(g.now(t), g.config.Limits()) {
			g.flows.Forget(e)
		}
	}
	slotTotals, totals := g.totals(t)
	t.Logf("%d packets, %d moved, %+v, %+v", book.received.Load(), book.moved.Load(), slotTotals, totals)
	if slotTotals.New == 0 || slotTotals.Hit == 0 {
		t.Error("no flow was inserted and found: not the stress it should be")
	}
}
