/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What a packet of an unknown flow says itself about where it belongs, for a
 * protocol that is known: OpenVPN (src/openvpn/ssl_pkt.h names the opcodes). Part
 * of select.c, of whose maps it speaks.
 *
 * A session's first packet tells that the flow is new, so that it need not be left
 * where the kernel's hash has it while the group settles. A data packet carries the
 * number that its server gave the client: if one recent flow, and no other, came
 * from the same address with the same number, it has another port now (NAT), and
 * goes where it was.
 *
 * A hint holds only for what gets an entry. A flow without one goes by the pick
 * table at its next packet, which has no hint, or not the same.
 */
#ifndef RPSEL_HINT_H
#define RPSEL_HINT_H

#include "policy.h"

#define UDP_HEADER 8

/* The first byte of an OpenVPN packet: opcode << 3 | key id. */
#define HARD_RESET_CLIENT_V2 7
#define HARD_RESET_CLIENT_V3 10
#define DATA_V2 9	 /* and 24 bits of peer-id */
#define NO_PEER 0xffffff /* a client that was given none */

/* The state in a word of peers: whose recent flows have that address and number. */
#define PEER_ONE 1  /* those of the word's listener alone */
#define PEER_MANY 2 /* another listener's too, until the word's second is older than idle */

/* head_of is the first four bytes of the payload; 0 if there are none. */
ALWAYS_INLINE __u32 head_of(struct sk_reuseport_md *ctx)
{
	__be32 head;

	return bpf_skb_load_bytes(ctx, UDP_HEADER, &head, sizeof(head)) ? 0 : bpf_ntohl(head);
}

ALWAYS_INLINE __u32 opcode(__u32 head)
{
	return head >> 27;
}

/* peer_of names the client of a data packet, or reports that it has no name. */
ALWAYS_INLINE int peer_of(struct sk_reuseport_md *ctx, __u32 head, struct peer *p)
{
	p->id = head & 0xffffff;
	return opcode(head) == DATA_V2 && p->id != NO_PEER &&
	       client_address(ctx, ctx->eth_protocol, p->client);
}

/*
 * peer_tag ties a word to its key. The kernel gives an element that it takes from
 * one key to the next at once, whoever still looks at it.
 */
ALWAYS_INLINE __u32 peer_tag(const struct peer *p)
{
	return flow_tag(flow_identity(p->client[0] ^ p->client[1] ^ p->client[1] >> 32, p->id));
}

/* departed: the listener in a word is gone, as far as can be told without asking for it. */
ALWAYS_INLINE int departed(__u64 word)
{
	__u32 slot = word_slot(word);
	struct slot *s = bpf_map_lookup_elem(&slots, &slot);

	return !s || !same_incarnation(READ_ONCE(s->incarnation), word_incarnation(word)) ||
	       known_dead(slot);
}

/*
 * note_peer keeps up whose client a data packet of an established flow comes from.
 * Unconfirmed flows leave no trace here: anybody can begin those, from any address.
 * A number that two listeners' clients share is marked by each when it finds the
 * other's word, so that the mark lasts as long as both send.
 */
OWN_FUNCTION int note_peer(struct sk_reuseport_md *ctx, const struct config *cfg, __u64 flow,
			   __u32 now)
{
	struct peer p = {};
	__u64 *word, was, mine;

	if (!cfg || word_state(flow) != FLOW_ESTABLISHED || !peer_of(ctx, head_of(ctx), &p))
		return 0;
	mine = make_word(word_slot(flow), word_incarnation(flow), PEER_ONE, now, peer_tag(&p));
	word = bpf_map_lookup_elem(&peers, &p);
	if (!word) {
		bpf_map_update_elem(&peers, &p, &mine, BPF_NOEXIST);
		return 0;
	}
	was = READ_ONCE(*word);
	if (word_tag(was) != word_tag(mine))
		return 0;
	if (recent(now, word_second(was), cfg->idle)) {
		int one = word_state(was) == PEER_ONE;

		if (same_listener(was, mine) && !one)
			return 0;
		/* After a rehome the other word may be the flow's own. */
		if (!same_listener(was, mine) && !(one && departed(was)))
			mine = make_word(word_slot(flow), word_incarnation(flow), PEER_MANY, now,
					 word_tag(mine));
	}
	exchange(word, was, mine);
	return 0;
}

/* follow_peer selects the listener that a data packet's client had at another port. */
OWN_FUNCTION int follow_peer(struct sk_reuseport_md *ctx, const struct config *cfg, __u32 head,
			     __u32 now, struct choice *c)
{
	struct peer p = {};
	__u64 *word, w;

	if (!cfg || !c || !peer_of(ctx, head, &p))
		return 0;
	word = bpf_map_lookup_elem(&peers, &p);
	if (!word)
		return 0;
	w = READ_ONCE(*word);
	if (word_tag(w) != peer_tag(&p) || word_state(w) != PEER_ONE ||
	    !recent(now, word_second(w), cfg->idle))
		return 0;
	c->slot = word_slot(w);
	c->incarnation = word_incarnation(w);
	if (choose(ctx, c->slot, c->incarnation))
		return 1;
	mourn(ctx, c->slot); /* or note_peer would think that there are two */
	return 0;
}

/*
 * take_hint says which hint the packet of an unknown flow gives, and selects the
 * listener if that is another flow's. What is unknown may yet be old: where there was no
 * room for it, and then no hint counts; or, while the group settles, since it has
 * not been seen before, and then only the first packet of a session is beyond doubt.
 */
OWN_FUNCTION int take_hint(struct sk_reuseport_md *ctx, const struct config *cfg, int waiting,
			   __u32 now, struct choice *c)
{
	__u32 head;

	if (!cfg || by_table(cfg))
		return HINT_NONE;
	head = head_of(ctx);
	if (waiting == SETTLING)
		return opcode(head) == HARD_RESET_CLIENT_V2 || opcode(head) == HARD_RESET_CLIENT_V3
			       ? HINT_FIRST
			       : HINT_NONE;
	return follow_peer(ctx, cfg, head, now, c) ? HINT_FLOAT : HINT_NONE;
}

#endif
