// Package loader makes reuseport groups sticky: it loads the selection program,
// pins its maps on a bpffs, attaches it to the groups of servers that run, and
// keeps the map entries right.
//
// # In short
//
//	listeners, err := sockets.ListenPacket(ctx, 4, "udp", ":4433") // one group of four
//	group, err := loader.Attach(listeners[0], loader.Options{})    // registers all four
//	defer group.Close()                                           // the kernel goes on
//
// A process that comes later binds to the same address and calls [Attach] with its own
// socket, or [Open] and [Group.Register]; one that ends calls [Group.Drain] before, if
// its clients are to come to their end. The examples are whole servers.
//
// # What it does
//
// A packet of a flow goes to the listener that has the flow, as long as that
// listener's socket is open, whatever others join, leave or drain. When it
// closes, its flows go to others at their next packet, and no other flow moves.
// A listener that joins gets its share of new flows, and none of the old ones.
// What a flow is says [Options.Affinity], who gets a new one [Options.Policy].
//
// A flow is remembered until it has been silent for [Options.Idle], or
// [Options.IdleNew] if it has not been confirmed (see [Confirm]). When the table is
// full, new flows are served without being remembered; established ones stay.
//
// The kernel keeps what is made: with every process of rpsel gone, a group goes
// on being balanced, and flows of dead listeners go on being rehomed. What is
// made is undone by [FS.Detach], by a reboot, or when somebody else detaches the
// program, and not by closing a [Group], which is only a handle.
//
// # Settling
//
// With [AffinityFlow] attaching to a group that is in use moves no flow. A flow that
// began before cannot be told from a new one until its client has sent a packet, so
// for [Options.Settle] flows that look new are left where the kernel's hash has
// them, and listeners that join meanwhile wait for their share. A server that
// attaches before it has any client sets Settle to -1.
//
// # Ownership
//
// Sockets are given as [syscall.Conn]: *net.UDPConn, *net.TCPListener, *os.File and
// [sockets.Conn] fit. They are borrowed for the call and never closed or kept: a
// slot becomes empty by itself when its socket closes. Every [Group] is closed by who
// got it.
//
// # Concurrency
//
// All functions and methods may be called concurrently, from several processes
// too: a lock on the network namespace's directory of the bpffs puts changes in
// a row. Who waits for it for more than ten seconds gets [ErrLocked]. A process
// that is killed at any point leaves a group that serves, and the next change
// completes or takes back what it had begun.
//
// # Errors
//
// The Err variables are wrapped with what they are about and the way out, in
// one line, for errors.Is. Each function's documentation lists those that it
// returns; whatever else comes is a wrong option, or an error of the operating
// system. [Attach] and [FS.Upgrade] do all or nothing.
//
// # Privileges and kernels
//
// Changing anything needs CAP_BPF and CAP_PERFMON (to read a group's order) and,
// for sockets of other users' processes, CAP_SYS_PTRACE; [ConfirmReply] needs
// CAP_NET_ADMIN and CAP_DAC_READ_SEARCH, mounting a bpffs and looking into other
// network namespaces CAP_SYS_ADMIN. A server without any registers its sockets by
// package agent. Linux 5.14, on arm64 5.18, with BTF is needed; what needs a newer
// one says so, by [ErrUnsupported] or by a function of its own ([CanCount],
// [HaveTimer], [HaveSenderNetNS]).
//
// # What it does not do
//
// The package never prints, and does not watch for listeners that come and go;
// that is the business of "rpsel agent". Datagrams that wait in a socket when that
// closes are lost. Multicast and broadcast reach every member without the program
// being asked (net/ipv4/udp.c __udp4_lib_mcast_deliver). A UDP socket that is connected
// has left its group, if it was bound to a wildcard, and since Linux 6.13 always.
package loader
