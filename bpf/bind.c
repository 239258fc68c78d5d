// SPDX-License-Identifier: GPL-2.0-only OR MIT

//go:build ignore

/*
 * What "rpsel run" attaches to the cgroup of its command.
 *
 * rpsel_bind4 and rpsel_bind6 set socket options on the sockets that bind to a
 * matching protocol, address and port. They run before the kernel looks for a
 * conflict (net/ipv4/af_inet.c inet_bind_sk, net/ipv6/af_inet6.c
 * inet6_bind_sk), so what they set counts. A socket that does not match is left
 * as it is; so is every bind to port 0: the kernel takes the port of a UDP
 * socket with SO_REUSEPORT for free when it looks for one for a socket of the
 * same user with SO_REUSEPORT (net/ipv4/udp.c udp_lib_lport_inuse).
 * An option that cannot be set refuses the bind with EPERM: a server on the
 * wrong device or in no group must not look as if all were well.
 *
 * rpsel_post_bind4, rpsel_post_bind6 (UDP) and rpsel_listen (TCP) report those
 * sockets once they are in the tables of the kernel, and can be registered.
 * Reports do not wait: when the ring is full, the next "rpsel attach" registers
 * what was missed.
 */
#include <stdbool.h>

#include "event.h"

/* As in asm-generic/socket.h. */
#define SOL_SOCKET 1
#define SO_REUSEADDR 2
#define SO_REUSEPORT 15
#define SO_BINDTODEVICE 25

#define LEAVE -1
#define IFNAMSIZ 16

/* Which binds match. An IPv4 address is in its IPv6 form, ::ffff:a.b.c.d. */
const volatile __u16 match_port;    /* 0: every port but 0 */
const volatile __u8 match_protocol; /* 0: UDP and TCP */
const volatile bool match_addr;
const volatile __u32 addr_to_match[4];

/* What is set on them. */
const volatile int reuseport = LEAVE; /* 0, 1 or LEAVE */
const volatile int reuseaddr = LEAVE;
const volatile char device[IFNAMSIZ]; /* "": leave */

const volatile bool trace; /* report each bind as well */

/* Sets the options one after the other, until one fails. */
static __always_inline bool set_options(struct bpf_sock_addr *ctx, struct event *e)
{
	int value;

	if (device[0]) {
		e->option = SO_BINDTODEVICE;
		e->error = bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, (void *)device,
					  sizeof(device));
		if (e->error)
			return false;
	}
	if (reuseaddr != LEAVE) {
		e->option = SO_REUSEADDR;
		value = reuseaddr;
		e->error = bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEADDR, &value, sizeof(value));
		if (e->error)
			return false;
	}
	if (reuseport != LEAVE) {
		e->option = SO_REUSEPORT;
		value = reuseport;
		e->error = bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEPORT, &value, sizeof(value));
		if (e->error)
			return false;
	}
	return true;
}

/* Handles a bind to the address in e and gives the program's return value: 1 to
 * go on, 0 to refuse.
 */
static __always_inline int force(struct bpf_sock_addr *ctx, struct event *e)
{
	struct binder b = {};
	bool ok;

	e->protocol = ctx->protocol;
	e->port = bpf_ntohs(ctx->user_port);
	if (e->protocol != IPPROTO_UDP && e->protocol != IPPROTO_TCP)
		return 1;
	if (match_protocol && e->protocol != match_protocol)
		return 1;
	if (!e->port || (match_port && e->port != match_port))
		return 1;
	if (match_addr && (e->addr[0] != addr_to_match[0] || e->addr[1] != addr_to_match[1] ||
			   e->addr[2] != addr_to_match[2] || e->addr[3] != addr_to_match[3]))
		return 1;

	ok = set_options(ctx, e);

	b.netns_cookie = bpf_get_netns_cookie(ctx);
	binder_of_now(&b);
	if (trace) {
		e->binding = 1;
		e->family = ctx->family;
		e->cookie = bpf_get_socket_cookie(ctx);
		report(e, &b);
	}
	if (!ok)
		return 0;
	if (ctx->sk)
		keep_binder(ctx->sk, &b);
	return 1;
}

SEC("cgroup/bind4")
int rpsel_bind4(struct bpf_sock_addr *ctx)
{
	struct event e = {};

	set_ip4(&e, ctx->user_ip4);
	return force(ctx, &e);
}

SEC("cgroup/bind6")
int rpsel_bind6(struct bpf_sock_addr *ctx)
{
	struct event e = {};

	e.addr[0] = ctx->user_ip6[0];
	e.addr[1] = ctx->user_ip6[1];
	e.addr[2] = ctx->user_ip6[2];
	e.addr[3] = ctx->user_ip6[3];
	return force(ctx, &e);
}

/* Reports a UDP socket that a bind program has matched. */
static __always_inline void bound(struct bpf_sock *sk, struct event *e)
{
	struct binder *b;

	if (e->protocol != IPPROTO_UDP)
		return;
	b = bpf_sk_storage_get(&binders, sk, NULL, 0);
	if (!b)
		return;
	e->cookie = bpf_get_socket_cookie(sk);
	report(e, b);
}

SEC("cgroup/post_bind4")
int rpsel_post_bind4(struct bpf_sock *sk)
{
	struct event e = {};

	describe_bound4(&e, sk);
	bound(sk, &e);
	return 1;
}

SEC("cgroup/post_bind6")
int rpsel_post_bind6(struct bpf_sock *sk)
{
	struct event e = {};

	describe_bound6(&e, sk);
	bound(sk, &e);
	return 1;
}

/* Reports a TCP socket that a bind program has matched, once it listens. It
 * leaves ctx->reply alone, and so every other operation as without a program.
 */
SEC("sockops")
int rpsel_listen(struct bpf_sock_ops *ctx)
{
	struct event e = {};
	struct binder *b;

	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB || !ctx->sk)
		return 1;
	b = bpf_sk_storage_get(&binders, ctx->sk, NULL, 0);
	if (!b)
		return 1;
	describe_listener(&e, ctx);
	report(&e, b);
	return 1;
}

char _license[] SEC("license") = "Dual MIT/GPL";
