// SPDX-License-Identifier: GPL-2.0-only OR MIT

//go:build ignore

/*
 * What rpsel would be with the kernel's LRU_HASH for a flow table: the same
 * identity, word, incarnation, details and counters, by the same functions. Only
 * the benchmarks load it.
 *
 * On a hit it does all that ours does, but for a look at whether the group waits,
 * and has the details beside the word. It leaves out what a hit does not come to:
 * settling, policies, reports, the timer and the replacement of the dead. So its new
 * flows are cheaper than they could be. Nor can it spare established flows
 * when it is full, be counted without a system call for each batch of entries, or
 * tell who was evicted.
 */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "parse.h"
#include "pick.h"
#include "rpsel.h"

const volatile __u32 clock_mult = 1;
const volatile __u32 listeners = 1;
const volatile __u32 idle = 3600;
const volatile __u32 idle_new = 3600;

/* By how many seconds flows are ahead of the clock when they begin: so long none is refreshed. */
__u32 lead;

struct tracked {
	__u64 word;
	struct detail detail;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1); /* set before it is made */
	__type(key, __u64);
	__type(value, struct tracked);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, RPSEL_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} socks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, RPSEL_SLOTS);
	__type(key, __u32);
	__type(value, struct slot);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RPSEL_SLOTS);
	__type(key, __u32);
	__type(value, struct slot_counters);
} slot_counters SEC(".maps");

#define COUNT_SLOT(ctx, slot, field)                                                               \
	({                                                                                         \
		__u32 index = (slot);                                                              \
		struct slot_counters *c = bpf_map_lookup_elem(&slot_counters, &index);             \
		if (c) {                                                                           \
			c->field++;                                                                \
			c->bytes += (ctx)->len;                                                    \
		}                                                                                  \
	})

ALWAYS_INLINE int choose(struct sk_reuseport_md *ctx, __u32 slot, __u32 incarnation)
{
	struct slot *s = bpf_map_lookup_elem(&slots, &slot);

	if (!s || READ_ONCE(s->incarnation) != incarnation)
		return 0;
	if (bpf_sk_select_reuseport(ctx, &socks, &slot, 0))
		return 0;
	return READ_ONCE(s->incarnation) == incarnation;
}

ALWAYS_INLINE int admit(struct sk_reuseport_md *ctx, __u64 identity, __u32 port, __u32 now)
{
	__u32 slot = scale(ctx->hash, listeners), second = now + lead;
	struct slot *s = bpf_map_lookup_elem(&slots, &slot);
	struct tracked t = {};

	if (!s || !client_address(ctx, ctx->eth_protocol, t.detail.client))
		return SK_PASS;
	t.word = make_word(slot, s->incarnation, lead ? FLOW_ESTABLISHED : FLOW_NEW, second,
			   flow_tag(identity));
	t.detail.history =
		(__u64)port << HISTORY_PORT_SHIFT | (__u64)now << HISTORY_SINCE_SHIFT | now;
	bpf_map_update_elem(&flows, &identity, &t, BPF_NOEXIST);
	if (choose(ctx, slot, s->incarnation))
		COUNT_SLOT(ctx, slot, new);
	return SK_PASS;
}

SEC("sk_reuseport")
int select_by_lru(struct sk_reuseport_md *ctx)
{
	__u32 now = (bpf_jiffies64() * clock_mult >> 32) & SECOND_MASK, port;
	struct tracked *t;
	__u64 identity, word;

	if (!client_port(ctx, ctx->data, ctx->data_end, &port))
		return SK_PASS;
	identity = flow_identity(ctx->hash, port);
	t = bpf_map_lookup_elem(&flows, &identity);
	if (!t)
		return admit(ctx, identity, port, now);
	word = READ_ONCE(t->word);
	/* The kernel gives an element that it takes from one key to the next at once. */
	if (word_tag(word) != flow_tag(identity))
		return admit(ctx, identity, port, now);
	if (age(now, word_second(word)) > 0) {
		__u64 fresh = refreshed(word, now);

		if (expired(word, now, idle, idle_new))
			return admit(ctx, identity, port, now);
		if (fresh != word && exchange(&t->word, word, fresh))
			word = fresh;
	}
	if (choose(ctx, word_slot(word), word_incarnation(word)))
		COUNT_SLOT(ctx, word_slot(word), hit);
	return SK_PASS;
}

char _license[] SEC("license") = "Dual MIT/GPL";
