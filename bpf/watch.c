// SPDX-License-Identifier: GPL-2.0-only OR MIT

//go:build ignore

/*
 * What the agent attaches to a cgroup, usually the root of the hierarchy: it is
 * told of each socket on one of its ports as soon as that can be registered, a
 * UDP socket when it is bound, a TCP socket when it listens. The kernel has put
 * it into its reuseport group by then (net/ipv4/af_inet.c __inet_bind,
 * __inet_listen_sk). Nothing is changed and nothing refused.
 *
 * The cgroup that counts is the one of the process that called socket(), at that
 * time (kernel/cgroup/cgroup.c cgroup_sk_alloc).
 */
#include "event.h"

/* The protocol in the upper half, the port in the lower one. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * 65536);
	__type(key, __u32);
	__type(value, __u8);
} ports SEC(".maps");

/* Reports that found the ring full. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} missed SEC(".maps");

static __always_inline void *watched(__u8 protocol, __u16 port)
{
	__u32 key = (__u32)protocol << 16 | port;

	return bpf_map_lookup_elem(&ports, &key);
}

static __always_inline void tell(struct event *e, const struct binder *b)
{
	__u32 zero = 0;
	__u64 *count;

	if (!report(e, b))
		return;
	count = bpf_map_lookup_elem(&missed, &zero);
	if (count)
		(*count)++;
}

static __always_inline void bound(struct bpf_sock *sk, struct event *e)
{
	struct binder b = {};

	if (!watched(e->protocol, e->port))
		return;
	b.netns_cookie = bpf_get_netns_cookie(sk);
	binder_of_now(&b);
	if (e->protocol == IPPROTO_UDP) {
		e->cookie = bpf_get_socket_cookie(sk);
		tell(e, &b);
	} else {
		keep_binder(sk, &b); /* for when it listens */
	}
}

SEC("cgroup/post_bind4")
int rpsel_watch4(struct bpf_sock *sk)
{
	struct event e = {};

	describe_bound4(&e, sk);
	bound(sk, &e);
	return 1;
}

SEC("cgroup/post_bind6")
int rpsel_watch6(struct bpf_sock *sk)
{
	struct event e = {};

	describe_bound6(&e, sk);
	bound(sk, &e);
	return 1;
}

/* It leaves ctx->reply alone, and so every other operation as without a
 * program. Who bound the socket before it was watched is not known.
 */
SEC("sockops")
int rpsel_watch_listen(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk; /* each load may be null to the verifier */
	struct binder unknown = {}, *b;
	struct event e = {};

	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB || !sk || !watched(IPPROTO_TCP, ctx->local_port))
		return 1;
	b = bpf_sk_storage_get(&binders, sk, NULL, 0);
	describe_listener(&e, ctx);
	tell(&e, b ? b : &unknown);
	return 1;
}

char _license[] SEC("license") = "Dual MIT/GPL";
