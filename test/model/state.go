package model

// The sizes of the world. A bucket's worth of places would add states but no
// new kind of interleaving.
const (
	maxPlaces = 3
	maxSlots  = 3
	maxActors = 3
)

// Idle times in seconds.
const (
	idle    = 5
	idleNew = 3
)

// Flow states, as in rpsel.h.
const (
	empty = iota
	busy
	fresh // FLOW_NEW
	established
)

// word is the word of an entry. The zero word is empty.
type word struct {
	slot, incarnation uint8
	state             uint8
	second            uint8
	tag               uint8
}

// revoked is FLOW_REVOKED: a claim that its owner must give back.
var revoked = word{slot: 0xff, state: empty}

func (w word) listener() listener { return listener{w.slot, w.incarnation} }

func (w word) tracks() bool { return w.state >= fresh }

// entry is a place of the flow table. Identity 0 is nobody's.
type entry struct {
	identity uint8
	word     word
}

// listener is a socket: the slot it is in, and which of the slot's it is.
type listener struct{ slot, incarnation uint8 }

// slot is what a packet reads of a slot. socket is the incarnation of the open
// socket in the array, 0 if there is none.
type slot struct{ incarnation, socket uint8 }

// set is a set of listeners; anybody is the set of all.
type set uint16

const anybody set = 1 << 15

func only(l listener) set { return 1 << (l.slot*4 + l.incarnation) }

func (s set) has(l listener) bool { return s&anybody != 0 || s&only(l) != 0 }

// actor is one packet, or somebody else who changes things. The fields below
// flow are the local variables of a packet's run.
type actor struct {
	pc   pc
	flow uint8

	now      uint8
	place    uint8    // the place being looked at
	mine     uint8    // the place of the flow's entry or claim, maxPlaces for none
	planned  uint8    // 1 + the empty place that a new flow is to have, 0 for none
	tries    uint8    // of entry_holds
	losses   uint8    // of rehome
	try      uint8    // which listener of the packet's order is tried
	word     word     // the word read last
	busy     word     // the word of the claim
	choice   listener // what pick chose
	dead     listener // whose flow is rehomed
	follow   listener // whose entry won
	target   listener // argument of choose
	selected listener // what the last successful select left in the context

	held, other pc // where entry_holds returns to
	yes, no     pc // where choose returns to
	end         pc // where a followed choose returns to

	may set // the listeners this packet may be given to
	had set // the listeners the flow has had in the table while the packet ran
}

// state is the whole world.
type state struct {
	second  uint8
	entries [maxPlaces]entry
	slots   [maxSlots]slot
	actors  [maxActors]actor
}

// open reports whether the listener's socket is open.
func (s *state) open(l listener) bool {
	return l.incarnation != 0 && int(l.slot) < maxSlots && s.slots[l.slot].socket == l.incarnation
}

// in are the listeners of the flow's entries, open or not.
func (s *state) in(flow uint8) set {
	var in set
	for _, e := range s.entries {
		if e.identity == flow && e.word.tracks() {
			in |= only(e.word.listener())
		}
	}
	return in
}

// owners are the listeners a packet of the flow may be given to now: that of
// its entry while that lives, else anybody.
func (s *state) owners(flow uint8) set {
	var owners set
	for _, e := range s.entries {
		if e.identity == flow && e.word.tracks() && s.open(e.word.listener()) {
			owners |= only(e.word.listener())
		}
	}
	if owners == 0 {
		return anybody
	}
	return owners
}
