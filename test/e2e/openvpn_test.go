package e2e

import (
	"strings"
	"testing"
)

const (
	// window is how many seconds after the crash clients are watched.
	window = 40
	// quiet is how many seconds a client that lost its server without a word
	// needs to give up (keepalive 2 10), and some.
	quiet = 15
	// settle is time enough for every client to send a packet, by which rpsel
	// knows its flow (keepalive 2 10).
	settle = "5s"
)

// Of three servers the first is killed. Without rpsel the kernel sends packets
// of healthy servers' clients to a server that does not know them.
func TestOpenVPNCrashWithoutRpsel(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	r := newRpsel(t, v.servers, vpnPort)
	first := v.startServer(1, r.run()...)
	v.startServer(2, r.run()...)
	v.startServer(3, r.run()...)
	clients := v.connectUntil(12, 3, 2)

	from := v.round()
	first.kill()
	v.finish(from + window - 1)
	victims, lost := 0, 0
	for _, c := range append(on(clients, 2), on(clients, 3)...) {
		if n := v.lost(c.name, from, from+window); n > 0 {
			victims++
			lost += n
		}
	}
	healthy := len(clients) - len(on(clients, 1))
	t.Logf("%d of %d clients of healthy servers lost %d probes", victims, healthy, lost)
	// The last server moves to the place of the first, and loses all its flows.
	if want := len(on(clients, 3)); victims < want {
		t.Errorf("%d clients of healthy servers lost probes, want at least the %d of server 3", victims, want)
	}
}

// With rpsel the same crash hurts only the clients of the server that died, and
// its restart nobody.
func TestOpenVPNCrash(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	r := newRpsel(t, v.servers, vpnPort)
	defer r.explain()
	first := v.startServer(1, r.run()...)
	v.startServer(2, r.run()...)
	v.startServer(3, r.run()...)
	clients := v.connectUntil(12, 3, 2)
	own := on(clients, 1)
	others := append(on(clients, 2), on(clients, 3)...)

	from := v.round()
	r.attach("--settle", settle)
	crash := v.round() + 3 // until then every client has sent some packets
	v.finish(crash - 1)
	for _, c := range clients {
		if n := v.lost(c.name, from, crash); n > 0 {
			t.Errorf("%s on server %d lost %d probes while rpsel attached", c.name, c.first, n)
		}
	}

	first.kill()
	back := v.awaitBack(own)
	for _, c := range own {
		if v.lost(c.name, crash, back) == 0 {
			t.Errorf("%s lost no probe when its server died: the test is blind", c.name)
		}
	}
	again := v.startServer(1, r.run()...)
	r.awaitActive(again.cmd.Process.Pid) // registered by "rpsel run"
	r.attach()
	v.connectUntil(0, 1, 1)

	end := max(crash+window, v.round()+quiet)
	v.finish(end)
	for _, c := range others {
		if n := v.lost(c.name, crash, end); n > 0 {
			t.Errorf("%s on server %d lost %d probes of %d", c.name, c.first, n, end-crash)
		}
	}
	for _, c := range own {
		if n := v.lost(c.name, back, end); n > 0 {
			t.Errorf("%s was back, and lost %d probes of %d", c.name, n, end-back)
		}
	}
}

// A server without SO_REUSEPORT that is at work becomes one of two.
func TestOpenVPNSecondServer(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	r := newRpsel(t, v.servers, vpnPort)
	defer r.explain()
	v.startServer(1)
	old := v.connect(6)
	if log := v.launchServer(2, r.run()...).awaitEnd(t); !strings.Contains(log, "Address already in use") {
		t.Errorf("without rpsel attach a second server says %q, want that the address is in use", log)
	}

	from := v.round()
	r.attach("--adopt", "--settle", settle)
	second := v.startServer(2, r.run()...)
	r.awaitActive(second.cmd.Process.Pid)
	r.awaitSettled()
	v.connectUntil(4, 2, 2)

	end := v.round() + quiet
	v.finish(end)
	for _, c := range old {
		if n := v.lost(c.name, from, end); n > 0 {
			t.Errorf("%s lost %d probes of %d", c.name, n, end-from)
		}
	}
}
