package bench

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// packets is how many of each kind a round measures.
const packets = 2000

// field is where groups are measured side by side.
type field struct {
	b    *testing.B
	ns   *testnet.NetNS
	fs   loader.FS
	port uint16
	took results
}

func newField(b *testing.B) *field {
	testnet.Privileged(b)
	stay(b)
	return &field{b: b, ns: testnet.New(b), fs: loader.FS(testnet.BPFFS(b)), port: 5000, took: results{}}
}

// stay keeps the benchmark on the first CPU: what user space writes into a table, and
// the next packet reads, is not to lie in another one's cache.
func stay(b *testing.B) {
	b.Helper()
	var before, first unix.CPUSet
	must(b, unix.SchedGetaffinity(0, &before))
	first.Set(0)
	runtime.LockOSThread()
	must(b, unix.SchedSetaffinity(0, &first))
	b.Cleanup(func() {
		unix.SchedSetaffinity(0, &before)
		runtime.UnlockOSThread()
	})
}

// keepStatistics has the kernel count what programs take, throughout: to begin and
// to end that takes it longer than a round.
func (f *field) keepStatistics() {
	f.b.Helper()
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	must(f.b, err)
	f.b.Cleanup(func() { stats.Close() })
}

// group is a reuseport group with a program, and who sends to it. Nobody reads
// its sockets: they drop what they get once they are full, which is after it was
// selected.
type group struct {
	*field
	target  netip.AddrPort
	conns   []*net.UDPConn
	senders []*testnet.Spoofer // one for each CPU
	program *ebpf.Program
	flows   int // that it is filled with
	next    int // the next that it has not seen
	random  *rand.Rand
}

func (f *field) listen(listeners int, network string) *group {
	f.b.Helper()
	g := &group{field: f, random: rand.New(rand.NewPCG(1, uint64(f.port)))}
	host := netip.MustParseAddr("127.0.0.1")
	if network == "udp6" {
		host = netip.IPv6Loopback()
	}
	g.target = netip.AddrPortFrom(host, f.port)
	f.port++
	must(f.b, f.ns.Do(func() (err error) {
		g.conns, err = sockets.ListenPacket(context.Background(), listeners, network, g.target.String())
		return err
	}))
	for _, c := range g.conns {
		f.b.Cleanup(func() { c.Close() })
		must(f.b, c.SetReadBuffer(1))
	}
	for range runtime.NumCPU() {
		s, err := testnet.NewSpoofer(f.ns, g.target)
		must(f.b, err)
		f.b.Cleanup(s.Close)
		g.senders = append(g.senders, s)
	}
	return g
}

// source is who sends the packets of a flow.
func (g *group) source(flow int) netip.AddrPort {
	port := uint16(1024 + flow%60000)
	if g.target.Addr().Is4() {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], firstSource+uint32(flow))
		return netip.AddrPortFrom(netip.AddrFrom4(a), port)
	}
	a := [16]byte{0x20, 0x01, 0x0d, 0xb8}
	binary.BigEndian.PutUint32(a[12:], firstSource+uint32(flow))
	return netip.AddrPortFrom(netip.AddrFrom16(a), port)
}

const firstSource = 10 << 24 // 10.0.0.0

// send sends a packet of each flow, by one sender.
func (g *group) send(s *testnet.Spoofer, flows []int) error {
	for _, flow := range flows {
		if err := s.Put(g.source(flow), [testnet.SpoofedSize]byte{}); err != nil {
			return err
		}
	}
	return s.Flush()
}

// sendAll sends a packet of each flow, from all CPUs at once.
func (g *group) sendAll(flows []int) {
	g.b.Helper()
	var sending sync.WaitGroup
	results := make([]error, len(g.senders))
	for cpu, s := range g.senders {
		part := flows[cpu*len(flows)/len(g.senders) : (cpu+1)*len(flows)/len(g.senders)]
		sending.Go(func() {
			testnet.Pin(g.b, cpu)
			results[cpu] = g.send(s, part)
		})
	}
	sending.Wait()
	for _, err := range results {
		must(g.b, err)
	}
}

// perPacket is how long a run of the program took, in ns, of packets of the flows.
func (g *group) perPacket(flows []int) float64 {
	g.b.Helper()
	return perRun(g.b, g.program, func() { must(g.b, g.send(g.senders[0], flows)) })
}

// hits is perPacket for flows that are known, after as many others have warmed up
// what all have in common.
func (g *group) hits() float64 {
	g.b.Helper()
	must(g.b, g.send(g.senders[0], g.some(steady, packets)))
	return g.perPacket(g.some(steady, packets))
}

func (g *group) perPacketOnAll(flows []int) float64 {
	g.b.Helper()
	return perRun(g.b, g.program, func() { g.sendAll(flows) })
}

