/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The flow table: buckets of eight entries that every CPU reads and writes
 * without a lock.
 *
 * The one rule: a word changes only by compare-and-exchange against the word
 * that was read. Whoever loses an exchange has old news and looks again. So a
 * refresh cannot undo a rehome, and an entry cannot turn into another flow's
 * between a look and a write. test/model enumerates the interleavings.
 *
 * Nothing here knows a map or a context, so that the harness can run it.
 */
#ifndef RPSEL_FLOW_H
#define RPSEL_FLOW_H

#include "rpsel.h"
#include <bpf/bpf_helpers.h>

#define ALWAYS_INLINE static __always_inline
/*
 * Functions of their own, not inlined and not static: the verifier proves each
 * once, and does not multiply its paths by those of the callers.
 */
#define OWN_FUNCTION __attribute__((noinline))
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))

/* exchange is the only way to change a word; it is a full barrier. */
ALWAYS_INLINE int exchange(__u64 *word, __u64 old, __u64 new)
{
	return __sync_val_compare_and_swap(word, old, new) == old;
}

ALWAYS_INLINE __u32 bits(__u64 word, __u32 shift, __u32 width)
{
	return (word >> shift) & ((1u << width) - 1);
}

ALWAYS_INLINE __u32 word_tag(__u64 w)
{
	return bits(w, 0, WORD_TAG_BITS);
}
ALWAYS_INLINE __u32 word_second(__u64 w)
{
	return bits(w, WORD_SECOND_SHIFT, WORD_SECOND_BITS);
}
ALWAYS_INLINE __u32 word_state(__u64 w)
{
	return bits(w, WORD_STATE_SHIFT, WORD_STATE_BITS);
}
ALWAYS_INLINE __u32 word_incarnation(__u64 w)
{
	return bits(w, WORD_INCARNATION_SHIFT, WORD_INCARNATION_BITS);
}
ALWAYS_INLINE __u32 word_slot(__u64 w)
{
	return w >> WORD_SLOT_SHIFT;
}

/* same_listener compares slot and incarnation. */
ALWAYS_INLINE int same_listener(__u64 a, __u64 b)
{
	return a >> WORD_INCARNATION_SHIFT == b >> WORD_INCARNATION_SHIFT;
}

ALWAYS_INLINE __u64 make_word(__u32 slot, __u32 incarnation, __u32 state, __u32 second, __u32 tag)
{
	return (__u64)slot << WORD_SLOT_SHIFT |
	       (__u64)(incarnation & ((1u << WORD_INCARNATION_BITS) - 1))
		       << WORD_INCARNATION_SHIFT |
	       (__u64)state << WORD_STATE_SHIFT |
	       (__u64)(second & SECOND_MASK) << WORD_SECOND_SHIFT |
	       (tag & ((1u << WORD_TAG_BITS) - 1));
}

/*
 * age is how many seconds before now a 24-bit second was. It is signed: another
 * CPU may have refreshed an entry after this one read its clock, and a second
 * of lead must not look like half a year of silence.
 */
ALWAYS_INLINE __s32 age(__u32 now, __u32 second)
{
	return (__s32)((now - second) << (32 - WORD_SECOND_BITS)) >> (32 - WORD_SECOND_BITS);
}

/*
 * recent reports whether a second lies within so many. One that nobody clears has an
 * age below zero for half of the time, once the clock has wrapped.
 */
ALWAYS_INLINE int recent(__u32 now, __u32 second, __u32 within)
{
	/* One comparison: with two the verifier looks at 3000 instructions more. */
	return (__u32)age(now, second) + within <= 2 * within;
}

/*
 * flow_identity names a flow by the kernel's own hash of its four-tuple, keyed
 * with the boot's secret, and its client port. Both steps can be undone: user
 * space reads the hash back to tell where plain Linux would send the flow.
 */
#define IDENTITY_MULTIPLIER 0x9e3779b97f4a7c15ull

ALWAYS_INLINE __u64 flow_identity(__u32 hash, __u32 port)
{
	__u64 x = ((__u64)hash << 16 | (port & 0xffff)) * IDENTITY_MULTIPLIER;

	return x ^ x >> 32;
}

ALWAYS_INLINE __u32 flow_tag(__u64 identity)
{
	return identity & ((1u << WORD_TAG_BITS) - 1);
}

/* scale maps a 32-bit hash to [0, n) as the kernel's reciprocal_scale does. */
ALWAYS_INLINE __u32 scale(__u32 hash, __u32 n)
{
	return (__u64)hash * n >> 32;
}

