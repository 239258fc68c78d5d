package loader_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
)

// Packets of OpenVPN, as long as the program looks at them, and a bit.
func openvpn(opcode byte) []byte { return append([]byte{opcode << 3}, "session1"...) }

func data(peer int) []byte {
	return append([]byte{9<<3 | 1, byte(peer >> 16), byte(peer >> 8), byte(peer)}, "sealed"...)
}

// vpnLab is a group with clients that each have an address of their own, and may
// go on with another port.
type vpnLab struct {
	t       *testing.T
	ns      *testnet.NetNS
	fs      loader.FS
	g       *loader.Group
	servers *testnet.Server
	remote  string
}

// session is a client's present socket.
type session struct {
	fd    int
	first string // who answered the first packet
}

func newVPNLab(t *testing.T, network, listen, remote string, listeners int, o loader.Options) *vpnLab {
	t.Helper()
	l := &vpnLab{t: t, ns: testnet.New(t), fs: loader.FS(testnet.BPFFS(t)), remote: remote}
	anyAddress(t, l.ns)
	servers := testnet.ServerOptions{Network: network, Addr: listen, ReusePort: true}
	if o.Confirm == loader.ConfirmReply {
		servers.Cgroup = inCgroup(t)
	}
	l.servers = testnet.StartGroup(t, l.ns, listeners, servers)
	l.g = attach(t, l.fs, l.ns, o)
	return l
}

func newV4Lab(t *testing.T, listeners int, o loader.Options) *vpnLab {
	t.Helper()
	return newVPNLab(t, "udp4", "127.0.0.1:1194", "127.0.0.1:1194", listeners, o)
}

var withFirst = loader.Options{Settle: -1, IdleNew: time.Hour, First: loader.FirstOpenVPN}

func (l *vpnLab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// host is the address of client i.
func (l *vpnLab) host(i int) string { return address(l.remote, i/200, i%200+1) }

// open sends the first packet of a new port of client i.
func (l *vpnLab) open(i int, packet []byte) session {
	l.t.Helper()
	var s session
	l.must(l.ns.Do(func() (err error) {
		s.fd, err = from(l.host(i), l.remote)
		return err
	}))
	l.t.Cleanup(func() { unix.Close(s.fd) })
	s.first = l.ask(s, packet)
	return s
}

func (l *vpnLab) ask(s session, packet []byte) string {
	l.t.Helper()
	server, err := question(s.fd, packet)
	l.must(err)
	return server
}

// float is the answer to a data packet from another port of client i.
func (l *vpnLab) float(i int) string {
	l.t.Helper()
	return l.open(i, data(own(i))).first
}

// dataUntil sends data, of each session with the number that peer gives, until so
// many clients are known as want says, with the property.
func (l *vpnLab) dataUntil(sessions []session, peer func(i int) int, what string, done func(map[string]loader.Peer) bool) {
	l.t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		for i, s := range sessions {
			if got := l.ask(s, data(peer(i))); got != s.first {
				l.t.Fatalf("client %d: %s answers, after %s", i, got, s.first)
			}
		}
		peers, err := l.g.Peers()
		l.must(err)
		if done(peers) {
			return
		}
	}
	peers, _ := l.g.Peers()
	l.t.Fatalf("%s: not within seconds: %v", what, peers)
}

// clients begins the sessions of n clients, and
// returns when all are known.
func (l *vpnLab) clients(n int) []session {
	l.t.Helper()
	var sessions []session
	for i := range n {
		sessions = append(sessions, l.open(i, openvpn(7)))
	}
	l.dataUntil(sessions, own, "known", func(peers map[string]loader.Peer) bool { return len(peers) == n })
	return sessions
}

// own is the peer-id of a client. Another one has the same, at another address.
func own(i int) int { return i / 2 }

func answers(sessions []session) (list []string) {
	for _, s := range sessions {
		list = append(list, s.first)
	}
	return list
}

