// Package watch tells of listeners as they come: of UDP sockets that are bound
// and of TCP sockets that listen, on the ports that are asked for.
//
// It attaches the programs of bpf/watch.c to a cgroup, beside other tools'
// programs, and changes nothing about the sockets. It sees those that were
// opened by processes of that cgroup, and below, in every network namespace.
// What came before, or while the buffer was full, only a search can find
// (sockets.Bound, sockets.Find).
package watch
