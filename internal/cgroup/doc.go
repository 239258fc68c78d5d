// Package cgroup makes, fills, watches and removes the cgroups of "rpsel run",
// and attaches BPF programs to cgroups without getting in the way of other
// tools' programs.
//
// It speaks of cgroup2 only, which may be mounted alone or beside cgroup v1.
package cgroup
