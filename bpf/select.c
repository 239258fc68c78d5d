// SPDX-License-Identifier: GPL-2.0-only OR MIT

//go:build ignore

/*
 * rpsel_select picks the socket of a reuseport group that gets a packet.
 *
 * It always returns SK_PASS. With a socket selected, that socket gets the
 * packet; with none (no live listener is registered) the kernel picks by its
 * own hash, as if there were no program: a port is never worse off than before.
 *
 * A tracked flow goes to its listener as long as that is alive. A flow whose
 * listener died is moved to a live one at its next packet, by this program
 * alone: no process of ours needs to run.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <bpf/bpf_helpers.h>

#include "conns.h"
#include "flow.h"
#include "key.h"
#include "parse.h"
#include "pick.h"
#include "rpsel.h"

/* Fixed when the program is loaded. */
const volatile __u32 buckets = 2;
const volatile __u32 tcp;
const volatile __u32 affinity = AFFINITY_FLOW;
const volatile __u32 confirm = CONFIRM_CLIENT;
const volatile __u64 prefix4[2]; /* AFFINITY_CLIENT: masks of the address, as it is in a detail */
const volatile __u64 prefix6[2];
const volatile __u32 key_offset; /* AFFINITY_BYTES: from the transport header on */
const volatile __u32 key_length = 1;
const volatile __u32 first_packets = FIRST_ANY;
const volatile __u32 clock_mult = 1; /* 2^32 / CONFIG_HZ */
const volatile __u32 timer = 1;	     /* 0: this kernel has no bpf_timer */

/* The sizes that depend on the group are set before the maps are made. */
struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, RPSEL_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} socks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, RPSEL_SLOTS);
	__type(key, __u32);
	__type(value, struct slot);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, RPSEL_SLOTS / 64);
	__type(key, __u32);
	__type(value, struct live);
} live SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct bucket);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2 * RPSEL_BUCKET);
	__type(key, __u32);
	__type(value, struct detail);
} details SEC(".maps");

/* Array elements take 8 bytes at least, so two entries share one. */
struct pick_pair {
	__u32 entries[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pick_pair);
} picks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RPSEL_SLOTS);
	__type(key, __u32);
	__type(value, struct slot_counters);
} slot_counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, RPSEL_SLOTS);
	__type(key, __u32);
	__type(value, struct listener);
} listeners SEC(".maps");

/* What the timer of house.h goes by. */
struct house {
	struct bpf_timer timer;
	__u32 ticked; /* second of its last tick, and TICKED; 0: it was never started */
	__u32 bucket; /* the next to be swept */
	__u32 entry;  /* of the pick table: the next to be mended */
	__u32 mend;   /* how many are to be looked at; ALL: a listener died */
	__u32 counts; /* 1: this round of sweeps counts flows from its beginning */
	__u32 full;   /* second in which a flow last found no room of its own, and TICKED */
};

#define TICKED 0x80000000u
#define ALL 0xffffffffu

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct house);
} house SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reader);
} reader SEC(".maps");

struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22); /* the reader's own, which may have another size */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct ring);
} reports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, RPSEL_SLOTS);
	__type(key, __u32);
	__type(value, struct load);
} loads SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct row);
} rows SEC(".maps");

/* How many flows each CPU has dealt with policy rr. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} turns SEC(".maps");

/* Where clients are: the kernel's own least recently used go first. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct peer);
	__type(value, __u64);
} peers SEC(".maps");

#define COUNT(field)                                                                               \
	({                                                                                         \
		__u32 zero = 0;                                                                    \
		struct counters *c = bpf_map_lookup_elem(&counters, &zero);                        \
		if (c)                                                                             \
			c->field++;                                                                \
	})

/*
 * credit_migrated counts a connection that waited in a closing TCP listener with the
 * one it goes to. One that has not got its socket yet gets that from there, and is
 * counted with it.
 */