/* The two buckets a flow may be in. They differ: a table has two at least. */
ALWAYS_INLINE __u32 first_bucket(__u64 identity, __u32 buckets)
{
	return scale(identity >> 32, buckets);
}
ALWAYS_INLINE __u32 second_bucket(__u64 identity, __u32 buckets)
{
	__u32 second = scale((__u32)identity, buckets);

	if (second != first_bucket(identity, buckets))
		return second;
	return second ? second - 1 : buckets - 1;
}

/*
 * after returns p, ordered behind the load that gave seen also on CPUs that
 * reorder loads: the address depends on it.
 */
ALWAYS_INLINE void *after(void *p, __u64 seen)
{
	__u64 zero = seen;

	asm volatile("%0 &= 0" : "+r"(zero));
	return p + zero;
}

/* An entry that changes this often while it is looked at is given up. */
#define HOLD_TRIES 3

/*
 * entry_holds reports whether the entry is the flow's, and its word. The word
 * is read on both sides of the identity: between two equal words nobody took
 * the entry for another flow. If they differ it looks again, or a flow would
 * seem lost whenever another CPU refreshes it. A busy entry is nobody's yet.
 */
ALWAYS_INLINE int entry_holds(struct flow *f, __u64 identity, __u64 *word)
{
	for (__u32 i = 0; i < HOLD_TRIES; i++) {
		__u64 w = READ_ONCE(f->word), seen;

		if (word_tag(w) != flow_tag(identity) || word_state(w) < FLOW_NEW)
			return 0;
		seen = READ_ONCE(((struct flow *)after(f, w))->identity);
		if (seen != identity)
			return 0;
		if (READ_ONCE(((struct flow *)after(f, seen))->word) == w) {
			*word = w;
			return 1;
		}
	}
	return 0;
}

/* find_among is find_in for a bucket in which another entry has the flow's tag. */
OWN_FUNCTION __u32 find_among(struct bucket *b, __u64 identity, __u64 *word)
{
	if (!b || !word)
		return RPSEL_BUCKET;
	for (__u32 i = 0; i < RPSEL_BUCKET; i++)
		if (entry_holds(&b->flows[i], identity, word))
			return i;
	return RPSEL_BUCKET;
}

/*
 * find_in returns the flow's place in the bucket, or RPSEL_BUCKET. The place is
 * reckoned from a difference that is zero: the verifier, which does not know that,
 * goes on once and not for each place.
 */
ALWAYS_INLINE __u32 find_in(struct bucket *b, __u64 identity, __u64 *word)
{
	__u64 differ = 0;
	__u32 place = 0;

#pragma unroll
	for (__u32 i = 0; i < RPSEL_BUCKET; i++) {
		differ = READ_ONCE(b->flows[i].word) ^ identity;
		if (!word_tag(differ)) {
			asm volatile("" : "+r"(differ));
			place = word_tag(differ) + i;
			goto tagged;
		}
	}
	return RPSEL_BUCKET;
tagged:
	place &= RPSEL_BUCKET - 1;
	if (entry_holds(&b->flows[place], identity, word))
		return place;
	return find_among(b, identity, word);
}

/* A claim that its owner must give up. No other word but the empty one has this state. */
#define FLOW_REVOKED make_word(1, 0, FLOW_EMPTY, 0, 0)

/* What a new flow wants of the table, and what it got. */
struct insertion {
	__u64 identity;
	__u32 now;
	__u32 idle;
	__u32 idle_new;
	__u32 slot; /* in: the listener picked; out: the listener to follow */
	__u32 incarnation;
	__u32 place; /* 0 to 7 first bucket, 8 to 15 second; in: empty_place, or NOWHERE */
	__u32 evicted;
	__u32 tag;  /* in: flow_tag of identity */
	__u64 busy; /* the word the place holds until commit */
	__u64 over; /* out: the word of the flow that gave way, or 0 */
};

/* Without CAP_PERFMON no function takes a pointer to stack that has holes. */
_Static_assert(sizeof(struct insertion) == 56, "insertion has no padding");

enum insert_result {
	INSERT_CLAIMED, /* place is ours: write the details, then commit */
	INSERT_FOLLOW,	/* the flow has an entry: slot and incarnation are its */
	INSERT_LOST,	/* another flow took the place: try at the next packet */
	INSERT_FULL,
};

