package model

import "fmt"

// world is a scenario: what there is at the start, and who acts.
type world struct {
	name   string
	places uint8
	tag    [4]uint8           // of each identity
	order  [maxActors][]uint8 // the slots that a packet's pick tries, in turn
	start  state
	// agree: nothing happens but packets, so all packets of one flow must be
	// given to one listener.
	agree bool
	// still: no slot changes, so choose can be one step.
	still bool
	// roomy: with an empty place no bucket is too full for empty_place, which leaves
	// out three states of four.
	roomy bool
}

// machine runs a world under a protocol.
type machine struct {
	*world
	protocol
	wrong string // the first violation, by the step that was taken last
}

func (m *machine) fail(format string, args ...any) {
	if m.wrong == "" {
		m.wrong = fmt.Sprintf(format, args...)
	}
}

// vacant is vacant of flow.h.
func vacant(w word, now uint8) bool {
	silent := int8(now) - int8(w.second)
	switch w.state {
	case empty:
		return w != revoked
	case busy:
		return false
	case fresh:
		return silent > idleNew
	default:
		return silent > idle
	}
}

// exchange is the compare-and-exchange of a word.
func (m *machine) exchange(s *state, place uint8, old, new word) bool {
	if s.entries[place].word != old {
		return false
	}
	m.store(s, place, new)
	return true
}

// store is what an exchange does when it succeeds, and a naive protocol
// whatever is there. Nobody may move a flow from a listener that is open.
func (m *machine) store(s *state, place uint8, new word) {
	e := &s.entries[place]
	if old := e.word; old.tracks() && new.tracks() && old.listener() != new.listener() && s.open(old.listener()) {
		m.fail("the entry of flow %d moves from %v, which is open, to %v", e.identity, old.listener(), new.listener())
	}
	e.word = new
}

// hold sends the actor through entry_holds and on to held or other. The word
// is in a.word then.
func (a *actor) hold(place uint8, held, other pc) {
	a.held, a.other, a.place, a.tries = held, other, place, 0
	a.pc = stepHoldsWord
}

// choose sends the actor through choose and on to yes or no.
func (a *actor) choose(l listener, yes, no pc) {
	a.target, a.yes, a.no = l, yes, no
	a.pc = stepChooseNumber
}

// visit sends the actor to a step at a place, or to the end if there is none.
func (m *machine) visit(a *actor, place uint8, step, end pc) {
	a.place, a.pc = place, step
	if place >= m.places {
		a.place, a.pc = 0, end
	}
}

// rival is rival of flow.h.
func (m *machine) rival(a *actor) bool {
	return a.word.tag == m.tag[a.flow] && a.word.state != empty && !vacant(a.word, a.now)
}

