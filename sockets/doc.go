// Package sockets finds the sockets of a port, whoever holds them, and gets
// hold of them.
//
// Find lists the reuseport groups of a port with their members in the kernel's
// own order, Take borrows a socket of another process, Adopt makes a reuseport
// group of a live socket, Listen and ListenPacket open a new group.
//
// The package changes sockets only in Adopt, and attaches no program and
// registers nothing: package loader does.
package sockets
