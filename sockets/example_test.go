package sockets_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"

	"github.com/rpsel/rpsel/sockets"
)

// Who serves a port, in the order by which the kernel picks. Here only this process is
// asked; without PID all that can be seen are.
func ExampleFind() {
	conns, err := sockets.ListenPacket(context.Background(), 2, "udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	for _, c := range conns {
		defer c.Close()
	}
	port := conns[0].LocalAddr().(*net.UDPAddr).AddrPort().Port()
	groups, err := sockets.Find(sockets.Query{Proto: sockets.UDP, Port: port, PID: os.Getpid()})
	if err != nil {
		log.Fatal(err)
	}
	for _, g := range groups {
		for i, m := range g.Members {
			fmt.Println(g.Proto, g.Addr.Addr(), "member", i, "of this process:", m.Holders[0].PID == os.Getpid())
		}
	}
	// Output:
	// udp 127.0.0.1 member 0 of this process: true
	// udp 127.0.0.1 member 1 of this process: true
}
