package model

// protocol says which protections are missing. The zero value is the protocol
// of flow.h.
type protocol struct {
	plainRefresh bool // refresh by a store
	plainRehome  bool // rehome by a store
	plainInsert  bool // claim and commit by stores
	singleRead   bool // identity, then word, each read once
	noScan       bool // no look at the other places after a claim
	revokeFrees  bool // a revoked claim is free at once, not when its owner gives it back
	ownNew       bool // a new entry with our tag may be evicted
	fullIsFull   bool // no second look when no place can be taken
	looseFollow  bool // follow an entry by one read of its word and identity
	rehomeOnce   bool // rehome does not try again when it lost to a refresh
	holdOnce     bool // an entry that changes while it is looked at is not looked at again
	noRecheck    bool // the incarnation is not read again after the selection
}

// holdTries is HOLD_TRIES of flow.h.
const holdTries = 3

// pc is the next step of an actor.
type pc uint8

const (
	stepEnd pc = iota

	stepClock   // rpsel_select: now = clock()
	stepLookup  // find_in: on to the next place
	stepFound   // rpsel_select: after find_in found the flow
	stepRefresh // rpsel_select: exchange(&f->word, word, fresh)
	stepHit     // rpsel_select: return SK_PASS after choose

	stepHoldsWord     // entry_holds: w = READ_ONCE(f->word)
	stepHoldsIdentity // entry_holds: seen = READ_ONCE(f->identity)
	stepHoldsAgain    // entry_holds: READ_ONCE(f->word) == w

	stepChooseNumber // choose: same_incarnation(READ_ONCE(s->incarnation), …)
	stepChooseSelect // choose: bpf_sk_select_reuseport
	stepChooseAgain  // choose: return same_incarnation(…)

	stepPick     // choose_any: c->incarnation = READ_ONCE(s->incarnation)
	stepPickNext // pick: its next try

	stepDead      // rehome: pick(…)
	stepRehome    // rehome: exchange(&f->word, word, moved(…))
	stepTheirs    // rehome: same_listener(theirs, word)
	stepOwnChoice // rehome, admit: choose(ctx, c.slot, c.incarnation)

	stepPlan     // rpsel_select: empty_place(first, second)
	stepPlanned  // insert_claim: claim(place_of(…), 0, in)
	stepSurvey   // insert_anywhere: survey(first), survey(second)
	stepJudge    // insert_anywhere: old = READ_ONCE(mine->word)
	stepClaim    // claim: exchange(&f->word, old, in->busy)
	stepIdentity // claim: WRITE_ONCE(f->identity, …)
	stepScan     // insert_scan: w = READ_ONCE(f->word)
	stepScanNext // insert_scan: the next place
	stepRevoke   // insert_scan: exchange(&f->word, w, FLOW_REVOKED)
	stepLoose    // without the second look of entry_holds
	stepYield    // insert_scan: entry_holds: give up for this entry
	stepGiveUp   // give_up: exchange(&mine->word, in->busy, 0)
	stepGiveBack // give_up: exchange(&mine->word, FLOW_REVOKED, 0)
	stepCommit   // insert_commit: exchange(&mine->word, in->busy, word)
	stepRevoked  // insert_withdraw: give_up(…)

	stepLookAgain     // look_again: w = READ_ONCE(f->word)
	stepLookAgainNext // look_again: the next place
	stepAgainHeld     // look_again: follow(in, w)
	stepFollow        // admit: choose(ctx, in.slot, in.incarnation)

	stepDeliver  // return SK_PASS
	stepFallback // fallback()

	// What others than packets do.
	stepClose     // the kernel empties the slot of a socket that closes
	stepBump      // Listeners.NextIncarnation
	stepRegister  // Sockets.Insert
	stepFlushRead // Flows.All
	stepFlush     // Flows.Forget
	stepTick      // the next second
)

var names = map[pc]string{
	stepClock: "clock", stepLookup: "find_in", stepFound: "found", stepRefresh: "refresh", stepHit: "hit",
	stepHoldsWord: "entry_holds: word", stepHoldsIdentity: "entry_holds: identity", stepHoldsAgain: "entry_holds: word again",
	stepChooseNumber: "choose: incarnation", stepChooseSelect: "choose: select", stepChooseAgain: "choose: incarnation again",
	stepPick: "pick", stepPickNext: "pick: next", stepDead: "dead", stepRehome: "rehome: exchange",
	stepTheirs: "rehome: whose is it", stepOwnChoice: "choose own pick", stepPlan: "empty_place", stepPlanned: "claim: empty", stepSurvey: "survey", stepJudge: "claim: word",
	stepClaim: "claim: exchange", stepIdentity: "claim: store identity", stepScan: "scan: word", stepRevoke: "scan: revoke",
	stepScanNext: "scan: next", stepLookAgainNext: "look_again: next", stepLoose: "identity, once", stepYield: "scan: yield", stepGiveUp: "give_up", stepGiveBack: "give_up: revoked",
	stepCommit: "commit", stepRevoked: "commit: revoked", stepLookAgain: "look_again: word", stepAgainHeld: "look_again: ours",
	stepFollow: "follow", stepDeliver: "deliver", stepFallback: "fallback",
	stepClose: "close", stepBump: "next incarnation", stepRegister: "register",
	stepFlushRead: "flush: read", stepFlush: "flush: exchange", stepTick: "tick",
}

func (p pc) String() string { return names[p] }
