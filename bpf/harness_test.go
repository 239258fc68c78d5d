package bpf_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/maps"
)

//go:generate go tool bpf2go -tags linux Harness harness.c -- -Wall -Wextra -Werror

// Results of run_packet: enum insert_result in flow.h, and those of harness.c.
const (
	claimed   = 0
	lost      = 2
	full      = 3
	hit       = 100
	refreshed = 101
)

const (
	idle    = 300
	idleNew = 30
)

func TestMain(m *testing.M) { testnet.Main(m) }

// load loads the harness for as long as the test runs.
func load(f *testing.F) *HarnessObjects {
	f.Helper()
	testnet.Privileged(f)
	var o HarnessObjects
	if err := LoadHarnessObjects(&o, nil); err != nil {
		f.Fatalf("%+v", err)
	}
	f.Cleanup(func() { o.Close() })
	return &o
}

// run runs a program on a frame and returns io after it.
func run(t *testing.T, o *HarnessObjects, p *ebpf.Program, in HarnessValues, frame []byte) (out HarnessValues) {
	t.Helper()
	if err := o.Io.Set(in); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Run(&ebpf.RunOptions{Data: frame}); err != nil {
		t.Fatal(err)
	}
	if err := o.Io.Get(&out); err != nil {
		t.Fatal(err)
	}
	return out
}

// frame is the shortest one the kernel takes for a test run.
func frame() []byte { return make([]byte, 64) }

func FuzzNumbers(f *testing.F) {
	o := load(f)
	f.Add(uint32(0), uint16(0), uint64(0), uint64(0), uint32(0), uint32(2), uint32(0), uint32(0), uint64(0))
	f.Add(uint32(0xdeadbeef), uint16(1194), uint64(maps.MakeWord(7, 9, maps.New, 100, 0xabcd)), uint64(1)<<42, uint32(102), uint32(49152), uint32(0x00050005), uint32(5), uint64(1)<<63)
	f.Add(^uint32(0), ^uint16(0), ^uint64(0), ^uint64(0), ^uint32(0), uint32(1<<22), ^uint32(0), ^uint32(0), ^uint64(0))
	f.Add(uint32(1), uint16(1), uint64(maps.MakeWord(4095, 1023, maps.Established, 0, 1)), uint64(0), uint32(0xffffff), uint32(3), uint32(0xffff0003), uint32(3), uint64(6))
	f.Add(uint32(1), uint16(1), uint64(maps.MakeWord(0, 0, maps.Established, 0xffffff, 1)), uint64(0), uint32(idle), uint32(3), uint32(0x0003ffff), uint32(1), uint64(6))
	for rank := range uint32(6) {
		f.Add(uint32(1), uint16(1), uint64(0), uint64(0), uint32(0), uint32(2), uint32(0), rank, uint64(0))
	}
	f.Fuzz(func(t *testing.T, hash uint32, port uint16, word, other uint64, now, buckets, entry, n uint32, set uint64) {
		buckets = max(buckets, 2)
		in := HarnessValues{Hash: hash, Port: uint32(port), Word: word, OtherWord: other, Now: now, Buckets: buckets,
			Idle: idle, IdleNew: idleNew, Slot: entry & 0xffff, Incarnation: n, Entry: entry, N: n & 0xffff, Set: set}
		out := run(t, o, o.RunNumbers, in, frame())

		w := maps.Word(word)
		want := in
		want.Identity = maps.Identity(hash, port)
		want.Tag = uint32(want.Identity & 0xffff)
		want.First, want.Second = maps.Buckets(want.Identity, buckets)
		want.Made = uint64(maps.MakeWord(w.Slot(), w.Incarnation(), w.State(), w.Second(), w.Tag()))
		want.SameListener = truth(w.Slot() == maps.Word(other).Slot() && w.Incarnation() == maps.Word(other).Incarnation())
		want.Age = maps.Age(now, w.Second())
		want.Refreshed = uint64(refresh(w, now))
		want.Expired = truth(expired(w, now))
		want.Moved = uint64(maps.MakeWord(in.Slot, n, w.State(), now, w.Tag()))
		want.EntryHash = maps.EntryHash(entry)
		want.PickedWaiting, want.Picked = entry&0xffff, entry>>16
		want.Mended = mend(entry, in.Slot, in.N)
		want.NthOne = nthOne(set, in.N)
		want.Rank, want.RankWaiting = in.N%6, nthRankWaiting(in.N%6)
		if diff := cmp.Diff(want, out, cmp.AllowUnexported(HarnessValues{})); diff != "" {
			t.Errorf("C differs from Go (-Go +C):\n%s", diff)
		}

		if want.Made != word {
			t.Errorf("word %#x is %#x when put together again", word, want.Made)
		}
		if out.First == out.Second || out.First >= buckets || out.Second >= buckets {
			t.Errorf("buckets %d and %d of %d", out.First, out.Second, buckets)
		}
		if h, p := maps.HashOf(out.Identity); h != hash || p != port {
			t.Errorf("identity of %#x, %d is that of %#x, %d", hash, port, h, p)
		}
	})
}