OWN_FUNCTION int credit_migrated(struct sk_reuseport_md *ctx, __u32 slot)
{
	struct slot *s = bpf_map_lookup_elem(&slots, &slot);
	struct bpf_sock *sk = ctx->migrating_sk;
	__u64 owner, was, cookie;
	__u32 state;

	/* Read once: the verifier takes a second load for another pointer. */
	asm volatile("" : "+r"(sk));
	if (!s || !sk)
		return 0;
	state = sk->state;
	if (state == BPF_TCP_NEW_SYN_RECV || state == BPF_TCP_CLOSE)
		return 0;
	owner = (__u64)slot << OWNER_SLOT_SHIFT | READ_ONCE(s->incarnation);
	if (state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT)
		owner |= OWNER_COUNTS;
	cookie = bpf_get_socket_cookie(sk);
	/* The listener that it had gone to before may listen again. */
	was = take_note(cookie);
	if (was & OWNER_COUNTS)
		change_conn(was & ~OWNER_COUNTS, -1);
	/* Where nobody counts, who begins to will find it among those of before. */
	if (!is_counted(owner & ~OWNER_COUNTS))
		return 0;
	/* Without room it stays with the listener it had, whose slot counts no more. */
	if (!bpf_map_update_elem(&moved_conns, &cookie, &owner, BPF_ANY) && owner & OWNER_COUNTS)
		change_conn(owner & ~OWNER_COUNTS, 1);
	return 0;
}

/*
 * With affinity client a connection whose TCP listener ends goes by its client's
 * flow, as the client's next connection would, and is counted as migrated whatever
 * became of the flow. kind is the affinity, which costs a load to look at.
 */
#define COUNT_SLOT_OF(kind, ctx, slot, field)                                                      \
	({                                                                                         \
		__u32 index = (slot);                                                              \
		struct slot_counters *c = bpf_map_lookup_elem(&slot_counters, &index);             \
		if (c) {                                                                           \
			if (tcp && (kind) == AFFINITY_CLIENT && (ctx)->migrating_sk) {             \
				c->migrated++;                                                     \
				credit_migrated(ctx, index);                                       \
			} else {                                                                   \
				c->field++;                                                        \
			}                                                                          \
			c->bytes += (ctx)->len;                                                    \
		}                                                                                  \
	})

#define COUNT_SLOT(ctx, slot, field) COUNT_SLOT_OF(affinity, ctx, slot, field)

/* clock is a coarse second that costs no clock read. It wraps after 24 bits. */
ALWAYS_INLINE __u32 clock(void)
{
	return (bpf_jiffies64() * clock_mult >> 32) & SECOND_MASK;
}

ALWAYS_INLINE int same_incarnation(__u32 a, __u32 b)
{
	return !((a ^ b) & ((1u << WORD_INCARNATION_BITS) - 1));
}

/*
 * waiting_at is what the group waits for: existing flows may not have been seen
 * yet, so that flows that look new are left where the kernel had them, or a
 * generation is not complete. User space writes until when before what, so it is
 * read after that. Cleared for good once over, or the clock's wrap would bring it
 * back after half a year.
 */
ALWAYS_INLINE int waiting_at(struct config *cfg, __u32 now)
{
	int waiting = READ_ONCE(cfg->waiting);

	if (!waiting || age(now, READ_ONCE(((struct config *)after(cfg, waiting))->until)) < 0)
		return waiting;
	WRITE_ONCE(cfg->waiting, NOT_WAITING);
	return NOT_WAITING;
}

/* frozen: user space copies the flow table, so nothing may be written to it. */
ALWAYS_INLINE int frozen(const struct config *cfg, __u32 now)
{
	__u32 since = READ_ONCE(cfg->frozen);
	__s32 lasted = age(now, since);

	return since && lasted >= 0 && lasted < RPSEL_FREEZE_SECONDS;
}

/* mask_client leaves of an address what counts. */
ALWAYS_INLINE void mask_client(__u64 client[2])
{
	int v6 = !is_mapped(client);

	if (affinity != AFFINITY_CLIENT)
		return;
	client[0] &= v6 ? prefix6[0] : prefix4[0];
	client[1] &= v6 ? prefix6[1] : prefix4[1];
}

