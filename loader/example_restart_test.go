package loader_test

import (
	"fmt"
	"log"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"github.com/rpsel/rpsel/loader"
)

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
		n, err := s.group.CountWhere(func(slot int, _ loader.State) bool { return slices.Contains(slots, slot) })
		if n == 0 || err != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
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
