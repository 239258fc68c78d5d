package maps

// State is how far an entry of the flow table has come (enum flow_state in
// bpf/rpsel.h).
type State uint8

// The states of an entry. The zero State is an empty entry.
const (
	Empty       State = iota
	Busy              // being inserted
	New               // seen once, may give way to another new flow
	Established       // confirmed
)

// String returns "empty", "busy", "new" or "established".
func (s State) String() string {
	return [...]string{"empty", "busy", "new", "established"}[s&3]
}

// The fields of a Word and of a detail's history, as laid out in bpf/rpsel.h.
const (
	tagBits          = 16
	secondBits       = 24
	stateBits        = 2
	incarnationBits  = 10
	secondShift      = tagBits
	stateShift       = secondShift + secondBits
	incarnationShift = stateShift + stateBits
	slotShift        = incarnationShift + incarnationBits

	secondMask      = 1<<secondBits - 1
	incarnationMask = 1<<incarnationBits - 1
)

// Word is the part of an entry that changes while a flow lives: its slot, the
// slot's incarnation, the state, the second in which the flow was last heard of
// and a tag of its identity.
type Word uint64

// MakeWord packs a word. Fields are cut to their widths.
func MakeWord(slot, incarnation uint32, state State, second, tag uint32) Word {
	return Word(uint64(slot)<<slotShift |
		uint64(incarnation&incarnationMask)<<incarnationShift |
		uint64(state&3)<<stateShift |
		uint64(second&secondMask)<<secondShift |
		uint64(tag&(1<<tagBits-1)))
}

// Slot is the index of the flow's listener.
func (w Word) Slot() uint32 { return uint32(w >> slotShift) }

// Incarnation holds the low bits of the slot's incarnation the flow belongs to.
func (w Word) Incarnation() uint32 { return uint32(w>>incarnationShift) & incarnationMask }

// State is how far the flow has come.
func (w Word) State() State { return State(w>>stateShift) & 3 }

// Second is the group's clock when the flow was last heard of, 24 bits.
func (w Word) Second() uint32 { return uint32(w>>secondShift) & secondMask }

// Tag is the part of the identity kept in the word.
func (w Word) Tag() uint32 { return uint32(w) & (1<<tagBits - 1) }

// SameIncarnation reports whether a slot's full incarnation is the one in the
// word, as far as the word's 10 bits tell.
func (w Word) SameIncarnation(incarnation uint32) bool {
	return w.Incarnation() == incarnation&incarnationMask
}

// Age returns the seconds from second to now on the group's 24-bit clock. It is
// signed: an entry may be newer than the reading of the clock.
func Age(now, second uint32) int32 {
	return int32((now-second)<<(32-secondBits)) >> (32 - secondBits)
}

// lead is how many seconds a second may lie ahead of an older reading of the clock.
const lead = 60

// Past is Age for a second that lies in the past, whenever the clock was read: it
// tells ages of up to 194 days, where Age takes one of more than 97 for the future.
func Past(now, second uint32) int32 {
	return int32((now-second+lead)&secondMask) - lead
}

// identityMultiplier is odd, so that multiplying by it can be undone.
const identityMultiplier = 0x9e3779b97f4a7c15

// identityInverse is its inverse modulo 2^64, by Newton's iteration.
var identityInverse = func() uint64 {
	inverse := uint64(identityMultiplier) // right to 3 bits
	for range 5 {
		inverse *= 2 - identityMultiplier*inverse
	}
	return inverse
}()

// Identity names a flow by the kernel's hash of its addresses and ports and by
// its client port (flow_identity in bpf/flow.h).
func Identity(hash uint32, port uint16) uint64 {
	x := (uint64(hash)<<16 | uint64(port)) * identityMultiplier
	return x ^ x>>32
}

// HashOf undoes Identity.
func HashOf(identity uint64) (hash uint32, port uint16) {
	x := (identity ^ identity>>32) * identityInverse
	return uint32(x >> 16), uint16(x)
}

// Scale maps a hash to [0, n) as the kernel's reciprocal_scale does.
func Scale(hash, n uint32) uint32 {
	return uint32(uint64(hash) * uint64(n) >> 32)
}

// Buckets returns the two buckets of a table of n that a flow may be in.
func Buckets(identity uint64, n uint32) (first, second uint32) {
	first, second = Scale(uint32(identity>>32), n), Scale(uint32(identity), n)
	switch {
	case second != first:
	case second > 0:
		second--
	default:
		second = n - 1
	}
	return first, second
}

// EntryHash draws the heir of an entry of the pick table whose listener is dead
// (entry_hash in bpf/pick.h).
func EntryHash(entry uint32) uint32 {
	x := (entry + 1) * 0x85ebca6b
	x ^= x >> 15
	x *= 0xc2b2ae35
	x ^= x >> 13
	x *= 0x27d4eb2f
	return x ^ x>>16
}
