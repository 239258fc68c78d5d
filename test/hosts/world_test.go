package hosts

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/rpsel/rpsel/internal/testnet"
)

func TestMain(m *testing.M) { testnet.Main(m) }

// Of each host.
const listeners = 4

// family is what differs between IPv4 and IPv6.
type family struct {
	name, network string
	service       string // the address, in brackets if need be
	translate     *strings.Replacer
}

// The page speaks of IPv4.
var families = []family{
	{"IPv4", "udp4", "203.0.113.80", strings.NewReplacer()},
	{"IPv6", "udp6", "[2001:db8:80::80]", strings.NewReplacer(
		"203.0.113.80/32 dev lo", "2001:db8:80::80/128 dev lo nodad", // usable at once
		"203.0.113.80/32", "2001:db8:80::80/128", "/ipv4/", "/ipv6/",
		"198.51.100.1", "2001:db8:1::1", "198.51.100.3", "2001:db8:2::1", "198.51.100.5", "2001:db8:3::1")},
}

// host is one with servers.
type host struct {
	ns      *testnet.NetNS
	bpffs   string
	servers []*testnet.Server
}

// names are of the listeners.
func (h *host) names() (names []string) {
	for _, s := range h.servers {
		names = append(names, s.Names...)
	}
	return names
}

// world is a client, a router, and hosts behind that.
type world struct {
	t       testing.TB
	family  family
	clients *testnet.NetNS
	router  *testnet.NetNS
	hosts   []*host
}

// newWorld makes it, with three hosts whose servers run, without a route to them.
func newWorld(t testing.TB, f family) *world {
	t.Helper()
	w := &world{t: t, family: f, clients: testnet.New(t), router: testnet.New(t)}
	testnet.Cable(t, testnet.End{NS: w.clients, Device: "up", Addrs: []string{"192.0.2.2/24", "2001:db8::2/64"}},
		testnet.End{NS: w.router, Device: "clients", Addrs: []string{"192.0.2.1/24", "2001:db8::1/64"}})
	sh(t, w.clients, "ip route add default via 192.0.2.1; ip route add default via 2001:db8::1")
	sh(t, w.router, "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
	for i := range 3 {
		h := &host{ns: testnet.New(t), bpffs: testnet.BPFFS(t)}
		w.hosts = append(w.hosts, h)
		four := func(last int) string { return fmt.Sprintf("198.51.100.%d", 2*i+last) }
		six := func(last int) string { return fmt.Sprintf("2001:db8:%d::%d", i+1, last) }
		testnet.Cable(t, testnet.End{NS: h.ns, Device: "up", Addrs: []string{four(1) + "/31", six(1) + "/64"}},
			testnet.End{NS: w.router, Device: fmt.Sprint("host", i+1), Addrs: []string{four(0) + "/31", six(2) + "/64"}})
		sh(t, h.ns, "ip route add default via "+four(0)+"; ip route add default via "+six(2))
	}
	return w
}

// serve starts the servers of all hosts.
func (w *world) serve() {
	w.t.Helper()
	for i, h := range w.hosts {
		for l := range listeners {
			h.servers = append(h.servers, testnet.StartServer(w.t, h.ns, testnet.ServerOptions{
				Network: w.family.network, Addr: w.family.service + ":1194", ReusePort: true,
				Name: fmt.Sprintf("host%d-%c", i+1, 'a'+l),
			}))
		}
	}
}

// flows are n new ones.
func (w *world) flows(n int) *testnet.Clients {
	w.t.Helper()
	return testnet.NewClients(w.t, w.clients, n, w.family.service+":1194")
}

// at counts answers of a host.
func (h *host) at(answers []string) (n int) {
	for _, a := range answers {
		if slices.Contains(h.names(), a) {
			n++
		}
	}
	return n
}

// sh runs a script in a namespace.
func sh(t testing.TB, ns *testnet.NetNS, script string) {
	t.Helper()
	if out, err := ns.Command("sh", "-euc", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// needResilient skips the test where the kernel has no resilient next-hop groups
// (before Linux 5.13), or ip(8) does not know them.
func needResilient(t testing.TB) {
	t.Helper()
	testnet.Privileged(t)
	const probe = "ip nexthop add id 1 blackhole; ip nexthop add id 2 group 1 type resilient buckets 8"
	out, err := testnet.New(t).Command("sh", "-euc", probe).CombinedOutput()
	if _, ended := errors.AsType[*exec.ExitError](err); ended {
		(&testnet.Unavailable{What: "resilient next-hop groups", Err: errors.New(string(out))}).Skip(t)
	}
	if err != nil {
		t.Fatal(err)
	}
}
