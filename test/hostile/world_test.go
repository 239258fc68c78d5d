package hostile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

func TestMain(m *testing.M) { testnet.Main(m) }

const (
	firstPort = 4001 // of the groups
	clientsOf = 16   // tracked flows of each
	members   = 4    // of a group: three, and one that joins
	patience  = 20 * time.Second
	tries     = 4 // a datagram that found a full buffer is sent again
)

// kinds are the groups: one of each way to say what is one client.
var kinds = []struct {
	name    string
	options loader.Options
}{
	{"flow", loader.Options{}},
	{"client", loader.Options{Affinity: loader.AffinityClient}},
	{"bytes", loader.Options{Affinity: loader.AffinityBytes(0, tokenSize)}},
	{"none", loader.Options{Affinity: loader.AffinityNone}},
	{"confirm reply", loader.Options{Confirm: loader.ConfirmReply}},
	{"first openvpn", loader.Options{First: loader.FirstOpenVPN}},
}

// tokenSize is how many bytes of a payload say whose it is: those of an OpenVPN data
// packet, so that they say something with --first openvpn, too.
const tokenSize = 4

func token(client int) []byte { return []byte{9 << 3, 0, 0, byte(client)} }

// client is where a client sends from. Four share an address, every other one is of IPv4.
func client(i int) netip.AddrPort {
	addr := netip.AddrFrom4([4]byte{198, 51, 100, byte(10 + i/4)})
	if i%2 == 1 {
		addr = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0x51, 15: byte(10 + i/4)})
	}
	return netip.AddrPortFrom(addr, uint16(40000+i))
}

// local is where a group is for a client.
func local(from netip.Addr, port uint16) netip.AddrPort {
	if from.Is4() {
		return netip.AddrPortFrom(testnet.WireIPv4.Addr(), port)
	}
	return netip.AddrPortFrom(testnet.WireIPv6.Addr(), port)
}

// group is one of the kinds, attached, and what its program counts.
type group struct {
	kind     int
	port     uint16
	program  *ebpf.Program
	counters *maps.Counters
}

// counts is how many runs the kernel counts, and how many outcomes the program.
func (g *group) counts() (runs, outcomes uint64, err error) {
	stats, err := g.program.Stats()
	if err != nil {
		return 0, 0, err
	}
	rest, err := g.counters.Group()
	if err != nil {
		return 0, 0, err
	}
	outcomes = rest.Fallback
	for slot := range uint32(members) {
		n, err := g.counters.Slot(slot)
		if err != nil {
			return 0, 0, err
		}
		outcomes += n.Hit + n.New + n.Rehomed + n.Untracked + n.Migrated
	}
	return stats.RunCount, outcomes, nil
}

// whose is what an answer is to: a group, and a client as the group sees it.
type whose struct {
	port uint16
	name string
}

// world is a group of each kind at the end of a wire.
type world struct {
	ns     *testnet.NetNS
	wire   *testnet.Wire
	groups []*group
	// senders are for each way, or what this kernel lacks for it.
	senders []sender
	lacks   []error
	offload *os.File // a tun device for packets that are offloaded
	trains  bool     // it takes trains

	mu       sync.Mutex
	has      map[whose]string // who answers whom
	moved    []string
	answered map[string]int // answers by payload, without the name of the server
	came     chan struct{}
	serial   uint32
}

