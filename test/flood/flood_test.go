package flood

import (
	"encoding/binary"
	"fmt"
	gomaps "maps"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
)

func TestMain(m *testing.M) { testnet.Main(m) }

const (
	capacity  = 1 << 16
	known     = 20000 // flows that are established when the flood begins
	unknown   = 2000  // flows of which one packet has come then
	newcomers = 300   // flows that begin in each phase
	phases    = 3
	chunks    = 4 // of a phase

	patience = time.Minute
	// most is how long a whole flood takes on a machine that is too slow for all of
	// its packets. It sends less then, but for what it takes to make a flood.
	most = 90 * time.Second
	// dull is how long a phase may take for that.
	dull = 5 * time.Minute
	// least is how many packets make a flood.
	least = 3 * capacity
)

// world is a group, its servers, and who talks to them.
type world struct {
	t       *testing.T
	ns      *testnet.NetNS
	fs      loader.FS
	group   *loader.Group
	address netip.AddrPort
	network string
	servers []*server
	book    *ledger
	legit   *testnet.Spoofer
	number  uint32 // of the last packets of flows
	resent  int
	sent    uint64
}

// clientOf is the source of a flow that counts.
func (w *world) clientOf(flow int) netip.AddrPort {
	return netip.AddrPortFrom(w.numbered([4]byte{10, 0, 0, 1}, uint64(flow)), uint16(5000+flow%1000))
}

// spoofed is a source of the flood: each has an address of its own.
func (w *world) spoofed(i uint64) netip.AddrPort {
	return netip.AddrPortFrom(w.numbered([4]byte{100, 0, 0, 0}, i%(27<<24)), uint16(1024+i%60000))
}

// numbered adds to an IPv4 address, or to the IPv6 address that has it in its third
// group and its fourth.
func (w *world) numbered(first [4]byte, n uint64) netip.Addr {
	n += uint64(binary.BigEndian.Uint32(first[:]))
	if w.address.Addr().Is4() {
		return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
	}
	a := [16]byte{0x20, 0x01, 0x0d, 0xb8}
	binary.BigEndian.PutUint64(a[8:], n)
	return netip.AddrFrom16(a)
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func newWorld(t *testing.T, network, address string) *world {
	t.Helper()
	w := &world{
		t: t, ns: testnet.New(t), fs: loader.FS(testnet.BPFFS(t)),
		network: network, address: netip.MustParseAddrPort(address),
		book: newLedger(known + unknown + 2*phases*newcomers),
	}
	var err error
	w.legit, err = testnet.NewSpoofer(w.ns, w.address)
	w.must(err)
	t.Cleanup(w.legit.Close)
	return w
}

// serve adds a listener.
func (w *world) serve() *server {
	w.t.Helper()
	s, err := serve(w.ns, w.network, w.address.String(), len(w.servers), w.book)
	w.must(err)
	w.t.Cleanup(func() { s.conn.Close() })
	w.servers = append(w.servers, s)
	return s
}

// kill closes a listener. Whom its flows go to next is no move.
func (w *world) kill(number int) (orphans int) {
	w.t.Helper()
	w.must(w.servers[number].close(w.ns, w.address.Port()))
	for flow := range w.book.owner {
		if w.book.owner[flow].CompareAndSwap(int32(number)+1, 0) {
			orphans++
		}
	}
	return orphans
}

// flows are some of them, by number.
type flows struct{ first, end int }

// tell sends a packet of each flow, and to those of which none arrived another one:
// what the loopback drops is not lost by the selection.
func (w *world) tell(all ...flows) error {
	w.number++
	deadline := time.Now().Add(patience)
	for first := true; ; first = false {
		missing := 0
		for _, some := range all {
			for flow := some.first; flow < some.end; flow++ {
				if w.book.seen[flow].Load() == w.number {
					continue
				}
				missing++
				if err := w.legit.Put(w.clientOf(flow), marked(uint32(flow), w.number)); err != nil {
					return err
				}
			}
		}
		if err := w.legit.Flush(); err != nil {
			return err
		}
		if missing == 0 {
			return nil
		}
		if !first {
			w.resent += missing
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d flows are not served, though they ask again and again", missing)
		}
		w.arrived(all)
	}
}

// arrived waits until the last packets of the flows are there, but not for long.
func (w *world) arrived(all []flows) {
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		missing := false
		for _, some := range all {
			for flow := some.first; flow < some.end && !missing; flow++ {
				missing = w.book.seen[flow].Load() != w.number
			}
		}
		if !missing {
			return
		}
	}
}

