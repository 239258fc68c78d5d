package loader_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/netip"
	"runtime"
	"time"

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

// leave ends a server when its last flow has: its clients stay, new ones go to others.
func (s *echoServer) leave() error {
	defer s.close()
	var slots []int
	for _, l := range s.listeners {
		slot, err := s.group.Slot(l)
		if err != nil {
			return err
		}
		if err := s.group.Drain(slot); err != nil {
			return err
		}
		slots = append(slots, slot)
	}
	for {
		has := 0
		for _, slot := range slots {
			n, err := s.group.CountWhere(func(of int, _ loader.State) bool { return of == slot })
			if err != nil {
				return err
			}
			has += n
		}
		if has == 0 {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
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

// A UDP server is replaced by a new version, and no flow is lost: those of the old one stay
// there to their end, and the new one has all that begin. The two processes are one here;
// what each does, it does for itself.
func Example_restart() {
	old, err := startEcho("old", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	key := old.group.Key()
	defer loader.DefaultFS.Detach(key)
	clients := dial(100, key.Addr)
	ask(clients)

	next, err := startEcho("new", key.Addr.String())
	if err != nil {
		log.Fatal(err)
	}
	defer next.close()
	left := make(chan error)
	go func() { left <- old.leave() }() // on SIGTERM, say
	awaitDrain(next.group)

	fmt.Println("clients of before:", everybody(ask(clients)))
	fmt.Println("new clients:", everybody(askOnce(100, key.Addr)))
	hangUp(clients)
	// By default a flow is kept for five minutes after its last packet. For the example it
	// is one second.
	times, err := loader.Attach(next.listeners[0], loader.Options{Idle: time.Second, IdleNew: time.Second})
	if err != nil {
		log.Fatal(err)
	}
	times.Close()
	if err := <-left; err != nil {
		log.Fatal(err)
	}
	fmt.Println("after that:", everybody(askOnce(100, key.Addr)))
	// Output:
	// clients of before: old
	// new clients: new
	// after that: new
}

// awaitDrain waits until as many listeners drain as a process has.
func awaitDrain(group *loader.Group) {
	for {
		status, err := group.Status()
		if err != nil {
			log.Fatal(err)
		}
		draining := 0
		for _, l := range status.Listeners {
			if l.State == "draining" {
				draining++
			}
		}
		if draining == runtime.NumCPU() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// askOnce is ask by clients that come and go.
func askOnce(n int, server netip.AddrPort) []string {
	clients := dial(n, server)
	defer hangUp(clients)
	return ask(clients)
}

// everybody is the one name that all have.
func everybody(names []string) string {
	for _, name := range names {
		if name != names[0] {
			return "some " + names[0] + ", some " + name
		}
	}
	return names[0]
}
