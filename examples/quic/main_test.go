package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/rpsel/rpsel/internal/testnet"
)

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "quic" {
		main()
		return
	}
	os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
	testnet.Main(m)
}

const address = "127.0.0.1:4433"

// port is a port with servers, each a process.
type port struct {
	t    *testing.T
	ns   *testnet.NetNS
	args []string
}

func newPort(t *testing.T, args ...string) *port {
	p := &port{t: t, ns: testnet.New(t)}
	p.args = append(args, "-listen", address, "-secret", "test", "-bpffs", testnet.BPFFS(t))
	return p
}

// start starts a server and returns when it serves.
func (p *port) start(name string) *exec.Cmd {
	p.t.Helper()
	path, err := os.Executable()
	if err != nil {
		p.t.Fatal(err)
	}
	cmd := &exec.Cmd{Path: path, Args: append([]string{"quic", "-name", name}, p.args...), Stderr: os.Stderr}
	out, err := cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.ns.Start(cmd); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { end(cmd) })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "serving\n" {
		p.t.Fatalf("server %s: %q, %v", name, line, err)
	}
	return cmd
}

// end kills a server and returns when it is gone.
func end(cmd *exec.Cmd) {
	cmd.Process.Kill() // may have ended
	cmd.Wait()
}

// client is a connection. Its address is its alone.
type client struct {
	addr       net.IP
	nat        *nat
	transports []*quic.Transport
	conn       *quic.Conn
	server     string // that answered first
}

// nat is a socket in the namespace of the servers, which can be another one from one
// packet to the next.
type nat struct {
	ns  *testnet.NetNS
	now atomic.Pointer[net.UDPConn]
}

// rebind opens a socket, in the place of the one there was.
func (n *nat) rebind(addr net.IP) error {
	var conn *net.UDPConn
	err := n.ns.Do(func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: addr})
		return err
	})
	if err != nil {
		return err
	}
	if before := n.now.Swap(conn); before != nil {
		return before.Close()
	}
	return nil
}

func (n *nat) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		conn := n.now.Load()
		length, from, err := conn.ReadFrom(b)
		if err == nil || conn == n.now.Load() {
			return length, from, err
		}
	}
}

func (n *nat) WriteTo(b []byte, to net.Addr) (int, error) {
	for {
		conn := n.now.Load()
		length, err := conn.WriteTo(b, to)
		if err == nil || conn == n.now.Load() {
			return length, err
		}
	}
}

func (n *nat) LocalAddr() net.Addr                { return n.now.Load().LocalAddr() }
func (n *nat) Close() error                       { return n.now.Load().Close() }
func (n *nat) SetDeadline(t time.Time) error      { return n.now.Load().SetDeadline(t) }
func (n *nat) SetReadDeadline(t time.Time) error  { return n.now.Load().SetReadDeadline(t) }
func (n *nat) SetWriteDeadline(t time.Time) error { return n.now.Load().SetWriteDeadline(t) }

// dial connects n clients, from addresses of their own.
func (p *port) dial(n int) []*client {
	p.t.Helper()
	clients := make([]*client, n)
	p.each(n, func(i int) error {
		c := &client{addr: net.IPv4(127, 1, byte(i/250), byte(1+i%250)), nat: &nat{ns: p.ns}}
		clients[i] = c
		if err := c.nat.rebind(c.addr); err != nil {
			return err
		}
		transport := &quic.Transport{Conn: c.nat}
		c.transports = append(c.transports, transport)
		server, err := net.ResolveUDPAddr("udp", address)
		if err != nil {
			return err
		}
		// No idle connection ends while a test runs.
		config := &quic.Config{MaxIdleTimeout: time.Hour, HandshakeIdleTimeout: time.Minute}
		c.conn, err = transport.Dial(context.Background(), server, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}}, config)
		if err != nil {
			return err
		}
		c.server, err = c.ask()
		return err
	})
	p.t.Cleanup(func() {
		for _, c := range clients {
			c.close()
		}
	})
	return clients
}

// close ends the connection. A client may be closed twice.
func (c *client) close() {
	if c == nil {
		return
	}
	if c.conn != nil {
		c.conn.CloseWithError(0, "")
	}
	for _, transport := range c.transports {
		transport.Close()
		transport.Conn.Close()
	}
}