/* client_of reads the client's address, as far as it counts. */
ALWAYS_INLINE int client_of(struct sk_reuseport_md *ctx, __u64 client[2])
{
	struct bpf_sock *migrating = 0;

	if (affinity == AFFINITY_CLIENT) {
		migrating = ctx->migrating_sk;
		/* Read once: the verifier takes a second load for another pointer. */
		asm volatile("" : "+r"(migrating));
	}
	if (migrating)
		peer_address(migrating, client);
	else if (!client_address(ctx, ctx->eth_protocol, client))
		return 0;
	mask_client(client);
	return 1;
}

union client_key {
	__u64 client[2];
	__u32 words[KEY_WORDS];
};

#define CLIENT_WORDS 4 /* and then the port */

/*
 * client_identity names a client by what can be read of its packets and of the
 * answers alike. The local address is left out: a server on a wildcard may
 * answer from another one, and two flows that meet so have one listener.
 */
ALWAYS_INLINE __u64 client_identity(const struct config *cfg, union client_key *key, __u32 port)
{
	if (affinity == AFFINITY_CLIENT)
		return keyed_identity(&cfg->key, key->words, CLIENT_WORDS);
	key->words[CLIENT_WORDS] = port;
	return keyed_identity(&cfg->key, key->words, KEY_WORDS);
}

/* identify names the client of a packet, by what counts as the same one. */
ALWAYS_INLINE int identify(struct sk_reuseport_md *ctx, const struct config *cfg, __u64 *identity,
			   __u32 *port)
{
	union client_key key = {};

	*port = 0;
	if (affinity != AFFINITY_CLIENT && !client_port(ctx, ctx->data, ctx->data_end, port))
		return 0;
	if (affinity == AFFINITY_CLIENT || confirm == CONFIRM_REPLY) {
		if (!client_of(ctx, key.client))
			return 0;
		*identity = client_identity(cfg, &key, *port);
		return 1;
	}
	if (affinity == AFFINITY_BYTES &&
	    !bpf_skb_load_bytes(ctx, key_offset, key.words, key_length)) {
		*identity = keyed_identity(&cfg->key, key.words, KEY_WORDS);
		return 1;
	}
	*identity = flow_identity(ctx->hash, *port);
	return 1;
}

/* pick_hash is what a client that has no listener is given one by. */
ALWAYS_INLINE __u32 pick_hash(struct sk_reuseport_md *ctx, __u64 identity)
{
	return affinity == AFFINITY_FLOW ? ctx->hash : identity >> 32;
}

ALWAYS_INLINE __u32 *pick_entry(__u32 index)
{
	__u32 pair = index >> 1;
	struct pick_pair *p = bpf_map_lookup_elem(&picks, &pair);

	return p ? &p->entries[index & 1] : 0;
}

#include "live.h"

#include "report.h"

#include "load.h"

#include "house.h"

/*
 * pick selects a listener for a flow that has none, and reports whether there
 * is one. A dead listener met in the pick table is replaced there by one drawn
 * evenly from all that live, by the number of the entry: so its other flows get
 * the same answer at once, and each entry is searched for only once.
 */
OWN_FUNCTION int pick(struct sk_reuseport_md *ctx, const struct config *cfg, __u32 hash,
		      int waiting, struct choice *c)
{
	int rank;

	if (!cfg || !c)
		return 0;

	__u64 table = READ_ONCE(cfg->table);
	__u32 index = scale(hash, table_size(table));
	__u32 *entry = pick_entry(table_first(table) + index);

	if (!entry)
		return 0;

	__u32 was = READ_ONCE(*entry);
	__u32 dead = picked(was, waiting);

	if (choose_any(ctx, dead, c))
		return 1;
	mourn(ctx, dead);
	rank = choose_heir(ctx, entry_hash(index), waiting, c);
	if (rank >= RANK_DRAINING)
		return rank == RANK_DRAINING;
	if (__sync_val_compare_and_swap(entry, was, mended(was, dead, c->slot)) != was) {
		/* Another CPU was first: the entry's flows stay together with its choice. */
		struct choice theirs = {};

		if (choose_any(ctx, picked(READ_ONCE(*entry), waiting), &theirs))
			*c = theirs;
		else if (!choose(ctx, c->slot, c->incarnation))
			return 0;
	}
	return 1;
}

