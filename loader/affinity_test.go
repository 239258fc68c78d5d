package loader_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// anyAddress makes every address of 2001:db8::/32 the namespace's, as every one
// of 127.0.0.0/8 is.
func anyAddress(t testing.TB, ns *testnet.NetNS) {
	t.Helper()
	err := ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		_, all, _ := net.ParseCIDR("2001:db8::/32")
		return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: all, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// ports counts those that were given out by from. The kernel would choose one twice.
var ports atomic.Uint32

// from makes a socket of an address, and a port that none had before it, connected to
// a server.
func from(host, remote string) (fd int, err error) {
	to := netip.MustParseAddrPort(remote)
	local := netip.MustParseAddr(host)
	family := unix.AF_INET
	if local.Is6() {
		family = unix.AF_INET6
	}
	if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	name := func(a netip.AddrPort) unix.Sockaddr {
		if a.Addr().Is4() {
			return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
		}
		return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	}
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
	}
	if err == nil {
		err = unix.Bind(fd, name(netip.AddrPortFrom(local, uint16(20000+ports.Add(1)%40000))))
	}
	if err == nil {
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30})
	}
	if err == nil {
		err = unix.Connect(fd, name(to))
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("from %s to %s: %w", host, remote, err)
	}
	return fd, nil
}

// askFrom sends one payload from an address, from another port each time, and
// returns who answered.
func askFrom(t testing.TB, ns *testnet.NetNS, host, remote string, payload []byte) (server string) {
	t.Helper()
	err := ns.Do(func() error {
		fd, err := from(host, remote)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		server, err = question(fd, payload)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return server
}

// question sends a payload, and returns who answered.
func question(fd int, payload []byte) (string, error) {
	if _, err := unix.Write(fd, payload); err != nil {
		return "", err
	}
	buf := make([]byte, 2048)
	n, err := unix.Read(fd, buf)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(fd, buf)
	}
	if err != nil || n < len(payload) {
		return "", fmt.Errorf("answer of %d bytes: %w", n, err)
	}
	return string(buf[len(payload):n]), nil
}

// address is that of host h of network n, in the family of the remote.
func address(remote string, n, h int) string {
	if strings.HasPrefix(remote, "[") {
		return fmt.Sprintf("2001:db8:0:%x::%x", n<<8|h, h) // networks of /56
	}
	return fmt.Sprintf("127.7.%d.%d", n, h)
}

// With affinity client all ports of an address, and with a prefix all addresses
// of a network, have one listener, whoever leaves and joins. Affinity flow is
// the control, that sees them apart.
func TestAffinityClient(t *testing.T) {
	const networks, hosts, ports = 100, 2, 2
	for _, c := range []struct {
		affinity loader.Affinity
		prefix   loader.ClientPrefix
		rows     int
	}{
		{loader.AffinityFlow, loader.ClientPrefix{}, networks * hosts * ports},
		{loader.AffinityClient, loader.ClientPrefix{}, networks * hosts},
		{loader.AffinityClient, loader.ClientPrefix{V4: 24, V6: 56}, networks},
	} {
		for _, family := range some(cases[1:]) { // those that have several addresses
			if family.listen == "[::1]:1194" {
				continue
			}
			t.Run(fmt.Sprintf("%s %s %s from %s", c.affinity, c.prefix, family.listen, family.remote), func(t *testing.T) {
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				anyAddress(t, ns)
				remote := family.remote
				servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: family.network, Addr: family.listen, ReusePort: true})
				g := attach(t, fs, ns, loader.Options{Affinity: c.affinity, ClientPrefix: c.prefix, Settle: -1})

				// ask returns the servers of each host, and of each network.
				ask := func() (host, network [][]string) {
					network = make([][]string, networks)
					for n := range networks {
						for h := range hosts {
							var answers []string
							for range ports {
								answers = append(answers, askFrom(t, ns, address(remote, n, h+1), remote, []byte("0123")))
							}
							host = append(host, answers)
							network[n] = append(network[n], answers...)
						}
					}
					return host, network
				}
				split := func(list [][]string) (n int) {
					for _, answers := range list {
						if len(slices.Compact(slices.Sorted(slices.Values(answers)))) > 1 {
							n++
						}
					}
					return n
				}
				check := func(host, network [][]string) {
					t.Helper()
					if split(host) == 0 != (c.affinity == loader.AffinityClient) {
						t.Errorf("%d of %d addresses have more than one listener", split(host), len(host))
					}
					if split(network) == 0 != (c.prefix.V4 != 0) {
						t.Errorf("%d of %d networks have more than one listener", split(network), len(network))
					}
				}
				host, network := ask()
				check(host, network)
				var all []string
				for _, answers := range host {
					all = append(all, answers[0])
				}
				if shares := testnet.Shares(all); len(shares) != 4 {
					t.Errorf("shares %v, want 4 listeners", shares)
				}
				s := status(t, g)
				if s.Tracked != c.rows || s.Affinity != c.affinity || s.ClientPrefix != c.prefix || s.Settling != 0 {
					t.Errorf("%d rows, want %d, status %+v", s.Tracked, c.rows, s)
				}
				if c.affinity == loader.AffinityFlow {
					return
				}
				for f, err := range g.Flows() {
					if err != nil || f.Client.Port() != 0 || f.Hash != 0 {
						t.Errorf("flow %+v, %v", f, err)
					}
					if _, _, err := g.Where(f); !errors.Is(err, loader.ErrHashUnknown) {
						t.Errorf("where: %v", err)
					}
				}
				of := netip.PrefixFrom(netip.MustParseAddr(address(remote, 7, 2)), netip.MustParseAddr(address(remote, 7, 2)).BitLen())
				if n, err := g.Flush(func(f loader.Flow) bool { return f.From(of) }); n != 1 || err != nil {
					t.Errorf("flushed %d, %v", n, err)
				}
				if f, err := g.DetachForecast(); err != nil || f.Move != -1 || f.Flows != c.rows-1 {
					t.Errorf("forecast %+v, %v", f, err)
				}

				// The pick table gives what was flushed the same listener.
				again, _ := ask()
				if diff := cmp.Diff(host, again); diff != "" {
					t.Errorf("clients moved: %s", diff)
				}
				servers.Close(0)
				servers.Add()
				attach(t, fs, ns, loader.Options{})
				after, network := ask()
				check(after, network)
				moved := 0
				for i := range host {
					moved += testnet.Moved(host[i], after[i], "s0")
				}
				if moved != 0 {
					t.Errorf("%d flows of others moved", moved)
				}
			})
		}
	}
}