// newWorld makes groups in which each client has a listener that the pick table would
// not give it any more, as far as possible: one has joined since, another drains. So who loses its flow
// is seen to move.
func newWorld(t testing.TB, attached bool) *world {
	t.Helper()
	ns := testnet.New(t)
	w := &world{ns: ns, has: map[whose]string{}, answered: map[string]int{}, came: make(chan struct{}, 1)}
	must(t, ns.Do(lenient))
	w.wire = testnet.NewWire(t, ns)
	w.wire.Datagrams(w.receive)
	must(t, ns.Do(func() error { return setMTU("wire", 65535) }))
	must(t, ns.Do(w.openOffload))
	t.Cleanup(func() { w.offload.Close() })
	w.openWays(t)
	countRuns(t)
	listen(t)

	fs := loader.FS(testnet.BPFFS(t))
	parent, err := cgroup.Root()
	must(t, err)
	dir := testnet.Cgroup(t, parent)
	for i, kind := range kinds {
		port := uint16(firstPort + i)
		servers := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{
			Network: "udp6", Addr: fmt.Sprintf("[::]:%d", port), ReusePort: true, Cgroup: dir,
			// Without it IPv6 sockets get no IPv4 multicast.
			Sockopts: []testnet.Sockopt{{Level: unix.IPPROTO_IP, Name: unix.IP_MULTICAST_ALL, Value: 1}},
		})
		g := &group{kind: i, port: port}
		w.groups = append(w.groups, g)
		if attached {
			g.attach(t, fs, ns, kind.options)
		}
		for c := range clientsOf {
			w.ask(t, g, c)
		}
		if attached {
			servers.Add()
			must(t, g.attach(t, fs, ns, loader.Options{}).Drain(0))
		} else {
			servers.Close(0)
		}
	}
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// setMTU is of a device of the calling thread's namespace.
func setMTU(name string, mtu int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetMTU(link, mtu)
}

// attach attaches a group, or registers who joined it. No flow is forgotten for as
// long as a test may run.
func (g *group) attach(t testing.TB, fs loader.FS, ns *testnet.NetNS, o loader.Options) *loader.Group {
	t.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: g.port})
	if err != nil || len(groups) != 1 {
		t.Fatalf("groups %v, %v", groups, err)
	}
	conn, err := groups[0].Members[0].Take()
	must(t, err)
	defer conn.Close()
	if g.program == nil {
		o.Flows, o.Settle, o.Idle, o.IdleNew = 10000, -1, time.Hour, time.Hour
	}
	handle, err := fs.Attach(conn, o)
	must(t, err)
	t.Cleanup(func() { handle.Close() })
	if g.program == nil {
		dir, err := filepath.Glob(filepath.Join(string(fs), "rpsel", "*", fmt.Sprintf("udp_*_%d*", g.port)))
		if err != nil || len(dir) != 1 {
			t.Fatalf("state %v, %v", dir, err)
		}
		g.program, err = ebpf.LoadPinnedProgram(filepath.Join(dir[0], "prog"), nil)
		must(t, err)
		slots, err := ebpf.LoadPinnedMap(filepath.Join(dir[0], bpf.SelectMapSlotCounters), nil)
		must(t, err)
		all, err := ebpf.LoadPinnedMap(filepath.Join(dir[0], bpf.SelectMapCounters), nil)
		must(t, err)
		g.counters = maps.NewCounters(slots, all)
		t.Cleanup(func() { g.program.Close(); slots.Close(); all.Close() })
	}
	return handle
}

// everybody begins the payload of a datagram that each member of a group gets.
const everybody = "everybody"

// nameSize is how long the name of a server is, which comes after what it answers.
const nameSize = len("s0")

// receive notes who answers, and whether that is who answered that client before.
func (w *world) receive(d testnet.Datagram) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if kind := int(d.From.Port()) - firstPort; kind < 0 || kind >= len(kinds) || len(d.Payload) < nameSize {
		return
	}
	payload, name := d.Payload[:len(d.Payload)-nameSize], d.Payload[len(d.Payload)-nameSize:]
	w.answered[answer(d.From.Port(), payload)]++
	select {
	case w.came <- struct{}{}:
	default:
	}
	of := whose{port: d.From.Port(), name: d.To.String()}
	switch kind := kinds[d.From.Port()-firstPort].options.Affinity; {
	case strings.HasPrefix(payload, everybody), kind == loader.AffinityNone:
		return
	case kind == loader.AffinityClient:
		of.name = d.To.Addr().String()
	case kind == kinds[2].options.Affinity && len(payload) >= tokenSize:
		of.name = payload[:tokenSize]
	}
	if had, known := w.has[of]; known && had != name {
		w.moved = append(w.moved, fmt.Sprintf("%s: client %s (%q), which %s has, is answered by %s: %.40q", kinds[d.From.Port()-firstPort].name, d.To, of.name, had, name, payload))
		return
	}
	w.has[of] = name
}

