/* SPDX-License-Identifier: GPL-2.0-only OR MIT */

/*
 * What bind.c and watch.c report about a socket, through a ring buffer. Reports
 * do not wait: when the ring is full they are dropped.
 */
#ifndef RPSEL_EVENT_H
#define RPSEL_EVENT_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17

#define RING_SIZE (256 * 1024) /* some 3600 reports */

struct event {
	__u64 cookie;
	__u64 netns_cookie; /* 0: not known */
	__u32 pid;	    /* who called bind(), in the initial pid namespace; 0: not known */
	__s32 error;	    /* of a bind: 0, or why the last option could not be set */
	__u32 addr[4];	    /* network order, IPv4 as ::ffff:a.b.c.d */
	__u16 option;	    /* of a bind: that option, SO_... */
	__u16 port;
	__u16 family;
	__u8 protocol;
	__u8 binding; /* 1: about to bind; 0: bound (UDP) or listening (TCP) */
	__u8 command[16];
};

_Static_assert(sizeof(struct event) == 64, "struct event has no padding");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_SIZE);
} events SEC(".maps");

/* On a socket: who bound it, and where. TCP's hook cannot tell before 6.10 (the
 * namespace: 5.15).
 */
struct binder {
	__u64 netns_cookie;
	__u32 pid;
	__u8 command[16];
	__u8 pad[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct binder);
} binders SEC(".maps");

/* The calling process. */
static __always_inline void binder_of_now(struct binder *b)
{
	b->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(b->command, sizeof(b->command));
}

static __always_inline void keep_binder(struct bpf_sock *sk, struct binder *b)
{
	struct binder *stored;

	stored = bpf_sk_storage_get(&binders, sk, b, BPF_SK_STORAGE_GET_F_CREATE);
	if (stored)
		*stored = *b; /* a socket may bind more than once, if the first fails */
}

static __noinline long report(struct event *e, const struct binder *b)
{
	e->netns_cookie = b->netns_cookie;
	e->pid = b->pid;
	__builtin_memcpy(e->command, b->command, sizeof(e->command));
	return bpf_ringbuf_output(&events, e, sizeof(*e), 0);
}

static __always_inline void set_ip4(struct event *e, __u32 ip4)
{
	e->addr[2] = bpf_htonl(0xffff);
	e->addr[3] = ip4;
}

/* What a bound socket's hook knows of it. */
static __always_inline void describe_bound4(struct event *e, struct bpf_sock *sk)
{
	set_ip4(e, sk->src_ip4);
	e->protocol = sk->protocol;
	e->family = sk->family;
	e->port = sk->src_port;
}

static __always_inline void describe_bound6(struct event *e, struct bpf_sock *sk)
{
	e->addr[0] = sk->src_ip6[0];
	e->addr[1] = sk->src_ip6[1];
	e->addr[2] = sk->src_ip6[2];
	e->addr[3] = sk->src_ip6[3];
	e->protocol = sk->protocol;
	e->family = sk->family;
	e->port = sk->src_port;
}

/* What TCP's hook knows of a listener. */
static __always_inline void describe_listener(struct event *e, struct bpf_sock_ops *ctx)
{
	__u32 ip4;

	e->protocol = IPPROTO_TCP;
	e->family = ctx->family;
	e->port = ctx->local_port;
	e->cookie = bpf_get_socket_cookie(ctx);
	if (ctx->family == AF_INET) {
		ip4 = ctx->local_ip4;
		/* Or clang makes one load of both branches', which needs ctx plus a
		 * variable; the verifier takes constants only.
		 */
		asm volatile("" : "+r"(ip4));
		set_ip4(e, ip4);
	} else {
		e->addr[0] = ctx->local_ip6[0];
		e->addr[1] = ctx->local_ip6[1];
		e->addr[2] = ctx->local_ip6[2];
		e->addr[3] = ctx->local_ip6[3];
	}
}

#endif