// With affinity bytes a session keeps its listener from any address; a packet
// too short for an id goes by its flow. Affinity client is the control.
func TestAffinityBytes(t *testing.T) {
	const sessions, addresses = 60, 4
	for _, c := range []struct {
		affinity loader.Affinity
		together bool
	}{
		{loader.AffinityBytes(1, 8), true},
		{loader.AffinityBytes(0, 20), false}, // more than the id
		{loader.AffinityClient, false},
	} {
		for _, family := range some(cases[1:]) {
			if family.listen == "[::1]:1194" {
				continue
			}
			t.Run(fmt.Sprintf("%s %s from %s", c.affinity, family.listen, family.remote), func(t *testing.T) {
				ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
				anyAddress(t, ns)
				remote := family.remote
				servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: family.network, Addr: family.listen, ReusePort: true})
				g := attach(t, fs, ns, loader.Options{Affinity: c.affinity, Settle: -1})
				ask := func(round byte) (answers [][]string) {
					for session := range sessions {
						// An opcode, the id, and what changes with each packet.
						packet := append([]byte{1}, binary.BigEndian.AppendUint64(nil, uint64(session))...)
						packet = append(packet, make([]byte, 16)...)
						var of []string
						for a := range addresses {
							packet[0], packet[12] = byte(a), round<<4|byte(a)
							of = append(of, askFrom(t, ns, address(remote, session, int(round)*addresses+a), remote, packet))
						}
						answers = append(answers, of)
					}
					return answers
				}
				before := ask(0)
				split := 0
				for _, of := range before {
					if len(slices.Compact(slices.Sorted(slices.Values(of)))) > 1 {
						split++
					}
				}
				if split == 0 != c.together {
					t.Errorf("%d sessions have more than one listener", split)
				}
				if !c.together {
					return
				}
				if s := status(t, g); s.Tracked != sessions || s.Affinity != c.affinity {
					t.Errorf("status %+v", s)
				}
				servers.Close(2)
				after := ask(1)
				for i := range before {
					if testnet.Moved(before[i], after[i], "s2") != 0 || len(slices.Compact(slices.Sorted(slices.Values(after[i])))) > 1 {
						t.Errorf("session %d: %v, then %v", i, before[i], after[i])
					}
				}

				// A byte short: the port counts, and the answer stays.
				var answers []string
				const short = 60
				packet := make([]byte, 8)
				err := ns.Do(func() error {
					for range short {
						fd, err := from(address(remote, 1, 1), remote)
						if err != nil {
							return err
						}
						defer unix.Close(fd)
						first, err := question(fd, packet)
						if err != nil {
							return err
						}
						second, err := question(fd, packet[:4])
						if err != nil || second != first {
							return fmt.Errorf("%s, then %s: %w", first, second, err)
						}
						answers = append(answers, first)
					}
					return nil
				})
				if s := status(t, g); err != nil || len(testnet.Shares(answers)) != 3 || s.Tracked != sessions+short || s.Counters.ParseError != 0 {
					t.Errorf("short packets: %v, shares %v, status %+v", err, testnet.Shares(answers), s)
				}
			})
		}
	}
}

