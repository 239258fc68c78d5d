package loader_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"runtime"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// echoServer answers datagrams with its name, by a socket and a goroutine per CPU: no
// lock and no queue are shared, and a client is always served by the same goroutine, which
// may keep what it knows of it to itself.
type echoServer struct {
	name      string
	listeners []*net.UDPConn
	group     *loader.Group
}

// startEcho starts a server, which makes the port sticky or joins those that are there.
func startEcho(name, address string) (*echoServer, error) {
	listeners, err := sockets.ListenPacket(context.Background(), runtime.NumCPU(), "udp", address)
	if err != nil {
		return nil, err
	}
	s := &echoServer{name: name, listeners: listeners}
	// Each listener has a slot when Attach returns. A port that had clients before it was
	// sticky would have to settle first, as it does by default.
	s.group, err = loader.Attach(listeners[0], loader.Options{Settle: -1})
	if err != nil {
		s.close()
		return nil, err
	}
	for _, l := range listeners {
		go echo(l, name)
	}
	return s, nil
}

func (s *echoServer) close() error {
	var errs []error
	for _, l := range s.listeners {
		errs = append(errs, l.Close())
	}
	if s.group != nil {
		errs = append(errs, s.group.Close())
	}
	return errors.Join(errs...)
}

// echo answers every datagram with a name until its socket closes.
func echo(conn *net.UDPConn, name string) {
	buffer := make([]byte, 2048)
	for {
		_, client, err := conn.ReadFromUDPAddrPort(buffer)
		if err != nil {
			return
		}
		conn.WriteToUDPAddrPort([]byte(name), client)
	}
}

// A UDP server with a goroutine per CPU, and as many sockets on one port.
func Example_udpServer() {
	server, err := startEcho("hello", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer server.close()
	key := server.group.Key()
	defer loader.DefaultFS.Detach(key)

	clients := dial(100, key.Addr)
	defer hangUp(clients)
	for range 3 {
		ask(clients)
	}
	status, err := server.group.Status()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(status.Counters.New, "flows began,", status.Counters.Hit, "packets were of known ones")
	// Output: 100 flows began, 200 packets were of known ones
}
