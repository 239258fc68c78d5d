package main

import (
	"context"
	"errors"
	"io"
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
	code, talk := drain(dies, "10s", func() {
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
	wait := func() error {
		status, err := g.Status()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
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
	if err := wait(); err == nil || !strings.Contains(err.Error(), "left after --timeout") {
		t.Errorf("it drains: got %v", err)
	}
	if err := g.Resume(0); err != nil {
		t.Fatal(err)
	}
	const nomore = "127.0.0.1:1194 slot 0, "
	if err := wait(); err == nil || !strings.Contains(err.Error(), "it drains no longer") || !strings.Contains(err.Error(), nomore) {
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
