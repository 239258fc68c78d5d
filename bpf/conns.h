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

/* Who has a connection now, by its cookie, until its storage says so; and OWNER_COUNTS. */
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

/* is_counted: the connections of this listener are counted. */
ALWAYS_INLINE int is_counted(__u64 owner)
{
	struct conns *c = conns_of(owner);

	return c && (__u32)READ_ONCE(c->word) == (__u32)owner;
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

/* change_conn does so, and tells who looks meanwhile. */
ALWAYS_INLINE void change_conn(__u64 owner, __s64 change)
{
	struct conns *c = conns_of(owner);

	if (!c)
		return;
	__sync_fetch_and_add(&c->begun, 1);
	add_conn(c, owner, change);
	__sync_fetch_and_add(&c->ended, 1);
}

/*
 * take_note reads and removes the note of who has a connection now. It is 0 for all
 * but one of those who want it at once, and if there is none.
 */
ALWAYS_INLINE __u64 take_note(__u64 cookie)
{
	__u64 *note = bpf_map_lookup_elem(&moved_conns, &cookie), owner;

	if (!note)
		return 0;
	owner = *note;
	return bpf_map_delete_elem(&moved_conns, &cookie) ? 0 : owner;
}

#endif
