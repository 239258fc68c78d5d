// Package maps speaks the layout of a group's pinned maps (bpf/rpsel.h): typed
// views that read and write the memory the selection program works on.
//
// It neither loads nor pins. The views map the kernel's memory into the
// process, so that a million flows are read without a system call each; every
// view must be closed, and must not be used after that.
//
// It changes with the layout, and is no part of what stays the same
// (docs/versions.md): programs use package loader.
package maps
