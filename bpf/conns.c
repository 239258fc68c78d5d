// SPDX-License-Identifier: GPL-2.0-only OR MIT

//go:build ignore

/*
 * Counts the connections that each TCP listener has open, from the sockets.
 *
 * User space puts into a listener's socket storage whose it is. The kernel copies
 * that into every connection the listener accepts (BPF_F_CLONE,
 * net/core/bpf_sk_storage.c), where it tells the programs here whose count to
 * change when the connection begins and ends. A socket without it is none of the
 * group's.
 *
 * A connection is counted from the end of its handshake on, so also while it
 * waits to be accepted, until both sides have said that they are done.
 */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "conns.h"
#include "task.h"

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6

enum {
	TCP_ESTABLISHED = 1,
	TCP_SYN_RECV = 3,
	TCP_FIN_WAIT1 = 4,
	TCP_FIN_WAIT2 = 5,
	TCP_CLOSE_WAIT = 8,
};

/* Of the group; fixed when the programs are loaded. */
const volatile __u64 netns;
const volatile __u16 port;

/* The kernel structures, as far as they are read. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	__s64 counter;
} atomic64_t;

struct in6_addr {
	__u8 s6_addr[16];
};

struct net {
	__u64 net_cookie;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	__be32 skc_rcv_saddr;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	possible_net_t skc_net;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
};

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
};

struct socket {
	struct sock *sk;
};

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct bpf_map *map;
	struct sock *sk;
	void *value;
};

#pragma clang attribute pop

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct accepted);
} owners SEC(".maps");

/* A connection on the group's port that no listener of the group is known to have. */
struct stranger {
	__u64 cookie;
	__u32 pid; /* in the reader's pid namespace */
	__u16 family;
	__u8 pad[2];
	__u8 local[16];
};

_Static_assert(sizeof(struct stranger) == 32, "struct stranger has no padding");

/* is_open: not both sides have said yet that they are done. */
static __always_inline int is_open(int state)
{
	return state == TCP_ESTABLISHED || state == TCP_FIN_WAIT1 || state == TCP_FIN_WAIT2 ||
	       state == TCP_CLOSE_WAIT;
}

/*
 * become changes the state of a connection and counts that, once, whoever comes
 * first. User space trusts its own count of the sockets if nobody began to change
 * anything meanwhile, nor was about to.
 */
static __always_inline int become(struct accepted *a, __u32 from, __u32 to, __s64 change)
{
	__u64 owner = READ_ONCE(a->owner);
	struct conns *c;

	if (READ_ONCE(a->state) != from)
		return 0;
	c = conns_of(owner);
	if (!c)
		return 0;
	__sync_fetch_and_add(&c->begun, 1);
	if (__sync_val_compare_and_swap(&a->state, from, to) == from)
		add_conn(c, owner, change);
	__sync_fetch_and_add(&c->ended, 1);
	return 0;
}

/*
 * settle_move gives a connection to the listener that it went to when the one
 * before closed. The selection program has counted it there. A socket whose cookie
 * nobody has asked for has not moved.
 */
static __always_inline void settle_move(struct accepted *a, __u64 cookie)
{
	__u32 state = READ_ONCE(a->state);
	__u64 owner;

	if (!cookie)
		return;
	owner = take_note(cookie);
	if (!owner)
		return;
	/* Nobody may have seen it begin. */
	if (owner & OWNER_COUNTS)
		state = __sync_val_compare_and_swap(&a->state, ACCEPTED_NOT_YET, ACCEPTED_OPEN);
	if (state == ACCEPTED_OPEN)
		change_conn(a->owner, -1);
	WRITE_ONCE(a->owner, owner & ~OWNER_COUNTS);
}

/*
 * rpsel_count follows a socket that changes its state (net/ipv4/af_inet.c
 * inet_sk_set_state). The kernel leaves out what interrupts it
 * (kernel/trace/bpf_trace.c __bpf_trace_run), such as packets that come while a
 * process closes a socket: what a missed change leaves wrong user space sets right.
 */
