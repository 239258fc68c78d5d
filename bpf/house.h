/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Housekeeping by a timer of the kernel's, that needs no process of ours: it
 * removes expired flows, a part of the table at each tick, and mends entries of
 * the pick table whose listener is known to be dead. Part of select.c, of whose
 * maps it speaks.
 *
 * The timer lives as long as somebody has the map of it, or its pin; its callback
 * keeps the program. Each program has a map of its own: one that replaces another
 * begins with a timer that was never started.
 */
#ifndef RPSEL_HOUSE_H
#define RPSEL_HOUSE_H

#include "load.h"
#include "report.h"

#define CLOCK_MONOTONIC 1
#define TICK 1000000000ull /* ns */
#define TICKS_LATE 3	   /* seconds without one after which the timer is started again */
#define TICKS_PER_ROUND 60 /* in which the flow table is swept, unless it is too large for that */

/*
 * How many buckets and entries a tick sees to. The most is what makes it take a
 * millisecond; it goes once over the elements of slots.
 */
#define TICK_LEAST 64
#define TICK_MOST RPSEL_SLOTS

/* How many listeners each rank had when the tick began. */
struct census {
	__u32 ranks[RANKS];
};

/* What a tick does. Every step knows where it is by its number. */
struct round {
	const struct config *cfg;
	struct house *house;
	__u64 table; /* of the configuration */
	__u32 now;
	__u32 waiting;
	__u32 sweep;  /* how many buckets are to be swept */
	__u32 counts; /* 1: and their flows counted */
	__u32 entry;  /* the first to be mended */
	__u32 mend;   /* how many */
	struct census have;
	__u32 reserved;
};

_Static_assert(sizeof(struct round) == 72, "round has no padding");

/* sweep_bucket empties the entries of flows that have expired, and may count the others. */
OWN_FUNCTION int sweep_bucket(__u32 index, __u32 now, const struct config *cfg, int counts)
{
	struct bucket *b = bpf_map_lookup_elem(&flows, &index);

	if (!b || !cfg)
		return 0;
	for (__u32 i = 0; i < RPSEL_BUCKET; i++) {
		__u64 word = READ_ONCE(b->flows[i].word);

		if (word_state(word) < FLOW_NEW)
			continue;
		if (!expired(word, now, cfg->idle, cfg->idle_new)) {
			struct load *l = counts ? load_of(word) : 0;

			if (l)
				__sync_fetch_and_add(&l->recount, 1);
		} else if (exchange(&b->flows[i].word, word, 0)) {
			tally(cfg, word, index, -1);
			report(now, REPORT_EXPIRE, index * RPSEL_BUCKET + i, word, 0);
		}
	}
	return 0;
}

/* known_dead reports whether a slot is in no rank. */
OWN_FUNCTION int known_dead(__u32 slot)
{
	__u32 word = slot / 64;
	struct live *l = bpf_map_lookup_elem(&live, &word);
	__u64 ranks = 0;

	if (!l)
		return 1; /* RPSEL_NO_SLOT */
	for (__u32 rank = 0; rank < RANKS; rank++)
		ranks |= READ_ONCE(l->ranks[rank]);
	return !(ranks >> (slot & 63) & 1);
}

/* find_heir is choose_heir as far as it can be told without asking the socket array. */
ALWAYS_INLINE __u32 find_heir(__u32 hash, int waiting, const struct census *have)
{
	for (__u32 i = 0; i < RANK_DRAINING; i++) {
		__u32 rank = nth_rank(i, waiting), n = have->ranks[rank < RANKS ? rank : 0];

		if (n)
			return nth_live(rank, scale(hash, n));
	}
	return RPSEL_NO_SLOT;
}

/* mend_entry does to an entry what pick does when a flow falls on it. */
OWN_FUNCTION int mend_entry(__u32 index, __u64 table, int waiting, const struct census *have)
{
	__u32 *entry = pick_entry(table_first(table) + index);

	if (!entry || !have)
		return 0;
	for (int half = 0; half < 2; half++) {
		int until = half ? NOT_WAITING : waiting;
		__u32 was = READ_ONCE(*entry), dead = picked(was, until), heir;

		if (!known_dead(dead))
			continue;
		heir = find_heir(entry_hash(index), until, have);
		if (heir < RPSEL_SLOTS)
			__sync_val_compare_and_swap(entry, was, mended(was, dead, heir));
	}
	return 0;
}