// With affinity none each packet of a flow goes to any listener, by its weight,
// and nothing is tracked; a draining one gets none.
func TestAffinityNone(t *testing.T) {
	const packets = 3000
	for _, c := range some(cases) {
		t.Run(fmt.Sprintf("%s from %s", c.listen, c.remote), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: c.network, Addr: c.listen, ReusePort: true})
			g := attach(t, fs, ns, loader.Options{Affinity: loader.AffinityNone})
			host := "127.0.0.1"
			if strings.HasPrefix(c.remote, "[") {
				host = "::1"
			}
			ask := func() map[string]int {
				var answers []string
				err := ns.Do(func() error {
					fd, err := from(host, c.remote)
					if err != nil {
						return err
					}
					defer unix.Close(fd)
					for range packets {
						server, err := question(fd, []byte("0123"))
						if err != nil {
							return err
						}
						answers = append(answers, server)
					}
					return nil
				})
				if err != nil {
					t.Errorf("packet %d: %v", len(answers), err)
					t.Fatalf("the program had %+v", status(t, g).Counters)
				}
				return testnet.Shares(answers)
			}
			expect := func(weights map[string]float64) {
				t.Helper()
				shares := ask()
				total := 0.0
				for _, w := range weights {
					total += w
				}
				for server, w := range weights {
					p := w / total
					// Six times the deviation, and what the pick table rounds.
					if off := math.Abs(float64(shares[server]) - packets*p); off > 6*math.Sqrt(packets*p*(1-p))+packets*0.01 {
						t.Errorf("%s has %d of %d packets with weights %v", server, shares[server], packets, weights)
					}
				}
				if len(shares) > len(weights) {
					t.Errorf("shares %v with weights %v", shares, weights)
				}
			}
			expect(map[string]float64{"s0": 1, "s1": 1, "s2": 1})
			if err := g.SetWeight(0, 3); err != nil {
				t.Fatal(err)
			}
			expect(map[string]float64{"s0": 3, "s1": 1, "s2": 1})
			if err := g.Drain(1); err != nil {
				t.Fatal(err)
			}
			expect(map[string]float64{"s0": 3, "s2": 1})
			s := status(t, g)
			if s.Affinity != loader.AffinityNone || s.Tracked != 0 || s.Counters.Untracked != 3*packets || s.Counters.Runs != 3*packets || s.Settling != 0 {
				t.Errorf("status %+v", s)
			}

			// The control: a flow that is tracked has one listener.
			if _, err := fs.Detach(g.Key()); err != nil {
				t.Fatal(err)
			}
			attach(t, fs, ns, loader.Options{})
			if shares := ask(); len(shares) != 1 {
				t.Errorf("affinity flow: shares %v", shares)
			}
		})
	}
}

