// SPDX-License-Identifier: GPL-2.0-only OR MIT

//go:build ignore

/*
 * rpsel_find: an iterator over the open files of all processes that reports
 * the sockets on one port, and the reuseport group each of them is in.
 *
 * It emits one struct record per descriptor of a bound UDP socket or a TCP
 * listener. A group's members, in the kernel's own order
 * (sock_reuseport.socks[], by which net/core/sock_reuseport.c picks), do not
 * fit into the 32 KiB of a seq_file and go to the map "members", once per
 * group and session; each record says where.
 *
 * bpf_get_socket_cookie() assigns the cookie of a socket that has none yet. A
 * group may be met before its last socket was visited, so members[].cookie is
 * only complete in a second session.
 *
 * Threads are skipped. A thread that unshared its file table
 * (unshare(CLONE_FILES)) can hold a socket that no leader holds; it stays
 * unseen, as it would for ss(8) and lsof(8).
 *
 * Linux 5.14 to 6.18: fields that came, went or changed size in between are
 * read through CO-RE.
 */
#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "task.h"

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262
#define TCP_LISTEN 10

#define MAX_MEMBERS 4096 /* the loader raises it when used_members asks for more */
#define MAX_GROUPS 65536

#define FLAG_REUSEPORT (1 << 0) /* SO_REUSEPORT is set */
#define FLAG_V6ONLY (1 << 1)
#define FLAG_HAS_PROGRAM (1 << 2)  /* the group has a program, also classic BPF */
#define FLAG_INCOMING_CPU (1 << 3) /* a member of the group set SO_INCOMING_CPU */
#define FLAG_MPTCP (1 << 4)

/* The kernel structures, as far as they are read. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;

typedef struct {
	__s64 counter;
} atomic64_t;

typedef struct {
	__u32 val;
} kuid_t;

struct in6_addr {
	__u8 s6_addr[16];
};

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
	__u64 net_cookie;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	unsigned char skc_reuse : 4;
	unsigned char skc_reuseport : 1;
	unsigned char skc_ipv6only : 1;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
};

struct bpf_prog_aux {
	__u32 id;
};

struct bpf_prog {
	struct bpf_prog_aux *aux;
};

struct kernfs_node {
	__u64 id;
};

struct cgroup {
	int level;
	struct kernfs_node *kn;
};

struct sock_cgroup_data {
	struct cgroup *cgroup;
};

struct sock_cgroup_data___old { /* before 5.15 */
	__u64 val;
};

struct sock;

struct sock_reuseport {
	__u16 num_socks;
	__u16 incoming_cpu; /* 6.2 */
	struct bpf_prog *prog;
	struct sock *socks[0];
};

struct numa_drop_counters { /* 6.18 */
	atomic_t drops0;
	atomic_t drops1;
};

struct sock {
	struct sock_common __sk_common;
	struct {
		atomic_t rmem_alloc;
	} sk_backlog;
	atomic_t sk_drops;
	struct numa_drop_counters *sk_drop_counters; /* 6.18 */
	__u16 sk_protocol;
	__u32 sk_ack_backlog;
	kuid_t sk_uid;
	void *sk_user_data;
	struct sock_cgroup_data sk_cgrp_data;
	struct sock_reuseport *sk_reuseport_cb;
};

struct udp_sock {
	__u8 encap_type;
	int forward_deficit;
};

struct mptcp_sock {
	struct sock *first;
};

struct socket {
	struct sock *sk;
};

struct inode {
	unsigned long i_ino;
};

struct file {
	struct inode *f_inode;
};

#pragma clang attribute pop

/* One descriptor of one socket, in host byte order but for the addresses. */
struct record {
	__u64 cookie; /* SO_COOKIE */
	__u64 inode;
	__u64 member; /* address of the sock that is in the group */
	__u64 group;  /* address of its sock_reuseport, or 0 */
	__u64 netns_cookie;
	__u64 cgroup;  /* id in the cgroup2 hierarchy; 0 if that is its root, or none */
	__u64 started; /* when the process was, in ns since the boot */
	__u32 netns_inum;
	__u32 first_member; /* index into the map "members" */
	__u32 num_members;
	__u32 program; /* id, 0 for classic BPF */
	__u32 pid;     /* in the reader's pid namespace */
	__u32 fd;
	__u32 uid;
	__u32 device;
	__u32 rx_queue; /* UDP: bytes; TCP: connections not accepted */
	__u32 drops;
	__u32 flags;
	__u16 protocol;
	__u16 family;
	__u16 local_port;
	__u16 remote_port;
	__u8 encap;	/* UDP_ENCAP_* */
	__u8 user_data; /* 0 free, else 1 + the low bits of sk_user_data */
	__u8 pad[2];
	__u8 local[16];
	__u8 remote[16];
	__u8 comm[16];
};

