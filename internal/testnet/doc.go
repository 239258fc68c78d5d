// Package testnet gives tests network namespaces, named echo servers as
// processes of their own, and clients that tell which server answered them.
//
// Everything it starts, mounts and creates ends with the test that asked for
// it, also when the test process is killed, but for the mount point of BPFFS.
package testnet
