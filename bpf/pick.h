/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Which entry of the pick table a new flow falls on, and how an entry is mended
 * when its listener is dead. Pure arithmetic; select.c does the selecting.
 */
#ifndef RPSEL_PICK_H
#define RPSEL_PICK_H

#include "flow.h"

ALWAYS_INLINE __u32 table_first(__u64 table)
{
	return table >> TABLE_FIRST_SHIFT;
}
ALWAYS_INLINE __u32 table_size(__u64 table)
{
	return table;
}

/*
 * entry_hash draws the heir of an entry whose listener is dead. It depends on
 * the entry alone, not on the flow: so all flows of the entry get the same heir,
 * and the entry can be mended in place without moving one of them.
 */
ALWAYS_INLINE __u32 entry_hash(__u32 entry)
{
	__u32 x = (entry + 1) * 0x85ebca6b;

	x ^= x >> 15;
	x *= 0xc2b2ae35;
	x ^= x >> 13;
	x *= 0x27d4eb2f;
	return x ^ x >> 16;
}

/* ones counts the set bits. */
ALWAYS_INLINE __u32 ones(__u64 set)
{
	return __builtin_popcountll(set);
}

/*
 * nth_one is the number of the set bit that n others come before. It halves the
 * word: in a loop over the bits the verifier of Linux 7.2 tells apart every n that
 * may be left.
 */
ALWAYS_INLINE __u64 nth_one(__u64 set, __u32 n)
{
	__u64 at = 0;

	for (__u32 half = 32; half; half /= 2) {
		__u32 low = ones(set & ((1ull << half) - 1));

		if (n >= low) {
			n -= low;
			set >>= half;
			at += half;
		}
	}
	return !n && set & 1 ? at : 0;
}

/*
 * nth_rank is the order in which ranks are searched. A generation that is about
 * to take over comes after the others as long as the group waits.
 */
ALWAYS_INLINE __u32 nth_rank(__u32 n, int waiting)
{
	if (!waiting || n >= RANK_DRAINING)
		return n;
	return n + 1 < RANK_DRAINING ? n + 1 : RANK_NEXT;
}

/* picked is the slot in an entry: while the group waits, or after. */
ALWAYS_INLINE __u32 picked(__u32 entry, int waiting)
{
	return waiting ? entry & PICK_HALF : entry >> PICK_AFTER_SHIFT;
}

/* mended is the entry with a living slot wherever it had the dead one. */
ALWAYS_INLINE __u32 mended(__u32 entry, __u32 dead, __u32 living)
{
	__u32 now = entry & PICK_HALF, later = entry >> PICK_AFTER_SHIFT;

	if (now == dead)
		now = living;
	if (later == dead)
		later = living;
	return later << PICK_AFTER_SHIFT | now;
}

#endif