func truth(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

func refresh(w maps.Word, now uint32) maps.Word {
	silent := maps.Age(now, w.Second())
	if silent < 1 || w.State() == maps.New && silent < 2 {
		return w
	}
	return maps.MakeWord(w.Slot(), w.Incarnation(), maps.Established, now, w.Tag())
}

func expired(w maps.Word, now uint32) bool {
	if w.State() == maps.Established {
		return maps.Age(now, w.Second()) > idle
	}
	return maps.Age(now, w.Second()) > idleNew
}

func mend(entry, dead, living uint32) uint32 {
	now, later := entry&0xffff, entry>>16
	if now == dead {
		now = living
	}
	if later == dead {
		later = living
	}
	return later<<16 | now
}

func nthOne(set uint64, n uint32) uint64 {
	if int(n) >= bits.OnesCount64(set) {
		return 0
	}
	for ; n > 0; n-- {
		set &= set - 1
	}
	return uint64(bits.TrailingZeros64(set))
}

// nthRankWaiting is the order of ranks while the group waits: the next generation
// serves before draining listeners only.
func nthRankWaiting(n uint32) uint32 {
	order := []maps.Rank{maps.RankFirst, maps.RankSecond, maps.RankOlder, maps.RankNext, maps.RankDraining}
	if int(n) < len(order) {
		return uint32(order[n])
	}
	return n
}

// ethernet lays out what run_parse reads: the transport header's first bytes
// where the frame begins, the network header where it belongs.
func ethernet(port, protocol uint16, network ...byte) []byte {
	packet := make([]byte, 14, 14+len(network))
	binary.BigEndian.PutUint16(packet, port)
	binary.BigEndian.PutUint16(packet[12:], protocol)
	return append(packet, network...)
}

const (
	ipv4 = 0x0800
	ipv6 = 0x86dd
)

// unrunnable tells frames that some kernels run no program on
// (net/bpf/test_run.c): a header alone, what does not fit into a page, and
// since lately (6.18 does) less than a whole IP header.
func unrunnable(frame []byte) bool {
	if len(frame) <= 14 || len(frame) > 2048 {
		return true
	}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case ipv4:
		return len(frame) < 14+20
	case ipv6:
		return len(frame) < 14+40
	}
	return false
}