// answer is what an answer is noted by: what next made.
func answer(port uint16, payload string) string {
	return fmt.Sprint(port, " ", payload[:min(len(payload), tokenSize+4)])
}

// send puts packets of a shape onto a way, or without one if this kernel lacks that. What
// the kernel does not take for a packet it refuses.
func (w *world) send(t testing.TB, s shape, by int, packets [][]byte) {
	t.Helper()
	put := w.senders[by]
	switch {
	case s.offloaded:
		put = w.put
	case put == nil:
		put = w.senders[alone]
	}
	for _, p := range packets {
		if err := put(p); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Fatal(err)
		}
	}
}

// put sends what undone made.
func (w *world) put(packet []byte) error {
	_, err := w.offload.Write(packet)
	return err
}

// answers is how many came to a payload.
func (w *world) answers(port uint16, payload string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answered[answer(port, payload)]
}

// next is a payload of a client that was not sent before.
func (w *world) next(c int) []byte {
	w.serial++
	return binary.BigEndian.AppendUint32(token(c), w.serial)
}

// ask sends a datagram of a tracked flow, and waits for the answer. One that met a full
// buffer is sent again.
func (w *world) ask(t testing.TB, g *group, c int) {
	t.Helper()
	payload := w.next(c)
	for range tries {
		must(t, w.wire.Send(simple(client(c), local(client(c).Addr(), g.port), payload)))
		if w.await(g.port, string(payload)) {
			return
		}
	}
	t.Fatalf("%s: client %d has no answer", kinds[g.kind].name, c)
}

// await waits until an answer came.
func (w *world) await(port uint16, payload string) bool { return w.awaitAnswers(port, payload, 1) }

// awaitAnswers waits until so many came.
func (w *world) awaitAnswers(port uint16, payload string, n int) bool {
	late := time.After(patience)
	for w.answers(port, payload) < n {
		select {
		case <-w.came:
		case <-late:
			return w.answers(port, payload) >= n
		}
	}
	return true
}

// settle asks from all clients of a group: what was sent before is answered by then, since
// each server answers in the order in which packets came. Then nobody may have been
// answered by another server than before, and each run has to be one outcome.
func (w *world) settle(t testing.TB, g *group) {
	t.Helper()
	for c := range clientsOf {
		w.ask(t, g, c)
	}
	w.mu.Lock()
	moved := w.moved
	w.moved = nil
	w.mu.Unlock()
	for _, m := range moved {
		t.Error(m)
	}
	if g.program != nil {
		g.counted(t)
	}
}

// counted returns how many runs there were, and fails the test if not each of them is one
// outcome. One that has not come to its end yet is no mistake.
func (g *group) counted(t testing.TB) uint64 {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		runs, outcomes, err := g.counts()
		must(t, err)
		if runs == outcomes {
			return runs
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: the kernel counts %d runs, the outcomes add up to %d", kinds[g.kind].name, runs, outcomes)
		}
	}
}

// countRuns makes the kernel count them.
func countRuns(t testing.TB) {
	t.Helper()
	testnet.Privileged(t)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	must(t, err)
	t.Cleanup(func() { stats.Close() })
}

// listen makes a test fail if the kernel complains while it runs.
func listen(t testing.TB) {
	t.Helper()
	log, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Logf("what the kernel says cannot be read: %v", err)
		return
	}
	_, err = log.Seek(0, unix.SEEK_END)
	must(t, err)
	t.Cleanup(func() {
		defer log.Close()
		raw, err := log.SyscallConn()
		must(t, err)
		line := make([]byte, 8192)
		raw.Control(func(fd uintptr) {
			for {
				n, err := unix.Read(int(fd), line)
				if err != nil {
					return // there is no more
				}
				for _, complaint := range []string{"WARNING:", "BUG:", "Oops", "general protection", "UBSAN:"} {
					// A lockup of the watchdog's is a machine that stood still.
					if bytes.Contains(line[:n], []byte(complaint)) && !bytes.Contains(line[:n], []byte("lockup")) {
						t.Errorf("the kernel says %s", line[:n])
					}
				}
			}
		})
	})
}
