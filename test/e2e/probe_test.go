package e2e

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

// patience is how long the answer to a probe may take. A probe that went to the
// wrong server is never answered, so there is no need to be quick on a busy
// machine.
const patience = 8 * time.Second

// prober pings through VPN devices, once per device and second, and keeps who
// answered.
type prober struct {
	ns   *testnet.NetNS
	stop chan struct{}
	done chan struct{} // closed when it has stopped

	mu       sync.Mutex
	devices  []string
	rounds   []*sync.WaitGroup      // of the probes of each second
	answered map[string]map[int]int // the server, by device and round; 0: none
	next     *sync.Cond             // of mu: another round has begun
}

func startProber(ns *testnet.NetNS) *prober {
	p := &prober{
		ns:       ns,
		stop:     make(chan struct{}),
		done:     make(chan struct{}),
		answered: make(map[string]map[int]int),
	}
	p.next = sync.NewCond(&p.mu)
	go func() {
		defer close(p.done)
		every := time.NewTicker(time.Second)
		defer every.Stop()
		for {
			select {
			case <-every.C:
				p.probeAll()
			case <-p.stop:
				return
			}
		}
	}()
	return p
}

// end stops the prober and waits for the last answers.
func (p *prober) end() {
	close(p.stop)
	<-p.done
	for _, round := range p.rounds {
		round.Wait()
	}
}

// add probes a device from the next second on.
func (p *prober) add(device string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.devices = append(p.devices, device)
	p.answered[device] = make(map[int]int)
}

func (p *prober) probeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	number, round := len(p.rounds), new(sync.WaitGroup)
	p.rounds = append(p.rounds, round)
	for _, device := range p.devices {
		round.Go(func() {
			server := 0
			err := p.ns.Do(func() (err error) {
				server, err = ping(device)
				return err
			})
			if err != nil {
				server = 0 // the device is gone or down: as bad as no answer
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			p.answered[device][number] = server
		})
	}
	p.next.Broadcast()
}

// round is the number of the next round.
func (p *prober) round() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.rounds)
}

// finish returns when a round and those before have all their answers, or none will
// come: on a busy machine an answer may be slower than the next round's.
func (p *prober) finish(number int) {
	p.mu.Lock()
	for len(p.rounds) <= number {
		p.next.Wait()
	}
	rounds := slices.Clone(p.rounds[:number+1])
	p.mu.Unlock()
	for _, round := range rounds {
		round.Wait()
	}
}

// at is the server that answered a device in a finished round, 0 for none.
func (p *prober) at(device string, round int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.answered[device][round]
}

// lost counts the rounds without an answer in [from, to), which are finished.
func (p *prober) lost(device string, from, to int) int {
	lost := 0
	for round := from; round < to; round++ {
		if p.at(device, round) == 0 {
			lost++
		}
	}
	return lost
}

// serverOf tells from the address of a device which server gave it: 10.8.N.x
// is of server N, which has 10.8.N.1. It runs in the clients' namespace.
func serverOf(device string) (int, error) {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return 0, err
	}
	addrs, err := link.Addrs()
	if err != nil {
		return 0, err
	}
	for _, addr := range addrs {
		if ip := addr.(*net.IPNet).IP.To4(); ip != nil {
			return int(ip[2]), nil
		}
	}
	return 0, fmt.Errorf("%s has no address", device)
}

// ping sends one echo request through a device to the server at its other end,
// and returns the server's number when that answers. Binding the socket to the
// device is what tells apart clients of one server, which share a subnet.
func ping(device string) (server int, err error) {
	server, err = serverOf(device)
	if err != nil {
		return 0, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.BindToDevice(fd, device); err != nil {
		return 0, err
	}
	request := []byte{8, 0, 0, 0, 0, 0, 0, 1} // echo; the kernel fills in identifier and checksum
	to := &unix.SockaddrInet4{Addr: [4]byte{10, 8, byte(server), 1}}
	if err := unix.Sendto(fd, request, 0, to); err != nil {
		return 0, err
	}
	deadline := time.Now().Add(patience)
	for {
		wait := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(wait, int(max(0, time.Until(deadline).Milliseconds())))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return 0, err
		}
		answer := make([]byte, 64)
		n, err = unix.Read(fd, answer)
		if err != nil {
			return 0, err
		}
		if n >= 8 && answer[0] == 0 { // echo reply
			return server, nil
		}
	}
}