// rules counts the flows by what is told of how they got their listener.
func (l *vpnLab) rules() map[string]int {
	l.t.Helper()
	n := map[string]int{}
	for f, err := range l.g.Flows() {
		l.must(err)
		if f.Since > f.Age {
			l.t.Errorf("flow %+v has its listener for longer than it is there", f)
		}
		switch {
		case f.Rehomed:
			n["rehomed"]++
		case f.First:
			n["first"]++
		case f.Floated:
			n["float"]++
		case f.Settling:
			n["settling"]++
		default:
			n["plain"]++
		}
	}
	return n
}

// While the group settles, a joiner gets its share of the flows that open a session,
// which stay; all others are left where the kernel has them. Without the option it
// gets none.
func TestFirstPackets(t *testing.T) {
	const n = 120 // of each kind
	for _, c := range some(append(cases[1:2:2], cases[3:]...)) {
		for _, first := range []loader.First{loader.FirstOpenVPN, ""} {
			t.Run(fmt.Sprintf("%s from %s, first %s", c.listen, c.remote, first), func(t *testing.T) {
				l := newVPNLab(t, c.network, c.listen, c.remote, 2, loader.Options{First: first})
				l.servers.Add()
				attach(t, l.fs, l.ns, loader.Options{})
				open := func(packet []byte) (sessions []session) {
					for i := range n {
						sessions = append(sessions, l.open(i, packet))
					}
					return sessions
				}
				var sessions []session
				for _, opcode := range []byte{7, 10} {
					some := open(openvpn(opcode))
					shares := testnet.Shares(answers(some))
					if first == "" && shares["s2"] != 0 {
						t.Errorf("opcode %d: shares %v, want none for the joiner", opcode, shares)
					}
					if first != "" && min(shares["s0"], shares["s1"], shares["s2"]) < n/12 {
						t.Errorf("opcode %d: shares %v", opcode, shares)
					}
					sessions = append(sessions, some...)
				}
				if want := map[bool]string{true: "first", false: "settling"}[first != ""]; l.rules()[want] != 2*n {
					t.Errorf("rules %v, want %d of %s", l.rules(), 2*n, want)
				}
				for _, packet := range [][]byte{openvpn(4), openvpn(8), data(3), openvpn(7)[:3], {}, []byte("7")} {
					some := open(packet)
					if shares := testnet.Shares(answers(some)); shares["s2"] != 0 {
						t.Errorf("%x: shares %v, want none for the joiner", packet, shares)
					}
					sessions = append(sessions, some...)
				}
				for _, packet := range [][]byte{openvpn(4), data(5)} {
					for i, s := range sessions {
						if got := l.ask(s, packet); got != s.first {
							t.Fatalf("flow %d moved from %s to %s", i, s.first, got)
						}
					}
				}
				l.must(l.g.Drain(0))
				if first != "" {
					if shares := testnet.Shares(answers(open(openvpn(7)))); shares["s0"] != 0 || len(shares) != 2 {
						t.Errorf("shares %v while s0 drains", shares)
					}
				} else {
					open(openvpn(7))
				}
				s := status(t, l.g)
				if want := (loader.Counters{Runs: 25 * n, New: 9 * n, Hit: 16 * n}); s.Counters != want || s.First != first || s.Settling == 0 {
					t.Errorf("status %+v, want counters %+v", s, want)
				}
			})
		}
	}
}

// What the kernel had it keeps: the hint is for flows that open a session, not for
// those of before the attach.
func TestFirstMovesNothing(t *testing.T) {
	t.Parallel()
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 3, udpServer)
	l := &vpnLab{t: t, ns: ns, fs: fs, remote: "127.0.0.1:1194"}
	var sessions []session
	for i := range 100 {
		// Two of each address, that have the same number.
		sessions = append(sessions, l.open(i/2, openvpn(7)))
	}
	l.g = attach(t, fs, ns, loader.Options{First: loader.FirstOpenVPN})
	both := func(peers map[string]loader.Peer) bool { return len(peers) == 50 }
	// The first of each is known before the second is heard of.
	var earlier []session
	for i := 0; i < len(sessions); i += 2 {
		earlier = append(earlier, sessions[i])
	}
	l.dataUntil(earlier, own, "known", both)
	l.dataUntil(sessions, func(i int) int { return own(i / 2) }, "known", both)
}