// The flows of a group are of three kinds, by their number, so that what is done to
// some does not change what is measured of others.
const (
	kinds  = 10
	quiet  = 0 // was heard of some seconds ago
	homing = 1 // its listener is replaced, and comes back
	steady = 2 // and up: has been heard of in this second, whenever that is
)

// some are flows of a kind, at random: in a large table hardly any comes twice.
func (g *group) some(kind, n int) []int {
	flows := make([]int, n)
	for i := range flows {
		k := kind
		if kind == steady {
			k += g.random.IntN(kinds - steady)
		}
		flows[i] = g.random.IntN(g.flows/kinds)*kinds + k
	}
	return flows
}

// newcomers are flows that the group has not seen.
func (g *group) newcomers(n int) []int {
	flows := make([]int, n)
	for i := range flows {
		flows[i] = g.next
		g.next++
	}
	return flows
}

// newInParts is what a packet of a new flow takes in a table that stays as full as it was: a
// few come at a time, and are taken out again after.
func (g *group) newInParts(before, after func()) (took float64) {
	g.b.Helper()
	g.next = g.flows
	for range parts {
		before()
		took += g.perPacket(g.newcomers(packets/parts)) / parts
		after()
	}
	return took
}

// isNew tells whether a client is none of those the group was filled with.
func (g *group) isNew(client [16]byte) bool {
	return int(binary.BigEndian.Uint32(client[12:])-firstSource) >= g.flows
}

// fill makes flows.
func (g *group) fill(flows int) {
	g.b.Helper()
	g.flows = flows
	for g.next < flows {
		g.sendAll(g.newcomers(min(1<<16, flows-g.next)))
	}
}

// attachOther gives the group another program than ours.
func (g *group) attachOther(p *ebpf.Program) {
	g.b.Helper()
	g.program = p
	raw, err := g.conns[0].SyscallConn()
	must(g.b, err)
	must(g.b, raw.Control(func(fd uintptr) {
		must(g.b, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, p.FD()))
	}))
}

// register puts the group's sockets into an array.
func (g *group) register(socks *ebpf.Map) {
	g.b.Helper()
	for i, c := range g.conns {
		raw, err := c.SyscallConn()
		must(g.b, err)
		must(g.b, raw.Control(func(fd uintptr) { must(g.b, socks.Put(uint32(i), uint64(fd))) }))
	}
}

func (g *group) load(name string, insns asm.Instructions) *ebpf.Program {
	g.b.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SkReuseport, Instructions: insns, License: "Dual MIT/GPL"})
	must(g.b, err)
	g.b.Cleanup(func() { p.Close() })
	return p
}

// empty is a group whose program decides nothing: what is left is what measuring
// takes.
func (f *field) empty() *group {
	f.b.Helper()
	g := f.listen(4, "udp4")
	g.attachOther(g.load("empty", asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}))
	g.fill(1000)
	return g
}

// hashOnly is a group whose program selects by the kernel's hash, and no more.
func (f *field) hashOnly(listeners int) *group {
	f.b.Helper()
	g := f.listen(listeners, "udp4")
	socks, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ReusePortSockArray, KeySize: 4, ValueSize: 8, MaxEntries: maps.Slots})
	must(f.b, err)
	f.b.Cleanup(func() { socks.Close() })
	g.register(socks)
	g.attachOther(g.load("hash_only", asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 32, asm.Word), // hash
		asm.Mul.Imm(asm.R2, int32(len(g.conns))),
		asm.RSh.Imm(asm.R2, 32),
		asm.StoreMem(asm.RFP, -4, asm.R2, asm.Word),
		asm.LoadMapPtr(asm.R2, socks.FD()),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -4),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnSkSelectReuseport.Call(),
		asm.Mov.Imm(asm.R0, 1),
		asm.Return(),
	}))
	g.fill(1000)
	return g
}

// room is the capacity of a table that is filled with so many flows.
func room(flows int) int { return flows + max(packets, flows/8) }

// sticky is a group of rpsel's.
type sticky struct {
	*group
	*loader.Group
	slots        *ebpf.Map
	entries, row []byte // the memory of the table
	picks        []byte // and of the pick table in force
	before       loader.Status
}

