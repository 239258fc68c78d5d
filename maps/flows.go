package maps

import (
	"encoding/binary"
	"errors"
	"iter"
	"net/netip"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// BucketSize is the number of entries of a bucket.
const BucketSize = 8

// firstBucket is the number of entries of the first bucket that are used before
// the second, if that has fewer (RPSEL_FIRST_BUCKET in bpf/rpsel.h).
const firstBucket = 6

// BucketsFor returns how many buckets a table for that many flows has: 1.5
// entries per flow. At three quarters of them fewer than one flow in a million finds
// no room, with all of them six in ten thousand (TestLoadFactor in bpf/).
func BucketsFor(flows int) uint32 {
	return uint32(max(2, (flows*3/2+BucketSize-1)/BucketSize))
}

// Entry is a tracked flow as it stood when it was read.
type Entry struct {
	Identity uint64
	Word     Word
	// Client is the peer, an IPv4 address also if it came to an IPv6 socket.
	Client netip.AddrPort
	// Created and Since are seconds of the group's clock: when the flow was
	// first seen, and when its present listener got it.
	Created, Since uint32
	// Hint is how it got its first listener, if it still has that.
	Hint  Hint
	place *bpf.SelectBucket
	index int
}

// Limits are the seconds that flows may be silent, by state.
type Limits struct {
	New, Established uint32
}

// Flows is the flow table.
//
// Its methods may be called from several goroutines and processes at once: no
// entry is changed but by compare-and-exchange.
type Flows struct {
	buckets mapped[bpf.SelectBucket]
	details mapped[bpf.SelectDetail]
}

// OpenFlows maps the table. The caller keeps the maps and may close them.
func OpenFlows(flows, details *ebpf.Map) (*Flows, error) {
	buckets, err := mapArray[bpf.SelectBucket](flows)
	if err != nil {
		return nil, err
	}
	rows, err := mapArray[bpf.SelectDetail](details)
	if err != nil {
		return nil, errors.Join(err, buckets.Close())
	}
	return &Flows{buckets, rows}, nil
}

// Close unmaps the table.
func (f *Flows) Close() error {
	return errors.Join(f.buckets.Close(), f.details.Close())
}

// Forever are limits within which no flow expires.
var Forever = Limits{New: 1 << (secondBits - 1), Established: 1 << (secondBits - 1)}

// Live reports whether the word is a flow's that has not expired.
func (l Limits) Live(w Word, now uint32) bool {
	silent := Age(now, w.Second())
	switch w.State() {
	case New:
		return silent <= int32(l.New)
	case Established:
		return silent <= int32(l.Established)
	default:
		return false
	}
}

// Words yields the word of each flow that has not expired: the quick way to
// count.
func (f *Flows) Words(now uint32, limits Limits) iter.Seq[Word] {
	return func(yield func(Word) bool) {
		for b := range f.buckets.values {
			for i := range BucketSize {
				w := Word(atomic.LoadUint64(&f.buckets.values[b].Flows[i].Word))
				if limits.Live(w, now) && !yield(w) {
					return
				}
			}
		}
	}
}

// All yields the flows that have not expired, in no useful order. Entries that
// change while they are read are read again.
func (f *Flows) All(now uint32, limits Limits) iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for b := range f.buckets.values {
			for i := range BucketSize {
				if e, ok := f.read(b, i, now, limits); ok && !yield(e) {
					return
				}
			}
		}
	}
}

func (f *Flows) read(bucket, i int, now uint32, limits Limits) (Entry, bool) {
	for {
		w := Word(atomic.LoadUint64(&f.buckets.values[bucket].Flows[i].Word))
		if !limits.Live(w, now) {
			return Entry{}, false
		}
		// Or it was refreshed, moved or taken meanwhile.
		if e, ok := f.entry(bucket, i, w); ok {
			return e, true
		}
	}
}

// entry reads what belongs to a word, if the entry still has that.
func (f *Flows) entry(bucket, i int, w Word) (Entry, bool) {
	place := &f.buckets.values[bucket]
	row := &f.details.values[bucket*BucketSize+i]
	identity := atomic.LoadUint64(&place.Flows[i].Identity)
	high, low := atomic.LoadUint64(&row.Client[0]), atomic.LoadUint64(&row.Client[1])
	history := atomic.LoadUint64(&row.History)
	if Word(atomic.LoadUint64(&place.Flows[i].Word)) != w {
		return Entry{}, false
	}
	created, since, hint := lifeOf(history)
	return Entry{
		Identity: identity,
		Word:     w,
		Client:   clientOf(high, low, uint16(history>>(2*secondBits))),
		Created:  created,
		Since:    since,
		Hint:     hint,
		place:    place,
		index:    i,
	}, true
}

