/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What happens to flows, told to who wants to know. Part of select.c, of whose
 * maps it speaks.
 *
 * The reader brings the ring along and renews a second; so nobody but a reader
 * pays for the memory, and one that is killed is forgotten by the clock. Nothing
 * waits for it: a report that finds the ring full is dropped and counted.
 */
#ifndef RPSEL_REPORT_H
#define RPSEL_REPORT_H

#include "flow.h"

static __noinline int output(struct report *r)
{
	__u32 zero = 0;
	void *ring = bpf_map_lookup_elem(&reports, &zero);
	struct reader *to;

	/* The reader looks by itself: to wake it takes ten times as long as all the rest. */
	if (!ring || !bpf_ringbuf_output(ring, r, sizeof(*r), BPF_RB_NO_WAKEUP))
		return 0;
	to = bpf_map_lookup_elem(&reader, &zero);
	if (to)
		__sync_fetch_and_add(&to->dropped, 1);
	return 0;
}

/*
 * send_report names the flow by its row of details. That of a flow that has lost
 * its entry is read at once; if the next owner is faster still, the report has
 * the wrong client.
 */
OWN_FUNCTION int send_report(enum report_kind kind, __u32 row, __u64 word, __u64 was)
{
	struct detail *d = bpf_map_lookup_elem(&details, &row);
	struct report r = {};

	if (!d)
		return 0;
	r.client[0] = READ_ONCE(d->client[0]);
	r.client[1] = READ_ONCE(d->client[1]);
	r.at = bpf_ktime_get_boot_ns();
	r.word = word;
	r.was = was;
	r.port = READ_ONCE(d->history) >> HISTORY_PORT_SHIFT;
	r.kind = kind;
	return output(&r);
}

/* report costs the look at one word if nobody reads. It is called where flows begin and change, not
 * on a hit. */
ALWAYS_INLINE void report(__u32 now, __u32 kind, __u32 row, __u64 word, __u64 was)
{
	__u32 zero = 0, read;
	struct reader *r = bpf_map_lookup_elem(&reader, &zero);
	__s32 ago;

	if (!r)
		return;
	read = READ_ONCE(r->read);
	ago = age(now, read);
	if (read && ago < RPSEL_READ_SECONDS && ago > -RPSEL_READ_SECONDS)
		send_report(kind, row, word, was);
}

#endif
