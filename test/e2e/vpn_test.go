package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/rpsel/rpsel/internal/testnet"
)

const (
	vpnPort = 1194
	vpnUp   = "Initialization Sequence Completed"
	// maxClients bounds how many are started to have some on every server: the
	// chance that 80 leave one of three with fewer than two is 1 in 10^12.
	maxClients = 80
)

// vpn is a laboratory of unmodified OpenVPN servers on one UDP port of one
// namespace, and their clients in another. Server N has the device sN and the
// subnet 10.8.N.0/24, so that a client's address tells its server.
type vpn struct {
	*prober
	t       testing.TB
	openvpn string
	dir     string
	pki     *pki
	servers *testnet.NetNS
	options map[int]string // further lines of a server's configuration
	common  string         // further lines of every configuration
	natted  bool           // clients come through a NAT each
	clients []*client
}

// client is an OpenVPN client. Its name is that of its device, too.
type client struct {
	*daemon
	first int  // the server it got at first
	nat   *nat // what it comes through, or nil
}

// newVPN makes the two namespaces and starts probing.
func newVPN(t testing.TB) *vpn {
	t.Helper()
	testnet.Privileged(t)
	v := &vpn{t: t, openvpn: need(t, "openvpn"), dir: t.TempDir(), pki: newPKI(t), options: map[int]string{}}
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		(&testnet.Unavailable{What: "tun devices", Err: err}).Skip(t)
	}
	v.must(err)
	tun.Close()

	clients, servers := testnet.Pair(t)
	v.servers = servers
	v.must(clients.Do(func() error {
		for key, value := range map[string]string{
			"ping_group_range": "0 0", // who may use echo sockets
			// Clients of one server have routes for its subnet on several devices.
			"conf/all/rp_filter":     "0",
			"conf/default/rp_filter": "0",
		} {
			if err := os.WriteFile(filepath.Join("/proc/sys/net/ipv4", key), []byte(value), 0); err != nil {
				return err
			}
		}
		return nil
	}))
	v.prober = startProber(clients)
	t.Cleanup(v.end)
	return v
}

func (v *vpn) must(err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatal(err)
	}
}

// config writes a configuration file and returns its path.
func (v *vpn) config(name, text string) string {
	v.t.Helper()
	path := filepath.Join(v.dir, name+".conf")
	v.must(os.WriteFile(path, []byte(text), 0o600))
	return path
}

// startServer starts server n, behind the wrapping command line if there is
// one, and returns when it serves.
func (v *vpn) startServer(n int, wrap ...string) *daemon {
	v.t.Helper()
	d := v.launchServer(n, wrap...)
	d.await(v.t, vpnUp)
	return d
}

// launchServer is startServer without the wait.
func (v *vpn) launchServer(n int, wrap ...string) *daemon {
	v.t.Helper()
	name := fmt.Sprint("s", n)
	config := v.config(name, v.serverConfig(n))
	return startDaemon(v.t, v.servers, name, append(slices.Clone(wrap), v.openvpn, "--config", config)...)
}

// serverConfig is the configuration of server n.
func (v *vpn) serverConfig(n int) string {
	v.t.Helper()
	name := fmt.Sprint("s", n)
	return fmt.Sprintf(`
proto udp
port %d
dev-type tun
dev %s
topology subnet
server 10.8.%d.0 255.255.255.0
keepalive 2 10
dh none
setenv opt disable-dco
verb 3
%s
%s
`, vpnPort, name, n, v.options[n], v.common) + v.pki.server(v.t, name)
}

// connect starts clients together and returns them when all have a server that
// answers.
func (v *vpn) connect(n int) []*client {
	v.t.Helper()
	var started []*client
	for range n {
		number := len(v.clients) + len(started) + 1
		name := fmt.Sprint("c", number)
		c := &client{}
		remote := netip.AddrPortFrom(v.servers.IPv4, vpnPort)
		if v.natted {
			c.nat = newNAT(v.t, v.ns, number, remote)
			remote = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(c.nat.port()))
		}
		config := v.config(name, fmt.Sprintf(`
client
proto udp
remote %s %d
nobind
dev-type tun
dev %s
connect-retry 1 2
setenv opt disable-dco
verb 3
%s
`, remote.Addr(), remote.Port(), name, v.common)+v.pki.client(v.t, name))
		c.daemon = startDaemon(v.t, v.ns, name, v.openvpn, "--config", config)
		started = append(started, c)
	}
	for _, c := range started {
		c.await(v.t, vpnUp)
		v.must(v.ns.Do(func() (err error) {
			// The server may not be done with it yet.
			for range 3 {
				if c.first, err = ping(c.name); c.first != 0 || err != nil {
					break
				}
			}
			return err
		}))
		if c.first == 0 {
			v.t.Fatalf("%s is up but its server does not answer", c.name)
		}
		v.add(c.name)
	}
	v.clients = append(v.clients, started...)
	return started
}

// connectUntil starts clients, first so many and then a few at a time, until
// each of servers 1 to n has some of them, and returns those.
func (v *vpn) connectUntil(first, servers, each int) []*client {
	v.t.Helper()
	clients := v.connect(first)
	for {
		short := false
		for server := 1; server <= servers; server++ {
			short = short || len(on(clients, server)) < each
		}
		if !short {
			v.t.Logf("%d clients on %v", len(clients), shares(clients))
			return clients
		}
		if len(clients) >= maxClients {
			v.t.Fatalf("%d clients and not %d on each server: %v", len(clients), each, shares(clients))
		}
		clients = append(clients, v.connect(4)...)
	}
}

// on are the clients whose first server was a certain one.
func on(clients []*client, server int) []*client {
	return slices.DeleteFunc(slices.Clone(clients), func(c *client) bool { return c.first != server })
}

func shares(clients []*client) map[int]int {
	shares := make(map[int]int)
	for _, c := range clients {
		shares[c.first]++
	}
	return shares
}

// awaitBack returns the first round from now on in which each of the clients has
// an answer of another server, or any after it had none in a round since. It
// fails the test after a minute.
func (v *vpn) awaitBack(clients []*client, since int) (round int) {
	v.t.Helper()
	from := v.round()
	for round := from; round < from+60; round++ {
		v.finish(round)
		away := slices.DeleteFunc(slices.Clone(clients), func(c *client) bool {
			server := v.at(c.name, round)
			return server != 0 && (server != c.first || v.lost(c.name, since, round) > 0)
		})
		if len(away) == 0 {
			return round
		}
	}
	for _, c := range clients {
		v.t.Logf("%s on server %d lost %d probes", c.name, c.first, v.lost(c.name, since, from+60))
	}
	v.t.Fatal("not all clients lost their server and came back")
	return 0
}

// lostNone fails the test for each client that lost a probe in [from, to).
func (v *vpn) lostNone(what string, clients []*client, from, to int) {
	v.t.Helper()
	for _, c := range clients {
		if n := v.lost(c.name, from, to); n > 0 {
			v.t.Errorf("%s: %s on server %d lost %d probes of %d", what, c.name, c.first, n, to-from)
		}
	}
}
