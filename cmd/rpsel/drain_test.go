package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// onText does something when a text is written for the first time.
type onText struct {
	text string
	do   func()
	all  strings.Builder
}

func (w *onText) Write(p []byte) (int, error) {
	if w.all.Write(p); strings.Contains(w.all.String(), w.text) {
		w.do()
	}
	return len(p), nil
}

// The wait ends well when the listener dies meanwhile, with flows that are far
// from idle, also if another one has its slot at once. The control is one that
// lives, whose flows are waited for.
func TestDrainWaitsForTheListener(t *testing.T) {
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	options := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true}
	dies, lives := testnet.StartServer(t, ns, options), testnet.StartServer(t, ns, options)
	where := []string{"--bpffs", bpffs, "-N", ns.Path(), "--port", "1194"}
	if code, _, talk := rpsel(append([]string{"attach", "--settle", "0"}, where...)...); code != exitDone {
		t.Fatal(talk)
	}
	testnet.NewClients(t, ns, 100, options.Addr).Ask()
	drain := func(s *testnet.Server, timeout string, do func()) (code int, talk string) {
		w := &onText{text: " left\n", do: sync.OnceFunc(do)}
		args := append([]string{"drain", "--pid", strconv.Itoa(s.PID()), "--wait", "--timeout", timeout}, where...)
		code = run(args, &env{out: io.Discard, err: w})
		return code, w.all.String()
	}
	if code, talk := drain(lives, "1s", func() {}); code != exitTimeout {
		t.Errorf("it lives: exit code %d, %s", code, talk)
	}
	waited := false
	code, talk := drain(dies, "2m", func() {
		waited = true
		dies.Kill()
		testnet.StartServer(t, ns, options)
		if code, _, talk := rpsel(append([]string{"attach"}, where...)...); code != exitDone {
			t.Error(talk)
		}
		testnet.NewClients(t, ns, 100, options.Addr).Ask()
	})
	if code != exitDone || !waited {
		t.Errorf("it died: exit code %d, waited: %v, %s", code, waited, talk)
	}
}

// Who waits for a listener to drain is told when it does not do so any more,
// rather than kept waiting, or sent to stop a server that still has clients.
func TestDrainedNoLonger(t *testing.T) {
	const addr = "127.0.0.1:1194"
	ns, fs := testnet.New(t), testnet.BPFFS(t)
	testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
	attach := func() *loader.Group {
		live, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Proto: sockets.UDP, Port: 1194})
		if err != nil || len(live) != 1 {
			t.Fatalf("got %d groups, %v", len(live), err)
		}
		conn, err := sockets.TakeMember(live[0])
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		g, err := loader.FS(fs).Attach(conn, loader.Options{Settle: -1})
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	g := attach()
	defer g.Close()
	testnet.NewClients(t, ns, 50, addr).Ask()

	s := &scope{port: 1194, bpffs: fs}
	wait := func(timeout time.Duration) error {
		status, err := g.Status()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		return waitDrained(ctx, &env{out: io.Discard, err: io.Discard}, s, []chosen{{g, status.Listeners[0]}})
	}
	drain := func() {
		t.Helper()
		if err := g.Drain(0); err != nil {
			t.Fatal(err)
		}
	}
	drain()
	// The control: it drains on.
	if err := wait(2 * time.Second); err == nil || !strings.Contains(err.Error(), "left after --timeout") {
		t.Errorf("it drains: got %v", err)
	}
	if err := g.Resume(0); err != nil {
		t.Fatal(err)
	}
	const nomore = "127.0.0.1:1194 slot 0, "
	if err := wait(time.Minute); err == nil || !strings.Contains(err.Error(), "it drains no longer") || !strings.Contains(err.Error(), nomore) {
		t.Errorf("resumed: got %v", err)
	}
	drain()
	before, err := g.Status()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := loader.FS(fs).Detach(g.Key()); err != nil {
		t.Fatal(err)
	}
	listener := []chosen{{g, before.Listeners[0]}}
	ctx := context.Background()
	if err := waitDrained(ctx, &env{out: io.Discard, err: io.Discard}, s, listener); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("detached: got %v, want %v", err, loader.ErrNotAttached)
	}
	attach().Close()
	if err := waitDrained(ctx, &env{out: io.Discard, err: io.Discard}, s, listener); err == nil || !strings.Contains(err.Error(), "it drains no longer") {
		t.Errorf("attached anew: got %v", err)
	}
}

// Where nobody counts connections the wait for the last one is refused before
// anything drains; all else works.
func TestDrainUncounted(t *testing.T) {
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "tcp4", Addr: "127.0.0.1:1194", ReusePort: true})
	where := []string{"--bpffs", bpffs, "-N", ns.Path(), "--port", "1194", "--proto", "tcp"}
	if code, _, talk := rpsel(append([]string{"attach"}, where...)...); code != exitDone {
		t.Fatal(talk)
	}
	// What tells such a group from another is that this is not there.
	if err := os.Remove(filepath.Join(bpffs, "rpsel", fmt.Sprint(ns.Cookie()), "tcp_7f000001_1194", "counting")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"drain", "--slot", "0", "--wait"}, exitUnsupported, `slot 0, `},
		{[]string{"drain", "--slot", "0", "--wait"}, exitUnsupported, `connections are not counted, "rpsel check" says why`},
		{[]string{"status"}, exitDone, " active "},
		{[]string{"status", "-j"}, exitDone, `"connections":null`},
		{[]string{"drain", "--slot", "0"}, exitDone, ": draining, connections are not counted\n"},
		{[]string{"drain", "--slot", "0", "-j"}, exitDone, `"connections":null`},
		{[]string{"status"}, exitDone, " draining "},
	} {
		code, out, talk := rpsel(append(c.args, where...)...)
		if all := out + talk; code != c.code || !strings.Contains(all, c.says) || c.says == " active " && strings.Contains(all, "draining") {
			t.Errorf("%v: exit code %d, want %d and %q: %s", c.args, code, c.code, c.says, all)
		}
	}
}

