package model

import "testing"

// packet is one packet of a flow, whose pick tries the slots in order.
func packet(flow uint8) actor { return actor{pc: stepClock, flow: flow} }

// reuse closes the slot's socket and registers another in the slot.
func reuse(slot uint8) actor {
	return actor{pc: stepClose, target: listener{slot: slot}}
}

// flush is user space that forgets the flow in a place.
func flush(place uint8) actor { return actor{pc: stepFlushRead, mine: place} }

// tick lets a second pass.
func tick() actor { return actor{pc: stepTick} }

// entries of flows 1 to 3, in listeners 0.1, 1.1 and so on.
func tracked(flow, slotNumber, state, second, tag uint8) entry {
	return entry{flow, word{slotNumber, 1, state, second, tag}}
}

const now = 10

// worlds returns the scenarios. Flows 1 and 2 have equal tags, 3 has another.
func worlds() []*world {
	alive := slot{1, 1}
	dead := slot{1, 0}
	upward, downward := []uint8{0, 1, 2}, []uint8{2, 1, 0}
	type entries = [maxPlaces]entry
	type slots = [maxSlots]slot
	type actors = [maxActors]actor
	all := []*world{
		{name: "refresh against refresh", places: 1, agree: true, still: true,
			start: state{slots: slots{alive, alive}, entries: entries{tracked(1, 0, established, now-1, 7)},
				actors: actors{packet(1), packet(1)}}},
		{name: "refresh against rehome", places: 1, agree: true, still: true,
			start: state{slots: slots{dead, alive, alive}, entries: entries{tracked(1, 0, established, now-1, 7)},
				actors: actors{packet(1), packet(1)}}},
		{name: "three rehome", places: 1, agree: true, still: true,
			start: state{slots: slots{dead, alive, alive}, entries: entries{tracked(1, 0, established, now-1, 7)},
				actors: actors{packet(1), packet(1), packet(1)}}},
		{name: "a listener dies under two packets, its slot is reused", places: 1,
			start: state{slots: slots{alive, alive}, entries: entries{tracked(1, 0, established, now-1, 7)},
				actors: actors{packet(1), packet(1), reuse(0)}}},
		{name: "a slot is reused while two rehome", places: 1,
			start: state{slots: slots{dead, alive, alive}, entries: entries{tracked(1, 0, established, now-1, 7)},
				actors: actors{packet(1), packet(1), reuse(0)}}},
		{name: "an heir dies while two rehome", places: 1,
			start: state{slots: slots{dead, alive, alive}, entries: entries{tracked(1, 0, established, now-1, 7)},
				actors: actors{packet(1), packet(1), reuse(2)}}},
		{name: "twins", places: 3, agree: true, still: true,
			start: state{slots: slots{alive, alive, alive}, actors: actors{packet(1), packet(1)}}},
		{name: "twins, one place", places: 1, agree: true, still: true,
			start: state{slots: slots{alive, alive, alive}, actors: actors{packet(1), packet(1)}}},
		{name: "twins whose listener dies", places: 2,
			start: state{slots: slots{alive, alive, alive}, actors: actors{packet(1), packet(1), reuse(0)}}},
		{name: "twins in a table of new flows", places: 2, still: true,
			start: state{slots: slots{alive, alive, alive},
				entries: entries{tracked(2, 1, fresh, now, 7), tracked(3, 1, fresh, now, 9)},
				actors:  actors{packet(1), packet(1)}}},
		{name: "a new flow is evicted under its packet by one with its tag", places: 1, still: true,
			start: state{slots: slots{alive, alive, alive}, entries: entries{tracked(1, 1, fresh, now-2, 7)},
				actors: actors{packet(1), packet(2)}}},
		{name: "a new flow is evicted under two packets by one with its tag", places: 1, still: true,
			start: state{slots: slots{alive, alive, alive}, entries: entries{tracked(1, 1, fresh, now-2, 7)},
				actors: actors{packet(1), packet(1), packet(2)}}},
		{name: "a new flow is evicted by twins with its tag", places: 2, still: true,
			start: state{slots: slots{alive, alive, alive},
				entries: entries{tracked(3, 1, established, now, 9), tracked(1, 1, fresh, now-2, 7)},
				actors:  actors{packet(1), packet(2), packet(2)}}},
		{name: "an orphan is evicted by one with its tag while it is rehomed", places: 1, still: true,
			start: state{slots: slots{dead, alive, alive}, entries: entries{tracked(1, 0, fresh, now-2, 7)},
				actors: actors{packet(1), packet(1), packet(2)}}},
		{name: "a full table", places: 2, still: true,
			start: state{slots: slots{alive, alive, alive},
				entries: entries{tracked(1, 1, established, now-1, 7), tracked(3, 2, established, now-1, 9)},
				actors:  actors{packet(1), packet(1), packet(2)}}},
		{name: "expiry while a packet comes", places: 2, still: true,
			start: state{slots: slots{alive, alive, alive},
				entries: entries{tracked(3, 2, established, now, 9), tracked(1, 1, established, now-idle, 7)},
				actors:  actors{packet(1), packet(2), tick()}}},
		{name: "expiry while two packets come", places: 2, still: true,
			start: state{slots: slots{alive, alive, alive}, entries: entries{{}, tracked(1, 1, established, now-idle, 7)},
				actors: actors{packet(1), packet(1), tick()}}},
		{name: "one with their tag expires between twins", places: 1, still: true,
			start: state{slots: slots{alive, alive, alive}, entries: entries{tracked(2, 1, fresh, now-idleNew, 7)},
				actors: actors{packet(1), packet(1), tick()}}},
		{name: "a second begins between twins", places: 2, still: true,
			start: state{slots: slots{alive, alive, alive}, actors: actors{packet(1), packet(1), tick()}}},
		{name: "flush under two packets", places: 2, still: true,
			start: state{slots: slots{alive, alive, alive}, entries: entries{{}, tracked(1, 1, established, now-1, 7)},
				actors: actors{packet(1), packet(1), flush(1)}}},
		{name: "flush while two rehome", places: 1, still: true,
			start: state{slots: slots{dead, alive, alive}, entries: entries{tracked(1, 0, established, now-1, 7)},
				actors: actors{packet(1), packet(1), flush(0)}}},
		{name: "flush of a new flow and one with its tag", places: 1, still: true,
			start: state{slots: slots{alive, alive, alive}, entries: entries{tracked(1, 1, fresh, now-2, 7)},
				actors: actors{packet(1), packet(2), flush(0)}}},
		// One entry remains, but the third may have followed a claim that then
		// yielded to an entry made meanwhile: it takes three CPUs that pick
		// three ways for that, so agree is not asked of them.
		{name: "triplets", places: 2, still: true, roomy: true,
			start: state{slots: slots{alive, alive, alive}, actors: actors{packet(1), packet(1), packet(1)}}},
		{name: "triplets, three places", places: 3, still: true, roomy: true,
			start: state{slots: slots{alive, alive, alive}, actors: actors{packet(1), packet(1), packet(1)}}},
		{name: "twins and a stranger with their tag", places: 2, still: true, roomy: true,
			start: state{slots: slots{alive, alive, alive}, actors: actors{packet(1), packet(1), packet(2)}}},
		{name: "twins and a stranger", places: 2, still: true, roomy: true,
			start: state{slots: slots{alive, alive, alive}, actors: actors{packet(1), packet(1), packet(3)}}},
	}
	for _, w := range all {
		w.tag = [4]uint8{0, 7, 7, 9}
		w.start.second = now
		w.order = [maxActors][]uint8{upward, downward, {1, 0, 2}}
	}
	return all
}