func (f *field) rpsel(listeners int, network string, flows int) *sticky {
	f.b.Helper()
	g := &sticky{group: f.listen(listeners, network)}
	attached, err := f.fs.Attach(g.conns[0], loader.Options{Settle: -1, Flows: room(flows), Idle: time.Hour, IdleNew: time.Hour})
	must(f.b, err)
	f.b.Cleanup(func() { attached.Close() })
	g.Group = attached
	g.program, err = ebpf.LoadPinnedProgram(g.pin("prog"), nil)
	must(f.b, err)
	f.b.Cleanup(func() { g.program.Close() })
	g.slots = g.open(bpf.SelectMapSlots)
	g.entries, g.row = g.memory(bpf.SelectMapFlows), g.memory(bpf.SelectMapDetails)
	var config bpf.SelectConfig
	must(f.b, g.open(bpf.SelectMapConfig).Lookup(uint32(0), &config))
	const entry = 4
	first, size := config.Table>>32, config.Table&math.MaxUint32
	g.picks = g.memory(bpf.SelectMapPicks)[first*entry : (first+size)*entry]
	g.fill(flows)
	g.stamp(func(int) bool { return true })
	g.before = g.status()
	return g
}

func (g *sticky) pin(name string) string {
	g.b.Helper()
	pins, err := filepath.Glob(filepath.Join(string(g.fs), "rpsel", strconv.FormatUint(g.ns.Cookie(), 10), fmt.Sprintf("udp_*_%d*", g.target.Port()), name))
	if err != nil || len(pins) != 1 {
		g.b.Fatal(pins, err)
	}
	return pins[0]
}

func (g *sticky) open(name string) *ebpf.Map {
	g.b.Helper()
	m, err := ebpf.LoadPinnedMap(g.pin(name), nil)
	must(g.b, err)
	g.b.Cleanup(func() { m.Close() })
	return m
}