// Without room for an entry the hint would not last: then it is none. All packets of
// a flow have one answer, also once there is room, and the joiner gives none.
func TestFirstTableFull(t *testing.T) {
	l := newV4Lab(t, 2, loader.Options{Flows: 64, First: loader.FirstOpenVPN})
	l.servers.Add()
	attach(t, l.fs, l.ns, loader.Options{})
	l.must(l.g.Fill(2*64, maps.Established))
	if n, err := l.g.Entries(); err != nil || n < 96 {
		t.Fatalf("%d entries, %v", n, err)
	}
	shares := map[string]int{}
	var sessions []session
	for i := range 60 {
		l.must(l.g.HadRoom()) // each is the first that finds none
		s := l.open(i, openvpn(7))
		shares[s.first]++
		sessions = append(sessions, s)
	}
	for i, packet := range [][]byte{openvpn(4), openvpn(7)} {
		if i == 1 {
			l.must(l.g.Fill(2*64, maps.Empty))
		}
		for j, s := range sessions {
			if got := l.ask(s, packet); got != s.first {
				t.Errorf("flow %d moved from %s to %s", j, s.first, got)
			}
		}
	}
	if shares["s2"] != 0 || len(shares) != 2 {
		t.Errorf("shares %v", shares)
	}
	if s := status(t, l.g); s.Counters.Untracked != 120 || s.Counters.TableFull != 120 || s.Counters.New != 60 {
		t.Errorf("counters %+v", s.Counters)
	}
}

// A client that goes on from another port has the listener it had, time and again,
// also after an upgrade, whatever confirms a flow. Without the option, the control, many do not.
func TestFloat(t *testing.T) {
	const n = 60
	for _, c := range some(append(cases[1:2:2], cases[3:]...)) {
		for _, o := range []loader.Options{withFirst, {Settle: -1, IdleNew: time.Hour, First: loader.FirstOpenVPN, Confirm: loader.ConfirmReply}, noSettle} {
			t.Run(fmt.Sprintf("%s from %s, first %s, confirm %s", c.listen, c.remote, o.First, o.Confirm), func(t *testing.T) {
				l := newVPNLab(t, c.network, c.listen, c.remote, 3, o)
				t.Parallel()
				if o.First == "" {
					moved := 0
					for i := range n {
						if l.float(i) != l.open(i, openvpn(7)).first {
							moved++
						}
					}
					if peers, err := l.g.Peers(); moved < n/4 || err != nil || len(peers) != 0 {
						t.Errorf("%d of %d have another listener, peers %v, %v", moved, n, peers, err)
					}
					return
				}
				sessions := l.clients(n)
				before := status(t, l.g).Counters
				for round := range 3 {
					if round == 1 {
						u, err := l.fs.Upgrade(l.g.Key(), loader.UpgradeOptions{})
						if err != nil || !u.Program || len(u.Made) != 0 {
							t.Fatalf("%+v, %v", u, err)
						}
						l.g = open(t, string(l.fs), l.g.Key())
					}
					for i := range sessions {
						s := l.open(i, data(own(i)))
						if s.first != sessions[i].first {
							t.Errorf("round %d: client %d floats from %s to %s", round, i, sessions[i].first, s.first)
						}
						sessions[i] = s
					}
					l.dataUntil(sessions, own, "known", func(peers map[string]loader.Peer) bool { return len(peers) == n })
				}
				s := status(t, l.g)
				if s.Counters.New != before.New+3*n || s.Counters.Untracked != 0 || l.rules()["float"] != 3*n || s.First != o.First {
					t.Errorf("status %+v, %+v before, rules %v", s, before, l.rules())
				}

				// Only a data packet with a number is the client's. Others leave no trace.
				other := func(opcode byte, peer int) []byte {
					packet := data(peer)
					packet[0] = opcode << 3
					return packet
				}
				began, err := l.g.Now()
				l.must(err)
				l.dataUntil(sessions, own, "refreshed", func(peers map[string]loader.Peer) bool {
					for i, s := range sessions {
						for _, packet := range [][]byte{data(0xffffff), other(6, i+1000), other(4, i+1000)} {
							if got := l.ask(s, packet); got != s.first {
								t.Fatalf("client %d moved from %s to %s", i, s.first, got)
							}
						}
					}
					if len(peers) != n {
						t.Fatalf("peers %v, want %d", peers, n)
					}
					now, err := l.g.Now()
					l.must(err)
					return maps.Age(now, began) > 4
				})
				for what, packet := range map[string]func(i int) []byte{
					"another number": func(i int) []byte { return data(own(i) + 1) },
					"no number":      func(int) []byte { return data(0xffffff) },
					"data v1":        func(i int) []byte { return other(6, own(i)) },
					"a new session":  func(i int) []byte { return other(7, own(i)) },
					"too short":      func(i int) []byte { return data(own(i))[:3] },
				} {
					followed := 0
					for i := range sessions {
						if l.open(i, packet(i)).first == sessions[i].first {
							followed++
						}
					}
					if followed > n*3/4 {
						t.Errorf("%s: %d of %d went where the client was", what, followed, n)
					}
				}
			})
		}
	}
	t.Cleanup(loader.OtherProgram()) // for the upgrades: all have attached
}

