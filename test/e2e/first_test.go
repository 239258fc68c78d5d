package e2e

import "testing"

const first = `first = "openvpn"`

// rebind gives every client another port, and returns the round from which on they have it.
func rebind(v *vpn, clients []*client) (from int) {
	from = v.round()
	for _, c := range clients {
		c.nat.rebind()
	}
	return from
}

// The NAT of every client gives it another port. Without --first most clients get
// another server, which does not know them.
func TestOpenVPNFloatWithoutFirst(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	v.natted = true
	r := newRpsel(t, v.servers, vpnPort)
	defer r.explain()
	for n := 1; n <= 3; n++ {
		v.startServer(n, r.run()...)
	}
	r.attach("--settle", "0s")
	clients := v.connectUntil(20, 3, 2)
	v.finish(v.round() + 3)

	from := rebind(v, clients)
	v.finish(from + quiet)
	lost := 0
	for _, c := range clients {
		if v.lost(c.name, from, from+quiet) > 0 {
			lost++
		}
	}
	t.Logf("%d of %d clients lost probes", lost, len(clients))
	if lost == 0 { // one in three stays by chance, all of 20 once in 10^9
		t.Errorf("none of %d clients lost probes", len(clients))
	}
}

// With it every tunnel survives, time and again, also on a server that drains.
func TestOpenVPNFloat(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	v.natted = true
	r := newRpsel(t, v.servers, vpnPort)
	defer r.explain()
	r.agent(settle, first)
	server := v.startServer(1, r.share()...)
	v.startServer(2, r.share()...)
	v.startServer(3, r.share()...)
	r.awaitActive(server.cmd.Process.Pid)
	r.awaitSettled()
	clients := v.connectUntil(12, 3, 2)
	v.finish(v.round() + 3) // until then every client has sent data, more than once

	from := rebind(v, clients)
	v.finish(from + quiet)
	v.lostNone("after all ports changed", clients, from, from+quiet)

	if out, err := r.outside("drain", "--slot", "0").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	again := rebind(v, clients)
	v.finish(again + quiet)
	v.lostNone("after all ports changed while a server drained", clients, again, again+quiet)
	for _, c := range clients {
		if server := v.at(c.name, again+quiet-1); server != c.first {
			t.Errorf("%s has server %d, after %d", c.name, server, c.first)
		}
	}
}

// While the group settles, a server that joins gets clients at once; without
// --first it gets none.
func TestOpenVPNSettling(t *testing.T) {
	for _, option := range []string{"--first=openvpn", "--policy=hash"} {
		t.Run(option, func(t *testing.T) {
			t.Parallel()
			v := newVPN(t)
			r := newRpsel(t, v.servers, vpnPort)
			defer r.explain()
			v.startServer(1, r.run()...)
			v.startServer(2, r.run()...)
			r.attach("--settle", "10m", option)
			third := v.startServer(3, r.run()...)
			r.awaitActive(third.cmd.Process.Pid)
			if option == "--first=openvpn" {
				clients := v.connectUntil(12, 3, 1)
				from := v.round()
				v.finish(from + 5)
				v.lostNone("while the group settles", clients, from, from+5)
				return
			}
			if clients := v.connect(12); len(on(clients, 3)) != 0 {
				t.Errorf("clients on %v, want none on the joiner", shares(clients))
			}
		})
	}
}