/* vacant reports whether the entry may be taken by anybody, whatever it holds. */
ALWAYS_INLINE int vacant(__u64 word, const struct insertion *in)
{
	__s32 silent = age(in->now, word_second(word));

	switch (word_state(word)) {
	case FLOW_EMPTY:
		return word != FLOW_REVOKED;
	case FLOW_BUSY:
		return 0;
	case FLOW_NEW:
		return silent > (__s32)in->idle_new;
	default:
		return silent > (__s32)in->idle;
	}
}

/* rival reports whether the word may be another insertion's of the same flow. */
ALWAYS_INLINE int rival(__u64 word, const struct insertion *in)
{
	return word_tag(word) == in->tag && word_state(word) != FLOW_EMPTY && !vacant(word, in);
}

#define RANK_OWN 0 /* the flow's own expired entry */
#define RANK_VACANT 1
#define RANK_NEW 2 /* and up: the older, the lower */
#define RANK_KEEP 0xffffff
#define SURVEY_RANK_SHIFT 16
#define SURVEY_USED_SHIFT 8

/*
 * survey finds the entry of a bucket that a new flow would rather take than any
 * other, as rank << 16 | used entries << 8 | place.
 */
OWN_FUNCTION __u64 survey(struct bucket *b, struct insertion *in)
{
	__u64 rank, best = RANK_KEEP;
	__u32 place = 0, used = 0;

	if (!b || !in)
		return best << SURVEY_RANK_SHIFT;
	for (__u32 i = 0; i < RPSEL_BUCKET; i++) {
		__u64 w = READ_ONCE(b->flows[i].word);
		__s32 silent = age(in->now, word_second(w));

		if (vacant(w, in)) {
			rank = RANK_VACANT;
			/* An empty one may have its identity still: a sweep leaves that. */
			if (w && READ_ONCE(b->flows[i].identity) == in->identity)
				rank = RANK_OWN;
		} else {
			used++;
			rank = RANK_KEEP;
			if (word_state(w) == FLOW_NEW)
				rank = silent < 0 ? RANK_KEEP - 1 : RANK_KEEP - 1 - silent;
		}
		if (rank < best) {
			best = rank;
			place = i;
		}
	}
	return best << SURVEY_RANK_SHIFT | used << SURVEY_USED_SHIFT | place;
}

/* tagged counts the entries of a bucket that may be the flow's, without a branch. */
ALWAYS_INLINE __u64 tagged(struct bucket *b, __u32 tag)
{
	__u64 n = 0;

#pragma unroll
	for (__u32 i = 0; i < RPSEL_BUCKET; i++)
		n += ((__u64)(word_tag(READ_ONCE(b->flows[i].word)) ^ tag) - 1) >> 63;
	return n;
}

/* No empty place: insert_claim weighs all. */
#define NOWHERE (2 * RPSEL_BUCKET)
#define ROOM_SHIFT 8

/*
 * room is how many entries of a bucket are not empty << ROOM_SHIFT | how many of those
 * come before the first that is. It takes no branch, which the CPU would guess wrong;
 * and hides from the compiler what is a truth value, or that would take one after all.
 */
ALWAYS_INLINE __u64 room(struct bucket *b)
{
	__u64 used = 0, all = 1, before = 0;

#pragma unroll
	for (__u32 i = 0; i < RPSEL_BUCKET; i++) {
		__u64 w = READ_ONCE(b->flows[i].word), less = -w;

		asm volatile("" : "+r"(less));
		w = (w | less) >> 63;
		asm volatile("" : "+r"(w));
		used += w;
		all &= w;
		before += all;
	}
	return used << ROOM_SHIFT | before;
}

/* empty_place is an empty entry for a new flow where a bucket has plenty, or NOWHERE. */
ALWAYS_INLINE __u32 empty_place(struct bucket *first, struct bucket *second)
{
	__u64 r = room(first);

	if (r >> ROOM_SHIFT < RPSEL_FIRST_BUCKET)
		return r & (RPSEL_BUCKET - 1);
	r = room(second);
	if (r >> ROOM_SHIFT < RPSEL_FIRST_BUCKET)
		return RPSEL_BUCKET + (r & (RPSEL_BUCKET - 1));
	return NOWHERE;
}

ALWAYS_INLINE struct flow *place_of(struct bucket *first, struct bucket *second, __u32 place)
{
	struct bucket *b = place < RPSEL_BUCKET ? first : second;

	return &b->flows[place & (RPSEL_BUCKET - 1)];
}

