/* SPDX-License-Identifier: GPL-2.0-only OR MIT */

/*
 * The processes that an iterator over their files meets, as far as they are read.
 */
#ifndef RPSEL_TASK_H
#define RPSEL_TASK_H

#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct upid {
	int nr;
};

struct pid {
	unsigned int level;
	struct upid numbers[1];
};

struct task_struct {
	int pid;
	int tgid;
	struct pid *thread_pid;
	__u64 start_time;
	char comm[16];
};

struct bpf_iter_meta {
	struct seq_file *seq;
	__u64 session_id;
};

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
};

#pragma clang attribute pop

/* The process's number in the reader's pid namespace, by which the reader can
 * open it; task->tgid is the number in the initial one.
 */
static __always_inline __u32 pid_seen_from_here(struct task_struct *task)
{
	struct task_struct *reader = (void *)bpf_get_current_task();
	__u32 level = BPF_CORE_READ(reader, thread_pid, level);
	struct pid *pid = BPF_CORE_READ(task, thread_pid);
	struct upid *number;
	__u32 nr = 0;

	number = (void *)pid + bpf_core_field_offset(struct pid, numbers) +
		 level * bpf_core_type_size(struct upid);
	bpf_core_read(&nr, sizeof(nr), &number->nr);
	return nr;
}

#endif
