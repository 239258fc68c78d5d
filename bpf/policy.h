/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Who gets a new flow. Policies draw from the pick table, where weights, ranks and
 * draining hold, and a dead listener is replaced; or from a row that user space
 * has made of the same listeners, and from the table if that one is dead. Part of
 * select.c, of whose maps it speaks.
 */
#ifndef RPSEL_POLICY_H
#define RPSEL_POLICY_H

#include "load.h"

/*
 * by_table: the table has no room to spare, or had none not long ago. A flow that
 * was left untracked, and was served by the pick table, may look new now. It must
 * find the listener it had.
 */
ALWAYS_INLINE int by_table(const struct config *cfg)
{
	__u32 zero = 0, full;
	struct house *h = bpf_map_lookup_elem(&house, &zero);

	if (!h)
		return 1;
	full = READ_ONCE(h->full);
	return full && recent(clock(), full, cfg->idle);
}

/* left_untracked notes that there was no room for a flow, or another had to give way. */
ALWAYS_INLINE void left_untracked(__u32 now)
{
	__u32 zero = 0;
	struct house *h = bpf_map_lookup_elem(&house, &zero);

	if (h && READ_ONCE(h->full) != (now | TICKED))
		WRITE_ONCE(h->full, now | TICKED);
}

/* next_turn is how many flows this CPU has dealt in turn. */
ALWAYS_INLINE __u32 next_turn(void)
{
	__u32 zero = 0;
	__u32 *turn = bpf_map_lookup_elem(&turns, &zero);

	return turn ? (*turn)++ : 0;
}

/* from_row is whose turn it is on this CPU, or who is near it, or RPSEL_NO_SLOT. */
ALWAYS_INLINE __u32 from_row(__u32 policy, __u32 hash)
{
	__u32 cpu = bpf_get_smp_processor_id(), size, i;
	struct row *r = bpf_map_lookup_elem(&rows, &cpu);

	if (!r)
		return RPSEL_NO_SLOT;
	size = READ_ONCE(r->size);
	if (!size)
		return RPSEL_NO_SLOT;
	/* CPUs do not all begin with the same. */
	i = policy == POLICY_RR ? (next_turn() + cpu) % size : scale(hash, size);
	return READ_ONCE(r->slots[i & (RPSEL_ROW - 1)]);
}

/* Draws for a second candidate, since the table may give the first again. */
#define SECOND_DRAWS 8

/*
 * pick_lighter puts a second candidate of the table in the place of the one that
 * was picked, if that has more flows for its weight.
 */
OWN_FUNCTION int pick_lighter(struct sk_reuseport_md *ctx, const struct config *cfg, __u32 hash,
			      struct choice *c)
{
	struct choice other = {};
	__u32 slot, *entry;
	__u64 table;

	if (!cfg || !c)
		return 0;
	table = READ_ONCE(cfg->table);
	slot = c->slot;
	for (__u32 i = 0; i < SECOND_DRAWS && slot == c->slot; i++) {
		hash = entry_hash(hash);
		entry = pick_entry(table_first(table) + scale(hash, table_size(table)));
		if (!entry)
			return 1;
		slot = picked(READ_ONCE(*entry), NOT_WAITING);
	}
	if (slot == c->slot || slot >= RPSEL_SLOTS || !lighter(slot, c->slot))
		return 1;
	if (choose_any(ctx, slot, &other)) {
		*c = other;
		return 1;
	}
	mourn(ctx, slot);
	return choose(ctx, c->slot, c->incarnation);
}

/*
 * pick_new selects a listener by the policy, and reports whether there is one.
 * While the group waits flows that look new stay where the table has them.
 */
OWN_FUNCTION int pick_new(struct sk_reuseport_md *ctx, const struct config *cfg, __u32 hash,
			  int waiting, struct choice *c)
{
	__u32 policy;

	if (!cfg || !c)
		return 0;
	policy = READ_ONCE(cfg->policy);
	if (policy < POLICY_LEAST || waiting || by_table(cfg))
		return pick(ctx, cfg, hash, waiting, c);
	if ((policy == POLICY_RR || policy == POLICY_CPU) &&
	    choose_any(ctx, from_row(policy, hash), c))
		return 1;
	if (policy == POLICY_RR || policy == POLICY_RANDOM)
		hash = bpf_get_prandom_u32();
	if (!pick(ctx, cfg, hash, waiting, c))
		return 0;
	return policy != POLICY_LEAST || pick_lighter(ctx, cfg, hash, c);
}

/*
 * pick_at_once does so where it takes no call: by the pick table, whose listener
 * lives. Who fails has pick_new to ask.
 */
ALWAYS_INLINE int pick_at_once(struct sk_reuseport_md *ctx, const struct config *cfg, __u32 hash,
			       int waiting, struct choice *c)
{
	__u64 table = READ_ONCE(cfg->table);
	__u32 *entry;

	if (READ_ONCE(cfg->policy) >= POLICY_LEAST)
		return 0;
	entry = pick_entry(table_first(table) + scale(hash, table_size(table)));
	return entry && choose_present(ctx, picked(READ_ONCE(*entry), waiting), c);
}

#endif