// step lets actor i take its next step, and emits each state that may follow.
func (m *machine) step(s state, i int, emit func(state)) {
	a := &s.actors[i]
	flow, tag := a.flow, m.tag[a.flow]

	switch a.pc {
	case stepClock:
		a.now, a.mine = s.second, maxPlaces
		m.lookup(a, 0)
	case stepLookup:
		m.lookup(a, a.place+1)
	case stepFound:
		a.mine = a.place
		silent := int8(a.now) - int8(a.word.second)
		switch {
		case silent > 0 && vacant(a.word, a.now):
			a.mine, a.pc = maxPlaces, stepPick // expired: a new flow
		case silent >= 1 && (a.word.state == established || silent >= 2):
			a.pc = stepRefresh
		default:
			a.choose(a.word.listener(), stepHit, stepDead)
		}
	case stepRefresh:
		news := a.word
		news.second, news.state = a.now, established
		if m.plainRefresh {
			m.store(&s, a.mine, news)
			a.word = news
		} else if m.exchange(&s, a.mine, a.word, news) {
			a.word = news
		}
		a.choose(a.word.listener(), stepHit, stepDead)
	case stepHit:
		if a.selected != a.target {
			m.fail("a packet for %v is given to %v", a.target, a.selected)
		}
		if !a.had.has(a.selected) {
			m.fail("a packet of flow %d follows the entry of another to %v", flow, a.selected)
		}
		a.pc = stepDeliver

	case stepHoldsWord:
		a.pc = stepHoldsIdentity
		if m.singleRead {
			break
		}
		a.word = s.entries[a.place].word
		if a.word.tag != tag || !a.word.tracks() {
			a.pc = a.other
		}
	case stepHoldsIdentity:
		a.pc = stepHoldsAgain
		if s.entries[a.place].identity != flow {
			a.pc = a.other
		}
	case stepHoldsAgain:
		again := s.entries[a.place].word
		if m.singleRead {
			a.word = again
		}
		a.tries++
		switch {
		case again == a.word && again.tag == tag && again.tracks():
			a.pc = a.held
		case a.tries == holdTries, m.holdOnce:
			a.pc = a.other
		default:
			a.pc = stepHoldsWord
		}

	case stepChooseNumber:
		a.pc = stepChooseSelect
		if s.slots[a.target.slot].incarnation != a.target.incarnation {
			a.pc = a.no
		} else if m.still {
			m.step(s, i, emit) // nothing can change between this and the selection
			return
		}
	case stepChooseSelect:
		a.pc = a.no
		if socket := s.slots[a.target.slot].socket; socket != 0 {
			a.selected = listener{a.target.slot, socket}
			a.pc = stepChooseAgain
			if m.still || m.noRecheck {
				a.pc = a.yes
			}
		}
	case stepChooseAgain:
		a.pc = a.no
		if s.slots[a.target.slot].incarnation == a.target.incarnation {
			a.pc = a.yes
		}

	case stepPick:
		if int(a.try) >= len(m.order[i]) {
			a.pc = stepFallback
			break
		}
		slot := m.order[i][a.try]
		a.choice = listener{slot, s.slots[slot].incarnation}
		picked := stepSurvey
		if a.planned > 0 {
			picked = stepPlanned
		}
		if a.mine < maxPlaces {
			picked = stepRehome
		}
		a.choose(a.choice, picked, stepPickNext)
	case stepPickNext:
		a.try++
		a.pc = stepPick

	case stepDead:
		a.dead, a.try, a.pc = a.word.listener(), 0, stepPick
	case stepRehome:
		moved := a.word
		moved.slot, moved.incarnation, moved.second = a.choice.slot, a.choice.incarnation, a.now
		a.losses++
		switch {
		case m.plainRehome:
			m.store(&s, a.mine, moved)
			a.pc = stepDeliver
		case m.exchange(&s, a.mine, a.word, moved):
			if moved.listener() == a.dead {
				m.fail("rehomed to the dead %v", a.dead)
			}
			a.pc = stepDeliver
		default:
			a.hold(a.mine, stepTheirs, stepOwnChoice)
		}
	case stepTheirs:
		switch {
		case a.word.listener() != a.dead || m.rehomeOnce:
			a.choose(a.word.listener(), stepHit, stepOwnChoice)
		case a.losses == holdTries:
			a.pc = stepOwnChoice
		default:
			a.pc = stepRehome
		}
	case stepOwnChoice:
		a.choose(a.choice, stepDeliver, stepFallback)

	case stepPlan:
		m.plan(s, i, emit)
		return
	case stepPlanned:
		if s.entries[a.planned-1].word != (word{}) && !m.plainInsert {
			a.planned, a.pc = 0, stepSurvey
			break
		}
		a.mine, a.planned, a.word = a.planned-1, 0, word{}
		a.pc = stepClaim
		m.step(s, i, emit) // by the same exchange
		return
	case stepSurvey:
		m.survey(s, i, emit)
		return
	case stepJudge:
		a.word = s.entries[a.mine].word
		a.pc = stepClaim
		ours := a.word.tag == tag && !m.ownNew
		if !vacant(a.word, a.now) && (a.word.state != fresh || ours) {
			m.visit(a, 0, stepLookAgain, stepDeliver)
		}
	case stepClaim:
		a.busy = word{a.choice.slot, a.choice.incarnation, busy, a.now, tag}
		a.pc = stepIdentity
		if m.plainInsert {
			m.store(&s, a.mine, a.busy)
		} else if !m.exchange(&s, a.mine, a.word, a.busy) {
			m.visit(a, 0, stepLookAgain, stepDeliver)
		}
	case stepIdentity:
		s.entries[a.mine].identity = flow
		m.visit(a, 0, stepScan, stepCommit)
		if m.noScan {
			a.pc = stepCommit
		}
	case stepScan:
		a.word = s.entries[a.place].word
		switch {
		case a.place == a.mine || !m.rival(a):
			m.visit(a, a.place+1, stepScan, stepCommit)
		case a.word.state != busy:
			a.hold(a.place, stepYield, stepScanNext)
			if m.looseFollow {
				a.pc = stepLoose
			}
		case a.place > a.mine:
			a.pc = stepRevoke
		default:
			// Perhaps another flow's: its identity may not be there yet.
			a.follow, a.end, a.pc = a.word.listener(), stepDeliver, stepGiveUp
		}
	case stepRevoke:
		none := revoked
		if m.revokeFrees {
			none = word{}
		}
		if m.exchange(&s, a.place, a.word, none) {
			m.visit(a, a.place+1, stepScan, stepCommit)
		} else {
			a.hold(a.place, stepYield, stepScanNext)
		}
	case stepScanNext:
		m.visit(a, a.place+1, stepScan, stepCommit)
	case stepLoose:
		a.pc = a.other
		if s.entries[a.place].identity == flow {
			a.pc = a.held
		}
	case stepYield:
		a.follow, a.end, a.pc = a.word.listener(), stepHit, stepGiveUp
	case stepGiveUp:
		a.pc = stepGiveBack
		if m.exchange(&s, a.mine, a.busy, word{}) || m.revokeFrees {
			a.pc = stepFollow
		}
	case stepGiveBack:
		m.exchange(&s, a.mine, revoked, word{})
		a.pc = stepFollow
	case stepFollow:
		a.choose(a.follow, a.end, stepOwnChoice)

	case stepCommit:
		done := a.busy
		done.state = fresh
		a.pc = stepDeliver
		if m.plainInsert {
			m.store(&s, a.mine, done)
		} else if !m.exchange(&s, a.mine, a.busy, done) {
			a.pc = stepRevoked
		}
	case stepRevoked:
		if !m.revokeFrees {
			m.exchange(&s, a.mine, revoked, word{})
		}
		m.visit(a, 0, stepLookAgain, stepDeliver)

	case stepLookAgain:
		a.mine = maxPlaces
		a.word = s.entries[a.place].word
		switch {
		case !m.rival(a):
			m.visit(a, a.place+1, stepLookAgain, stepDeliver)
		case a.word.state == busy:
			a.choose(a.word.listener(), stepDeliver, stepOwnChoice)
		default:
			a.hold(a.place, stepAgainHeld, stepLookAgainNext)
			if m.looseFollow {
				a.pc = stepLoose
			}
		}
	case stepLookAgainNext:
		m.visit(a, a.place+1, stepLookAgain, stepDeliver)
	case stepAgainHeld:
		a.choose(a.word.listener(), stepHit, stepOwnChoice)

	case stepDeliver:
		if !a.may.has(a.selected) {
			m.fail("a packet of flow %d is given to %v: another has the flow, and is open", flow, a.selected)
		}
		*a = actor{flow: flow, selected: a.selected}
	case stepFallback:
		*a = actor{flow: flow}

	// What is no packet. The slot acted upon is in target, the place in mine.
	case stepClose:
		s.slots[a.target.slot].socket = 0
		a.pc = stepBump
	case stepBump:
		s.slots[a.target.slot].incarnation++
		a.pc = stepRegister
	case stepRegister:
		s.slots[a.target.slot].socket = s.slots[a.target.slot].incarnation
		*a = actor{}
	case stepFlushRead:
		a.word, a.pc = s.entries[a.mine].word, stepFlush
		if !a.word.tracks() {
			*a = actor{}
		}
	case stepFlush:
		m.exchange(&s, a.mine, a.word, word{})
		*a = actor{}
	case stepTick:
		s.second++
		*a = actor{}
	}
	emit(s)
}

