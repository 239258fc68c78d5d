/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Who is alive, and how one of them is selected. Part of select.c, of whose maps
 * it speaks.
 */
#ifndef RPSEL_LIVE_H
#define RPSEL_LIVE_H

#include "pick.h"

/*
 * choose selects the listener of a slot if it still is that incarnation. The
 * number is read again after the selection: a listener that took the slot in
 * between must not get the packets of the one before. READ_ONCE keeps the
 * compiler from merging the two reads.
 */
ALWAYS_INLINE int choose(struct sk_reuseport_md *ctx, __u32 slot, __u32 incarnation)
{
	struct slot *s = bpf_map_lookup_elem(&slots, &slot);

	if (!s || !same_incarnation(READ_ONCE(s->incarnation), incarnation))
		return 0;
	if (bpf_sk_select_reuseport(ctx, &socks, &slot, 0))
		return 0;
	return same_incarnation(READ_ONCE(s->incarnation), incarnation);
}

/* The outcome of a pick: a slot that is selected already, or none. */
struct choice {
	__u32 slot;
	__u32 incarnation;
};

/* choose_present is choose for whoever has the slot. */
ALWAYS_INLINE int choose_present(struct sk_reuseport_md *ctx, __u32 slot, struct choice *c)
{
	struct slot *s = bpf_map_lookup_elem(&slots, &slot);

	if (!s)
		return 0;
	c->slot = slot;
	c->incarnation = READ_ONCE(s->incarnation);
	if (bpf_sk_select_reuseport(ctx, &socks, &slot, 0))
		return 0;
	return same_incarnation(READ_ONCE(s->incarnation), c->incarnation);
}

OWN_FUNCTION int choose_any(struct sk_reuseport_md *ctx, __u32 slot, struct choice *c)
{
	return c ? choose_present(ctx, slot, c) : 0;
}

/*
 * clear_bits is a full barrier. An atomic operation whose result nobody uses is
 * none on arm64, where the kernel makes another instruction of it.
 */
ALWAYS_INLINE void clear_bits(__u64 *word, __u64 which)
{
	__u64 was = __sync_fetch_and_and(word, ~which);

	asm volatile("" : : "r"(was));
}

/*
 * bury_bit clears the bit of a dead listener. A listener that registers sets its
 * bit last: if the second selection succeeds it came in between, and the bit is
 * set again whatever the order.
 */
ALWAYS_INLINE int bury_bit(struct sk_reuseport_md *ctx, __u64 *word, __u32 slot)
{
	__u64 bit = 1ull << (slot & 63);

	if (!word || !bpf_sk_select_reuseport(ctx, &socks, &slot, 0))
		return 0;
	clear_bits(word, bit);
	if (bpf_sk_select_reuseport(ctx, &socks, &slot, 0))
		return 1;
	__sync_fetch_and_or(word, bit);
	return 0;
}

/* bury_word does so for all dead listeners of a word, whose first is given. */
OWN_FUNCTION int bury_word(struct sk_reuseport_md *ctx, __u64 *word, __u32 first)
{
	if (!word)
		return 0;

	__u64 set = READ_ONCE(*word);

	/* Shifted, since the verifier would carry along what it learns of each bit. */
	for (__u32 i = 0; i < 64; i++, set >>= 1)
		if (set & 1)
			bury_bit(ctx, word, first + i);
	return 0;
}

/*
 * bury_slot does so for one listener that was found dead, whatever its rank: who
 * cannot ask the socket array knows by the bits. It reports whether there was one.
 */
OWN_FUNCTION int bury_slot(struct sk_reuseport_md *ctx, __u32 slot)
{
	__u32 word = slot / 64;
	struct live *l = bpf_map_lookup_elem(&live, &word);
	int buried = 0;

	if (!l)
		return 0;
	for (__u32 rank = 0; rank < RANKS; rank++)
		if (READ_ONCE(l->ranks[rank]) >> (slot & 63) & 1)
			buried |= bury_bit(ctx, &l->ranks[rank], slot);
	return buried;
}

struct bpf_map;

/* A search of the live bits. */
struct search {
	struct sk_reuseport_md *ctx;
	__u32 rank; /* whose bits */
	__u32 bits; /* count: how many there are; take: how many to pass over */
	__u64 found;
};

ALWAYS_INLINE __u64 *live_bits(struct live *l, const struct search *s)
{
	__u32 rank = s->rank;

	return &l->ranks[rank < RANKS ? rank : 0];
}

static long bury(struct bpf_map *map, const __u32 *key, struct live *l, struct search *s)
{
	(void)map;
	bury_word(s->ctx, live_bits(l, s), *key * 64);
	return 0;
}

static long count(struct bpf_map *map, const __u32 *key, struct live *l, struct search *s)
{
	(void)map;
	(void)key;
	s->bits += ones(READ_ONCE(*live_bits(l, s)));
	return 0;
}

/* take finds the listener whose bit comes after a number of others. */
static long take(struct bpf_map *map, const __u32 *key, struct live *l, struct search *s)
{
	__u64 set = READ_ONCE(*live_bits(l, s));
	__u32 here = ones(set);

	(void)map;
	if (s->bits >= here) {
		s->bits -= here;
		return 0;
	}
	s->found = *key * 64 + nth_one(set, s->bits);
	return 1;
}

/* count_live is how many listeners a rank has, alive or not. */
OWN_FUNCTION __u32 count_live(__u32 rank)
{
	struct search s = {.rank = rank};

	bpf_for_each_map_elem(&live, count, &s, 0);
	return s.bits;
}

/*
 * nth_live is the slot of a rank that n others come before. One that is none,
 * RPSEL_SLOTS, tells that others cleared bits since they were counted.
 */
OWN_FUNCTION __u32 nth_live(__u32 rank, __u32 n)
{
	struct search s = {.rank = rank, .bits = n, .found = RPSEL_SLOTS};

	bpf_for_each_map_elem(&live, take, &s, 0);
	return s.found;
}

/*
 * choose_live takes the listener at the hash's share of those of a rank. Nobody
 * may have cleared the bits of the dead yet: meeting one, it does so and tries
 * again. Draining listeners are drawn anew for each packet, and only clean bits
 * give the same answer each time. It tries more than once since listeners may
 * die, and other CPUs clear their bits, while it counts.
 */
#define LIVE_TRIES 4

OWN_FUNCTION int choose_live(struct sk_reuseport_md *ctx, __u32 hash, __u32 rank, struct choice *c)
{
	struct search s = {.ctx = ctx, .rank = rank};

	for (int clean = rank == RANK_DRAINING; clean < LIVE_TRIES; clean++) {
		__u32 n;

		if (clean)
			bpf_for_each_map_elem(&live, bury, &s, 0);
		n = count_live(rank);
		if (!n)
			break;
		if (choose_any(ctx, nth_live(rank, scale(hash, n)), c))
			return 1;
	}
	return 0;
}

/* choose_heir takes a listener of the first rank that has one, and returns that rank or RANKS. */
ALWAYS_INLINE int choose_heir(struct sk_reuseport_md *ctx, __u32 hash, int waiting,
			      struct choice *c)
{
	for (__u32 i = 0; i < RANKS; i++) {
		__u32 rank = nth_rank(i, waiting);

		if (choose_live(ctx, hash, rank, c))
			return rank;
	}
	return RANKS;
}

#endif