// moved counts flows that changed their listener since the last kill.
func (w *world) moved(all ...flows) (n int) {
	for _, some := range all {
		for flow := some.first; flow < some.end; flow++ {
			if w.book.moves[flow].Load() != 0 {
				n++
			}
		}
	}
	return n
}

// flood sends n packets of sources at full speed, from all CPUs, while f runs
// again and again. It stops when time is up.
func (w *world) flood(n uint64, most time.Duration, source func(uint64) netip.AddrPort, f func() error) {
	w.t.Helper()
	end := time.Now().Add(most)
	var sending sync.WaitGroup
	var sent, next atomic.Uint64
	results := make(chan error, runtime.NumCPU())
	for range runtime.NumCPU() {
		s, err := testnet.NewSpoofer(w.ns, w.address)
		w.must(err)
		sending.Go(func() {
			defer s.Close()
			for time.Now().Before(end) {
				first := next.Add(testnet.SpoofedBatch) - testnet.SpoofedBatch
				for i := first; i < min(n, first+testnet.SpoofedBatch); i++ {
					if err := s.Put(source(i), [testnet.SpoofedSize]byte{}); err != nil {
						results <- err
						return
					}
					sent.Add(1)
				}
				if first >= n {
					break
				}
			}
			results <- s.Flush()
		})
	}
	over := make(chan struct{})
	go func() {
		sending.Wait()
		close(over)
	}()
	for running := true; running; {
		w.must(f())
		select {
		case <-over:
			running = false
		case <-time.After(500 * time.Millisecond): // the flood is to have the CPUs, too
		}
	}
	for range runtime.NumCPU() {
		w.must(<-results)
	}
	w.sent += sent.Load()
}

func (w *world) status() loader.Status {
	w.t.Helper()
	s, err := w.group.Status()
	w.must(err)
	return s
}

// table opens the flow table itself: only there the identities are.
func (w *world) table() (*maps.Flows, *ebpf.Map) {
	w.t.Helper()
	pins, err := filepath.Glob(filepath.Join(string(w.fs), "rpsel", "*", "udp_*", "flows"))
	if err != nil || len(pins) != 1 {
		w.t.Fatal(pins, err)
	}
	open := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(filepath.Join(filepath.Dir(pins[0]), name), nil)
		w.must(err)
		return m
	}
	buckets, details := open("flows"), open("details")
	w.t.Cleanup(func() { buckets.Close() })
	defer details.Close()
	flows, err := maps.OpenFlows(buckets, details)
	w.must(err)
	w.t.Cleanup(func() { flows.Close() })
	return flows, buckets
}

// packets is how many the flood has: RPSEL_FLOOD, or else four million, of which
// a short run sends a tenth.
func packets(t *testing.T) uint64 {
	t.Helper()
	text := os.Getenv("RPSEL_FLOOD")
	switch {
	case text == "" && testing.Short():
		return 400_000
	case text == "":
		return 4_000_000
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatal("RPSEL_FLOOD:", err)
	}
	return n
}

// P5: whatever floods the group, no established flow moves, nor one that begins
// meanwhile. Flows of which one packet has come do: that is the control. What each
// flow has was chosen among other listeners than there are when the flood comes, so
// that a flow that loses its entry is seen to move.
func TestFlood(t *testing.T) {
	for i, c := range []struct {
		name, network, address string
		affinity               loader.Affinity
		policy                 loader.Policy
		share                  uint64 // of the packets
	}{
		{"IPv4", "udp4", "127.0.0.1:4711", loader.AffinityFlow, loader.PolicyHash, 1},
		{"IPv6", "udp6", "[::1]:4711", loader.AffinityFlow, loader.PolicyHash, 4},
		{"affinity client", "udp4", "127.0.0.1:4711", loader.AffinityClient, loader.PolicyHash, 4},
		{"policy least", "udp4", "127.0.0.1:4711", loader.AffinityFlow, loader.PolicyLeast, 4},
	} {
		if testing.Short() && i > 1 {
			break
		}
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.network, c.address)
			w.run(packets(t)/c.share, loader.Options{
				Flows: capacity, Settle: -1, Affinity: c.affinity, Policy: c.policy,
				// Nothing expires while the flood lasts.
				Idle: 10 * dull, IdleNew: 10 * dull,
			})
		})
	}
}