_Static_assert(sizeof(struct record) == 160, "struct record has no padding");

struct member {
	__u64 sk;
	__u64 cookie; /* 0 until somebody asked for it */
};

struct placed {
	__u64 session;
	__u32 first;
	__u32 count;
};

/* What to report; 0 is any. Variables, so that one loaded program serves all. */
__u64 filter_netns;
__u32 filter_pid; /* in the reader's pid namespace */
__u16 filter_port;
__u8 filter_protocol;

/* Members written, and tried to write beyond the end of the map. The reader sets
 * it to 0 before it opens a session.
 */
__u32 used_members;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_MEMBERS);
	__type(key, __u32);
	__type(value, struct member);
} members SEC(".maps");

/* Groups whose members are written already. The reader empties it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_GROUPS);
	__type(key, __u64);
	__type(value, struct placed);
} groups SEC(".maps");

struct walk {
	struct sock_reuseport *reuse;
	__u32 first;
	__u32 count;
};

/* bpf_for_each_map_elem() over "members" serves as the loop: bpf_loop() is
 * 5.17, and the verifier walks through every turn of a plain one.
 */
static long write_member(void *map, __u32 *key, void *value, struct walk *walk)
{
	__u32 i = *key, at = walk->first + i;
	struct sock_reuseport *reuse = walk->reuse;
	struct sock *sk = NULL;
	struct member *m;

	(void)map;
	(void)value;
	if (i >= walk->count)
		return 1;
	m = bpf_map_lookup_elem(&members, &at);
	if (!m)
		return 1;
	bpf_core_read(&sk, sizeof(sk), &reuse->socks[i]);
	m->sk = (__u64)sk;
	m->cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	return 0;
}

/* Writes the group's members, once per session, and gives their number. They
 * stay where they are for the rest of the session: bpf_seq_write() may fail for
 * want of room, and then this socket is visited again.
 */
static __noinline __u32 write_members(struct sock_reuseport *reuse, __u64 id, struct record *r)
{
	__u64 key = (__u64)reuse;
	struct placed *done, placed = {};
	struct walk walk = {};

	done = bpf_map_lookup_elem(&groups, &key);
	if (done && done->session == id) {
		r->first_member = done->first;
		return done->count;
	}
	walk.reuse = reuse;
	walk.first = used_members;
	walk.count = BPF_CORE_READ(reuse, num_socks);
	used_members += walk.count;
	bpf_for_each_map_elem(&members, write_member, &walk, 0);

	placed.session = id;
	placed.first = walk.first;
	placed.count = walk.count;
	bpf_map_update_elem(&groups, &key, &placed, BPF_ANY);
	r->first_member = walk.first;
	return walk.count;
}

static __always_inline __u32 drops_of(struct sock *sk)
{
	if (bpf_core_field_exists(sk->sk_drop_counters)) {
		struct numa_drop_counters *c = BPF_CORE_READ(sk, sk_drop_counters);

		if (c)
			return BPF_CORE_READ(c, drops0.counter) + BPF_CORE_READ(c, drops1.counter);
	}
	return BPF_CORE_READ(sk, sk_drops.counter);
}

/* As sock_cgroup_ptr() in include/linux/cgroup.h. */
static __always_inline __u64 cgroup_of(struct sock *sk)
{
	struct cgroup *cgroup = NULL;

	if (!bpf_core_field_exists(sk->sk_cgrp_data))
		return 0;
	if (bpf_core_field_exists(sk->sk_cgrp_data.cgroup)) {
		cgroup = BPF_CORE_READ(sk, sk_cgrp_data.cgroup);
	} else {
		struct sock_cgroup_data___old *data = (void *)&sk->sk_cgrp_data;
		__u64 val = BPF_CORE_READ(data, val);

		/* With marks of net_cls or net_prio it counts as the root's. */
		if (!(val & 3))
			cgroup = (void *)val;
	}
	if (!cgroup || !BPF_CORE_READ(cgroup, level))
		return 0;
	return BPF_CORE_READ(cgroup, kn, id);
}

