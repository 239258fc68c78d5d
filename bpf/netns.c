// SPDX-License-Identifier: GPL-2.0-only OR MIT

//go:build ignore

/*
 * rpsel_netns lists the cookies of all network namespaces that there are, by
 * the kernel's own list (net/core/net_namespace.c net_namespace_list). What
 * processes, threads, mounts, descriptors and sockets keep is in it, wherever
 * they are; cleanup_net takes a namespace off before it frees it.
 *
 * The list is a ring that is read under RCU, which the caller of the program
 * holds (net/bpf/test_run.c bpf_prog_test_run_raw_tp). It begins at the
 * namespace of the calling task. One node of the ring is its head, which is no
 * namespace: the cookie that is read there is noise. So the answer may have a
 * number too much, and none too few.
 */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define MAX_NETNS 4096

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct list_head {
	struct list_head *next;
};

struct net {
	struct list_head list;
	__u64 net_cookie;
};

struct nsproxy {
	struct net *net_ns;
};

struct task_struct {
	struct nsproxy *nsproxy;
};

#pragma clang attribute pop

__u64 cookies[MAX_NETNS]; /* the answer */
__u32 count;		  /* of cookies */
__u32 whole;		  /* the ring was seen from end to end */

SEC("raw_tp")
int rpsel_netns(void *ctx __attribute__((unused)))
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct net *net = BPF_CORE_READ(task, nsproxy, net_ns);
	struct list_head *first, *at;
	__u32 n = 0;

	whole = 0;
	if (!net)
		return 0;
	first = (void *)net + bpf_core_field_offset(struct net, list);
	at = first;
	for (int i = 0; i < MAX_NETNS; i++) {
		net = (void *)at - bpf_core_field_offset(struct net, list);
		cookies[i] = BPF_CORE_READ(net, net_cookie);
		n++;
		at = BPF_CORE_READ(at, next);
		if (at == first || !at)
			break;
	}
	count = n;
	whole = at == first;
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