static long step(struct bpf_map *map, const __u32 *key, struct slot *slot, struct round *r)
{
	__u32 i = *key;

	(void)map;
	(void)slot;
	if (i < r->sweep) {
		sweep_bucket(r->house->bucket, r->now, r->cfg, r->counts);
		WRITE_ONCE(r->house->bucket, r->house->bucket + 1);
	}
	if (i < r->mend)
		mend_entry((r->entry + i) % table_size(r->table), r->table, r->waiting, &r->have);
	return i >= r->sweep && i >= r->mend;
}

/* publish makes what a round has counted the count, if it counted from its beginning. */
static long publish(struct bpf_map *map, const __u32 *key, struct load *l, struct round *r)
{
	__u32 recount = __sync_lock_test_and_set(&l->recount, 0);

	(void)map;
	(void)key;
	if (r->counts)
		WRITE_ONCE(l->flows, recount);
	return 0;
}

static int tick(void *map, int *key, struct house *h)
{
	__u32 zero = 0, now = clock(), left = READ_ONCE(h->mend), size;
	struct config *cfg = bpf_map_lookup_elem(&config, &zero);
	struct round r = {};

	(void)map;
	(void)key;
	if (!cfg)
		return 0;
	r.cfg = cfg;
	r.house = h;
	r.table = READ_ONCE(cfg->table);
	r.now = now;
	r.waiting = waiting_at(cfg, now);
	r.entry = h->entry;
	if (!frozen(cfg, now)) {
		r.sweep = buckets / TICKS_PER_ROUND + TICK_LEAST;
		if (r.sweep > TICK_MOST)
			r.sweep = TICK_MOST;
		if (r.sweep > buckets - h->bucket)
			r.sweep = buckets - h->bucket;
	}
	if (tcp || READ_ONCE(cfg->policy) != POLICY_LEAST)
		h->counts = 0;
	r.counts = h->counts;
	size = left < table_size(r.table) ? left : table_size(r.table);
	r.mend = size < TICK_MOST ? size : TICK_MOST;
	for (__u32 rank = 0; r.mend && rank < RANKS; rank++)
		r.have.ranks[rank] = count_live(rank);
	bpf_for_each_map_elem(&slots, step, &r, 0);
	if (h->bucket >= buckets) {
		if (!tcp && READ_ONCE(cfg->policy) == POLICY_LEAST) {
			bpf_for_each_map_elem(&loads, publish, &r, 0);
			h->counts = 1;
		}
		WRITE_ONCE(h->bucket, 0);
	}
	if (r.mend)
		h->entry = (r.entry + r.mend) % table_size(r.table);
	/* Somebody may have died meanwhile, and the round begun anew. */
	__sync_val_compare_and_swap(&h->mend, left, size - r.mend);
	WRITE_ONCE(h->ticked, now | TICKED);
	bpf_timer_start(&h->timer, TICK, 0);
	return 0;
}

OWN_FUNCTION int start_house(__u32 now)
{
	__u32 zero = 0;
	struct house *h = bpf_map_lookup_elem(&house, &zero);

	if (!h)
		return 0;
	if (!READ_ONCE(h->ticked))
		WRITE_ONCE(h->mend, ALL); /* listeners may have died before */
	WRITE_ONCE(h->ticked, now | TICKED);
	bpf_timer_init(&h->timer, &house, CLOCK_MONOTONIC);
	bpf_timer_set_callback(&h->timer, tick);
	bpf_timer_start(&h->timer, TICK, 0);
	return 0;
}

/*
 * keep_house starts the timer, unless it runs. It is called where a flow is
 * refreshed or a listener picked, which is often enough, and so costs a hit
 * nothing. If it fails that is tried again some seconds later.
 */
ALWAYS_INLINE void keep_house(__u32 now)
{
	__u32 zero = 0, ticked;
	struct house *h;

	if (!timer)
		return;
	h = bpf_map_lookup_elem(&house, &zero);
	if (!h)
		return;
	ticked = READ_ONCE(h->ticked);
	if (!ticked || !recent(now, ticked, TICKS_LATE))
		start_house(now);
}

/* mourn buries a listener that was found dead, and has the pick table mended. */
ALWAYS_INLINE void mourn(struct sk_reuseport_md *ctx, __u32 slot)
{
	__u32 zero = 0;
	struct house *h;

	if (!bury_slot(ctx, slot) || !timer)
		return;
	h = bpf_map_lookup_elem(&house, &zero);
	if (h)
		WRITE_ONCE(h->mend, ALL);
}

#endif