/* unsettled leaves out that the group settles, which is no matter for what is known. */
ALWAYS_INLINE int unsettled(int waiting)
{
	return waiting == SETTLING ? NOT_WAITING : waiting;
}

#include "policy.h"

#include "hint.h"

ALWAYS_INLINE int fallback(void)
{
	COUNT(fallback);
	return SK_PASS;
}

/* untracked serves a packet by the pick table alone. */
ALWAYS_INLINE int untracked(struct sk_reuseport_md *ctx, const struct config *cfg, __u32 hash,
			    int waiting)
{
	struct choice c = {};

	if (!pick(ctx, cfg, hash, waiting, &c))
		return fallback();
	COUNT_SLOT(ctx, c.slot, untracked);
	return SK_PASS;
}

/* scatter serves a packet of a group without affinity: by the policy, each anew. */
ALWAYS_INLINE int scatter(struct sk_reuseport_md *ctx, const struct config *cfg, __u32 hash,
			  int waiting)
{
	struct choice c = {};

	if (!pick_new(ctx, cfg, hash, waiting, &c))
		return fallback();
	COUNT_SLOT(ctx, c.slot, untracked);
	return SK_PASS;
}

/* describe writes what people will want to know, into the row of the claimed entry. */
ALWAYS_INLINE void describe(__u32 row, const __u64 client[2], __u32 port, __u32 now, __u32 hint)
{
	__u64 since = (now - hint) & SECOND_MASK;
	struct detail *d = bpf_map_lookup_elem(&details, &row);

	if (!d)
		return;
	d->client[0] = client[0];
	d->client[1] = client[1];
	d->history = (__u64)port << HISTORY_PORT_SHIFT | since << HISTORY_SINCE_SHIFT | now;
}

/* describe_move notes since when the flow has its present listener. */
ALWAYS_INLINE void describe_move(__u32 row, __u32 now)
{
	struct detail *d = bpf_map_lookup_elem(&details, &row);

	if (!d)
		return;
	__u64 h = READ_ONCE(d->history);
	__u64 since = (__u64)SECOND_MASK << HISTORY_SINCE_SHIFT;

	/* Never before the next second, or nobody could tell that it moved (enum hint). */
	if (age(now, h & SECOND_MASK) < 1)
		now = (h + 1) & SECOND_MASK;
	exchange(&d->history, h, (h & ~since) | (__u64)now << HISTORY_SINCE_SHIFT);
}

/*
 * rehome gives a flow whose listener is gone to a live one. Of several CPUs one
 * wins the exchange; the others take the listener it chose. Who lost to a mere
 * refresh tries again.
 */
ALWAYS_INLINE int rehome(struct sk_reuseport_md *ctx, const struct config *cfg, struct flow *f,
			 __u32 row, __u64 identity, __u64 word, __u32 now, int waiting)
{
	struct choice c = {};

	mourn(ctx, word_slot(word));
	if (!pick_new(ctx, cfg, pick_hash(ctx, identity), unsettled(waiting), &c))
		return fallback();
	for (__u32 i = 0; i < HOLD_TRIES; i++) {
		__u64 mine = moved(word, c.slot, c.incarnation, now), theirs;

		if (exchange(&f->word, word, mine)) {
			tally(cfg, word, row / RPSEL_BUCKET, -1);
			tally(cfg, mine, row / RPSEL_BUCKET, 1);
			describe_move(row, now);
			report(now, REPORT_REHOME, row, mine, word);
			COUNT_SLOT(ctx, c.slot, rehomed);
			return SK_PASS;
		}
		if (!entry_holds(f, identity, &theirs))
			break;
		if (same_listener(theirs, word)) {
			word = theirs;
			continue;
		}
		if (choose(ctx, word_slot(theirs), word_incarnation(theirs))) {
			COUNT_SLOT(ctx, word_slot(theirs), hit);
			return SK_PASS;
		}
		break;
	}
	if (!choose(ctx, c.slot, c.incarnation))
		return fallback();
	COUNT_SLOT(ctx, c.slot, untracked);
	return SK_PASS;
}

