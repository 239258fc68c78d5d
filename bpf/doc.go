// Package bpf holds rpsel's BPF programs: the C sources and what bpf2go makes
// of them.
//
// Only loader and sockets use it. Run "make generate" after a change to the C.
package bpf
