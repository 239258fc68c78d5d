package hosts

import (
	"strings"
	"testing"

	"github.com/rpsel/rpsel/internal/testnet"
)

const tracked = 200 // flows

// The commands of docs/hosts.md: no flow moves but those of a listener that dies,
// within its host, and those of a host that is removed.
func TestResilient(t *testing.T) {
	needResilient(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			page := testnet.OpenPage(t, "hosts.md")
			// On a busy machine no flow may be forgotten before it is asked again.
			patient := strings.NewReplacer("rpsel attach", "rpsel attach --idle 1h --idle-new 1h", "idle_timer 300", "idle_timer 3600")
			next := func() string { return patient.Replace(f.translate.Replace(page.Next())) }
			group, address, attach, more, drain, count, less, healthy := next(), next(), next(), next(), next(), next(), next(), next()
			w := newWorld(t, f)
			for _, h := range w.hosts {
				h.ns.Script(t, h.bpffs, address)
			}
			w.serve()
			for _, h := range w.hosts {
				h.ns.Script(t, h.bpffs, attach)
				h.ns.Script(t, h.bpffs, healthy)
			}
			w.router.Script(t, "/sys/fs/bpf", group)
			first := w.hosts[0]

			flows := w.flows(tracked)
			before := flows.AskAll()
			if shares := testnet.Shares(before); len(shares) != 2*listeners {
				t.Errorf("two hosts: %v", shares)
			}
			killed := first.servers[0].Names[0]
			first.servers[0].Kill()
			now := flows.AskAll()
			for i := range now {
				switch {
				case before[i] != killed && now[i] != before[i]:
					t.Errorf("a listener died: flow %d moved from %s to %s", i, before[i], now[i])
				case before[i] == killed && (now[i] == killed || first.at(now[i:i+1]) == 0):
					t.Errorf("a listener died: flow %d of it has %s", i, now[i])
				}
			}

			w.router.Script(t, "/sys/fs/bpf", more)
			if moved := testnet.Moved(now, flows.AskAll()); moved != 0 {
				t.Errorf("a host was added: %d flows moved", moved)
			}
			others := w.flows(tracked)
			came := others.AskAll()
			if n := w.hosts[2].at(came); n < 10 { // of 67, on average
				t.Errorf("the host that was added has %d of %d new flows", n, len(came))
			}

			w.router.Script(t, "/sys/fs/bpf", drain)
			if moved := testnet.Moved(now, flows.AskAll()) + testnet.Moved(came, others.AskAll()); moved != 0 {
				t.Errorf("a host drains: %d flows moved", moved)
			}
			// One in 25 of the buckets is in use at it.
			if n := first.at(w.flows(tracked).AskAll()); n > 50 {
				t.Errorf("the draining host has %d of %d new flows", n, tracked)
			}
			if left := strings.TrimSpace(first.ns.Script(t, first.bpffs, count)); left == "0" {
				t.Error("the draining host has no flow, though they send")
			}

			w.router.Script(t, "/sys/fs/bpf", less)
			for _, f := range []struct {
				flows  *testnet.Clients
				before []string
			}{{flows, now}, {others, came}} {
				after := f.flows.AskAll()
				if moved := testnet.Moved(f.before, after, first.names()...); moved != 0 {
					t.Errorf("a host was removed: %d flows of others moved", moved)
				}
				if n := first.at(after); n != 0 {
					t.Errorf("the host that was removed has %d flows", n)
				}
			}
			if n := first.at(before); n == 0 || n == tracked {
				t.Errorf("the first host had %d flows", n)
			}
		})
	}
}

// Without rpsel, and with the kernel's plain multipath routes, each of those steps moves
// flows that nothing has happened to.
func TestPlain(t *testing.T) {
	testnet.Privileged(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			w := newWorld(t, f)
			run := func(ns *testnet.NetNS, script string) {
				t.Helper()
				sh(t, ns, f.translate.Replace(script))
			}
			for _, h := range w.hosts {
				run(h.ns, "ip address add 203.0.113.80/32 dev lo")
			}
			w.serve()
			const policy = "echo 3 >/proc/sys/net/ipv4/fib_multipath_hash_policy; echo 0x37 >/proc/sys/net/ipv4/fib_multipath_hash_fields; "
			const route = "ip route replace 203.0.113.80/32"
			const host1, host2, host3 = " nexthop via 198.51.100.1 dev host1", " nexthop via 198.51.100.3 dev host2", " nexthop via 198.51.100.5 dev host3"
			run(w.router, policy+route+host1+host2)
			flows := w.flows(tracked)
			first := w.hosts[0]
			now := flows.AskAll()
			step := func(what string, do func(), gone ...string) {
				t.Helper()
				before := now
				do()
				now = flows.AskAll()
				moved := testnet.Moved(before, now, gone...)
				if moved == 0 {
					t.Errorf("%s: no flow moved", what)
				}
				t.Logf("%s: %d of %d flows moved", what, moved, tracked)
			}
			step("a listener killed", first.servers[0].Kill, first.servers[0].Names[0])
			step("a host added", func() { run(w.router, route+host1+host2+host3) })
			step("a host removed", func() { run(w.router, route+host2+host3) }, first.names()...)
		})
	}
}