func FuzzParse(f *testing.F) {
	o := load(f)
	v4 := []byte{0: 0x45, 12: 192, 0, 2, 1, 198, 51, 100, 7}
	options := []byte{0: 0x4f, 12: 192, 0, 2, 1, 198, 51, 100, 7, 59: 0}
	v6 := []byte{0: 0x60, 6: 17, 8: 0x20, 0x01, 0x0d, 0xb8, 23: 1, 39: 2}
	extended := []byte{0: 0x60, 6: 60, 8: 0x20, 0x01, 0x0d, 0xb8, 23: 1, 39: 2, 17, 47: 0}
	for _, outside := range []bool{false, true} {
		f.Add(ethernet(1194, ipv4, v4...), outside)
		f.Add(ethernet(40001, ipv4, options...), outside)
		f.Add(ethernet(0, ipv6, v6...), outside)
		f.Add(ethernet(65535, ipv6, extended...), outside)
		f.Add(ethernet(443, ipv4, v4[:15]...), outside)
		f.Add(ethernet(443, ipv6, v6[:23]...), outside)
		f.Add(ethernet(443, 0x0806, v4...), outside)
		f.Add(ethernet(443, 0x0806, v4[:15]...), outside)
		f.Add(ethernet(443, ipv4, v6...), outside)
	}
	f.Fuzz(func(t *testing.T, packet []byte, outside bool) {
		in := HarnessValues{Outside: truth(outside)}
		if err := o.Io.Set(in); err != nil {
			t.Fatal(err)
		}
		if _, err := o.RunParse.Run(&ebpf.RunOptions{Data: packet}); errors.Is(err, unix.EINVAL) && unrunnable(packet) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		var out HarnessValues
		if err := o.Io.Get(&out); err != nil {
			t.Fatal(err)
		}

		want := in
		want.ParsedPort, want.Port = 1, uint32(binary.BigEndian.Uint16(packet))
		var client []byte
		if binary.BigEndian.Uint16(packet[12:]) == ipv6 {
			if len(packet) >= 14+24 {
				client = packet[14+8 : 14+24]
			}
		} else if len(packet) >= 14+16 {
			client = append([]byte{10: 0xff, 11: 0xff}, packet[14+12:14+16]...)
		}
		if client == nil {
			out.Client = [2]uint64{} // half an answer is none
		} else {
			want.ParsedAddress = 1
			want.Client[0], want.Client[1] = binary.NativeEndian.Uint64(client), binary.NativeEndian.Uint64(client[8:])
		}
		if diff := cmp.Diff(want, out, cmp.AllowUnexported(HarnessValues{})); diff != "" {
			t.Errorf("frame %x: C differs from Go (-Go +C):\n%s", packet, diff)
		}
	})
}

// table is the Go twin of the flow table, for one CPU.
type table [4]HarnessBucket

// packet does what run_packet does. It returns the result and, of a hit, the slot.
func (tb *table) packet(identity uint64, now, slot uint32) (result, served uint32) {
	first, second := maps.Buckets(identity, uint32(len(tb)))
	forgotten := false
	for _, b := range []uint32{first, second} {
		i := tb.find(b, identity)
		if i < 0 {
			continue
		}
		f := &tb[b].Flows[i]
		w := maps.Word(f.Word)
		if forgotten = expired(w, now); forgotten {
			break
		}
		f.Word = uint64(refresh(w, now))
		if f.Word != uint64(w) {
			return refreshed, w.Slot()
		}
		return hit, w.Slot()
	}
	return tb.insert(first, second, identity, now, slot, forgotten), slot
}

func (tb *table) find(b uint32, identity uint64) int {
	for i, f := range tb[b].Flows {
		w := maps.Word(f.Word)
		if w.State() >= maps.New && f.Identity == identity && w.Tag() == uint32(identity&0xffff) {
			return i
		}
	}
	return -1
}