/* follow makes the insertion end at the listener another CPU has chosen. */
ALWAYS_INLINE int follow(struct insertion *in, __u64 word)
{
	in->slot = word_slot(word);
	in->incarnation = word_incarnation(word);
	return INSERT_FOLLOW;
}

/*
 * look_again finds the entry of a flow that another CPU has inserted, or is
 * about to, since this one looked. Failing that the insertion ends otherwise.
 */
OWN_FUNCTION int look_again(struct bucket *first, struct bucket *second, struct insertion *in,
			    int otherwise)
{
	if (!first || !second || !in)
		return INSERT_FULL;
	for (__u32 place = 0; place < 2 * RPSEL_BUCKET; place++) {
		struct flow *f = place_of(first, second, place);
		__u64 w = READ_ONCE(f->word);

		if (rival(w, in) &&
		    (word_state(w) == FLOW_BUSY || entry_holds(f, in->identity, &w)))
			return follow(in, w);
	}
	return otherwise;
}

/* give_up makes an entry that this CPU had marked busy empty. */
ALWAYS_INLINE void give_up(struct flow *mine, const struct insertion *in)
{
	if (!exchange(&mine->word, in->busy, 0))
		exchange(&mine->word, FLOW_REVOKED, 0);
}

/*
 * weigh chooses the place for a flow by all entries of both buckets, and reports
 * whether there is one.
 */
OWN_FUNCTION int weigh(struct bucket *first, struct bucket *second, struct insertion *in)
{
	if (!first || !second || !in)
		return 0;

	__u64 a = survey(first, in), b = survey(second, in);
	__u32 used_a = a >> SURVEY_USED_SHIFT & 0xff, used_b = b >> SURVEY_USED_SHIFT & 0xff;
	__u64 rank_a = a >> SURVEY_RANK_SHIFT, rank_b = b >> SURVEY_RANK_SHIFT;

	/*
	 * A well filled first bucket yields to a second one that is less so. Were it
	 * to one with any room, three flows in a million would find none in a table
	 * at three quarters of its capacity; so none of three million does.
	 */
	if (rank_a == RANK_VACANT && used_a >= RPSEL_FIRST_BUCKET && rank_b == RANK_VACANT &&
	    used_b < used_a)
		rank_a = RANK_NEW;
	in->place = rank_a <= rank_b ? a & 7 : RPSEL_BUCKET + (b & 7);
	in->evicted = rank_a > RANK_VACANT && rank_b > RANK_VACANT;
	return rank_a != RANK_KEEP || rank_b != RANK_KEEP;
}

/*
 * insert_scan looks over all places once the flow has claimed one. A finished entry
 * of the flow, or an earlier busy one with its tag, wins and is followed; a later
 * busy one is revoked.
 */
OWN_FUNCTION int insert_scan(struct bucket *first, struct bucket *second, struct insertion *in)
{
	if (!first || !second || !in)
		return INSERT_FULL;

	struct flow *mine = place_of(first, second, in->place);

	for (__u32 place = 0; place < 2 * RPSEL_BUCKET; place++) {
		struct flow *f = place_of(first, second, place);
		__u64 w = READ_ONCE(f->word);

		if (place == in->place || !rival(w, in))
			continue;
		/* Of a busy entry the identity may not be there yet: the tag must do. */
		if (word_state(w) != FLOW_BUSY || place > in->place) {
			if (word_state(w) == FLOW_BUSY && exchange(&f->word, w, FLOW_REVOKED))
				continue;
			if (!entry_holds(f, in->identity, &w))
				continue;
		}
		give_up(mine, in);
		return follow(in, w);
	}
	return INSERT_CLAIMED;
}

/* claim marks an entry busy for the flow, if it still has the word that was read. */
ALWAYS_INLINE int claim(struct flow *f, __u64 old, struct insertion *in)
{
	in->busy = make_word(in->slot, in->incarnation, FLOW_BUSY, in->now, in->tag);
	if (!exchange(&f->word, old, in->busy))
		return 0;
	WRITE_ONCE(f->identity, in->identity);
	return 1;
}