// Hint is what the first packet of a flow said of where it belongs (enum hint in
// bpf/rpsel.h).
type Hint uint8

// The hints.
const (
	NoHint    Hint = iota
	HintFirst      // that it is new, while the group settled
	HintFloat      // who it is of: it followed the flow its client had at another port
)

// lifeOf takes the seconds out of a history (struct detail in bpf/rpsel.h). A hint
// is written as a second before that in which the flow was created.
func lifeOf(history uint64) (created, since uint32, hint Hint) {
	created = uint32(history) & secondMask
	since = uint32(history>>secondBits) & secondMask
	if before := Age(created, since); before == int32(HintFirst) || before == int32(HintFloat) {
		return created, created, Hint(before)
	}
	return created, since, NoHint
}

// life is what lifeOf takes apart.
func life(created, since uint32, hint Hint) uint64 {
	return uint64((since-uint32(hint))&secondMask)<<secondBits | uint64(created)
}

// clientOf makes an address of what the program notes (struct detail in bpf/rpsel.h).
func clientOf(high, low uint64, port uint16) netip.AddrPort {
	var address [16]byte
	binary.NativeEndian.PutUint64(address[:8], high)
	binary.NativeEndian.PutUint64(address[8:], low)
	return netip.AddrPortFrom(netip.AddrFrom16(address).Unmap(), port)
}

// Buckets is how many buckets the table has.
func (f *Flows) Buckets() int { return len(f.buckets.values) }

// Sweep empties the entries of the buckets [first, end) whose flows have
// expired, and returns how many. It tells forgotten of each, unless that is nil.
// Entries that change meanwhile are left alone.
func (f *Flows) Sweep(first, end int, now uint32, limits Limits, forgotten func(Entry)) (n int) {
	for b := first; b < end; b++ {
		for i := range BucketSize {
			w := Word(atomic.LoadUint64(&f.buckets.values[b].Flows[i].Word))
			if w.State() < New || limits.Live(w, now) {
				continue
			}
			e, ok := Entry{Word: w, place: &f.buckets.values[b], index: i}, true
			if forgotten != nil {
				e, ok = f.entry(b, i, w)
			}
			if !ok || !f.Forget(e) {
				continue
			}
			n++
			if forgotten != nil {
				forgotten(e)
			}
		}
	}
	return n
}

// Place puts a flow of another table into this one, which no program uses yet,
// where the program will look for it and by the rule by which it would have put
// it there (insert_claim in bpf/flow.h). Only where the program would find both
// buckets full, a flow that is there makes room by going to its other bucket. It
// reports false if none can.
func (f *Flows) Place(e Entry) bool {
	first, second := Buckets(e.Identity, uint32(len(f.buckets.values)))
	bucket, at := first, f.used(first)
	if other := f.used(second); at >= firstBucket && other < at {
		bucket, at = second, other
	}
	if at == BucketSize {
		var ok bool
		if bucket, at, ok = f.makeRoom(first, second); !ok {
			return false
		}
	}
	address := e.Client.Addr().As16()
	f.details.values[bucket*BucketSize+at] = bpf.SelectDetail{
		Client:  [2]uint64{binary.NativeEndian.Uint64(address[:8]), binary.NativeEndian.Uint64(address[8:])},
		History: uint64(e.Client.Port())<<(2*secondBits) | life(e.Created, e.Since, e.Hint),
	}
	place := &f.buckets.values[bucket].Flows[at]
	place.Identity, place.Word = e.Identity, uint64(e.Word)
	return true
}

// makeRoom moves a flow out of one of two full buckets. It returns the place.
func (f *Flows) makeRoom(buckets ...uint32) (bucket, place uint32, ok bool) {
	for _, bucket := range buckets {
		for place, flow := range f.buckets.values[bucket].Flows {
			to, other := Buckets(flow.Identity, uint32(len(f.buckets.values)))
			if to == bucket {
				to = other
			}
			if used := f.used(to); used < BucketSize {
				f.buckets.values[to].Flows[used] = flow
				f.details.values[to*BucketSize+used] = f.details.values[bucket*BucketSize+uint32(place)]
				return bucket, uint32(place), true
			}
		}
	}
	return 0, 0, false
}

// used is how many places of a bucket are taken: those in front, as long as
// only Place has filled it.
func (f *Flows) used(bucket uint32) uint32 {
	for i := range f.buckets.values[bucket].Flows {
		if f.buckets.values[bucket].Flows[i].Word == 0 {
			return uint32(i)
		}
	}
	return BucketSize
}

// Forget removes the flow from the table. It reports false if the entry has
// changed since it was read; then nothing is done.
func (f *Flows) Forget(e Entry) bool {
	return atomic.CompareAndSwapUint64(&e.place.Flows[e.index].Word, uint64(e.Word), 0)
}
