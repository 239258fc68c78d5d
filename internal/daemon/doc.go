// Package daemon is "rpsel agent": it keeps ports sticky while listeners, groups
// and network namespaces come and go.
//
// One goroutine owns all that the agent knows, and does one thing after the
// other: batches of events, a tick every second, a sweep every ten. Whatever
// says that there may be something to do, the doing is the same (keep.go): a live
// group is attached if it should be, and its members are registered. So nothing
// depends on an event alone, and an agent that was killed is made good for by the
// first sweep of the next.
//
// Nothing here is needed for traffic: the kernel goes on without the agent. The
// package holds no descriptor of a socket, a process or a network namespace for
// longer than it works on it: each of them would keep alive what it is of.
//
// The package never prints: it logs.
package daemon