func (g *sticky) memory(name string) []byte {
	g.b.Helper()
	m := g.open(name)
	page := unix.Getpagesize()
	size := int(m.MaxEntries()) * int(m.ValueSize())
	memory, err := unix.Mmap(m.FD(), 0, (size+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(g.b, err)
	g.b.Cleanup(func() { unix.Munmap(memory) })
	return memory[:size]
}

const (
	entrySize, rowSize = 16, 24
	// ahead is how far the last packet of a flow lies in the future: for so long
	// no other one refreshes it.
	ahead = 24 * 60 * 60
	// behind is how far in the past.
	behind = 10
)

// stamp makes flows established, and sets when their last packets came, by kind.
func (g *sticky) stamp(which func(kind int) bool) {
	g.b.Helper()
	now := g.now()
	for at := range len(g.entries) / entrySize {
		entry := g.entries[at*entrySize+8:]
		w := maps.Word(binary.NativeEndian.Uint64(entry))
		flow := int(binary.BigEndian.Uint32(g.row[at*rowSize+12:]) - firstSource)
		kind := flow % kinds
		if w.State() < maps.New || flow >= g.flows || !which(kind) {
			continue
		}
		second := now + ahead
		if kind == quiet {
			second = now - behind
		}
		binary.NativeEndian.PutUint64(entry, uint64(maps.MakeWord(w.Slot(), w.Incarnation(), maps.Established, second, w.Tag())))
	}
}

// now is the second of the group's clock.
func (g *sticky) now() uint32 {
	g.b.Helper()
	clock, err := ebpf.LoadPinnedProgram(g.pin("clock"), nil)
	must(g.b, err)
	defer clock.Close()
	now, _, err := clock.Test(make([]byte, 64))
	must(g.b, err)
	return now
}

// small tables are put in order after each round; in large ones what a round does
// is not met again.
func (g *sticky) small() bool { return g.flows <= 100_000 }

// parts is in how many a round of new flows comes to a small table, which forgets each
// before the next: a thousand flows would be three thousand at the end of a round, as many
// as the table has room for, and the fuller the buckets the more a new flow takes.
const parts = 4

// newFlow is what a packet of a flow takes that is in neither bucket.
func (g *sticky) newFlow() float64 {
	g.b.Helper()
	if !g.small() {
		return g.perPacket(g.newcomers(packets))
	}
	return g.newInParts(g.warm, func() {
		_, err := g.Flush(func(f loader.Flow) bool { return g.isNew(f.Client.Addr().As16()) })
		must(g.b, err)
	})
}

// warm reads what a new flow looks at, so that it is in a cache if that has room: what
// other groups and other processes did since is no part of what a new flow takes. A
// quiet server's new flow takes more (docs/performance.md).
func (g *sticky) warm() {
	g.b.Helper()
	const line = 64
	for _, memory := range [][]byte{g.entries, g.row, g.picks} {
		for at := 0; at < len(memory); at += line {
			sink += uint64(memory[at])
		}
	}
}

// refresh is what a packet takes that is a flow's first in a second.
func (g *sticky) refresh() float64 {
	g.b.Helper()
	if g.small() {
		g.stamp(func(kind int) bool { return kind == quiet })
	}
	flows := g.random.Perm(g.flows / kinds)
	for i := range flows {
		flows[i] = flows[i]*kinds + quiet
	}
	return g.perPacket(flows[:min(packets, len(flows))])
}

// rehome is what a packet takes of a flow whose slot has got another listener.
func (g *sticky) rehome() float64 {
	g.b.Helper()
	flows := g.random.Perm(g.flows / kinds)
	for i := range flows {
		flows[i] = flows[i]*kinds + homing
	}
	flows = flows[:min(packets, len(flows))]
	g.incarnate(1)
	took := g.perPacket(flows)
	g.incarnate(-1)
	g.perPacket(flows)
	return took
}

// incarnate makes the listeners of all slots others.
func (g *sticky) incarnate(change int) {
	g.b.Helper()
	for i := range g.conns {
		var s bpf.SelectSlot
		must(g.b, g.slots.Lookup(uint32(i), &s))
		s.Incarnation += uint32(change)
		must(g.b, g.slots.Put(uint32(i), s))
	}
}

// access is what a load takes, in ns, that depends on the one before, from
// anywhere in the flow table.
func (g *sticky) access() float64 {
	const line, loads = 64, 10 * packets
	x, lines := g.random.Uint64(), uint64(len(g.entries)/line)
	start := time.Now()
	for range loads {
		at := (x >> 32) * lines >> 32 * line
		x = (x + binary.NativeEndian.Uint64(g.entries[at:])) * 0x9e3779b97f4a7c15
		x ^= x >> 29
	}
	took := float64(time.Since(start).Nanoseconds()) / loads
	sink += x
	return took
}

var sink uint64

func (g *sticky) status() loader.Status {
	g.b.Helper()
	s, err := g.Status()
	must(g.b, err)
	return s
}

// bytes is the memory of the group's maps.
func (g *sticky) bytes() (sum uint64) {
	g.b.Helper()
	pins, err := filepath.Glob(g.pin(".") + "/*")
	must(g.b, err)
	for _, pin := range pins {
		if m, err := ebpf.LoadPinnedMap(pin, nil); err == nil {
			sum += memoryOf(g.b, m)
			m.Close()
		}
	}
	return sum
}

// memoryOf is what the kernel says that a map takes.
func memoryOf(b *testing.B, m *ebpf.Map) uint64 {
	b.Helper()
	info, err := m.Info()
	must(b, err)
	n, ok := info.Memlock()
	if !ok {
		b.Fatal("the kernel does not tell the memory of ", m)
	}
	return n
}

// lru is a group with the program of lru.c.
type lru struct {
	*group
	maps LruObjects
}

func (f *field) lru(like *sticky) *lru {
	f.b.Helper()
	g := &lru{group: f.listen(len(like.conns), "udp4")}
	var config bpf.SelectConfig
	must(f.b, like.open(bpf.SelectMapConfig).Lookup(uint32(0), &config))
	spec, err := LoadLru()
	must(f.b, err)
	must(f.b, spec.Variables[LruVarClockMult].Set(config.ClockMult))
	must(f.b, spec.Variables[LruVarListeners].Set(uint32(len(g.conns))))
	must(f.b, spec.Variables[LruVarLead].Set(uint32(ahead)))
	spec.Maps[LruMapFlows].MaxEntries = uint32(room(like.flows) * 3 / 2)
	must(f.b, spec.LoadAndAssign(&g.maps, nil))
	f.b.Cleanup(func() { g.maps.Close() })
	g.register(g.maps.Socks)
	for i := range g.conns {
		must(f.b, g.maps.Slots.Put(uint32(i), LruSlot{Incarnation: 1}))
	}
	g.attachOther(g.maps.SelectByLru)
	g.fill(like.flows)
	return g
}

func (g *lru) newFlow() float64 {
	g.b.Helper()
	if g.flows > 100_000 {
		return g.perPacket(g.newcomers(packets))
	}
	return g.newInParts(func() {}, func() {
		var identity uint64
		var t LruTracked
		var gone []uint64
		for all := g.maps.Flows.Iterate(); all.Next(&identity, &t); {
			var client [16]byte
			binary.NativeEndian.PutUint64(client[8:], t.Detail.Client[1])
			if g.isNew(client) {
				gone = append(gone, identity)
			}
		}
		for _, identity := range gone {
			must(g.b, g.maps.Flows.Delete(identity))
		}
	})
}

// results are what rounds took, by name.
type results map[string][]float64

func (r results) add(name string, value float64) { r[name] = append(r[name], value) }

// report reports of each result the least and the median, net of what the
// measuring itself takes.
func (r results) report(b *testing.B) {
	b.ReportMetric(0, "ns/op")
	for name, all := range r {
		slices.Sort(all)
		least, median := all[0], all[len(all)/2]
		if net := r["empty"]; len(net) > 0 && name != "empty" && !isAccess(name) {
			slices.Sort(net)
			least, median = least-net[0], median-net[len(net)/2]
		}
		b.ReportMetric(least, name+"/ns")
		b.ReportMetric(median, name+"/median-ns")
	}
}
