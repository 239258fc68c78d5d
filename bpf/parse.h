/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What is read of a packet. The context may be of any program type that has
 * bpf_skb_load_bytes, so that the harness can run it.
 */
#ifndef RPSEL_PARSE_H
#define RPSEL_PARSE_H

#include <linux/if_ether.h>

#include "flow.h"
#include <bpf/bpf_endian.h>

#define AF_INET6 10

/*
 * client_port is the source port: the first two bytes of both UDP and TCP. Of a
 * packet in fragments even those may lie outside the linear part.
 */
ALWAYS_INLINE int client_port(void *ctx, void *data, void *data_end, __u32 *port)
{
	__be16 *source = data;
	__be16 copy;

	if ((void *)(source + 1) <= data_end) {
		*port = bpf_ntohs(*source);
		return 1;
	}
	if (bpf_skb_load_bytes(ctx, 0, &copy, sizeof(copy)))
		return 0;
	*port = bpf_ntohs(copy);
	return 1;
}

/*
 * client_address reads the source address relative to the network header, by
 * the packet's own version: a dual-stack socket gets IPv4 packets too. The
 * address sits in the fixed part of either header, whatever extensions follow.
 */
ALWAYS_INLINE int client_address(void *ctx, __u32 eth_protocol, __u64 client[2])
{
	if (eth_protocol == bpf_htons(ETH_P_IPV6))
		return !bpf_skb_load_bytes_relative(ctx, 8, client, 16, BPF_HDR_START_NET);
	client[0] = 0;
	client[1] = bpf_cpu_to_be64(0xffff00000000ull);
	return !bpf_skb_load_bytes_relative(ctx, 12, (void *)client + 12, 4, BPF_HDR_START_NET);
}

/* is_mapped: the address is an IPv4 one. */
ALWAYS_INLINE int is_mapped(const __u64 client[2])
{
	return !client[0] &&
	       (client[1] & bpf_cpu_to_be64(~0xffffffffull)) == bpf_cpu_to_be64(0xffff00000000ull);
}

/*
 * peer_address is client_address for a connection that migrates, of which there
 * may be no packet (inet_csk_listen_stop and reqsk_timer_handler in
 * net/ipv4/inet_connection_sock.c). That of an IPv4 client of a dual-stack listener
 * is in its IPv6 form already (sk_daddr_set).
 */
ALWAYS_INLINE void peer_address(struct bpf_sock *sk, __u64 client[2])
{
	union {
		__u32 words[4];
		__u64 client[2];
	} peer = {.words = {0, 0, bpf_htonl(0xffff)}};

	if (sk->family == AF_INET6) {
		peer.words[0] = sk->dst_ip6[0];
		peer.words[1] = sk->dst_ip6[1];
		peer.words[2] = sk->dst_ip6[2];
		peer.words[3] = sk->dst_ip6[3];
	} else {
		peer.words[3] = sk->dst_ip4;
	}
	client[0] = peer.client[0];
	client[1] = peer.client[1];
}

#endif