func TestProtocol(t *testing.T) {
	for _, w := range worlds() {
		t.Run(w.name, func(t *testing.T) {
			found, states := check(w, protocol{})
			if found != nil {
				t.Errorf("%v", found)
			}
			t.Logf("%d states", states)
		})
	}
}

// TestWithout takes away one protection after the other: the check must miss it.
func TestWithout(t *testing.T) {
	for _, test := range []struct {
		name string
		protocol
	}{
		{"everything", naive},
		{"exchange in refresh", protocol{plainRefresh: true}},
		{"exchange in rehome", protocol{plainRehome: true}},
		{"exchange in insert", protocol{plainInsert: true}},
		{"word read on both sides of the identity", protocol{singleRead: true}},
		{"scan after the claim", protocol{noScan: true}},
		{"revoked claims left to their owners", protocol{revokeFrees: true}},
		{"own new entry spared", protocol{ownNew: true}},
		{"second look in a full table", protocol{fullIsFull: true}},
		{"word read again before it is followed", protocol{looseFollow: true}},
		{"rehome tried again after a refresh", protocol{rehomeOnce: true}},
		{"second look at an entry that changed", protocol{holdOnce: true}},
		{"incarnation read again", protocol{noRecheck: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, w := range worlds() {
				if found, _ := check(w, test.protocol); found != nil {
					t.Logf("%s:\n%v", w.name, found)
					return
				}
			}
			t.Error("nothing wrong is found")
		})
	}
}

// TestNaive counts the scenarios that go wrong with plain stores.
func TestNaive(t *testing.T) {
	wrong := 0
	for _, w := range worlds() {
		if found, _ := check(w, naive); found != nil {
			wrong++
		}
	}
	if wrong == 0 {
		t.Error("nothing wrong is found")
	}
	t.Logf("wrong in %d of %d scenarios", wrong, len(worlds()))
}

// naive is the protocol without any of its protections.
var naive = protocol{
	plainRefresh: true, plainRehome: true, plainInsert: true, singleRead: true, noScan: true,
	ownNew: true, fullIsFull: true, looseFollow: true, rehomeOnce: true, holdOnce: true, noRecheck: true,
}