func (w *world) run(n uint64, o loader.Options) {
	t := w.t
	for range 3 {
		w.serve()
	}
	var err error
	w.group, err = w.fs.Attach(w.servers[0].conn, o)
	w.must(err)
	defer w.group.Close()

	old, once := flows{0, known}, flows{known, known + unknown}
	for deadline := time.Now().Add(patience); w.status().Established < known; {
		w.must(w.tell(old))
		if time.Now().After(deadline) {
			t.Fatalf("flows are not established: %+v", w.status())
		}
	}
	w.must(w.tell(once))
	// From now on the table picks the first for nothing, and the last for a third.
	_, err = w.group.Register(w.serve().conn)
	w.must(err)
	w.must(w.group.Drain(0))
	w.must(w.tell(old))

	table, buckets := w.table()
	victims := w.choose(table, known/8)
	young, control := flows{once.end, once.end}, 0
	begin, most := time.Now(), most
	if n < packets(t) {
		most /= 2
	}
	report := fmt.Sprintf("%-8s %10s %12s %10s %10s %10s %10s\n", "EACH", "PACKETS", "PACKETS/S", "NEW", "EVICTED", "FULL", "TRACKED")
	each := (n + phases*chunks - 1) / (phases * chunks)
	for phase, name := range []string{"once", "collide", "twice"} {
		before, sent, began := w.status().Counters, w.sent, time.Now()
		source, orphans := w.spoofed, 0
		// Goes on until enough sources are known that fall among the victims: each look at
		// the table shows but those it holds then.
		full := func() bool {
			return w.sent-sent >= least && len(victims.found) >= victims.room(t, buckets)*2/3
		}
		switch name {
		case "collide":
			crafted := slices.Collect(gomaps.Keys(victims.found))
			room := victims.room(t, buckets)
			if len(crafted) < room/2 {
				t.Errorf("%d sources for %d entries are too few", len(crafted), room)
			}
			crafted = crafted[:min(len(crafted), room*11/10)]
			source = func(i uint64) netip.AddrPort { return crafted[i%uint64(len(crafted))] }
			full = func() bool { return room-victims.room(t, buckets) > min(room, len(crafted))/2 }
		case "twice":
			// As many as the table has entries for, over and over: of more, each would be
			// evicted before it comes again.
			room := uint64(capacity*3/2 - w.status().Established)
			source = func(i uint64) netip.AddrPort { return w.spoofed(n + i%room) }
			full = func() bool {
				s := w.status()
				return s.Established > capacity && s.Counters.TableFull > before.TableFull
			}
		}
		// What comes again takes two seconds to be established, however few it is.
		for chunk := uint64(0); chunk < chunks || !full() && time.Since(began) < dull; chunk++ {
			dies := name == "twice" && chunk == chunks-1
			w.flood(each, most/phases/chunks, func(i uint64) netip.AddrPort { return source(chunk*each + i) }, func() error {
				if dies {
					// A listener dies: its flows move, once.
					dies, orphans = false, w.kill(1)
				}
				return w.tell(old, young)
			})
			// With another policy than hash a flow that begins before may move once.
			if young.end == once.end+phase*newcomers && w.status().Counters.Evicted > 0 {
				young.end += newcomers
			}
			if name == "once" {
				victims.learn(table)
			}
		}
		if !full() {
			t.Errorf("%s: in %v it does not come to what it is for: %d packets sent, %d sources found, %+v",
				name, dull, w.sent-sent, len(victims.found), w.status().Counters)
		}
		w.must(w.tell(old, young))
		after := w.status()
		c, took := after.Counters, time.Since(began)
		report += fmt.Sprintf("%-8s %10d %12.0f %10d %10d %10d %10d\n", name, w.sent-sent, float64(w.sent-sent)/took.Seconds(),
			c.New-before.New, c.Evicted-before.Evicted, c.TableFull-before.TableFull, after.Tracked)
		if moved := w.moved(old, young); moved != 0 {
			t.Errorf("%s: %d flows moved", name, moved)
		}
		switch name {
		case "once":
			// The control.
			w.must(w.tell(once))
			control = w.moved(once)
			if c.Evicted == before.Evicted || control < unknown/10 {
				t.Errorf("control: %d of %d flows of which one packet had come moved, %+v", control, unknown, c)
			}
		case "twice":
			if orphans < known/10 || c.Rehomed == before.Rehomed {
				t.Errorf("%d flows lost their listener, %+v", orphans, c)
			}
		}
		if c.Fallback != 0 {
			t.Errorf("%d packets fell back to the kernel's hash", c.Fallback)
		}
	}
	t.Logf("%d flows established, %d of their packets were sent again; %d of %d with one packet moved; %d packets sent (%d wanted) in %v\n%s",
		known, w.resent, control, unknown, w.sent, n, time.Since(begin).Round(time.Millisecond), report)
	w.after(flows{young.end, young.end + newcomers}, old)
}

