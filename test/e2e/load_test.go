package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

// load is clients of a web server, each of which opens one connection after the
// other, with one request each.
type load struct {
	addr netip.AddrPort
	stop chan struct{}
	all  sync.WaitGroup

	mu       sync.Mutex
	answered map[string]int // by what the answer says
	failed   map[string]int // by what went wrong
}

// startLoad starts clients in a namespace. They end with the test.
func startLoad(t testing.TB, ns *testnet.NetNS, clients int, addr netip.AddrPort) *load {
	t.Helper()
	l := &load{addr: addr, stop: make(chan struct{}), answered: map[string]int{}, failed: map[string]int{}}
	for range clients {
		l.all.Go(func() {
			// Blocking system calls, on a thread that is in the namespace for good.
			if err := ns.Do(l.client); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(l.end)
	return l
}

// end stops the clients, each after the connection it has.
func (l *load) end() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.all.Wait()
}

// settle is end, after some more connections to each listener: a kernel without the
// fix of CVE-2026-46015 does not wake who gets one that is moved, until the next comes.
func (l *load) settle(t testing.TB) {
	l.awaitAnswers(t, 1000)
	l.end()
}

func (l *load) client() error {
	for {
		select {
		case <-l.stop:
			return nil
		default:
		}
		body, err := request(l.addr)
		l.mu.Lock()
		if err != nil {
			l.failed[err.Error()]++
		} else {
			l.answered[body]++
		}
		l.mu.Unlock()
	}
}

// count is how many connections were answered and how many failed.
func (l *load) count() (answered, failed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.answered {
		answered += n
	}
	for _, n := range l.failed {
		failed += n
	}
	return answered, failed
}

// answers is how many connections each server has answered, by what it says.
func (l *load) answers() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.answered)
}

// awaitAnswers returns when so many more connections were answered, or failed.
func (l *load) awaitAnswers(t testing.TB, n int) {
	t.Helper()
	answered, failed := l.count()
	from := answered + failed
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if answered, failed = l.count(); answered+failed >= from+n {
			return
		}
	}
	t.Fatalf("not %d connections within two minutes", n)
}

// row is a line of the table that docs/tcp.md has.
func (l *load) row(what string) string {
	answered, failed := l.count()
	line := fmt.Sprintf("%-34s %7d connections %5d failed", what, answered+failed, failed)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, kind := range slices.Sorted(maps.Keys(l.failed)) {
		line += fmt.Sprintf("; %d %s", l.failed[kind], kind)
	}
	return line
}

// loadPatience is how long a connection may stand still. A SYN or an answer that
// is lost, rather than refused, is a failure as well.
const loadPatience = 20 * time.Second

// request opens a connection, asks, and returns the body of the answer. An error
// names the step and its reason. It is run in the clients' namespace.
func request(addr netip.AddrPort) (body string, err error) {
	fd, err := dialTCP(addr)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		return "", fmt.Errorf("write: %w", err)
	}
	answer, err := io.ReadAll(blocking(fd))
	if err != nil {
		return "", fmt.Errorf("read: %w", err)
	}
	head, rest, whole := bytes.Cut(answer, []byte("\r\n\r\n"))
	switch {
	case len(answer) == 0:
		return "", errors.New("read: no answer")
	case !whole:
		return "", errors.New("read: half an answer")
	case !bytes.Contains(head, []byte(" 200 ")):
		status, _, _ := strings.Cut(string(head), "\r\n")
		return "", errors.New("answer: " + status)
	}
	return strings.TrimSpace(string(rest)), nil
}

// dialTCP opens a connection whose calls block, for loadPatience at most.
func dialTCP(addr netip.AddrPort) (fd int, err error) {
	to := &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	limit := unix.NsecToTimeval(loadPatience.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit), // connect's, too
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit))
	if err == nil {
		err = unix.Connect(fd, to)
	}
	if errors.Is(err, unix.EINTR) { // a signal of Go's scheduler: it goes on without us
		err = connected(fd)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect: %w", err)
	}
	return fd, nil
}

// connected waits for the outcome of a connect.
func connected(fd int) error {
	wait := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		n, err := unix.Poll(wait, int(loadPatience.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return unix.ETIMEDOUT
		}
		outcome, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && outcome != 0 {
			err = syscall.Errno(outcome)
		}
		return err
	}
}

// blocking reads from a descriptor whose calls block.
type blocking int

func (b blocking) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(b), p)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}