SEC("tp_btf/inet_sock_set_state")
int rpsel_count(__u64 *ctx)
{
	struct sock *sk = (void *)ctx[0];
	int was = ctx[1], now = ctx[2];
	__u16 num = sk->__sk_common.skc_num; /* 0: it is being closed */
	struct accepted *a;

	if ((num && num != port) || (is_open(now) && was != TCP_SYN_RECV))
		return 0;
	a = bpf_sk_storage_get(&owners, sk, 0, 0);
	if (!a)
		return 0;
	settle_move(a, sk->__sk_common.skc_cookie.counter);
	if (now == TCP_ESTABLISHED)
		return become(a, ACCEPTED_NOT_YET, ACCEPTED_OPEN, 1);
	return become(a, ACCEPTED_OPEN, ACCEPTED_CLOSED, -1);
}

/*
 * see_open counts a connection that is not counted yet. It may have ended before there
 * was anything to say that it is.
 */
static __always_inline void see_open(struct accepted *a, struct sock *sk)
{
	become(a, ACCEPTED_NOT_YET, ACCEPTED_OPEN, 1);
	if (!is_open(sk->__sk_common.skc_state))
		become(a, ACCEPTED_OPEN, ACCEPTED_CLOSED, -1);
}

/* rpsel_opened lists the connections that are open, by owner. */
SEC("iter/bpf_sk_storage_map")
int rpsel_opened(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct accepted *a = ctx->value;
	struct sock *sk = ctx->sk;
	__u64 owner;

	if (!sk || !a)
		return 0;
	settle_move(a, sk->__sk_common.skc_cookie.counter);
	if (!is_open(sk->__sk_common.skc_state))
		return 0;
	see_open(a, sk); /* nobody may have seen it begin */
	if (a->state != ACCEPTED_OPEN)
		return 0;
	owner = a->owner;
	bpf_seq_write(ctx->meta->seq, &owner, sizeof(owner));
	return 0;
}

static __noinline long tell_stranger(struct seq_file *seq, struct stranger *s)
{
	return bpf_seq_write(seq, s, sizeof(*s));
}

/*
 * rpsel_adopt counts connections that began before their listener was registered.
 * It tells of those in the files of processes; to whom they belong user space puts
 * into moved_conns, and runs it again.
 */
SEC("iter/task_file")
int rpsel_adopt(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct stranger s = {};
	struct accepted *a, fresh = {};
	struct socket *socket;
	struct sock *sk;
	__u64 owner;

	if (!task || !file || task->pid != task->tgid)
		return 0;
	socket = bpf_sock_from_file(file);
	if (!socket)
		return 0;
	sk = socket->sk;
	if (!sk)
		return 0;
	s.family = sk->__sk_common.skc_family;
	if ((s.family != AF_INET && s.family != AF_INET6) || sk->sk_protocol != IPPROTO_TCP ||
	    sk->__sk_common.skc_num != port || !is_open(sk->__sk_common.skc_state) ||
	    BPF_CORE_READ(sk, __sk_common.skc_net.net, net_cookie) != netns)
		return 0;
	if (bpf_sk_storage_get(&owners, sk, 0, 0))
		return 0;
	s.cookie = bpf_get_socket_cookie(sk);
	if (bpf_map_lookup_elem(&moved_conns, &s.cookie)) {
		owner = take_note(s.cookie);
		if (!owner)
			return 0;
		fresh.owner = owner & ~OWNER_COUNTS;
		fresh.state = owner & OWNER_COUNTS ? ACCEPTED_OPEN : ACCEPTED_NOT_YET;
		a = bpf_sk_storage_get(&owners, sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE);
		if (a)
			see_open(a, sk);
		return 0;
	}
	s.pid = pid_seen_from_here(task);
	if (s.family == AF_INET)
		BPF_CORE_READ_INTO(&s.local, sk, __sk_common.skc_rcv_saddr);
	else
		BPF_CORE_READ_INTO(&s.local, sk, __sk_common.skc_v6_rcv_saddr);
	tell_stranger(ctx->meta->seq, &s);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