/* row_of is the row of details of an entry, by its place in the flow's two buckets. */
ALWAYS_INLINE __u32 row_of(__u64 identity, __u32 place)
{
	__u32 bucket = place < RPSEL_BUCKET ? first_bucket(identity, buckets)
					    : second_bucket(identity, buckets);

	return bucket * RPSEL_BUCKET + (place & (RPSEL_BUCKET - 1));
}

/*
 * touch_row has the CPU fetch a row of details, while it has other things to do: the
 * exchange after it is written would wait for that.
 */
ALWAYS_INLINE void touch_row(__u32 row)
{
	struct detail *d = bpf_map_lookup_elem(&details, &row);

	if (d)
		(void)READ_ONCE(d->history);
}

/*
 * admit gives a flow that is in neither bucket a listener and an entry: at the place,
 * if that is still empty.
 */
ALWAYS_INLINE int admit(struct sk_reuseport_md *ctx, const struct config *cfg, struct bucket *first,
			struct bucket *second, __u32 place, __u64 identity, __u32 port, __u32 now,
			int waiting)
{
	struct choice c = {};
	__u64 client[2];
	int hint = HINT_NONE;

	touch_row(row_of(identity, place));

	if (!client_of(ctx, client)) {
		COUNT(parse_error);
		return untracked(ctx, cfg, pick_hash(ctx, identity), waiting);
	}
	if (first_packets == FIRST_OPENVPN)
		hint = take_hint(ctx, cfg, waiting, now, &c);
	if (hint != HINT_FLOAT) {
		__u32 hash = pick_hash(ctx, identity);
		int until = hint ? unsettled(waiting) : waiting;

		if (!pick_at_once(ctx, cfg, hash, until, &c) &&
		    !pick_new(ctx, cfg, hash, until, &c))
			return fallback();
	}

	struct insertion in = {
		.identity = identity,
		.now = now,
		.idle = cfg->idle,
		.idle_new = cfg->idle_new,
		.slot = c.slot,
		.incarnation = c.incarnation,
		.place = place,
		.tag = flow_tag(identity),
	};
	int result = insert_claim(first, second, &in);
	__u32 row = row_of(identity, in.place), bucket = row / RPSEL_BUCKET;

	if (in.over) {
		tally(cfg, in.over, bucket, -1);
		report(now, in.evicted ? REPORT_EVICT : REPORT_EXPIRE, row, in.over, 0);
	}
	if (result == INSERT_CLAIMED) {
		describe(row, client, port, now, hint);
		result = insert_commit(first, second, &in);
	}
	if (result == INSERT_CLAIMED) {
		if (in.evicted) {
			COUNT(evicted);
			left_untracked(now);
		}
		tally(cfg, make_word(c.slot, c.incarnation, FLOW_NEW, now, 0), bucket, 1);
		report(now, REPORT_NEW, row,
		       make_word(c.slot, c.incarnation, FLOW_NEW, now, in.tag), 0);
		COUNT_SLOT(ctx, c.slot, new);
		return SK_PASS;
	}
	if (result == INSERT_FOLLOW && choose(ctx, in.slot, in.incarnation)) {
		COUNT_SLOT(ctx, in.slot, hit);
		return SK_PASS;
	}
	if (result == INSERT_FULL) {
		int known = by_table(cfg);

		COUNT(table_full);
		left_untracked(now);
		if (!known)
			return untracked(ctx, cfg, pick_hash(ctx, identity), waiting);
	}
	if (hint)
		return untracked(ctx, cfg, pick_hash(ctx, identity), waiting);
	/* A follow that failed may have left another listener selected. */
	if (result == INSERT_FOLLOW && !choose(ctx, c.slot, c.incarnation))
		return fallback();
	COUNT_SLOT(ctx, c.slot, untracked);
	return SK_PASS;
}

