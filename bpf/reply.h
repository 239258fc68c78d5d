/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * rpsel_reply confirms the flows that the server answers. Part of select.c, of
 * whose maps it speaks.
 *
 * It runs for every packet that the sockets of a listener's cgroup send, and
 * lets every one pass. It creates nothing: it makes a new flow an established
 * one, by the exchange that everybody uses, and leaves all others alone. So it
 * does not matter if it runs twice, for two cgroups of which one holds the
 * other.
 */
#ifndef RPSEL_REPLY_H
#define RPSEL_REPLY_H

#define PASS 1
#define AF_INET 2
#define UDP_CONNECTED 1 /* bpf_sock.state, of include/net/tcp_states.h */

/* What the group's sockets are bound to, fixed when the program is loaded. */
const volatile __u32 server_port;
const volatile __u32 server_family;
const volatile __u32 server_address[4]; /* as in bpf_sock: src_ip4, or src_ip6 */
const volatile __u32 server_device;
const volatile __u64 server_netns; /* its cookie; 0: this kernel does not tell */

ALWAYS_INLINE int bound_as_server(struct bpf_sock *sk)
{
	if (server_family == AF_INET)
		return sk->src_ip4 == server_address[0];
	return sk->src_ip6[0] == server_address[0] && sk->src_ip6[1] == server_address[1] &&
	       sk->src_ip6[2] == server_address[2] && sk->src_ip6[3] == server_address[3];
}

/*
 * sent_by_server tells by the sending socket alone, before the packet is looked
 * at: what else is in the cgroup sends at the price of one comparison. Another
 * group on this port must not confirm our flows. connect(2) gives a socket on a
 * wildcard the address it sends from, so that one may be anybody's on this port.
 */
ALWAYS_INLINE int sent_by_server(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	__u32 wildcard =
		!(server_address[0] | server_address[1] | server_address[2] | server_address[3]);

	if (!sk || sk->src_port != server_port)
		return 0;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->protocol != IPPROTO_UDP || sk->family != server_family ||
	    sk->bound_dev_if != server_device)
		return 0;
	if (!bound_as_server(sk) && !(wildcard && sk->state == UDP_CONNECTED))
		return 0;
	return !server_netns || bpf_get_netns_cookie(skb) == server_netns;
}

#define V4_PROTOCOL 9
#define V4_DESTINATION 16
#define V6_NEXT 6
#define V6_DESTINATION 24
#define V6_SIZE 40
#define V6_EXTENSIONS 4 /* that are passed over, at most */
#define UDP_DESTINATION 2

/*
 * skip_extensions finds the transport header of an IPv6 packet. There is no
 * fragment yet: the hook is before that.
 */
ALWAYS_INLINE __u32 skip_extensions(struct __sk_buff *skb, __u8 next)
{
	__u32 at = V6_SIZE;

	for (__u32 i = 0; i <= V6_EXTENSIONS; i++) {
		__u8 extension[2]; /* the next header, and eights of bytes after the first */

		if (next == IPPROTO_UDP)
			return at;
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS)
			return 0;
		if (bpf_skb_load_bytes(skb, at, extension, sizeof(extension)))
			return 0;
		next = extension[0];
		at += (extension[1] + 1) * 8;
	}
	return 0;
}

/*
 * addressee reads whom a datagram is for, by the packet's own version: a
 * dual-stack socket answers IPv4 clients too. The data begin with the network
 * header; of a large datagram they are in fragments.
 */
ALWAYS_INLINE int addressee(struct __sk_buff *skb, __u64 client[2], __u32 *port)
{
	__u8 head[V4_DESTINATION + 4];
	__be16 to;
	__u32 at;

	if (bpf_skb_load_bytes(skb, 0, head, sizeof(head)))
		return 0;
	if (head[0] >> 4 == 4) {
		if (head[V4_PROTOCOL] != IPPROTO_UDP)
			return 0;
		at = (head[0] & 15) * 4;
		client[0] = 0;
		client[1] = bpf_cpu_to_be64(0xffff00000000ull);
		__builtin_memcpy((void *)client + 12, head + V4_DESTINATION, 4);
	} else {
		at = skip_extensions(skb, head[V6_NEXT]);
		if (!at || bpf_skb_load_bytes(skb, V6_DESTINATION, client, 16))
			return 0;
	}
	mask_client(client);
	if (bpf_skb_load_bytes(skb, at + UDP_DESTINATION, &to, sizeof(to)))
		return 0;
	*port = bpf_ntohs(to);
	return 1;
}

/* establish confirms the flow of an entry. A client's packet may refresh it meanwhile. */
ALWAYS_INLINE void establish(const struct config *cfg, struct flow *f, __u32 row, __u64 identity,
			     __u32 now)
{
	__u64 word;

	for (__u32 i = 0; i < HOLD_TRIES; i++) {
		if (!entry_holds(f, identity, &word) || word_state(word) != FLOW_NEW ||
		    expired(word, now, cfg->idle, cfg->idle_new))
			return;
		if (exchange(&f->word, word, answered(word))) {
			report(now, REPORT_ESTABLISHED, row, answered(word), 0);
			return;
		}
	}
}

SEC("cgroup_skb/egress")
int rpsel_reply(struct __sk_buff *skb)
{
	union client_key key = {};
	__u32 zero = 0, port, b, place, now;
	struct bucket *bucket;
	struct config *cfg;
	__u64 identity, word;

	if (confirm != CONFIRM_REPLY || !sent_by_server(skb) || !addressee(skb, key.client, &port))
		return PASS;
	cfg = bpf_map_lookup_elem(&config, &zero);
	if (!cfg)
		return PASS;
	identity = client_identity(cfg, &key, port);
	b = first_bucket(identity, buckets);
	bucket = bpf_map_lookup_elem(&flows, &b);
	if (!bucket)
		return PASS;
	place = find_in(bucket, identity, &word);
	if (place == RPSEL_BUCKET) {
		b = second_bucket(identity, buckets);
		bucket = bpf_map_lookup_elem(&flows, &b);
		if (!bucket)
			return PASS;
		place = find_in(bucket, identity, &word);
	}
	/* Most replies are to established flows: for them this is all. */
	if (place == RPSEL_BUCKET || word_state(word) != FLOW_NEW)
		return PASS;
	now = clock();
	if (!frozen(cfg, now))
		establish(cfg, &bucket->flows[place & (RPSEL_BUCKET - 1)], b * RPSEL_BUCKET + place,
			  identity, now);
	return PASS;
}

#endif
