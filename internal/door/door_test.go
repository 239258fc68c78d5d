package door_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/door"
	"github.com/rpsel/rpsel/internal/testnet"
)

func TestMain(m *testing.M) { testnet.Main(m) }

// desk is a Handler that notes what it is asked for.
type desk struct {
	calls atomic.Int32
	hold  chan struct{} // if not nil, a request waits for it

	mu  sync.Mutex
	got []string
}

func (d *desk) note(what string, p door.Peer, conn syscall.Conn) error {
	d.calls.Add(1)
	if d.hold != nil {
		<-d.hold
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	inner := errors.New("no descriptor")
	flags := 0
	raw.Control(func(fd uintptr) { flags, inner = unix.FcntlInt(fd, unix.F_GETFD, 0) })
	if inner != nil {
		return inner
	}
	if flags&unix.FD_CLOEXEC == 0 {
		return errors.New("it would be inherited")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.got = append(d.got, fmt.Sprint(what, " by ", p.UID, " ", p.PID == os.Getpid()))
	return nil
}

func (d *desk) Register(p door.Peer, conn syscall.Conn) (int, error) {
	return 7, d.note("register", p, conn)
}
func (d *desk) Drain(p door.Peer, conn syscall.Conn) error { return d.note("drain", p, conn) }
func (d *desk) Resume(door.Peer, syscall.Conn) error {
	return errors.New("first line\nsecond " + strings.Repeat("ä", 2000))
}

// open opens a door for the user that the test runs as.
func open(t testing.TB, h door.Handler) (d *door.Door, dir, path string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "run")
	d, err := door.Open(dir, h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := d.SetOwners([]uint32{uint32(os.Getuid())}); err != nil {
		t.Fatal(err)
	}
	return d, dir, door.Path(dir, uint32(os.Getuid()))
}

func dial(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	c, err := net.Dial(door.Network, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

// say sends a message with n descriptors and returns the answer: "" if there is
// none.
func say(t testing.TB, path string, message []byte, n int) (text string, done bool) {
	t.Helper()
	c := dial(t, path)
	defer c.Close()
	var rights []byte
	if n > 0 {
		var fds []int
		for range n {
			fds = append(fds, int(os.Stderr.Fd()))
		}
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := c.WriteMsgUnix(message, rights, nil); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, door.MaxAnswer+1)
	size, err := c.Read(buf)
	if err != nil || size == 0 {
		return "", false
	}
	a, err := door.ParseAnswer(buf[:size])
	if err != nil {
		t.Fatalf("%v: %q", err, buf[:size])
	}
	return fmt.Sprint(a.Text, a.Slot), a.Done
}

// needRoot is for doors of other users.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 || len(capability.Missing(capability.Chown)) > 0 {
		(&testnet.Unavailable{What: "another user's door", Err: unix.EPERM}).Skip(t)
	}
}

// descriptors counts the test's own.
func descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// Requests of every kind and shape are answered or dropped, and no descriptor
// that came with one stays open.
func TestRequests(t *testing.T) {
	h := &desk{}
	_, _, path := open(t, h)
	request := func(op door.Op) []byte { return door.Request{Op: op}.Marshal() }
	say(t, path, request(door.Register), 1) // opens what Go opens once
	before := descriptors(t)
	const one = "send exactly one descriptor"
	for _, c := range []struct {
		name    string
		message []byte
		fds     int
		done    bool
		want    string // the answer begins with it
	}{
		{"register", request(door.Register), 1, true, "7"},
		{"drain", request(door.Drain), 1, true, "0"},
		{"an error", request(door.Resume), 1, false, "first line second ää"},
		{"no descriptor", request(door.Register), 0, false, "register: " + one},
		{"two", request(door.Register), 2, false, "register: " + one},
		{"three", request(door.Register), 3, false, "register: " + one},
		{"as many as can be sent", request(door.Drain), 253, false, "drain: " + one},
		{"garbage", []byte("GET / HTTP/1.1\r\n"), 1, false, "not a request"},
		{"short", []byte("rpsl"), 1, false, "not a request"},
		{"long", append(request(door.Register), 0), 1, false, "not a request"},
		{"huge", bytes.Repeat([]byte("rpsl"), 20000), 2, false, "not a request"},
		{"another version", []byte("rpsl\x02\x01\x00\x00"), 1, false, "request of version 2, this agent speaks 1"},
		{"another request", []byte("rpsl\x01\x04\x00\x00"), 1, false, "request 4: this agent does not know that"},
		{"none", []byte("rpsl\x01\x00\x00\x00"), 1, false, "request 0"},
		{"reserved", []byte("rpsl\x01\x01\x00\x01"), 1, false, "register: this agent does not know that"},
		{"only descriptors", nil, 3, false, "not a request"},
		{"nothing", nil, 0, false, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			text, done := say(t, path, c.message, c.fds)
			if done != c.done || !strings.HasPrefix(text, c.want) || c.want == "" && text != "" {
				t.Errorf("answer %q, done %v, want %q, %v", text, done, c.want, c.done)
			}
		})
	}
	// The agent's end of the last connection is closed by now, or will be.
	await(t, "descriptors are closed", func() bool { return descriptors(t) == before })
	want := fmt.Sprint("register by ", os.Getuid(), " true")
	if h.got[0] != want || h.calls.Load() != 3 {
		t.Errorf("%d calls, the first %q, want %q", h.calls.Load(), h.got[0], want)
	}
}

// A message may have descriptors and no byte, which Go does not send.
func TestEmptyWithDescriptors(t *testing.T) {
	h := &desk{}
	_, _, path := open(t, h)
	say(t, path, door.Request{Op: door.Register}.Marshal(), 1)
	before := descriptors(t)
	c := dial(t, path)
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	rights := unix.UnixRights(int(os.Stderr.Fd()))
	message := unix.Msghdr{Control: &rights[0]}
	message.SetControllen(len(rights))
	var errno syscall.Errno
	raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&message)), 0)
	})
	if errno != 0 {
		t.Fatal(errno)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("answered: %d, %v", n, err)
	}
	c.Close()
	await(t, "the descriptor is closed", func() bool { return descriptors(t) == before })
	if n := h.calls.Load(); n != 1 {
		t.Errorf("%d requests were handled", n)
	}
}