// insert gives the flow the best place: an empty one of a bucket that has two more,
// unless the flow has an expired entry; that one, a vacant one, that of the oldest new
// flow. The first bucket is preferred, but for a vacant place only while it has two
// more, or the second has no more.
func (tb *table) insert(first, second uint32, identity uint64, now, slot uint32, forgotten bool) uint32 {
	type place struct {
		bucket uint32
		index  int
	}
	var own, oldest *place
	var vacant, empty [2][]place
	age := int32(-1 << 31)
	for n, b := range []uint32{first, second} {
		for i, f := range tb[b].Flows {
			w, here := maps.Word(f.Word), place{b, i}
			if w == 0 && !forgotten {
				empty[n] = append(empty[n], here)
			}
			switch silent := maps.Age(now, w.Second()); {
			case w == 0 || expired(w, now):
				vacant[n] = append(vacant[n], here)
				if w != 0 && f.Identity == identity && own == nil {
					own = &here
				}
			case w.State() == maps.New && max(silent, 0) > age:
				oldest, age = &here, max(silent, 0)
			}
		}
	}
	var at place
	switch {
	case len(empty[0]) > 2:
		at = empty[0][0]
	case len(empty[1]) > 2:
		at = empty[1][0]
	case own != nil:
		at = *own
	case len(vacant[0]) > 2 || len(vacant[0]) > 0 && len(vacant[1]) <= len(vacant[0]):
		at = vacant[0][0]
	case len(vacant[1]) > 0:
		at = vacant[1][0]
	case oldest == nil:
		return full
	case maps.Word(tb[oldest.bucket].Flows[oldest.index].Word).Tag() == uint32(identity&0xffff):
		return lost // perhaps this very flow, inserted by another CPU
	default:
		at = *oldest
	}
	f := &tb[at.bucket].Flows[at.index]
	f.Identity = identity
	f.Word = uint64(maps.MakeWord(slot, 1, maps.New, now, uint32(identity&0xffff)))
	return claimed
}

// flow is one of 256 identities that fight for four buckets; four share each tag.
func flow(n byte) uint64 {
	return uint64(n&3)<<62 | uint64(n>>2&3)<<30 | uint64(n>>4&3)<<40 | uint64(n>>6)
}

// FuzzTable sends packets of flows, lets time pass and flushes, two bytes each.
func FuzzTable(f *testing.F) {
	o := load(f)
	memory, err := o.Flows.Memory()
	if err != nil {
		f.Fatal(err)
	}
	var sweep, flood, churn []byte
	for n := range 256 {
		sweep = append(sweep, 0, byte(n))
		flood = append(flood, 0, byte(n), 0x80|byte(n%4), 0, 0, byte(n))
		churn = append(churn, 0, byte(n*7), 0x80|byte(n%8), 0, 0x40, byte(n*5))
	}
	// Both buckets full, the oldest in the second place: the first one's was
	// flushed and is the newest.
	var oldest []byte
	for n := range 16 {
		oldest = append(oldest, 0, byte(4+n%4<<6+n/4<<4), 0x80, 0)
	}
	f.Add(append(oldest, 0x40, 0, 0, 4, 0, 1))
	// Six in the first bucket: the seventh, whose tag is another, goes to the second.
	f.Add([]byte{0, 0x44, 0, 0x54, 0, 0x64, 0, 0x74, 0, 0x84, 0, 0x94, 0, 0xc4})
	f.Add([]byte{0, 4, 0, 20, 0x85, 0, 0, 20}) // two expire, the second comes back
	// A flow whose entry was flushed comes back when its first bucket is full but for that,
	// gets one in the second bucket, expires and comes back once more: there is one entry of it.
	var both []byte
	for n := range 16 {
		both = append(both, 0, byte(4+n<<4))
	}
	f.Add(append(both, 0x40, 8, 0x40, 9, 0x40, 10, 0x40, 11, 0x40, 0, 0, 4, 0x89, 0, 0, 4))
	f.Add(sweep)
	f.Add(flood)
	f.Add(churn)
	f.Add([]byte{0, 1, 0x84, 0, 0, 1, 0x86, 0, 0, 1, 0x88, 0, 0, 1, 0x8a, 0, 0, 1})
	f.Fuzz(func(t *testing.T, steps []byte) {
		var twin table
		now, slot := uint32(0xffff80), uint32(0) // about to wrap
		if _, err := memory.WriteAt(make([]byte, binary.Size(twin)), 0); err != nil {
			t.Fatal(err)
		}
		for ; len(steps) >= 2; steps = steps[2:] {
			what, n := steps[0], steps[1]
			switch {
			case what&0x80 != 0: // time
				now += [...]uint32{1, 2, 3, 29, idleNew, idleNew + 1, 150, idle, idle + 1, 3600, 1 << 22}[int(what&0x7f)%11]
			case what&0x40 != 0: // flush
				w := &twin[n>>3&3].Flows[n&7].Word
				*w = 0
				at := int64(n>>3&3)*128 + int64(n&7)*16 + 8
				if _, err := memory.WriteAt(make([]byte, 8), at); err != nil {
					t.Fatal(err)
				}
			default:
				slot = (slot + 1) % maps.Slots
				out := run(t, o, o.RunPacket, HarnessValues{Identity: flow(n), Now: now, Idle: idle, IdleNew: idleNew, Slot: slot, Incarnation: 1}, frame())
				result, served := twin.packet(flow(n), now, slot)
				if out.Result != result || out.Slot != served {
					t.Fatalf("flow %d: result %d, slot %d; in Go %d, %d", n, out.Result, out.Slot, result, served)
				}
			}
			var got table
			for b := range got {
				if err := o.Flows.Lookup(uint32(b), &got[b]); err != nil {
					t.Fatal(err)
				}
			}
			if got != twin {
				t.Fatalf("tables differ after step %x %x (-Go +C):\n%s", what, n, cmp.Diff(twin, got, cmp.AllowUnexported(HarnessBucket{})))
			}
		}
		seen := make(map[uint64]bool)
		for _, b := range twin {
			for _, f := range b.Flows {
				if f.Word != 0 && seen[f.Identity] {
					t.Errorf("flow %#x has two entries", f.Identity)
				}
				seen[f.Identity] = seen[f.Identity] || f.Word != 0
			}
		}
	})
}