// With confirm reply nobody is known by a number whom the server does not answer,
// however long he sends it. The control is confirm client.
func TestFloatUnanswered(t *testing.T) {
	const n = 10
	for confirm, want := range map[loader.Confirm]int{loader.ConfirmReply: 0, loader.ConfirmClient: n} {
		t.Run(string(confirm), func(t *testing.T) {
			t.Parallel()
			l := newV4Lab(t, 1, loader.Options{Settle: -1, First: loader.FirstOpenVPN, Confirm: confirm})
			l.must(unix.Kill(l.servers.PID(), unix.SIGSTOP)) // it is killed in the end
			var clients []int
			for i := range n {
				l.must(l.ns.Do(func() error {
					fd, err := from(l.host(i), l.remote)
					clients = append(clients, fd)
					return err
				}))
				t.Cleanup(func() { unix.Close(clients[i]) })
			}
			for range 2 {
				for i, fd := range clients {
					_, err := unix.Write(fd, data(own(i)))
					l.must(err)
				}
				await(t, l.fs, l.g.Key(), "two seconds begin", passed(t, 2))
			}
			peers, err := l.g.Peers()
			s := status(t, l.g)
			if established := s.Established; err != nil || len(peers) != want || established != want || s.Counters.Hit != n || s.Counters.New != n {
				t.Errorf("peers %v, %v, %d of %d flows established, %+v", peers, err, established, s.Tracked, s.Counters)
			}
		})
	}
}

