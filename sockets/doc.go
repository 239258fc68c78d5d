// Package sockets finds the sockets of a port, whoever holds them, and gets
// hold of them.
//
// [Listen] and [ListenPacket] open new groups, as a server does for itself. For
// the sockets of others [Find] lists the reuseport groups of a port with their
// members in the kernel's own order, [Take] borrows a socket of another process, and
// [Adopt] makes a reuseport group of a live socket that was bound without
// SO_REUSEPORT.
//
// # Reuseport groups
//
// Sockets that are bound to the same address with SO_REUSEPORT, by the same user, are
// one group (a [Key] has all that counts), and the kernel deals what comes to the
// address among them, by hash(addresses, ports) * n >> 32 over the members in
// the order of [Group].Members (net/core/sock_reuseport.c
// reuseport_select_sock). A socket that closes leaves its place to the last
// one, so that the order says nothing about age.
//
// # Names of sockets and namespaces
//
// A socket is named by its cookie (SO_COOKIE) and a network namespace by its own
// (SO_NETNS_COOKIE): 64-bit numbers that are never given out twice before the next
// boot, unlike inodes, pids and descriptors.
//
// # Ownership
//
// Functions that take a [syscall.Conn] borrow it for the call: *net.UDPConn,
// *net.TCPListener, *os.File and [Conn] fit. What a function opens its caller
// closes: the sockets of Listen and ListenPacket, each [Conn], each [NetNS]. A Conn
// is to be closed soon: it keeps the socket of a dead server alive.
//
// # Concurrency
//
// All functions may be called concurrently.
//
// # Errors
//
// The Err variables are wrapped with the process or socket that they are about
// and with the way out, in one line, for errors.Is. Without a capability, or on a
// kernel that lacks a feature, it is [ErrPermission] or [ErrUnsupported] and names it.
//
// The package changes sockets only in Adopt, and attaches no program that stays and
// registers nothing: package loader does.
package sockets