// The wait for a TCP listener ends with the last connection that it accepted, not
// before, also if the server closes the listener meanwhile. The connections are of
// before the attach and after it.
func TestDrainWaitsForConnections(t *testing.T) {
	const addr = "127.0.0.1:1194"
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	o := testnet.ServerOptions{Network: "tcp4", Addr: addr, ReusePort: true, Name: "s0"}
	server := testnet.StartServer(t, ns, o)
	o.Name = "s1"
	testnet.StartServer(t, ns, o)
	where := []string{"--bpffs", bpffs, "-N", ns.Path(), "--port", "1194", "--proto", "tcp"}
	conns := map[string][]net.Conn{}
	dial := func(n int) {
		t.Helper()
		for range n {
			name := make([]byte, 8)
			err := ns.Do(func() error {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					return err
				}
				t.Cleanup(func() { c.Close() })
				n, err := c.Read(name)
				conns[string(name[:n])] = append(conns[string(name[:n])], c)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	dial(20)
	if code, out, talk := rpsel(append([]string{"attach", "--policy", "least"}, where...)...); code != exitDone || !strings.Contains(out, "CONNS") {
		t.Fatal(out, talk)
	}
	dial(20)
	mine := conns["s0"]
	if len(mine) < 3 || len(conns["s1"]) < 3 {
		t.Fatalf("connections: %d and %d", len(mine), len(conns["s1"]))
	}
	last := &onText{text: "\n1 connection left\n", do: sync.OnceFunc(func() { mine[0].Close() })}
	first := &onText{text: fmt.Sprintf("\n%d connections left\n", len(mine)), do: sync.OnceFunc(func() {
		dial(10)
		server.Close(0)
		for _, c := range mine[1:] {
			c.Close()
		}
	})}
	args := append([]string{"drain", "--slot", "0", "--wait", "--timeout", "2m"}, where...)
	code := run(args, &env{out: io.Discard, err: io.MultiWriter(first, last)})
	if talk := last.all.String(); code != exitDone || !strings.Contains(talk, last.text) {
		t.Errorf("exit code %d: %s", code, talk)
	}
	if got := len(conns["s0"]); got != len(mine) {
		t.Errorf("%d new connections while it drained", got-len(mine))
	}
	// One look may come before the last ACK of a handshake.
	s := &scope{port: 1194, bpffs: bpffs}
	g, err := loader.FS(bpffs).Open(loader.Key{NetNS: ns.Cookie(), Proto: sockets.TCP, Addr: netip.MustParseAddrPort(addr)})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	drained := []chosen{{g, loader.Listener{Slot: 0}}}
	once, cancel := context.WithCancel(context.Background())
	cancel()
	for ctx, ends := range map[context.Context]bool{context.Background(): true, once: false} {
		if err := waitDrained(ctx, &env{out: io.Discard, err: io.Discard}, s, drained); (err == nil) != ends {
			t.Errorf("the wait for none ends well: %v, want %v", err, ends)
		}
	}
	code, out, talk := rpsel(append([]string{"status", "-j"}, where...)...)
	if want := fmt.Sprintf(`"connections":%d}`, len(conns["s1"])); code != exitDone || !strings.Contains(out, `"connections":0}`) || !strings.Contains(out, want) {
		t.Errorf("want %s, status %s %s", want, out, talk)
	}
}

// It waits for those, too, that waited to be accepted when their listener was
// registered, and were accepted only while it drains.
func TestDrainWaitsForAccepted(t *testing.T) {
	const addr, n = "127.0.0.1:1194", 5
	ns, bpffs := testnet.New(t), testnet.BPFFS(t)
	server := testnet.StartServer(t, ns, testnet.ServerOptions{Network: "tcp4", Addr: addr, ReusePort: true, Hold: true})
	where := []string{"--bpffs", bpffs, "-N", ns.Path(), "--port", "1194", "--proto", "tcp"}
	var conns []net.Conn
	for range n {
		err := ns.Do(func() error {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			conns = append(conns, c)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if code, out, talk := rpsel(append([]string{"attach"}, where...)...); code != exitDone {
		t.Fatal(out, talk)
	}
	last := &onText{text: "\n1 connection left\n", do: sync.OnceFunc(func() { conns[0].Close() })}
	first := &onText{text: fmt.Sprintf("\n%d connections left\n", n), do: sync.OnceFunc(func() {
		server.Accept()
		for i, c := range conns {
			if _, err := c.Read(make([]byte, 8)); err != nil {
				t.Error(err)
			}
			if i > 0 {
				c.Close()
			}
		}
	})}
	args := append([]string{"drain", "--slot", "0", "--wait", "--timeout", "2m"}, where...)
	code := run(args, &env{out: io.Discard, err: io.MultiWriter(first, last)})
	if talk := last.all.String(); code != exitDone || !strings.Contains(talk, last.text) {
		t.Errorf("exit code %d: %s", code, talk)
	}
}
