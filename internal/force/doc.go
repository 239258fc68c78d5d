// Package force runs programs with socket options forced on what they bind:
// SO_REUSEPORT, SO_REUSEADDR and SO_BINDTODEVICE. The programs are not changed
// and do not notice; they may be static and make system calls of their own.
//
// [Command.Run] puts the calling process into a cgroup of its own, attaches the
// programs of bpf/bind.c to it, and becomes the command. What it leaves behind
// is a process in the caller's cgroup, the reaper, that tells of the command's
// listeners and removes the cgroup after the last process in it. [Watch] does
// the same for a cgroup that exists, as long as it is called.
//
// The package registers nothing, and never prints.
package force
