// SPDX-License-Identifier: GPL-2.0-only OR MIT

//go:build ignore

/*
 * The pure parts of the selection program, to be run by BPF_PROG_TEST_RUN, which
 * sk_reuseport programs do not have. Only the tests of this package load it.
 *
 * Arguments and results are in the variable io.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_helpers.h>

#include "flow.h"
#include "key.h"
#include "parse.h"
#include "pick.h"
#include "rpsel.h"

/* Set before the program is loaded, with the size of flows. */
const volatile __u32 table_buckets = 4;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, struct bucket);
} flows SEC(".maps");

/* Who run_churn has at present, by identity; 0: nobody. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} population SEC(".maps");

struct values {
	/* run_numbers */
	__u64 word;
	__u64 other_word;
	__u64 identity;
	__u64 set;
	__u64 nth_one;
	__u64 refreshed;
	__u64 moved;
	__u64 made;
	__u32 hash;
	__u32 port;
	__u32 buckets;
	__u32 now;
	__u32 idle;
	__u32 idle_new;
	__u32 slot;
	__u32 incarnation;
	__u32 entry;
	__u32 n;
	__u32 first;
	__u32 second;
	__s32 age;
	__u32 expired;
	__u32 same_listener;
	__u32 tag;
	__u32 entry_hash;
	__u32 picked;
	__u32 picked_waiting;
	__u32 mended;
	__u32 rank;
	__u32 rank_waiting;
	/* run_parse */
	__u64 client[2];
	__u32 outside; /* in: pretend that nothing is linear */
	__u32 parsed_port;
	__u32 parsed_address;
	/* run_packet */
	__u32 result;
	__u32 place;
	__u32 evicted;
	/* run_key */
	struct keys keys;
	__u32 words[KEY_WORDS];
	__u64 keyed_short; /* of the first four words */
	__u64 keyed;
};

struct values io;

SEC("tc")
int run_numbers(struct __sk_buff *skb)
{
	(void)skb;
	io.identity = flow_identity(io.hash, io.port);
	io.tag = flow_tag(io.identity);
	io.first = first_bucket(io.identity, io.buckets);
	io.second = second_bucket(io.identity, io.buckets);
	io.made = make_word(word_slot(io.word), word_incarnation(io.word), word_state(io.word),
			    word_second(io.word), word_tag(io.word));
	io.same_listener = same_listener(io.word, io.other_word);
	io.age = age(io.now, word_second(io.word));
	io.refreshed = refreshed(io.word, io.now);
	io.expired = expired(io.word, io.now, io.idle, io.idle_new);
	io.moved = moved(io.word, io.slot, io.incarnation, io.now);
	io.entry_hash = entry_hash(io.entry);
	io.picked = picked(io.entry, 0);
	io.picked_waiting = picked(io.entry, 1);
	io.mended = mended(io.entry, io.slot, io.n);
	io.nth_one = nth_one(io.set, io.n);
	io.rank = nth_rank(io.n % (RANKS + 1), NOT_WAITING);
	io.rank_waiting = nth_rank(io.n % (RANKS + 1), TURNING);
	return TC_ACT_OK;
}

SEC("tc")
int run_key(struct __sk_buff *skb)
{
	(void)skb;
	io.keyed_short = keyed_identity(&io.keys, io.words, 4);
	io.keyed = keyed_identity(&io.keys, io.words, KEY_WORDS);
	return TC_ACT_OK;
}

/*
 * The kernel's test run lays out an Ethernet frame, so what stands for the
 * transport header is the frame's first bytes. The network header is where it
 * belongs.
 */
SEC("tc")
int run_parse(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;

	io.parsed_port = client_port(skb, data, io.outside ? data : data_end, &io.port);
	io.parsed_address = client_address(skb, skb->protocol, io.client);
	return TC_ACT_OK;
}

enum { PACKET_HIT = 100, PACKET_REFRESHED = 101 };