// after is after the flood: what it left expires, newcomers are tracked, and
// without rpsel the flows would move.
func (w *world) after(fresh, old flows) {
	t := w.t
	times := func(idle time.Duration) {
		t.Helper()
		g, err := w.fs.Attach(w.servers[2].conn, loader.Options{Idle: idle, IdleNew: idle})
		w.must(err)
		w.must(g.Close())
	}
	times(time.Second)
	for deadline := time.Now().Add(patience); w.status().Tracked != 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("what the flood left does not expire: %+v", w.status())
		}
	}
	times(time.Minute)
	_, err := w.group.Flush(nil) // what has not been swept is within its time again
	w.must(err)
	w.must(w.tell(fresh))
	if s := w.status(); s.Tracked != newcomers {
		t.Errorf("after the flood %d of %d flows are tracked", s.Tracked, newcomers)
	}
	_, err = w.group.Register(w.serve().conn)
	w.must(err)
	w.must(w.tell(fresh))
	if moved := w.moved(fresh); moved != 0 {
		t.Errorf("after the flood %d flows moved", moved)
	}

	// The kernel's own hash does move flows of others when a listener dies.
	_, err = w.fs.Detach(w.group.Key())
	w.must(err)
	for flow := range w.book.owner {
		w.book.owner[flow].Store(0)
		w.book.moves[flow].Store(0)
	}
	w.must(w.tell(old))
	w.kill(0)
	w.must(w.tell(old))
	if w.moved(old) == 0 {
		t.Error("control: no flow moved without rpsel")
	}
}

// victims are established flows whose buckets are to be filled.
type victims struct {
	buckets map[uint32]bool
	found   map[netip.AddrPort]bool // sources of the flood that fall into no others
}

// choose takes some of the established flows.
func (w *world) choose(table *maps.Flows, n int) *victims {
	w.t.Helper()
	v := &victims{buckets: map[uint32]bool{}, found: map[netip.AddrPort]bool{}}
	for e := range table.All(0, maps.Forever) {
		if e.Word.State() == maps.Established && n > 0 {
			n--
			first, second := maps.Buckets(e.Identity, uint32(table.Buckets()))
			v.buckets[first], v.buckets[second] = true, true
		}
	}
	return v
}

// learn looks which sources of the flood can only have an entry beside the victims'. Who
// is no root would have to know the secret of the kernel's hash, or the keys.
func (v *victims) learn(table *maps.Flows) {
	for e := range table.All(0, maps.Forever) {
		first, second := maps.Buckets(e.Identity, uint32(table.Buckets()))
		if !v.buckets[first] || !v.buckets[second] || e.Client.Addr().As16()[12] == 10 {
			continue // it has a place elsewhere, or counts itself
		}
		source := e.Client
		if source.Port() == 0 { // affinity client
			source = netip.AddrPortFrom(source.Addr(), 1024)
		}
		v.found[source] = true
	}
}

// room is how many entries of the buckets are not those of established flows.
func (v *victims) room(t *testing.T, buckets *ebpf.Map) (n int) {
	t.Helper()
	for b := range v.buckets {
		var bucket bpf.SelectBucket
		if err := buckets.Lookup(b, &bucket); err != nil {
			t.Fatal(err)
		}
		for _, f := range bucket.Flows {
			if maps.Word(f.Word).State() != maps.Established {
				n++
			}
		}
	}
	return n
}
