package bench

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// BenchmarkAffinity is what a packet of a known client costs the selection
// program, in ns by the kernel's own statistics, whose clock counts too: the
// least of many rounds in which every affinity has its turn, and flow with
// first openvpn as well. A thousand flows from as many addresses.
func BenchmarkAffinity(b *testing.B) {
	const clients, packets = 1000, 10
	testnet.Privileged(b)
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	must(b, err)
	defer stats.Close()
	ns, fs := testnet.New(b), loader.FS(testnet.BPFFS(b))
	affinities := []loader.Options{
		{Affinity: loader.AffinityFlow}, {Affinity: loader.AffinityFlow, First: loader.FirstOpenVPN}, {Affinity: loader.AffinityClient},
		{Affinity: loader.AffinityBytes(0, 8)}, {Affinity: loader.AffinityBytes(0, 20)}, {Affinity: loader.AffinityNone},
	}
	programs := make([]*ebpf.Program, len(affinities))
	remotes := make([]netip.AddrPort, len(affinities))
	for i, affinity := range affinities {
		remotes[i] = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(5000+i))
		testnet.StartGroup(b, ns, 4, testnet.ServerOptions{Network: "udp4", Addr: remotes[i].String(), ReusePort: true})
		programs[i] = attachAffinity(b, fs, ns, remotes[i].Port(), affinity)
	}
	var fds []int
	must(b, ns.Do(func() error {
		for i := range clients {
			fd, err := client(i)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
		}
		return nil
	}))
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	payload := make([]byte, 32)
	least := make([]float64, len(affinities))
	for i := range least {
		least[i] = math.Inf(1)
	}
	for b.Loop() {
		for i := range affinities {
			before, runs := spent(b, programs[i])
			for range packets {
				for c, fd := range fds {
					binary.BigEndian.PutUint32(payload, 9<<27|uint32(c)) // a data packet of OpenVPN, too
					unix.Sendto(fd, payload, unix.MSG_DONTWAIT, &unix.SockaddrInet4{Addr: remotes[i].Addr().As4(), Port: int(remotes[i].Port())})
				}
			}
			after, ran := spent(b, programs[i])
			least[i] = min(least[i], float64(after-before)/float64(ran-runs))
		}
	}
	b.ReportMetric(0, "ns/op")
	for i, affinity := range affinities {
		b.ReportMetric(least[i], fmt.Sprintf("ns/%s%s", affinity.Affinity, affinity.First))
	}
}

// attachAffinity attaches the group on a port and returns its program.
func attachAffinity(b *testing.B, fs loader.FS, ns *testnet.NetNS, port uint16, o loader.Options) *ebpf.Program {
	b.Helper()
	find := func() sockets.Group {
		groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: port})
		must(b, err)
		return groups[0]
	}
	conn, err := sockets.TakeMember(find())
	must(b, err)
	defer conn.Close()
	o.Settle, o.Flows = -1, 2000
	g, err := fs.Attach(conn, o)
	must(b, err)
	must(b, g.Close())
	program, err := ebpf.NewProgramFromID(ebpf.ProgramID(find().Program))
	must(b, err)
	b.Cleanup(func() { program.Close() })
	return program
}

// spent is how long a program has run, and how often.
func spent(b *testing.B, p *ebpf.Program) (time.Duration, uint64) {
	b.Helper()
	s, err := p.Stats()
	must(b, err)
	return s.Runtime, s.RunCount
}

// client makes a socket with an address of its own.
func client(i int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 1, byte(i >> 8), byte(i)}})
}