/* insert_anywhere is insert_claim by all entries of both buckets. */
OWN_FUNCTION int insert_anywhere(struct bucket *first, struct bucket *second, struct insertion *in)
{
	if (!first || !second || !in)
		return INSERT_FULL;
	if (!weigh(first, second, in))
		return look_again(first, second, in, INSERT_FULL);

	/*
	 * The word is judged anew: what is exchanged is what was judged. A new flow
	 * with our tag is most likely ours, inserted meanwhile.
	 */
	struct flow *mine = place_of(first, second, in->place);
	__u64 old = READ_ONCE(mine->word);

	if (!vacant(old, in) &&
	    (!in->evicted || word_state(old) != FLOW_NEW || word_tag(old) == in->tag))
		return look_again(first, second, in, INSERT_LOST);
	in->evicted = !vacant(old, in);
	if (!claim(mine, old, in))
		return look_again(first, second, in, INSERT_LOST);
	if (word_state(old) >= FLOW_NEW)
		in->over = old;
	return insert_scan(first, second, in);
}

/*
 * insert_claim finds room for a flow that is in neither bucket and marks it
 * busy. Room is, in this order: what is empty or expired (in the second bucket
 * only when the first holds RPSEL_FIRST_BUCKET, and more), then the oldest new flow.
 * Never an established one.
 *
 * Two CPUs may insert twin first packets at once. Each marks its place and then
 * looks over all places, so that whichever way the two interleave, one entry
 * remains.
 *
 * A busy entry belongs to the CPU that marked it until that CPU itself makes it
 * something else: nobody takes it, and whoever revokes it only says so. That is
 * why identity and details may be written by plain stores. It never stays busy,
 * because a BPF program always runs to its end.
 *
 * Most often there is plenty of room in the first bucket, and nobody else has the
 * tag. That takes no call, of which each costs 8 ns where the kernel guards returns
 * against speculation.
 */
ALWAYS_INLINE int insert_claim(struct bucket *first, struct bucket *second, struct insertion *in)
{
	if (in->place >= NOWHERE || !claim(place_of(first, second, in->place), 0, in))
		return insert_anywhere(first, second, in);
	if (tagged(first, in->tag) + tagged(second, in->tag) == 1)
		return INSERT_CLAIMED;
	return insert_scan(first, second, in);
}

/* insert_withdraw ends an insertion whose claim was revoked; the winner is followed. */
OWN_FUNCTION int insert_withdraw(struct bucket *first, struct bucket *second, struct insertion *in)
{
	if (!first || !second || !in)
		return INSERT_FULL;
	give_up(place_of(first, second, in->place), in);
	return look_again(first, second, in, INSERT_LOST);
}

/* insert_commit makes a claimed entry visible. It fails when the claim was revoked meanwhile. */
ALWAYS_INLINE int insert_commit(struct bucket *first, struct bucket *second, struct insertion *in)
{
	struct flow *mine = place_of(first, second, in->place);
	__u64 word = make_word(in->slot, in->incarnation, FLOW_NEW, in->now, in->tag);

	if (exchange(&mine->word, in->busy, word))
		return INSERT_CLAIMED;
	return insert_withdraw(first, second, in);
}

/*
 * refreshed is the word of a flow that was heard of now. The client's next
 * packet at least a second after its first confirms it: the clock counts whole
 * seconds, so that two of them must have begun.
 */
ALWAYS_INLINE __u64 refreshed(__u64 word, __u32 now)
{
	__u32 state = word_state(word);
	__s32 silent = age(now, word_second(word));

	if (silent < 1 || (state == FLOW_NEW && silent < 2))
		return word;
	return make_word(word_slot(word), word_incarnation(word), FLOW_ESTABLISHED, now,
			 word_tag(word));
}

/* heard is refreshed where the client alone confirms nothing. */
ALWAYS_INLINE __u64 heard(__u64 word, __u32 now)
{
	if (age(now, word_second(word)) < 1)
		return word;
	return make_word(word_slot(word), word_incarnation(word), word_state(word), now,
			 word_tag(word));
}

/* answered is the word of a flow that the server has confirmed. Its second stays the client's. */
ALWAYS_INLINE __u64 answered(__u64 word)
{
	return make_word(word_slot(word), word_incarnation(word), FLOW_ESTABLISHED,
			 word_second(word), word_tag(word));
}

/* expired reports whether a flow was silent for longer than its state allows. */
ALWAYS_INLINE int expired(__u64 word, __u32 now, __u32 idle, __u32 idle_new)
{
	__u32 allowed = word_state(word) == FLOW_ESTABLISHED ? idle : idle_new;

	return age(now, word_second(word)) > (__s32)allowed;
}

/* moved is the word of a flow that another listener has from now on. */
ALWAYS_INLINE __u64 moved(__u64 word, __u32 slot, __u32 incarnation, __u32 now)
{
	return make_word(slot, incarnation, word_state(word), now, word_tag(word));
}

#endif