// occupancy is what became of the flows that began.
type occupancy struct{ began, untracked, evicted uint64 }

func (o occupancy) String() string {
	share := func(n uint64) float64 { return float64(n) / float64(o.began) }
	return fmt.Sprintf("%9d %10.1e %10.1e", o.began, share(o.untracked), share(o.evicted))
}

// occupy fills a table with load percent of the flows it is made for. Then as many
// flows again expire, and others begin, in each of some turns.
func occupy(t *testing.T, capacity, load, turns int) (filling, churning occupancy) {
	t.Helper()
	spec, err := LoadHarness()
	if err != nil {
		t.Fatal(err)
	}
	buckets, flows := maps.BucketsFor(capacity), capacity*load/100
	spec.Maps["flows"].MaxEntries = buckets
	spec.Maps["population"].MaxEntries = uint32(flows)
	if err := spec.Variables["table_buckets"].Set(buckets); err != nil {
		t.Fatal(err)
	}
	var o HarnessObjects
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		t.Fatalf("%+v", err)
	}
	defer o.Close()
	if err := o.Io.Set(HarnessValues{Now: 1000, Idle: idle, IdleNew: idleNew, Incarnation: 1}); err != nil {
		t.Fatal(err)
	}
	c := HarnessChurn{Seed: uint64(capacity), Flows: uint32(flows), Lag: uint32(capacity / 100)}
	run := func(n int) occupancy {
		t.Helper()
		before := c
		c.Until += uint64(n)
		if err := o.Churn.Set(c); err != nil {
			t.Fatal(err)
		}
		for c.Runs < c.Until {
			if _, err := o.RunChurn.Run(&ebpf.RunOptions{Data: frame(), Repeat: 1 << 14}); err != nil {
				t.Fatal(err)
			}
			if err := o.Churn.Get(&c); err != nil {
				t.Fatal(err)
			}
		}
		return occupancy{uint64(n), c.Untracked - before.Untracked, c.Evicted - before.Evicted}
	}
	return run(flows), run(turns * flows)
}

