package testnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Client ports are given out from here on, each once per namespace.
	firstClientPort = 10000
	// Sockets open at a time. Their datagrams fit into the receive buffer of
	// one server (212992 bytes by default, 768 for a small datagram, 896 on Linux
	// 6.12), so that none is lost even if all go to one that is slow.
	block = 200
	// How long an answer may take on a machine that is busy with other things. Who
	// refuses is known at once.
	patience = 20 * time.Second
)

// Clients are flows to one server address: the n client ports are its alone,
// and stay the same however often it asks. Its methods may not be called
// concurrently.
type Clients struct {
	t      testing.TB
	ns     *NetNS
	remote netip.AddrPort
	stream bool
	first  int
	n      int
	seq    uint32 // of the last Ask: answers to an earlier one do not count
}

// NewClients makes n UDP flows to a literal address and port. A namespace has
// room for some 50 000 clients.
func NewClients(t testing.TB, ns *NetNS, n int, remote string) *Clients {
	t.Helper()
	addr, err := netip.ParseAddrPort(remote)
	must(t, err)
	ns.mu.Lock()
	defer ns.mu.Unlock()
	c := &Clients{t: t, ns: ns, remote: addr, first: ns.nextPort, n: n}
	ns.nextPort += n
	if ns.nextPort > 1<<16 {
		t.Fatalf("no ports left for %d clients", n)
	}
	return c
}

// NewTCPClients is NewClients for TCP: each Ask makes one connection per
// client, from the same port every time.
func NewTCPClients(t testing.TB, ns *NetNS, n int, remote string) *Clients {
	t.Helper()
	c := NewClients(t, ns, n, remote)
	c.stream = true
	return c
}

// Port is the source port of a client.
func (c *Clients) Port(client int) int { return c.first + client }

// Ask sends one datagram from each client and returns the names of the servers
// that answered, by client: "" for one that was refused or not answered within
// some seconds.
func (c *Clients) Ask() []string {
	c.t.Helper()
	c.seq++
	answers := make([]string, 0, c.n)
	must(c.t, c.ns.Do(func() error {
		for len(answers) < c.n {
			first := c.first + len(answers)
			some, err := c.ask(first, min(first+block, c.first+c.n))
			if err != nil {
				return err
			}
			answers = append(answers, some...)
		}
		return nil
	}))
	return answers
}

// AskAll is Ask until each client has an answer: on a busy machine one may take longer
// than a client waits. It fails the test after ten times.
func (c *Clients) AskAll() []string {
	c.t.Helper()
	var answers []string
	for range 10 {
		if answers = c.Ask(); !slices.Contains(answers, "") {
			return answers
		}
	}
	c.t.Fatalf("not all clients are answered: %v", Shares(answers))
	return nil
}

// ask asks from the ports [first, end).
func (c *Clients) ask(first, end int) (answers []string, err error) {
	question := binary.BigEndian.AppendUint32(nil, c.seq)
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for port := first; port < end; port++ {
		fd, err := c.open(port)
		if err != nil {
			return nil, err
		}
		fds = append(fds, fd)
		err = unix.Connect(fd, sockaddr(c.remote))
		if err == nil && !c.stream {
			_, err = unix.Write(fd, question)
		}
		if err != nil && !unanswered(err) {
			return nil, fmt.Errorf("ask from port %d: %w", port, err)
		}
	}
	deadline := time.Now().Add(patience)
	for _, fd := range fds {
		answer, err := c.answer(fd, deadline)
		if err != nil {
			return nil, err
		}
		answers = append(answers, answer)
	}
	return answers, nil
}

// open makes the socket of a client.
func (c *Clients) open(port int) (fd int, err error) {
	kind, family, any := unix.SOCK_DGRAM, unix.AF_INET6, netip.IPv6Unspecified()
	if c.stream {
		kind = unix.SOCK_STREAM | unix.SOCK_NONBLOCK
	}
	if c.remote.Addr().Is4() {
		family, any = unix.AF_INET, netip.IPv4Unspecified()
	}
	if fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if c.stream {
		// Closing resets the connection: it leaves no TIME_WAIT on the port.
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return -1, os.NewSyscallError("setsockopt SO_LINGER", err)
		}
	}
	// Who lists open files at the same time, as sockets.Find does, holds each for
	// a moment (kernel/bpf/task_iter.c): also the last socket that was closed here.
	// So does a process that is being started, until it calls exec.
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(any, uint16(port))))
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(deadline) {
			return fd, os.NewSyscallError("bind", err)
		}
	}
}

// answer reads the name of the server. A deadline that has passed does not
// keep it from taking an answer that is there.
func (c *Clients) answer(fd int, deadline time.Time) (string, error) {
	buf := make([]byte, 64)
	for {
		wait := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(wait, int(max(0, time.Until(deadline).Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return "", os.NewSyscallError("poll", err)
		case n == 0:
			return "", nil
		}
		n, err = unix.Read(fd, buf)
		if err != nil && !unanswered(err) {
			return "", os.NewSyscallError("read", err)
		}
		switch {
		case n <= 0:
			return "", nil
		case c.stream:
			return string(buf[:n]), nil
		case n > 4 && binary.BigEndian.Uint32(buf) == c.seq:
			return strings.TrimRight(string(buf[4:n]), "\x00"), nil
		}
	}
}

// unanswered tells errors that mean there is no server from broken tests.
func unanswered(err error) bool {
	for _, e := range []error{unix.ECONNREFUSED, unix.ECONNRESET, unix.EPIPE, unix.ENOTCONN, unix.EAGAIN, unix.EINPROGRESS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