// await polls what nothing tells.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("in vain: ", what)
		}
	}
}

// twoDoors opens one for root and one for nobody, which as many silent clients keep
// shut as could be served in two rounds.
func twoDoors(t *testing.T, patience time.Duration) (ours, theirs string, silent []*net.UnixConn) {
	t.Helper()
	needRoot(t)
	door.SetPatience(t, patience)
	d, dir, ours := open(t, &desk{})
	if err := d.SetOwners([]uint32{0, 65534}); err != nil {
		t.Fatal(err)
	}
	theirs = door.Path(dir, 65534)
	for range 2 * door.MaxClients {
		silent = append(silent, dial(t, theirs))
	}
	return ours, theirs, silent
}

// Clients that say nothing keep no door shut but their own.
func TestSlowElsewhere(t *testing.T) {
	ours, _, _ := twoDoors(t, 10*time.Minute)
	if text, done := say(t, ours, door.Request{Op: door.Register}.Marshal(), 1); !done {
		t.Errorf("at the other door: %q", text)
	}
}

// They are thrown out after a while, and their own door opens again.
func TestSlow(t *testing.T) {
	_, theirs, silent := twoDoors(t, time.Second)
	if text, _ := say(t, theirs, door.Request{Op: door.Register}.Marshal(), 1); !strings.HasPrefix(text, "you are uid 0, this socket is uid 65534's") {
		t.Errorf("at the same door: %q", text)
	}
	for i, c := range silent {
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("client %d was told something: %d, %v", i, n, err)
		}
	}
}

// No more than MaxClients requests of an owner are handled at once.
func TestBounded(t *testing.T) {
	h := &desk{hold: make(chan struct{})}
	_, _, path := open(t, h)
	var clients sync.WaitGroup
	var done atomic.Int32
	for range 3 * door.MaxClients {
		clients.Go(func() {
			if _, ok := say(t, path, door.Request{Op: door.Drain}.Marshal(), 1); ok {
				done.Add(1)
			}
		})
	}
	await(t, "as many as may be are handled", func() bool { return h.calls.Load() == door.MaxClients })
	if n := h.calls.Load(); n != door.MaxClients {
		t.Errorf("%d at once", n)
	}
	for n := range int32(3 * door.MaxClients) {
		h.hold <- struct{}{}
		if now := h.calls.Load(); now > door.MaxClients+n+1 {
			t.Errorf("%d handled after %d ended", now, n+1)
		}
	}
	clients.Wait()
	if done.Load() != 3*door.MaxClients {
		t.Errorf("%d of %d were answered", done.Load(), 3*door.MaxClients)
	}
}