// The affinity, its prefix, its keys and the flows outlive an upgrade.
func TestAffinityUpgrade(t *testing.T) {
	for _, o := range []loader.Options{
		{Affinity: loader.AffinityClient, ClientPrefix: loader.ClientPrefix{V4: 30, V6: 64}},
		{Affinity: loader.AffinityBytes(2, 4)},
	} {
		t.Run(string(o.Affinity), func(t *testing.T) {
			ns, root := testnet.New(t), testnet.BPFFS(t)
			testnet.StartGroup(t, ns, 4, udpServer)
			g := attach(t, loader.FS(root), ns, o)
			ask := func() (answers []string) {
				for i := range 200 {
					packet := binary.BigEndian.AppendUint64(nil, uint64(i)<<16)
					answers = append(answers, askFrom(t, ns, fmt.Sprintf("127.9.%d.%d", i/50, i%50*4+1), "127.0.0.1:1194", packet))
				}
				return answers
			}
			before := ask()
			defer loader.OtherProgram()()
			for _, flows := range []int{0, 2000} {
				u, err := loader.FS(root).Upgrade(g.Key(), loader.UpgradeOptions{Flows: flows})
				if err != nil || u.UpToDate || !u.Program {
					t.Fatalf("%+v, %v", u, err)
				}
				if diff := cmp.Diff(before, ask()); diff != "" {
					t.Errorf("clients moved: %s", diff)
				}
			}
			// With other keys they would all be new, and go elsewhere after a flush.
			g = open(t, root, g.Key())
			s := status(t, g)
			if s.Affinity != o.Affinity || s.ClientPrefix != o.ClientPrefix || s.Counters.New != 200 || s.Counters.Hit != 400 {
				t.Errorf("status %+v", s)
			}
			if n, err := g.Flush(nil); n != 200 || err != nil {
				t.Fatalf("flushed %d, %v", n, err)
			}
			if diff := cmp.Diff(before, ask()); diff != "" {
				t.Errorf("picked otherwise: %s", diff)
			}
		})
	}
}

// refusal is of options, with words of the error.
type refusal struct {
	o    loader.Options
	want string
}

// refuses tries options that an attach and its plan refuse, each in one line.
func refuses(t *testing.T, fs loader.FS, conn *sockets.Conn, refusals ...refusal) {
	t.Helper()
	for _, r := range refusals {
		_, err := fs.Attach(conn, r.o)
		_, planErr := fs.Plan(conn, r.o)
		for _, err := range []error{err, planErr} {
			if err == nil || !strings.Contains(err.Error(), r.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%+v: %v, want %q", r.o, err, r.want)
			}
			if strings.Contains(r.want, "fixed") != errors.Is(err, loader.ErrFixed) {
				t.Errorf("%+v: ErrFixed: %v", r.o, err)
			}
		}
	}
}

// What makes no sense is refused at once.
func TestAffinityRefused(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 1, udpServer)
	refuses(t, fs, member(t, ns),
		refusal{loader.Options{Affinity: "bytes:0,0"}, "bytes:OFFSET,LENGTH"},
		refusal{loader.Options{Affinity: "bytes:2000,1"}, "bytes:OFFSET,LENGTH"},
		refusal{loader.Options{Affinity: "server"}, "use flow, client"},
		refusal{loader.Options{ClientPrefix: loader.ClientPrefix{V4: 24, V6: 56}}, "it goes with affinity client"},
		refusal{loader.Options{Affinity: loader.AffinityClient, ClientPrefix: loader.ClientPrefix{V4: 33}}, "such as 24/56"})
}

