// Package loader makes reuseport groups sticky: it loads the selection program,
// pins its maps on a bpffs, attaches it to the groups of servers that run, and
// keeps the map entries right.
//
// The kernel keeps what it makes: with every process of rpsel gone, a group
// goes on being balanced, and flows of dead listeners go on being rehomed. A
// [Group] is only a handle; closing it changes nothing for traffic.
//
// All functions may be called concurrently, from several processes too: a lock
// on the network namespace's directory of the bpffs puts changes in a row.
// Changing anything needs CAP_BPF, CAP_PERFMON (to read a group's order) and,
// for sockets of other processes, CAP_SYS_PTRACE; mounting a bpffs and looking
// into other namespaces needs CAP_SYS_ADMIN.
//
// The package never prints, and does not watch for listeners that come and go;
// that is the business of the agent.
package loader