// Two clients of one address that have the same number with two servers cannot be
// told apart: what comes from a third port is served as any new flow, as long as both are
// heard of, and until one of the two has been silent for as long as a flow may be.
func TestFloatAmbiguous(t *testing.T) {
	t.Parallel()
	const n, ports = 8, 12
	l := newV4Lab(t, 3, withFirst)
	var first, second []session
	for i := range n {
		a := l.open(i, openvpn(7))
		b := a
		for b.first == a.first {
			b = l.open(i, openvpn(7))
		}
		first, second = append(first, a), append(second, b)
	}
	followed := func() (count int) {
		for i := range n {
			for range ports {
				if l.float(i) == first[i].first {
					count++
				}
			}
		}
		return count
	}
	ambiguous := func(want bool) func(map[string]loader.Peer) bool {
		return func(peers map[string]loader.Peer) bool {
			for _, p := range peers {
				if p.Ambiguous != want {
					return false
				}
			}
			return len(peers) == n
		}
	}
	both := slices.Concat(first, second)
	l.dataUntil(both, func(i int) int { return own(i % n) }, "ambiguous", ambiguous(true))
	if f := followed(); f > n*ports*2/3 {
		t.Errorf("%d of %d follow one of two", f, n*ports)
	}
	const idle = uint32(loader.DefaultIdle / time.Second)
	l.must(l.g.AgePeers(idle - 60))
	l.dataUntil(both, func(i int) int { return own(i % n) }, "ambiguous as before", func(peers map[string]loader.Peer) bool {
		for _, p := range peers {
			if p.Heard > 100 {
				return false
			}
		}
		return ambiguous(true)(peers)
	})
	l.must(l.g.AgePeers(100))
	if f := followed(); f > n*ports*2/3 {
		t.Errorf("%d of %d follow one of two, though both send", f, n*ports)
	}

	// From now on nobody hears of the second ones. What the first ones send does not count.
	l.dataUntil(first, own, "the last to have been heard of", func(peers map[string]loader.Peer) bool {
		for i, s := range first {
			if p := peers[fmt.Sprintf("%s %d", l.host(i), own(i))]; fmt.Sprint("s", p.Slot) != s.first || !p.Ambiguous {
				return false
			}
		}
		return true
	})
	l.must(l.g.AgePeers(idle - 100))
	began, err := l.g.Now()
	l.must(err)
	l.dataUntil(first, own, "refreshed", func(map[string]loader.Peer) bool {
		now, err := l.g.Now()
		l.must(err)
		return maps.Age(now, began) > 2
	})
	l.must(l.g.AgePeers(150))
	l.dataUntil(first, own, "told apart", ambiguous(false))
	if f := followed(); f != n*ports {
		t.Errorf("%d of %d follow the only one", f, n*ports)
	}
	l.dataUntil(both, func(i int) int { return own(i % n) }, "ambiguous again", ambiguous(true))
	l.must(l.g.AgePeers(1 << 23)) // seconds have wrapped
	l.dataUntil(first, own, "told apart after half a year", ambiguous(false))
}

// Where a client was long ago says nothing, and a listener that is gone serves
// nobody: its clients are balanced, and found again where they were moved to.
func TestFloatGone(t *testing.T) {
	t.Parallel()
	const n = 60
	l := newV4Lab(t, 3, withFirst)
	sessions := l.clients(n)

	// A draining listener keeps its clients.
	l.must(l.g.Drain(1))
	drained := 0
	for i := range sessions {
		s := l.open(i, data(own(i)))
		if s.first != sessions[i].first {
			t.Errorf("client %d floats from %s to %s", i, sessions[i].first, s.first)
		}
		if s.first == "s1" {
			drained++
		}
		if got := l.open(i, openvpn(7)).first; got == "s1" {
			t.Errorf("a new flow got the draining listener")
		}
	}
	if drained == 0 {
		t.Errorf("shares %v", testnet.Shares(answers(sessions)))
	}
	l.must(l.g.Resume(1))

	// The listener dies. Who floats before rpsel has heard of it is balanced, and so
	// is everybody else's flow at its next packet.
	l.servers.Close(1)
	var orphans, after []session
	var numbers []int
	for i, s := range sessions {
		floated := l.float(i)
		if s.first != "s1" && floated != s.first {
			t.Errorf("client %d of a healthy listener floats from %s to %s", i, s.first, floated)
		}
		if s.first == "s1" {
			orphans, numbers = append(orphans, s), append(numbers, i)
		}
		if s.first == "s1" && floated == "s1" {
			t.Errorf("client %d floats to a dead listener", i)
		}
	}
	for i, s := range orphans {
		after = append(after, session{s.fd, l.ask(s, data(own(numbers[i])))})
	}
	l.dataUntil(after, func(i int) int { return own(numbers[i]) }, "known after the rehome", func(peers map[string]loader.Peer) bool {
		for i, s := range after {
			p := peers[fmt.Sprintf("%s %d", l.host(numbers[i]), own(numbers[i]))]
			if p.Ambiguous || fmt.Sprint("s", p.Slot) != s.first {
				return false
			}
		}
		return true
	})
	for i, s := range after {
		if got := l.float(numbers[i]); got != s.first {
			t.Errorf("client %d was rehomed to %s, and floats to %s", numbers[i], s.first, got)
		}
	}

	// Expired, and so it is when seconds have wrapped.
	for _, ago := range []uint32{uint32(loader.DefaultIdle/time.Second) + 1, 1 << 23} {
		l.must(l.g.AgePeers(ago))
		followed, healthy := 0, 0
		for i, s := range sessions {
			if s.first == "s1" {
				continue
			}
			healthy++
			if l.float(i) == s.first {
				followed++
			}
		}
		if followed == healthy {
			t.Errorf("all of %d follow a flow of long ago", followed)
		}
	}
}

