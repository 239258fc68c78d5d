// Package bpf holds rpsel's BPF programs: the C sources and what bpf2go makes
// of them. Run "make generate" after a change to the C.
package bpf

// AdoptProgram names the program that sockets.Adopt attaches for a moment. One that
// stays is of a process that was killed meanwhile.
const AdoptProgram = "rpsel_adopt"
