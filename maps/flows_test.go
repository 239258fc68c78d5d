package maps

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

func TestMain(m *testing.M) { testnet.Main(m) }

func newFlows(tb testing.TB, buckets uint32) *Flows {
	tb.Helper()
	testnet.Privileged(tb)
	array := func(size, n uint32) *ebpf.Map {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: size, MaxEntries: n, Flags: unix.BPF_F_MMAPABLE})
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { m.Close() })
		return m
	}
	f, err := OpenFlows(array(128, buckets), array(24, buckets*BucketSize))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	return f
}

// randomEntry is a flow of the second 1000, IPv4 or IPv6.
func randomEntry(random *rand.Rand) Entry {
	hash, port := random.Uint32(), uint16(1+random.UintN(65535))
	identity := Identity(hash, port)
	addr := netip.AddrFrom4([4]byte{10, byte(hash), byte(hash >> 8), byte(hash >> 16)})
	if hash&1 == 0 {
		addr = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: byte(hash), 15: byte(hash >> 8)})
	}
	e := Entry{
		Identity: identity,
		Word:     MakeWord(random.Uint32N(Slots), random.Uint32N(1024), New+State(hash>>31), 1000, uint32(identity)),
		Client:   netip.AddrPortFrom(addr, port),
		Created:  900 + hash%50, Since: 950 + hash%50,
	}
	if e.Hint = Hint(hash % 3); e.Hint != NoHint {
		e.Since = e.Created
	}
	return e
}

// A hint is a second before the first one, also where the clock wraps; nothing else
// is taken for one.
func TestLife(t *testing.T) {
	for _, c := range []struct {
		created, since uint32
		hint           Hint
		history        uint64
	}{
		{1000, 1000, NoHint, 1000<<24 | 1000},
		{1000, 1000, HintFirst, 999<<24 | 1000},
		{1000, 1000, HintFloat, 998<<24 | 1000},
		{1, 1, HintFloat, 0xffffff<<24 | 1},
		{0, 0, HintFirst, 0xffffff << 24},
		{1000, 1001, NoHint, 1001<<24 | 1000}, // rehomed
		{0xffffff, 0, NoHint, 0xffffff},       // rehomed, and wrapped
		{1000, 997, NoHint, 997<<24 | 1000},
	} {
		created, since, hint := lifeOf(c.history | 1194<<48)
		if created != c.created || since != c.since || hint != c.hint || life(created, since, hint) != c.history {
			t.Errorf("%#x: created %d, since %d, hint %d, and back %#x, want %+v", c.history, created, since, hint, life(created, since, hint), c)
		}
	}
}

// As many flows as a table is made for find a place in it, each with all that is
// known of it, where the program looks, and few in their second bucket. Without
// anybody who makes room some in a hundred thousand would find none.
func TestPlace(t *testing.T) {
	const n = 20000
	random := rand.New(rand.NewPCG(1, 2))
	buckets := BucketsFor(n)
	f := newFlows(t, buckets)
	want := map[uint64]Entry{}
	for len(want) < n {
		e := randomEntry(random)
		if _, twice := want[e.Identity]; twice {
			continue
		}
		if !f.Place(e) {
			t.Fatalf("no room for flow %d of %d", len(want), n)
		}
		want[e.Identity] = e
	}
	read := 0
	for e := range f.All(1000, Limits{New: 30, Established: 300}) {
		w, ok := want[e.Identity]
		w.place, w.index = e.place, e.index
		if !ok || e != w {
			t.Fatalf("got %+v, want %+v", e, w)
		}
		read++
	}
	if read != n {
		t.Errorf("%d flows, want %d", read, n)
	}
	second := 0
	at := map[uint64]uint32{}
	used := make([]int, buckets)
	for bucket, b := range f.buckets.values {
		for _, flow := range b.Flows {
			if flow.Word != 0 {
				at[flow.Identity] = uint32(bucket)
				used[bucket]++
			}
		}
	}
	for identity, bucket := range at {
		first, other := Buckets(identity, buckets)
		switch bucket {
		case first:
		case other:
			second++
			if used[first] < firstBucket {
				t.Errorf("a flow is in its second bucket, and its first holds %d", used[first])
			}
		default:
			t.Errorf("a flow is in bucket %d, and would be looked for in %d and %d", bucket, first, other)
		}
	}
	if second == 0 || second > n/2 {
		t.Errorf("%d of %d flows are in their second bucket", second, n)
	}
}

func TestPlaceFull(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	f := newFlows(t, 2)
	for i := range 2 * BucketSize { // each flow's buckets are these two
		if !f.Place(randomEntry(random)) {
			t.Fatalf("no room for flow %d", i)
		}
	}
	if f.Place(randomEntry(random)) {
		t.Error("two full buckets take another flow")
	}
}

// BenchmarkCopy copies a million flows into a table of twice the size.
func BenchmarkCopy(b *testing.B) {
	const n = 1 << 20
	random := rand.New(rand.NewPCG(5, 6))
	from := newFlows(b, BucketsFor(n))
	for range n {
		from.Place(randomEntry(random))
	}
	for range b.N {
		b.StopTimer()
		to := newFlows(b, BucketsFor(2*n))
		b.StartTimer()
		for e := range from.All(1000, Limits{New: 30, Established: 300}) {
			to.Place(e)
		}
	}
}