// A client whose listener dies while it gets another port is known by the new one: the
// dead one's word does not make it ambiguous, though nobody else has found it dead.
func TestFloatOrphan(t *testing.T) {
	t.Parallel()
	l := newV4Lab(t, 8, withFirst)
	sessions := l.clients(1)
	var dead int
	if _, err := fmt.Sscanf(sessions[0].first, "s%d", &dead); err != nil {
		t.Fatal(err)
	}
	l.servers.Close(dead)
	s := l.open(0, data(0))
	if s.first == sessions[0].first {
		t.Fatalf("%s answers after its close", s.first)
	}
	l.dataUntil([]session{s}, own, "known anew", func(peers map[string]loader.Peer) bool {
		p := peers[l.host(0)+" 0"]
		if p.Ambiguous {
			t.Fatalf("peers %v", peers)
		}
		return fmt.Sprint("s", p.Slot) == s.first
	})
	for range 5 {
		if got := l.float(0); got != s.first {
			t.Errorf("floats from %s to %s", s.first, got)
		}
	}
}

// Where there was no room lately an unknown flow may be an old one, that somebody
// else's number must not move: a float is served as any other, the same each time, and
// also once there is room again.
func TestFloatTableFull(t *testing.T) {
	t.Parallel()
	const n = 40
	l := newV4Lab(t, 3, loader.Options{Flows: 64, Settle: -1, First: loader.FirstOpenVPN})
	sessions := l.clients(n)
	l.must(l.g.Fill(2*64, maps.Established))
	before := status(t, l.g).Counters
	followed := 0
	var floats []session
	for i := range n {
		l.must(l.g.HadRoom())
		s := l.open(i, data(own(i)))
		floats = append(floats, s)
		if s.first == sessions[i].first {
			followed++
		}
		for range 2 {
			if got := l.ask(s, data(own(i))); got != s.first {
				t.Errorf("client %d: %s, then %s", i, s.first, got)
			}
		}
	}
	c := status(t, l.g).Counters
	if followed > n*4/5 || c.Untracked != before.Untracked+3*n || c.TableFull != before.TableFull+3*n {
		t.Errorf("%d of %d follow, counters %+v, then %+v", followed, n, before, c)
	}
	l.must(l.g.Fill(2*64, maps.Empty))
	for i, s := range floats {
		if got := l.ask(s, data(own(i))); got != s.first {
			t.Errorf("client %d: %s, and once there is room %s", i, s.first, got)
		}
	}
	if c := status(t, l.g).Counters; c.New != before.New+n {
		t.Errorf("counters %+v", c)
	}
}