/* packet does to the flow table what a packet of a flow does whose listener lives. */
static __noinline int packet(void)
{
	__u64 identity = io.identity, word = 0;
	__u32 a = first_bucket(identity, table_buckets), b = second_bucket(identity, table_buckets);
	struct bucket *first = bpf_map_lookup_elem(&flows, &a);
	struct bucket *second = bpf_map_lookup_elem(&flows, &b);
	struct flow *f;
	__u32 place;

	if (!first || !second)
		return 0;
	f = first->flows;
	place = find_in(first, identity, &word);
	if (place == RPSEL_BUCKET) {
		f = second->flows;
		place = find_in(second, identity, &word);
	}
	if (place < RPSEL_BUCKET && !expired(word, io.now, io.idle, io.idle_new)) {
		__u64 fresh = refreshed(word, io.now);

		io.result = PACKET_HIT;
		io.slot = word_slot(word);
		if (fresh != word && exchange(&f[place & (RPSEL_BUCKET - 1)].word, word, fresh))
			io.result = PACKET_REFRESHED;
		return 0;
	}

	struct insertion in = {
		.identity = identity,
		.now = io.now,
		.idle = io.idle,
		.idle_new = io.idle_new,
		.slot = io.slot,
		.incarnation = io.incarnation,
		.place = place < RPSEL_BUCKET ? NOWHERE : empty_place(first, second),
		.tag = flow_tag(identity),
	};

	io.result = insert_claim(first, second, &in);
	if (io.result == INSERT_CLAIMED)
		io.result = insert_commit(first, second, &in);
	io.place = in.place;
	io.evicted = in.evicted;
	return 0;
}

SEC("tc")
int run_packet(struct __sk_buff *skb)
{
	(void)skb;
	packet();
	return TC_ACT_OK;
}

/* expire makes a flow one that was heard of too long ago. */
static __noinline int expire(__u64 identity)
{
	__u32 a = first_bucket(identity, table_buckets), b = second_bucket(identity, table_buckets);
	__u32 long_ago = io.now - io.idle - 1;

	for (int i = 0; i < 2; i++) {
		struct bucket *in = bpf_map_lookup_elem(&flows, i ? &b : &a);
		__u64 word = 0;
		__u32 place;

		if (!in)
			return 0;
		place = find_in(in, identity, &word);
		if (place < RPSEL_BUCKET)
			exchange(&in->flows[place].word, word,
				 make_word(word_slot(word), word_incarnation(word),
					   FLOW_ESTABLISHED, long_ago, word_tag(word)));
	}
	return 0;
}

/* What run_churn does, and what it has seen. */
struct churn {
	__u64 seed;
	__u64 runs;	 /* so far */
	__u64 until;	 /* it does nothing more then */
	__u64 untracked; /* flows that found no room when they began */
	__u64 evicted;	 /* flows that gave way */
	__u32 flows;	 /* that there are at a time */
	__u32 lag;	 /* how many others begin before a flow's second packet */
};

struct churn churn;

/* draw makes a flow, or a number, of the number of a run. */
static __noinline __u64 draw(__u64 n)
{
	n = (churn.seed + n) * IDENTITY_MULTIPLIER;
	n = (n ^ n >> 30) * 0xbf58476d1ce4e5b9ull;
	n = (n ^ n >> 27) * 0x94d049bb133111ebull;
	return n ^ n >> 31;
}

/* place_in is where the flow of a run is in the population. */
ALWAYS_INLINE __u64 *place_in(__u64 run)
{
	__u32 at = run < churn.flows ? run : scale(draw(~run), churn.flows);

	return bpf_map_lookup_elem(&population, &at);
}

/* flow_of makes the flow of a run. */
ALWAYS_INLINE __u64 flow_of(__u64 run)
{
	__u64 drawn = draw(run);

	return flow_identity(drawn, drawn >> 32);
}

/*
 * run_churn lets one flow begin. The first take nobody's place; then one expires
 * that is drawn from all. The flow that began some runs ago sends its second packet,
 * if it is still there.
 */
SEC("tc")
int run_churn(struct __sk_buff *skb)
{
	__u64 run = churn.runs, *flow;
	__u32 now = io.now;

	(void)skb;
	if (run >= churn.until)
		return TC_ACT_OK;
	churn.runs++;
	flow = place_in(run);
	if (!flow)
		return TC_ACT_OK;
	if (*flow)
		expire(*flow);
	*flow = io.identity = flow_of(run);
	packet();
	churn.untracked += io.result == INSERT_FULL;
	churn.evicted += io.result == INSERT_CLAIMED && io.evicted;
	if (run < churn.lag)
		return TC_ACT_OK;
	flow = place_in(run - churn.lag);
	if (!flow || *flow != flow_of(run - churn.lag))
		return TC_ACT_OK;
	io.identity = *flow;
	io.now = now + 2;
	packet();
	churn.evicted += io.result == INSERT_CLAIMED && io.evicted;
	io.now = now;
	return TC_ACT_OK;
}

char _license[] SEC("license") = "Dual MIT/GPL";
