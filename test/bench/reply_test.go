package bench

import (
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// BenchmarkReply is what ConfirmReply costs who sends: sockets that have nothing
// to do with the group, in the cgroup of a listener and in another, and the
// listener itself. Each round measures all of them with the group attached, and
// without. Reported is the ratio of packets per second of processor time, of the
// best rounds each, and of the listener also what a run of the program takes,
// by the kernel's own statistics, whose clock counts too.
func BenchmarkReply(b *testing.B) {
	const clients, packets = 1000, 10000
	testnet.Privileged(b)
	root, err := cgroup.Root()
	must(b, err)
	dirs := []string{testnet.Cgroup(b, root), testnet.Cgroup(b, root)}
	ns, fs := testnet.New(b), loader.FS(testnet.BPFFS(b))

	// A socket is of the cgroup in which its process was when it opened it.
	own, err := cgroup.Own()
	must(b, err)
	open := func(dir, local string) (fd int) {
		b.Helper()
		enter(b, dir)
		defer enter(b, own)
		must(b, ns.Do(func() (err error) {
			if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
				return err
			}
			return unix.Bind(fd, name(local))
		}))
		b.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	listener := open(dirs[0], "127.0.0.1:1194")
	sink := open(own, "127.0.0.1:9")
	must(b, unix.SetsockoptInt(sink, unix.SOL_SOCKET, unix.SO_RCVBUF, 1)) // nobody reads it

	type sender struct {
		name string
		fd   int
		to   []unix.Sockaddr // nil: it is connected
	}
	var senders []sender
	for i, where := range []string{"beside", "elsewhere"} {
		one := open(dirs[i], "127.0.0.1:0")
		senders = append(senders, sender{where + "-sendto", one, []unix.Sockaddr{name("127.0.0.1:9")}})
		two := open(dirs[i], "127.0.0.1:0")
		must(b, unix.Connect(two, name("127.0.0.1:9")))
		senders = append(senders, sender{where + "-connected", two, nil})
	}
	replies := sender{name: "listener", fd: listener}
	var peers []int
	for i := range clients {
		local := fmt.Sprintf("127.2.%d.%d:20000", i>>8, i&255)
		peer := open(own, local)
		must(b, unix.SetsockoptInt(peer, unix.SOL_SOCKET, unix.SO_RCVBUF, 1))
		peers = append(peers, peer)
		replies.to = append(replies.to, name(local))
	}
	senders = append(senders, replies)

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	payload := make([]byte, 64)
	send := func(s sender) float64 {
		begin := processorTime(b)
		for i := range packets {
			if s.to == nil {
				unix.Write(s.fd, payload)
			} else {
				unix.Sendto(s.fd, payload, 0, s.to[i%len(s.to)])
			}
		}
		return packets / (processorTime(b) - begin).Seconds()
	}
	best := [2][]float64{make([]float64, len(senders)), make([]float64, len(senders))}
	least := math.Inf(1)
	for round := 0; b.Loop(); round++ {
		measure := func(with int) {
			for i, s := range senders {
				best[with][i] = max(best[with][i], send(s))
			}
		}
		attached := func() {
			program, detach := attachReply(b, fs, ns)
			defer program.Close()
			defer detach()
			for _, peer := range peers {
				must(b, unix.Sendto(peer, payload, 0, name("127.0.0.1:1194")))
			}
			least = min(least, perRun(b, program, func() { send(replies) }))
			measure(1)
		}
		if round%2 == 0 {
			measure(0)
			attached()
		} else {
			attached()
			measure(0)
		}
	}
	b.ReportMetric(0, "ns/op")
	for i, s := range senders {
		b.ReportMetric(best[1][i]/best[0][i], s.name+"-ratio")
	}
	b.ReportMetric(least, "ns/reply")
}

// processorTime is what this thread has had, with the softirqs that ran in it.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var t unix.Timespec
	must(b, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t))
	return time.Duration(t.Nano())
}

// enter moves this process into a cgroup.
func enter(b *testing.B, dir string) {
	b.Helper()
	must(b, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0))
}

func name(addr string) unix.Sockaddr {
	a := netip.MustParseAddrPort(addr)
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// attachReply attaches the group on port 1194 and returns the program that sees
// the replies.
func attachReply(b *testing.B, fs loader.FS, ns *testnet.NetNS) (program *ebpf.Program, detach func()) {
	b.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: 1194, PID: os.Getpid()})
	must(b, err)
	conn, err := sockets.TakeMember(groups[0])
	must(b, err)
	defer conn.Close()
	g, err := fs.Attach(conn, loader.Options{Confirm: loader.ConfirmReply, Settle: -1, Flows: 2000})
	must(b, err)
	defer g.Close()
	pins, err := filepath.Glob(filepath.Join(string(fs), "rpsel", "*", "udp_*", "reply"))
	must(b, err)
	program, err = ebpf.LoadPinnedProgram(pins[0], nil)
	must(b, err)
	return program, func() {
		_, err := fs.Detach(g.Key())
		must(b, err)
	}
}

// perRun is how long a run of a program takes, in ns, while f runs.
func perRun(b *testing.B, p *ebpf.Program, f func()) float64 {
	b.Helper()
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	must(b, err)
	defer stats.Close()
	before, runs := spent(b, p)
	f()
	after, ran := spent(b, p)
	return float64(after-before) / float64(ran-runs)
}