// A table of another size: what flows are told to have their listener by stays; the
// numbers are forgotten if fewer are kept, and come back with the clients' data.
func TestFloatUpgradeFlows(t *testing.T) {
	t.Parallel()
	const n = 30
	l := newV4Lab(t, 3, withFirst)
	sessions := l.clients(n)
	for i := range sessions {
		sessions[i] = l.open(i, data(own(i)))
	}
	for _, c := range []struct {
		flows int
		kept  bool
	}{{300_000, true}, {1000, false}} {
		u, err := l.fs.Upgrade(l.g.Key(), loader.UpgradeOptions{Flows: c.flows})
		if err != nil || slices.Contains(u.Made, "peers") == c.kept {
			t.Fatalf("%+v, %v", u, err)
		}
		l.g = open(t, string(l.fs), l.g.Key())
		peers, err := l.g.Peers()
		if err != nil || len(peers) != n && c.kept || len(peers) != 0 && !c.kept {
			t.Errorf("flows %d: peers %v, %v", c.flows, peers, err)
		}
		if r := l.rules(); r["float"] != n {
			t.Errorf("flows %d: rules %v", c.flows, r)
		}
		l.must(l.g.HadRoom()) // what came while the flows were copied
		l.dataUntil(sessions, own, "known", func(peers map[string]loader.Peer) bool { return len(peers) == n })
		for i, s := range sessions {
			if got := l.float(i); got != s.first {
				t.Errorf("flows %d: client %d floats from %s to %s", c.flows, i, s.first, got)
			}
		}
		_, err = l.g.Flush(func(f loader.Flow) bool {
			return !slices.ContainsFunc(sessions, func(s session) bool { return f.Client == client(t, s) })
		})
		l.must(err)
		l.dataUntil(sessions, own, "known", func(peers map[string]loader.Peer) bool { return len(peers) == n })
	}
}

// client is a session's address and port.
func client(t *testing.T, s session) netip.AddrPort {
	t.Helper()
	name, err := unix.Getsockname(s.fd)
	if err != nil {
		t.Fatal(err)
	}
	v4 := name.(*unix.SockaddrInet4)
	return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), uint16(v4.Port))
}

// What is flushed is forgotten: such a client is no float.
func TestFloatFlushed(t *testing.T) {
	t.Parallel()
	l := newV4Lab(t, 3, withFirst)
	sessions := l.clients(40)
	one := netip.MustParseAddr(l.host(7))
	n, err := l.g.Flush(func(f loader.Flow) bool { return f.Client.Addr() == one })
	peers, peersErr := l.g.Peers()
	if _, there := peers[fmt.Sprintf("%s %d", one, own(7))]; n != 1 || err != nil || peersErr != nil || there || len(peers) != 39 {
		t.Errorf("flushed %d, %v, peers %v, %v", n, err, peers, peersErr)
	}
	if _, err := l.g.Flush(nil); err != nil {
		t.Fatal(err)
	}
	followed := 0
	for i, s := range sessions {
		if l.float(i) == s.first {
			followed++
		}
	}
	if followed > 40*4/5 {
		t.Errorf("%d of 40 follow a flow that was flushed", followed)
	}
}

// It goes with UDP and affinity flow.
func TestFirstRefused(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 1, udpServer)
	refuses(t, fs, member(t, ns),
		refusal{loader.Options{First: "quic"}, `first "quic": use openvpn`},
		refusal{loader.Options{First: loader.FirstOpenVPN, Affinity: loader.AffinityClient}, "affinity flow: with client all ports"},
		refusal{loader.Options{First: loader.FirstOpenVPN, Affinity: loader.AffinityNone}, "it goes with affinity flow"},
		refusal{loader.Options{First: loader.FirstOpenVPN, Affinity: loader.AffinityBytes(0, 4)}, "it goes with affinity flow"})
	err := loader.Options{First: loader.FirstOpenVPN}.CheckProto(loader.TCP)
	if err == nil || !strings.Contains(err.Error(), "it goes with UDP") {
		t.Errorf("TCP: %v", err)
	}
}