// What a killed agent left is replaced, the directory can be passed through
// whatever the umask, and a socket is its owner's alone.
func TestStale(t *testing.T) {
	umask := unix.Umask(0o077)
	defer unix.Umask(umask)
	dir := filepath.Join(t.TempDir(), "run", "bpffs-1")
	if err := door.MakeDir(dir); err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{dir, filepath.Dir(dir)} {
		if info, err := os.Stat(at); err != nil || info.Mode().Perm() != 0o755 {
			t.Fatalf("%s: %v, %v", at, info, err)
		}
	}
	for _, uid := range []uint32{uint32(os.Getuid()), 4711} {
		l, err := net.ListenUnix(door.Network, &net.UnixAddr{Name: door.Path(dir, uid), Net: door.Network})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close() // as a killed process does
	}
	unix.Umask(0)
	d, err := door.Open(dir, &desk{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.SetOwners([]uint32{uint32(os.Getuid())}); err != nil {
		t.Fatal(err)
	}
	path := door.Path(dir, uint32(os.Getuid()))
	if info, err := os.Stat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := os.Stat(door.Path(dir, 4711)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the other door: %v", err)
	}
	if text, done := say(t, path, door.Request{Op: door.Drain}.Marshal(), 1); !done {
		t.Error(text)
	}
	if err := d.SetOwners(nil); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// Close waits for the request that is handled, and throws out who waits.
func TestClose(t *testing.T) {
	h := &desk{hold: make(chan struct{})}
	d, _, path := open(t, h)
	silent := dial(t, path)
	answers := make(chan bool)
	go func() {
		_, done := say(t, path, door.Request{Op: door.Drain}.Marshal(), 1)
		answers <- done
	}()
	await(t, "a request is handled", func() bool { return h.calls.Load() == 1 })
	closed := make(chan error)
	go func() { closed <- d.Close() }()
	if n, err := silent.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("the silent one: %d, %v", n, err)
	}
	select {
	case err := <-closed:
		t.Fatalf("closed while a request is handled: %v", err)
	default:
	}
	close(h.hold)
	if !<-answers {
		t.Error("the request was not answered")
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial(door.Network, path); !errors.Is(err, unix.ENOENT) {
		t.Errorf("after Close: %v", err)
	}
	if n := h.calls.Load(); n != 1 {
		t.Errorf("%d requests were handled", n)
	}
}

// A door that cannot be opened does not keep the others shut.
func TestSetOwners(t *testing.T) {
	needRoot(t)
	d, dir, path := open(t, &desk{})
	// A directory that is not empty cannot be replaced.
	if err := os.MkdirAll(filepath.Join(door.Path(dir, 1000), "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.SetOwners([]uint32{1000, 65534, 0}); err == nil || !strings.Contains(err.Error(), door.Path(dir, 1000)) {
		t.Errorf("got %v", err)
	}
	for _, at := range []string{path, door.Path(dir, 65534)} {
		if info, err := os.Stat(at); err != nil || info.Mode() != os.ModeSocket|0o600 {
			t.Errorf("%s: %v, %v", at, info, err)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add(door.Request{Op: door.Drain}.Marshal())
	f.Add([]byte("rpsl\x02\x01\x00\x00"))
	f.Fuzz(func(t *testing.T, message []byte) {
		r, err := door.ParseRequest(message)
		if err == nil && !bytes.Equal(r.Marshal(), message) {
			t.Errorf("%q is understood as %+v", message, r)
		}
	})
}

func FuzzParseAnswer(f *testing.F) {
	f.Add(door.Answer{Done: true, Slot: 4095}.Marshal())
	f.Add(door.Answer{Text: "no"}.Marshal())
	f.Fuzz(func(t *testing.T, message []byte) {
		a, err := door.ParseAnswer(message)
		if err != nil {
			return
		}
		again, err := door.ParseAnswer(a.Marshal())
		if err != nil || again.Done != a.Done || again.Slot != a.Slot {
			t.Errorf("%q is understood as %+v, and again as %+v, %v", message, a, again, err)
		}
	})
}

// Whatever comes through a door, the next who knocks is served.
func FuzzDoor(f *testing.F) {
	f.Add(door.Request{Op: door.Drain}.Marshal(), uint8(1))
	f.Add([]byte("rpsl"), uint8(0))
	f.Add([]byte{}, uint8(200))
	_, _, path := open(f, &desk{})
	f.Fuzz(func(t *testing.T, message []byte, fds uint8) {
		fds = min(fds, 253) // SCM_MAX_FD
		message = message[:min(len(message), 100<<10)]
		if _, done := say(t, path, message, int(fds)); done != (fds == 1 && len(message) == 8 && valid(message)) {
			t.Errorf("%q with %d descriptors: done %v", message, fds, done)
		}
		if text, done := say(t, path, door.Request{Op: door.Register}.Marshal(), 1); !done {
			t.Errorf("after %q: %q", message, text)
		}
	})
}

// valid tells requests that the desk grants.
func valid(message []byte) bool {
	r, err := door.ParseRequest(message)
	return err == nil && r.Op != door.Resume
}