// lookup is find_in from a place on.
func (m *machine) lookup(a *actor, place uint8) {
	if place >= m.places {
		a.place, a.pc = 0, stepPlan
		return
	}
	a.hold(place, stepFound, stepLookup)
}

// plan emits a state for each empty place, as if any might be the one that is the
// bucket's first, and one without a place, as if the buckets were too full for that.
func (m *machine) plan(s state, i int, emit func(state)) {
	a := &s.actors[i]
	a.pc = stepPick
	for place, e := range s.entries[:m.places] {
		if e.word == (word{}) {
			a.planned = uint8(place) + 1
			emit(s)
		}
	}
	if a.planned == 0 || !m.roomy {
		a.planned = 0
		emit(s)
	}
}

// survey emits a state for each place that survey might return: the flow's own
// expired entry, else any that may be taken. Of which it takes in truth the
// steps to come ask no question.
func (m *machine) survey(s state, i int, emit func(state)) {
	a := &s.actors[i]
	for place, e := range s.entries[:m.places] {
		if e.identity == a.flow && e.word.tracks() && vacant(e.word, a.now) {
			a.mine, a.pc = uint8(place), stepJudge
			emit(s)
			return
		}
	}
	full := true
	for place, e := range s.entries[:m.places] {
		if vacant(e.word, a.now) || e.word.state == fresh {
			full = false
			a.mine, a.pc = uint8(place), stepJudge
			emit(s)
		}
	}
	if full {
		m.visit(a, 0, stepLookAgain, stepDeliver)
		if m.fullIsFull {
			a.pc = stepDeliver
		}
		emit(s)
	}
}