SEC("sk_reuseport/migrate")
int rpsel_select(struct sk_reuseport_md *ctx)
{
	__u32 zero = 0, now, port, b, place, row, kind = affinity;
	struct config *cfg = bpf_map_lookup_elem(&config, &zero);
	struct bucket *first, *second;
	__u64 identity, word;
	struct flow *f;
	int waiting;

	if (!cfg)
		return SK_PASS;

	now = clock();
	waiting = waiting_at(cfg, now);
	if (tcp && kind != AFFINITY_CLIENT && ctx->migrating_sk) {
		struct choice c = {};

		/* A connection that waits in a closing TCP listener: it goes as a new one would. */
		if (!pick_new(ctx, cfg, ctx->hash, unsettled(waiting), &c))
			return fallback();
		COUNT_SLOT(ctx, c.slot, migrated);
		credit_migrated(ctx, c.slot);
		return SK_PASS;
	}

	if (kind == AFFINITY_NONE) {
		/* A connection's SYN may come twice; each datagram stands for itself. */
		__u32 hash = ctx->ip_protocol == IPPROTO_UDP ? bpf_get_prandom_u32() : ctx->hash;

		keep_house(now);
		return scatter(ctx, cfg, hash, unsettled(waiting));
	}

	/* Only what goes by the kernel's hash can be left where that had it. */
	if (kind != AFFINITY_FLOW)
		waiting = unsettled(waiting);
	if (!identify(ctx, cfg, &identity, &port)) {
		COUNT(parse_error);
		return untracked(ctx, cfg, ctx->hash, waiting);
	}

	b = first_bucket(identity, buckets);
	first = bpf_map_lookup_elem(&flows, &b);
	if (!first)
		return fallback();
	f = first->flows;
	row = b * RPSEL_BUCKET;
	place = find_in(first, identity, &word);
	b = second_bucket(identity, buckets);
	if (place == RPSEL_BUCKET) {
		second = bpf_map_lookup_elem(&flows, &b);
		if (!second)
			return fallback();
		f = second->flows;
		row = b * RPSEL_BUCKET;
		place = find_in(second, identity, &word);
		if (place == RPSEL_BUCKET)
			goto unknown;
	}
	f += place & (RPSEL_BUCKET - 1);
	row += place;

	if (age(now, word_second(word)) > 0) {
		keep_house(now);
		if (expired(word, now, cfg->idle, cfg->idle_new))
			goto forgotten;
		if (!frozen(cfg, now)) {
			__u64 fresh =
				confirm == CONFIRM_REPLY ? heard(word, now) : refreshed(word, now);

			/* Losing this exchange is no loss: somebody else wrote news. */
			if (fresh != word && exchange(&f->word, word, fresh)) {
				if (word_state(word) != word_state(fresh))
					report(now, REPORT_ESTABLISHED, row, fresh, 0);
				word = fresh;
				if (first_packets == FIRST_OPENVPN)
					note_peer(ctx, cfg, word, now);
			}
		}
	}
	if (choose(ctx, word_slot(word), word_incarnation(word))) {
		COUNT_SLOT_OF(kind, ctx, word_slot(word), hit);
		return SK_PASS;
	}
	if (frozen(cfg, now)) {
		left_untracked(now);
		return untracked(ctx, cfg, pick_hash(ctx, identity), waiting);
	}
	return rehome(ctx, cfg, f, row, identity, word, now, waiting);

forgotten:
	/* Silent for too long: it may be taken over, so it is a new flow now. */
	second = bpf_map_lookup_elem(&flows, &b);
	if (!second)
		return fallback();
	place = NOWHERE; /* but its own */
	goto begin;
unknown:
	place = empty_place(first, second);
begin:
	keep_house(now);
	if (frozen(cfg, now)) {
		left_untracked(now);
		return untracked(ctx, cfg, pick_hash(ctx, identity), waiting);
	}
	return admit(ctx, cfg, first, second, place, identity, port, now, waiting);
}

#include "reply.h"

/* rpsel_clock tells user space, by BPF_PROG_TEST_RUN, which second it is. */
SEC("socket")
int rpsel_clock(struct __sk_buff *skb)
{
	(void)skb;
	return clock();
}

char _license[] SEC("license") = "Dual MIT/GPL";
