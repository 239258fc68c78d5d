package stress

import (
	"net"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/testnet"
)

// server is a listener that echoes its slot.
type server struct {
	slot uint32
	conn *net.UDPConn
}

func serve(t *testing.T, ns *testnet.NetNS, slot uint32) server {
	t.Helper()
	s := server{slot, listen(t, ns, address)}
	go func() {
		packet := make([]byte, 2048)
		for {
			_, from, err := s.conn.ReadFromUDPAddrPort(packet)
			if err != nil {
				return
			}
			s.conn.WriteToUDPAddrPort([]byte{byte(slot)}, from)
		}
	}()
	t.Cleanup(func() { s.conn.Close() })
	return s
}

// ask sends one packet and returns which slot answered.
func ask(t *testing.T, c *net.UDPConn) uint32 {
	t.Helper()
	if _, err := c.Write([]byte("who?")); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 16)
	c.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := c.Read(answer); err != nil {
		t.Fatal(err)
	}
	return uint32(answer[0])
}

func askAll(t *testing.T, clients []*net.UDPConn) []uint32 {
	t.Helper()
	answers := make([]uint32, len(clients))
	for i, c := range clients {
		answers[i] = ask(t, c)
	}
	return answers
}

// TestTraffic is the life of a group in short: flows stick, a joiner takes
// none, the dead one's are rehomed and nobody else's, slots are used again.
func TestTraffic(t *testing.T) {
	ns := testnet.New(t)
	g := newGroup(t, 64)
	var servers [4]server
	for slot := range uint32(3) {
		servers[slot] = serve(t, ns, slot)
	}
	if err := g.attach(servers[0].conn); err != nil {
		t.Fatal(err)
	}
	for _, s := range servers[:3] {
		if err := g.join(s.slot, s.conn); err != nil {
			t.Fatal(err)
		}
	}
	var clients []*net.UDPConn
	for range 100 {
		var c net.Conn
		if err := ns.Do(func() (err error) {
			c, err = net.Dial("udp4", address)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, c.(*net.UDPConn))
	}
	first := askAll(t, clients)
	moved := func(when string, was, is []uint32, dead uint32) {
		t.Helper()
		n := 0
		for i := range was {
			switch {
			case was[i] == dead && is[i] == dead:
				t.Errorf("%s: client %d is answered by dead slot %d", when, i, dead)
			case was[i] == dead:
				n++
			case was[i] != is[i]:
				t.Errorf("%s: client %d moved from %d to %d", when, i, was[i], is[i])
			}
		}
		t.Logf("%s: %d moved", when, n)
	}
	const none = ^uint32(0)
	moved("same group", first, askAll(t, clients), none)

	servers[3] = serve(t, ns, 3)
	moved("bound, unregistered", first, askAll(t, clients), none)
	if err := g.join(3, servers[3].conn); err != nil {
		t.Fatal(err)
	}
	moved("joined", first, askAll(t, clients), none)

	servers[1].conn.Close()
	second := askAll(t, clients)
	moved("closed", first, second, 1)
	moved("after that", second, askAll(t, clients), none)

	if err := g.bury(1); err != nil {
		t.Fatal(err)
	}
	servers[1] = serve(t, ns, 1)
	if err := g.join(1, servers[1].conn); err != nil {
		t.Fatal(err)
	}
	moved("slot used again", second, askAll(t, clients), none)

	for _, s := range servers[1:] {
		s.conn.Close()
	}
	for i, slot := range askAll(t, clients) {
		if slot != 0 {
			t.Errorf("one left: client %d is answered by %d", i, slot)
		}
	}
	slots, all := g.totals(t)
	t.Logf("%+v %+v", slots, all)
}