// How full the table may be: of a million flows fewer than one finds no room when
// there are three quarters of what the table is made for. The table of all loads is
// in the log.
func TestLoadFactor(t *testing.T) {
	testnet.Privileged(t)
	report := fmt.Sprintf("%-9s %-6s %-31s %s\n", "CAPACITY", "LOAD", "FILLED  UNTRACKED    EVICTED", "REPLACED  UNTRACKED    EVICTED")
	for _, c := range []struct{ capacity, turns, target int }{{1 << 16, 4, 60}, {1 << 18, 1, 1}} {
		for _, load := range []int{25, 50, 75, 90, 100} {
			turns := c.turns
			if load == 75 {
				turns = c.target // enough to tell one in a million
			}
			filling, churning := occupy(t, c.capacity, load, turns)
			if n := filling.untracked + churning.untracked; load <= 75 && n*1_000_000 >= filling.began+churning.began {
				t.Errorf("%d %% of %d: %d of %d flows found no room", load, c.capacity, n, filling.began+churning.began)
			}
			// The control: it is made for no more.
			if load == 100 && churning.untracked+churning.evicted == 0 {
				t.Errorf("%d %% of %d: every flow found room", load, c.capacity)
			}
			report += fmt.Sprintf("%-9d %4d %% %s %s\n", c.capacity, load, filling, churning)
		}
	}
	t.Log("\n" + report)
}

// The keyed identity, and that words which differ hardly ever meet.
func FuzzKey(f *testing.F) {
	o := load(f)
	f.Add(uint64(0), []byte(nil))
	f.Add(uint64(1), []byte("0123456789abcdefghij"))
	f.Add(^uint64(0), bytes.Repeat([]byte{0xff}, 20))
	f.Fuzz(func(t *testing.T, seed uint64, packet []byte) {
		in := HarnessValues{Words: wordsOf(packet)}
		keys := rand.New(rand.NewPCG(seed, 0))
		for i := range in.Keys.High {
			in.Keys.High[i], in.Keys.Low[i] = keys.Uint64(), keys.Uint64()
		}
		want := in
		want.KeyedShort = keyed(&in, in.Words[:4])
		want.Keyed = keyed(&in, in.Words[:])
		if diff := cmp.Diff(want, run(t, o, o.RunKey, in, frame()), cmp.AllowUnexported(HarnessValues{})); diff != "" {
			t.Errorf("C differs from Go (-Go +C):\n%s", diff)
		}
		for bit := range 8 * 20 {
			other := in.Words
			other[bit/32] ^= 1 << (bit % 32)
			if keyed(&in, other[:]) == want.Keyed {
				t.Errorf("seed %d: %x is the same with another bit %d", seed, in.Words, bit)
			}
		}
	})
}

func wordsOf(packet []byte) (words [5]uint32) {
	for i, b := range packet[:min(len(packet), 20)] {
		words[i/4] |= uint32(b) << (i % 4 * 8)
	}
	return words
}

// keyed is keyed_identity of bpf/key.h.
func keyed(in *HarnessValues, words []uint32) uint64 {
	half := func(keys [6]uint64) uint64 {
		sum := keys[0]
		for i, word := range words {
			sum += keys[i+1] * uint64(word)
		}
		return sum >> 32
	}
	x := half(in.Keys.High)<<32 | half(in.Keys.Low)
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Addresses and ids as they come, in order and with common factors, fill the
// buckets as random ones do: no bucket has many more than its share.
func TestKeySpread(t *testing.T) {
	const n, table = 1 << 16, 1 << 13
	for step := range 28 {
		for word := range 5 {
			in := HarnessValues{}
			keys := rand.New(rand.NewPCG(uint64(step), uint64(word)))
			for i := range in.Keys.High {
				in.Keys.High[i], in.Keys.Low[i] = keys.Uint64(), keys.Uint64()
			}
			seen := map[uint64]bool{}
			first, second := make([]int, table), make([]int, table)
			for i := range uint32(n) {
				words := [5]uint32{0x0a000001, 7, 7, 7, 7}
				words[word] = bits.RotateLeft32(i, step)
				identity := keyed(&in, words[:])
				a, b := maps.Buckets(identity, table)
				seen[identity] = true
				first[a]++
				second[b]++
			}
			// With a mean of 8, of which a random one passes 40 once in 10^15.
			if most := max(slices.Max(first), slices.Max(second)); len(seen) != n || most > 40 {
				t.Errorf("step 2^%d, word %d: %d identities of %d, %d in one bucket", step, word, len(seen), n, most)
			}
		}
	}
}
