package loader_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/netip"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// A server with four sockets on one port; one of them closes, and only its
// flows go elsewhere.
func ExampleAttach() {
	listeners, err := sockets.ListenPacket(context.Background(), 4, "udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	for i, l := range listeners {
		defer l.Close()
		go echo(l, fmt.Sprint("listener ", i))
	}
	group, err := loader.Attach(listeners[0], loader.Options{Settle: -1})
	if err != nil {
		log.Fatal(err)
	}
	defer loader.DefaultFS.Detach(group.Key())
	defer group.Close()

	clients := dial(100, group.Key().Addr)
	defer hangUp(clients)
	before := ask(clients)
	listeners[0].Close()
	after := ask(clients)
	moved := 0
	for i := range clients {
		if before[i] != "listener 0" && before[i] != after[i] {
			moved++
		}
	}
	fmt.Println("flows of other listeners that moved:", moved)
	// Output: flows of other listeners that moved: 0
}

// A process that comes later finds the group by its address and registers a
// socket of its own.
func ExampleGroup_Register() {
	first, err := sockets.ListenPacket(context.Background(), 1, "udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer first[0].Close()
	attached, err := loader.Attach(first[0], loader.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer loader.DefaultFS.Detach(attached.Key())
	defer attached.Close()

	address := first[0].LocalAddr().String()
	second, err := sockets.ListenPacket(context.Background(), 1, "udp", address)
	if err != nil {
		log.Fatal(err)
	}
	defer second[0].Close()
	group, err := loader.Open(loader.Key{Proto: loader.UDP, Addr: netip.MustParseAddrPort(address)})
	if err != nil {
		log.Fatal(err)
	}
	defer group.Close()
	slot, err := group.Register(second[0])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("registered in slot", slot)
	// Output: registered in slot 1
}

// Flows lists who has which flow.
func ExampleGroup_Flows() {
	listeners, err := sockets.ListenPacket(context.Background(), 1, "udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer listeners[0].Close()
	go echo(listeners[0], "hello")
	group, err := loader.Attach(listeners[0], loader.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer loader.DefaultFS.Detach(group.Key())
	defer group.Close()

	clients := dial(2, group.Key().Addr)
	defer hangUp(clients)
	ask(clients)
	for flow, err := range group.Flows() {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(flow.Client.Addr(), "has slot", flow.Slot, "and is", flow.State)
	}
	// Output:
	// 127.0.0.1 has slot 0 and is new
	// 127.0.0.1 has slot 0 and is new
}

// dial opens n sockets to a server, each a flow.
func dial(n int, server netip.AddrPort) []*net.UDPConn {
	var clients []*net.UDPConn
	for range n {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server))
		if err != nil {
			log.Fatal(err)
		}
		clients = append(clients, c)
	}
	return clients
}

// hangUp closes what dial opened.
func hangUp(clients []*net.UDPConn) {
	for _, c := range clients {
		c.Close()
	}
}

// ask sends a datagram from each client and returns who answered.
func ask(clients []*net.UDPConn) []string {
	var names []string
	buffer := make([]byte, 2048)
	for _, c := range clients {
		c.Write([]byte("who?"))
		n, err := c.Read(buffer)
		if err != nil {
			log.Fatal(err)
		}
		names = append(names, string(buffer[:n]))
	}
	return names
}