SEC("iter/task_file")
int rpsel_find(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct record r = {};
	struct sock_reuseport *reuse;
	struct socket *socket;
	struct sock *sk;
	struct net *net;
	__u64 user_data;

	if (!task || !file || task->pid != task->tgid)
		return 0;
	if (filter_pid && pid_seen_from_here(task) != filter_pid)
		return 0;
	socket = bpf_sock_from_file(file);
	if (!socket)
		return 0;
	sk = socket->sk;
	if (!sk)
		return 0;

	r.family = sk->__sk_common.skc_family;
	if (r.family != AF_INET && r.family != AF_INET6)
		return 0;
	r.protocol = sk->sk_protocol;
	if (r.protocol == IPPROTO_MPTCP) {
		r.flags |= FLAG_MPTCP;
		r.protocol = IPPROTO_TCP;
	}
	if (r.protocol == IPPROTO_TCP) {
		if (sk->__sk_common.skc_state != TCP_LISTEN)
			return 0;
	} else if (r.protocol != IPPROTO_UDP) {
		return 0;
	}
	if (filter_protocol && r.protocol != filter_protocol)
		return 0;
	r.local_port = sk->__sk_common.skc_num;
	if (!r.local_port || (filter_port && r.local_port != filter_port))
		return 0;
	net = sk->__sk_common.skc_net.net;
	r.netns_cookie = BPF_CORE_READ(net, net_cookie);
	if (filter_netns && r.netns_cookie != filter_netns)
		return 0;

	r.cookie = bpf_get_socket_cookie(sk);
	r.inode = BPF_CORE_READ(file, f_inode, i_ino);
	r.netns_inum = BPF_CORE_READ(net, ns.inum);
	r.pid = pid_seen_from_here(task);
	r.fd = ctx->fd;
	BPF_CORE_READ_INTO(&r.comm, task, comm);
	r.started = task->start_time;

	/* What sits in the group is the TCP socket below an MPTCP one. */
	if (r.flags & FLAG_MPTCP && bpf_core_type_exists(struct mptcp_sock)) {
		struct sock *first = BPF_CORE_READ((struct mptcp_sock *)sk, first);

		if (first)
			sk = first;
	}
	r.member = (__u64)sk;
	r.uid = BPF_CORE_READ(sk, sk_uid.val);
	r.device = BPF_CORE_READ(sk, __sk_common.skc_bound_dev_if);
	r.remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	if (r.family == AF_INET) {
		BPF_CORE_READ_INTO(&r.local, sk, __sk_common.skc_rcv_saddr);
		BPF_CORE_READ_INTO(&r.remote, sk, __sk_common.skc_daddr);
	} else {
		BPF_CORE_READ_INTO(&r.local, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&r.remote, sk, __sk_common.skc_v6_daddr);
		if (BPF_CORE_READ_BITFIELD_PROBED(&sk->__sk_common, skc_ipv6only))
			r.flags |= FLAG_V6ONLY;
	}
	if (BPF_CORE_READ_BITFIELD_PROBED(&sk->__sk_common, skc_reuseport))
		r.flags |= FLAG_REUSEPORT;
	r.cgroup = cgroup_of(sk);
	r.drops = drops_of(sk);
	if (r.protocol == IPPROTO_UDP) {
		struct udp_sock *up = (struct udp_sock *)sk;

		r.encap = BPF_CORE_READ(up, encap_type);
		/* As udp_rqueue_get(). */
		r.rx_queue = BPF_CORE_READ(sk, sk_backlog.rmem_alloc.counter) -
			     BPF_CORE_READ(up, forward_deficit);
	} else {
		r.rx_queue = BPF_CORE_READ(sk, sk_ack_backlog);
	}
	user_data = (__u64)BPF_CORE_READ(sk, sk_user_data);
	if (user_data)
		r.user_data = 1 + (user_data & 7);

	reuse = BPF_CORE_READ(sk, sk_reuseport_cb);
	r.group = (__u64)reuse;
	if (reuse) {
		struct bpf_prog *prog = BPF_CORE_READ(reuse, prog);

		if (prog) {
			r.flags |= FLAG_HAS_PROGRAM;
			r.program = BPF_CORE_READ(prog, aux, id);
		}
		if (bpf_core_field_exists(reuse->incoming_cpu) &&
		    BPF_CORE_READ(reuse, incoming_cpu))
			r.flags |= FLAG_INCOMING_CPU;
		r.num_members = write_members(reuse, ctx->meta->session_id, &r);
	}

	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
