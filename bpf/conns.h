/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * How many connections each TCP listener has open. conns.c counts them; the
 * selection program reads the counts, and says where a connection goes that
 * waited in a closing listener: that program sees no socket storage.
 */
#ifndef RPSEL_CONNS_H
#define RPSEL_CONNS_H

#include "flow.h"
#include "rpsel.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, RPSEL_SLOTS);
	__type(key, __u32);
	__type(value, struct conns);
} conns SEC(".maps");

/* Who has a connection now, by its cookie, until its storage says so. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, RPSEL_MOVED);
	__type(key, __u64);
	__type(value, __u64);
} moved_conns SEC(".maps");

ALWAYS_INLINE struct conns *conns_of(__u64 owner)
{
	__u32 slot = owner >> OWNER_SLOT_SHIFT;

	return bpf_map_lookup_elem(&conns, &slot);
}

/*
 * add_conn counts a connection that its owner has, or (change -1) has no longer.
 * A slot that has another listener by now is left as it was: the number of the
 * incarnation is in the same word.
 */
ALWAYS_INLINE void add_conn(struct conns *c, __u64 owner, __s64 change)
{
	__u64 one = (__u64)change << CONNS_OPEN_SHIFT;

	if ((__u32)__sync_fetch_and_add(&c->word, one) != (__u32)owner)
		__sync_fetch_and_add(&c->word, -one);
}

#endif