// What is fixed while attached is refused with the way out, and all is as before, its
// idle times too; the same anew is no change.
func TestFixed(t *testing.T) {
	const detach = ": detach it, and attach it with that"
	dir := inCgroup(t)
	prefix := loader.ClientPrefix{V4: 24, V6: 56}
	for _, c := range []struct {
		name     string
		o        loader.Options
		refusals []refusal
	}{
		{"defaults", loader.Options{}, []refusal{
			{loader.Options{Flows: 1000}, `flows 1000: fixed while attached, with 262144: "rpsel upgrade --flows 1000" changes it`},
			{loader.Options{Affinity: loader.AffinityClient}, "affinity client: fixed while attached, with flow" + detach},
			{loader.Options{First: loader.FirstOpenVPN}, "first openvpn: fixed while attached, with none" + detach},
			{loader.Options{Confirm: loader.ConfirmReply}, "confirm reply: fixed while attached, with client" + detach},
		}},
		{"affinity client", loader.Options{Affinity: loader.AffinityClient, ClientPrefix: prefix}, []refusal{
			{loader.Options{Affinity: loader.AffinityFlow}, "affinity flow: fixed while attached, with client" + detach},
			{loader.Options{Affinity: loader.AffinityNone}, "affinity none: fixed while attached, with client" + detach},
			{loader.Options{Affinity: loader.AffinityBytes(0, 4)}, "affinity bytes:0,4: fixed while attached, with client" + detach},
			{loader.Options{Affinity: loader.AffinityClient, ClientPrefix: loader.ClientPrefix{V4: 24, V6: 64}},
				"client prefix 24/64: fixed while attached, with 24/56" + detach},
		}},
		{"affinity bytes", loader.Options{Affinity: "bytes:00,04"}, []refusal{
			{loader.Options{Affinity: "bytes:01,4"}, "affinity bytes:1,4: fixed while attached, with bytes:0,4" + detach},
			{loader.Options{Affinity: "bytes:0,04x"}, "bytes:OFFSET,LENGTH"},
		}},
		{"first and confirm", loader.Options{Flows: 1000, Affinity: loader.AffinityFlow, First: loader.FirstOpenVPN, Confirm: loader.ConfirmReply}, []refusal{
			{loader.Options{Flows: 2000}, "flows 2000: fixed while attached, with 1000"},
			{loader.Options{Confirm: loader.ConfirmClient}, "confirm client: fixed while attached, with reply" + detach},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			o := udpServer
			o.Cgroup = dir
			testnet.StartGroup(t, ns, 2, o)
			var g *loader.Group
			for range 2 { // the second has nothing to do
				g = attach(t, fs, ns, c.o)
			}
			id, err := g.ProgramID()
			if err != nil {
				t.Fatal(err)
			}
			conn := member(t, ns) // held from now on, and so in what both looks see
			before := status(t, g)
			for i := range c.refusals {
				c.refusals[i].o.Idle, c.refusals[i].o.Policy = time.Minute, loader.PolicyLeast
			}
			refuses(t, fs, conn, c.refusals...)
			after := status(t, g)
			if now, err := g.ProgramID(); now != id || err != nil {
				t.Errorf("program %d, %d before, %v", now, id, err)
			}
			if after.Settling > 0 {
				after.Settling = before.Settling
			}
			if diff := cmp.Diff(before, after, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
				// Time goes on.
				cmpopts.IgnoreFields(loader.Status{}, "Age"), cmpopts.IgnoreFields(loader.Listener{}, "Joined")); diff != "" {
				t.Errorf("not as before: %s", diff)
			}
		})
	}
}

// With TCP all connections of an address have one listener; by default, the
// control, they have several.
func TestAffinityTCP(t *testing.T) {
	for _, affinity := range []loader.Affinity{loader.AffinityClient, loader.AffinityNone} {
		t.Run(string(affinity), func(t *testing.T) {
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 4, testnet.ServerOptions{Network: "tcp6", Addr: "[::]:1194", ReusePort: true})
			clients := testnet.NewTCPClients(t, ns, 100, "127.0.0.1:1194")
			conn := member(t, ns)
			for _, refused := range []loader.Affinity{loader.AffinityFlow, loader.AffinityBytes(0, 4)} {
				if _, err := fs.Attach(conn, loader.Options{Affinity: refused}); err == nil || !strings.Contains(err.Error(), "for TCP use client or none") {
					t.Errorf("%s: %v", refused, err)
				}
			}
			conn.Close() // or it would keep that listener alive
			g := attach(t, fs, ns, loader.Options{Affinity: affinity})
			shares := testnet.Shares(clients.Ask())
			if len(shares) == 1 != (affinity == loader.AffinityClient) || shares[""] != 0 {
				t.Errorf("shares %v", shares)
			}
			if affinity == loader.AffinityNone {
				return
			}
			for i, name := range servers.Names {
				if shares[name] > 0 {
					servers.Close(i)
				}
			}
			after := testnet.Shares(clients.Ask())
			s := status(t, g)
			if len(after) != 1 || after[""] != 0 || s.Tracked != 1 || s.Counters.New != 1 || s.Counters.Rehomed != 1 {
				t.Errorf("shares %v, then %v, status %+v", shares, after, s)
			}
		})
	}
}
