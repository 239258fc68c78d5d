package main

import (
	"io"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/rpsel/rpsel/internal/testnet"
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
