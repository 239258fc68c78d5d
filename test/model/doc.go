// Package model checks the protocol of the flow table by enumeration: all ways
// in which the shared loads, stores and exchanges of a few packets, and of what
// happens around them, can follow each other.
//
// The steps are those of bpf/flow.h and bpf/select.c and carry the names of the
// C functions they are taken from. Two things are made wider than the C, so
// that more is checked than can happen: every packet has its own order of
// listeners to pick from, and an insertion may try any place that it could
// take, not only the one empty_place or survey would choose. One thing is left out: loads of
// one CPU happen in program order, as the address dependencies of after() and
// the full barrier of an exchange make them.
package model
