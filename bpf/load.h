/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * How many flows each listener has, for policy least; with TCP it is connections,
 * and conns.c counts them. Part of select.c, of whose
 * maps it speaks.
 *
 * Whoever's exchange gives an entry to a flow, or takes it from one, counts that.
 * A listener counts only what is its own: when a slot gets another, its count
 * begins at zero, and the flows of the one before are nobody's. What may be lost
 * when several CPUs are at it at once, the next round of sweeps finds.
 */
#ifndef RPSEL_LOAD_H
#define RPSEL_LOAD_H

#include "live.h"

/* load_of is where the flows of the listener in a word are counted, if it is the slot's. */
ALWAYS_INLINE struct load *load_of(__u64 word)
{
	__u32 slot = word_slot(word);
	struct slot *s = bpf_map_lookup_elem(&slots, &slot);

	if (!s || !same_incarnation(READ_ONCE(s->incarnation), word_incarnation(word)))
		return 0;
	return bpf_map_lookup_elem(&loads, &slot);
}

OWN_FUNCTION int add_load(__u64 word, __u32 bucket, __s32 change)
{
	__u32 zero = 0;
	struct house *h = bpf_map_lookup_elem(&house, &zero);
	struct load *l = load_of(word);

	if (!h || !l)
		return 0;
	__sync_fetch_and_add(&l->flows, change);
	if (bucket < READ_ONCE(h->bucket))
		__sync_fetch_and_add(&l->recount, change);
	return 0;
}

/*
 * tally counts that an entry of a bucket has become, or (change -1) is no longer,
 * a flow of the listener in the word. A bucket that the sweep has passed is not
 * counted again in this round.
 */
ALWAYS_INLINE void tally(const struct config *cfg, __u64 word, __u32 bucket, __s32 change)
{
	if (!tcp && READ_ONCE(cfg->policy) == POLICY_LEAST)
		add_load(word, bucket, change);
}

/* flows_of is a listener's count. It may be below zero for a moment. */
ALWAYS_INLINE __u64 flows_of(__u32 slot)
{
	__s32 flows = 0;

	if (tcp) {
		struct conns *c = bpf_map_lookup_elem(&conns, &slot);

		flows = c ? READ_ONCE(c->word) >> CONNS_OPEN_SHIFT : 0;
	} else {
		struct load *l = bpf_map_lookup_elem(&loads, &slot);

		flows = l ? READ_ONCE(l->flows) : 0;
	}
	return flows > 0 ? flows : 0;
}

ALWAYS_INLINE __u64 weight_of(__u32 slot)
{
	struct listener *l = bpf_map_lookup_elem(&listeners, &slot);

	return l ? READ_ONCE(l->weight) & ~WEIGHT_UNDEALT : 1;
}

/* lighter reports whether a listener has fewer flows for its weight than another. */
OWN_FUNCTION int lighter(__u32 slot, __u32 other)
{
	return flows_of(slot) * weight_of(other) < flows_of(other) * weight_of(slot);
}

#endif
