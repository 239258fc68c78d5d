package hostile

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

const (
	trains = 8 // that each client sends
	riders = 12
	wagons = 10  // datagrams of a train
	wagon  = 200 // bytes of each
	port   = 1194
)

// setGRO lets a device of the calling thread's namespace join datagrams (ethtool).
func setGRO(name string, on bool) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	value := struct{ cmd, data uint32 }{cmd: 0x2c} // ETHTOOL_SGRO
	if on {
		value.data = 1
	}
	request := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(request.name[:], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return os.NewSyscallError("ioctl SIOCETHTOOL", errno)
	}
	return nil
}

// rider is a client that sends trains.
type rider struct {
	conn *net.UDPConn
	has  string // who answers it
}

// ride makes a client of a group.
func ride(ns *testnet.NetNS, to netip.AddrPort) (*rider, error) {
	r := &rider{}
	err := ns.Do(func() (err error) {
		r.conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		return err
	})
	return r, err
}

// segment makes a train of all that is sent at once: the kernel, or the device, takes it
// apart.
func (r *rider) segment(size int) error {
	raw, err := r.conn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) })
	return errors.Join(err, inner)
}

// ask sends so many bytes and returns who answers, when all of them were answered.
func (r *rider) ask(size int) (names map[string]int, err error) {
	if _, err := r.conn.Write(bytes.Repeat([]byte{'t'}, size)); err != nil {
		return nil, err
	}
	names, answer := map[string]int{}, make([]byte, 1<<16)
	r.conn.SetReadDeadline(time.Now().Add(patience))
	for size > 0 {
		n, err := r.conn.Read(answer)
		if err != nil {
			return names, fmt.Errorf("%d bytes are not answered: %w", size, err)
		}
		names[string(answer[n-nameSize:n])]++
		size -= n - nameSize
	}
	return names, nil
}

// P1, P8: all datagrams of a train go to the flow's listener, and a train that is still
// one is one run, whether sender, device or receiver join it.
func TestTrains(t *testing.T) {
	countRuns(t)
	listen(t)
	for _, c := range []struct {
		network  string
		mtu      int
		gro, all bool // the device joins what comes; the servers take it as one
	}{
		{"udp4", 1500, false, false}, {"udp4", 1500, true, true}, {"udp6", 1500, true, false}, {"udp6", 9000, false, true}, {"udp4", 9000, true, true},
	} {
		t.Run(fmt.Sprintf("%s mtu %d gro %t,%t", c.network, c.mtu, c.gro, c.all), func(t *testing.T) {
			far, near := testnet.Pair(t)
			for _, ns := range []*testnet.NetNS{far, near} {
				must(t, ns.Do(func() error { return errors.Join(setMTU("veth", c.mtu), setGRO("veth", c.gro)) }))
			}
			addr := netip.AddrPortFrom(near.IPv4, port)
			if c.network == "udp6" {
				addr = netip.AddrPortFrom(near.IPv6, port)
			}
			o := testnet.ServerOptions{Network: c.network, Addr: addr.String(), ReusePort: true}
			if c.all {
				o.Sockopts = []testnet.Sockopt{{Level: unix.IPPROTO_UDP, Name: unix.UDP_GRO, Value: 1}}
			}
			servers, fs, g := testnet.StartGroup(t, near, 3, o), loader.FS(testnet.BPFFS(t)), &group{port: port}
			g.attach(t, fs, near, loader.Options{})
			all := make([]*rider, riders)
			for i := range all {
				r, err := ride(far, addr)
				must(t, err)
				t.Cleanup(func() { r.conn.Close() })
				names, err := r.ask(wagon)
				must(t, err)
				for r.has = range names {
				}
				all[i] = r
				must(t, r.segment(wagon))
			}
			servers.Add()
			must(t, g.attach(t, fs, near, loader.Options{}).Drain(0))
			before := g.counted(t)
			for range trains {
				for i, r := range all {
					names, err := r.ask(wagons * wagon)
					if err != nil {
						t.Fatalf("client %d: %v", i, err)
					}
					if len(names) != 1 || names[r.has] == 0 {
						t.Errorf("client %d, whom %s has, is answered by %v", i, r.has, names)
					}
				}
			}
			if runs := g.counted(t) - before; runs != trains*riders {
				t.Errorf("%d runs of %d trains", runs, trains*riders)
			}
		})
	}
}