// each runs f for each of n clients at the same time, or, where a handshake takes an emulated
// processor seconds, for four. f fails the test by its error.
func (p *port) each(n int, f func(i int) error) {
	p.t.Helper()
	errs := make([]error, n)
	var all sync.WaitGroup
	atOnce := make(chan struct{}, n)
	if testing.Short() {
		atOnce = make(chan struct{}, 4)
	}
	for i := range n {
		atOnce <- struct{}{}
		all.Go(func() {
			errs[i] = f(i)
			<-atOnce
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		p.t.Fatal(err)
	}
}

// ask asks on a new stream of the connection, and returns who answered.
func (c *client) ask() (string, error) {
	stream, err := c.conn.OpenStreamSync(c.conn.Context())
	if err != nil {
		return "", err
	}
	if _, err := stream.Write([]byte(strings.Repeat("who? ", 50))); err != nil {
		return "", err
	}
	if err := stream.Close(); err != nil {
		return "", err
	}
	name, err := io.ReadAll(stream)
	return string(name), err
}

// lost asks again on all connections, and counts by server those that were reset.
func (p *port) lost(clients []*client) map[string]int {
	p.t.Helper()
	lost, mu := map[string]int{}, sync.Mutex{}
	p.each(len(clients), func(i int) error {
		name, err := clients[i].ask()
		if reset(err) {
			mu.Lock()
			defer mu.Unlock()
			lost[clients[i].server]++
			return nil
		}
		if err == nil && name != clients[i].server {
			err = fmt.Errorf("%s answers on a connection of %s", name, clients[i].server)
		}
		return err
	})
	return lost
}

// reset tells whether a connection was reset by a server that does not know it.
func reset(err error) bool {
	_, is := errors.AsType[*quic.StatelessResetError](err)
	return is
}

// A server joins, and no connection is lost; on plain Linux many are. It gets its share
// of new ones.
func TestJoin(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		lost bool
	}{{"rpsel", nil, false}, {"plain Linux", []string{"-plain"}, true}} {
		t.Run(c.name, func(t *testing.T) {
			p := newPort(t, c.args...)
			for _, name := range []string{"a", "b", "c"} {
				p.start(name)
			}
			clients := p.dial(60)
			p.start("d")
			if lost := p.lost(clients); (len(lost) > 0) != c.lost {
				t.Errorf("connections lost: %v", lost)
			}
			got := 0
			for _, c := range p.dial(150) {
				if c.server == "d" {
					got++
				}
			}
			if got == 0 {
				t.Error("the new server got none of 150 connections")
			}
		})
	}
}

// A server dies, and its connections alone are lost; on plain Linux others, too.
func TestDeath(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		lost bool
	}{{"rpsel", nil, false}, {"plain Linux", []string{"-plain"}, true}} {
		t.Run(c.name, func(t *testing.T) {
			p := newPort(t, c.args...)
			first := p.start("a")
			for _, name := range []string{"b", "c"} {
				p.start(name)
			}
			clients := p.dial(150)
			its := 0
			for _, c := range clients {
				if c.server == "a" {
					its++
				}
			}
			end(first)
			lost := p.lost(clients)
			if its == 0 || lost["a"] != its {
				t.Errorf("the dead server had %d connections, %d were reset", its, lost["a"])
			}
			if (lost["b"]+lost["c"] > 0) != c.lost {
				t.Errorf("connections lost: %v", lost)
			}
		})
	}
}

// A server that is told to end keeps its connections until their clients end them, and
// gets no new ones.
func TestEnd(t *testing.T) {
	p := newPort(t)
	first := p.start("a")
	p.start("b")
	clients := p.dial(60)
	if err := first.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	// As soon as it is drained.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		later := p.dial(20)
		got := 0
		for _, c := range later {
			if c.server == "a" {
				got++
			}
			c.close()
		}
		if got == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of 20 new connections went to the server that ends", got)
		}
	}
	if lost := p.lost(clients); len(lost) > 0 {
		t.Errorf("connections lost: %v", lost)
	}
	for _, c := range clients {
		c.close()
	}
	if err := first.Wait(); err != nil {
		t.Errorf("server a: %v", err)
	}
}

// A NAT gives a client another port, or address, which it does not know of.
func TestRebinding(t *testing.T) {
	for _, c := range []struct {
		name     string
		affinity string
		address  bool
		lost     bool
	}{
		{"port, affinity flow", "flow", false, true},
		{"port, affinity client", "client", false, false},
		{"address, affinity client", "client", true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPort(t, "-affinity", c.affinity)
			for _, name := range []string{"a", "b", "c"} {
				p.start(name)
			}
			clients := p.dial(60)
			p.each(len(clients), func(i int) error {
				to := clients[i].addr
				if c.address {
					to = net.IPv4(127, 2, 0, byte(1+i))
				}
				return clients[i].nat.rebind(to)
			})
			if lost := p.lost(clients); (len(lost) > 0) != c.lost {
				t.Errorf("connections lost: %v", lost)
			}
		})
	}
}

// A client that migrates probes its new path. Whether that leads to its server or not, the
// connection goes on where it was.
func TestProbe(t *testing.T) {
	p := newPort(t)
	for _, name := range []string{"a", "b", "c"} {
		p.start(name)
	}
	clients := p.dial(60)
	ctx, stop := context.WithCancel(context.Background())
	var probing sync.WaitGroup
	defer probing.Wait()
	defer stop()
	p.each(len(clients), func(i int) error {
		second := &nat{ns: p.ns}
		if err := second.rebind(clients[i].addr); err != nil {
			return err
		}
		transport := &quic.Transport{Conn: second}
		clients[i].transports = append(clients[i].transports, transport)
		path, err := clients[i].conn.AddPath(transport)
		if err != nil {
			return err
		}
		probing.Go(func() { path.Probe(ctx) })
		return nil
	})
	if lost := p.lost(clients); len(lost) > 0 {
		t.Errorf("connections lost: %v", lost)
	}
}
