package door

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/capability"
)

// patience is how long a client may take to say what it wants, or to take the
// answer. Tests are less patient.
var patience = 5 * time.Second

const (
	// maxClients is how many clients of one owner are served at once; others
	// wait in the socket's queue.
	maxClients = 16
	// pause is how long a door stays shut when no connection can be accepted,
	// for lack of descriptors.
	pause = 100 * time.Millisecond
)

// Peer is who asks: what the kernel noted when the client connected
// (SO_PEERCRED).
type Peer struct {
	PID int // zero: in a pid namespace that cannot be seen from here
	UID uint32
}

// Handler does what clients ask for. Its methods borrow conn, which may be any
// kind of file, for as long as they run. They are called concurrently; the text
// of their errors goes to the client.
type Handler interface {
	Register(p Peer, conn syscall.Conn) (slot int, err error)
	Drain(p Peer, conn syscall.Conn) error
	Resume(p Peer, conn syscall.Conn) error
}

// Door serves the owners of groups. Its methods are to be called by one
// goroutine.
type Door struct {
	dir       string
	handler   Handler
	listeners map[uint32]*listener

	mu       sync.Mutex
	clients  map[*net.UnixConn]bool
	closed   bool
	handling sync.WaitGroup
}

// listener is the socket of one owner.
type listener struct {
	*net.UnixListener
	uid     uint32
	path    string
	clients chan struct{} // as many as are served at once
	shut    chan struct{}
}

// MakeDir makes a run directory that everybody may pass through, and what is
// missing above it.
func MakeDir(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := MakeDir(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	err := os.Mkdir(dir, 0o755)
	switch {
	case err == nil:
		return os.Chmod(dir, 0o755) // whatever the umask
	case errors.Is(err, fs.ErrExist):
		return nil
	default:
		return err
	}
}

// Open opens the doors of a run directory, for nobody yet. It removes those that
// a killed agent left: there is one agent per directory, the caller sees to that.
// The caller closes the Door.
func Open(dir string, h Handler) (*Door, error) {
	if err := MakeDir(dir); err != nil {
		return nil, err
	}
	stale, err := filepath.Glob(filepath.Join(dir, Pattern))
	if err != nil {
		return nil, err
	}
	for _, path := range stale {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	return &Door{dir: dir, handler: h, listeners: map[uint32]*listener{}, clients: map[*net.UnixConn]bool{}}, nil
}

// SetOwners says who has a door: it opens those that are missing and closes the
// others. If one cannot be opened, the others are all the same.
func (d *Door) SetOwners(uids []uint32) error {
	var errs []error
	for uid, l := range d.listeners {
		if !slices.Contains(uids, uid) {
			delete(d.listeners, uid)
			errs = append(errs, l.close())
		}
	}
	for _, uid := range uids {
		if d.listeners[uid] != nil {
			continue
		}
		l, err := listen(d.dir, uid)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		d.listeners[uid] = l
		go d.serve(l)
	}
	return errors.Join(errs...)
}

// Close closes all doors, and returns when no Handler runs any more.
func (d *Door) Close() error {
	err := d.SetOwners(nil)
	d.mu.Lock()
	d.closed = true
	for c := range d.clients {
		c.SetReadDeadline(time.Unix(1, 0)) // who is being answered may have the answer
	}
	d.mu.Unlock()
	d.handling.Wait()
	return err
}

// listen opens the door of one owner. The socket is nobody's but root's until
// it is the owner's.
func listen(dir string, uid uint32) (*listener, error) {
	path := Path(dir, uid)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	private := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		// The file gets the mode of the socket (net/unix/af_unix.c unix_bind_bsd).
		var inner error
		err := raw.Control(func(fd uintptr) { inner = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, os.NewSyscallError("fchmod", inner))
	}}
	l, err := private.Listen(context.Background(), Network, path)
	if err != nil {
		return nil, err
	}
	if err := os.Lchown(path, int(uid), -1); err != nil {
		l.Close()
		if errors.Is(err, unix.EPERM) {
			err = capability.Denied("give "+path+" to its owner", capability.Chown)
		}
		return nil, err
	}
	return &listener{
		UnixListener: l.(*net.UnixListener), uid: uid, path: path,
		clients: make(chan struct{}, maxClients), shut: make(chan struct{}),
	}, nil
}

// close removes the socket too.
func (l *listener) close() error {
	close(l.shut)
	return l.UnixListener.Close()
}

// serve accepts clients until the door is shut.
func (d *Door) serve(l *listener) {
	for {
		select {
		case l.clients <- struct{}{}:
		case <-l.shut:
			return
		}
		c, err := l.AcceptUnix()
		if err != nil {
			<-l.clients
			select {
			case <-l.shut:
				return
			case <-time.After(pause):
				continue
			}
		}
		go func() {
			defer func() { <-l.clients }()
			defer c.Close()
			d.answer(c, l.uid)
		}()
	}
}

// answer serves one client.
func (d *Door) answer(c *net.UnixConn, owner uint32) {
	if !d.enter(c) {
		return
	}
	defer d.leave(c)
	peer, err := peerOf(c)
	if err != nil {
		return
	}
	request, file, err := receive(c)
	var a Answer
	switch {
	case errors.Is(err, errSilent):
	case err != nil:
		a.Text = err.Error()
	case peer.UID != owner:
		a.Text = fmt.Sprintf("you are uid %d, this socket is uid %d's", peer.UID, owner)
	default:
		a = d.handle(peer, request, file)
	}
	// Before the answer, so that a client that has it knows its socket is its
	// own again. It may block, if the client sent something odd.
	for _, fd := range file {
		unix.Close(fd)
	}
	if errors.Is(err, errSilent) {
		return
	}
	c.SetWriteDeadline(time.Now().Add(patience))
	c.Write(a.Marshal())
}

// enter counts a client in, unless the door is closed.
func (d *Door) enter(c *net.UnixConn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return false
	}
	d.clients[c] = true
	return c.SetReadDeadline(time.Now().Add(patience)) == nil
}

func (d *Door) leave(c *net.UnixConn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.clients, c)
}

// handle asks the handler, unless the door is closed.
func (d *Door) handle(p Peer, r Request, file received) (a Answer) {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return Answer{Text: "the agent is about to end: try again"}
	}
	d.handling.Add(1)
	d.mu.Unlock()
	defer d.handling.Done()

	var slot int
	var err error
	switch r.Op {
	case Register:
		slot, err = d.handler.Register(p, file)
	case Drain:
		err = d.handler.Drain(p, file)
	case Resume:
		err = d.handler.Resume(p, file)
	}
	if err != nil {
		return Answer{Text: err.Error()}
	}
	return Answer{Done: true, Slot: uint32(slot)}
}

// peerOf reads who connected.
func peerOf(c *net.UnixConn) (Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var p Peer
	var inner error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); inner == nil {
			p = Peer{PID: int(cred.Pid), UID: cred.Uid}
		}
	})
	return p, errors.Join(err, inner)
}

// errSilent: there is nobody to answer.
var errSilent = errors.New("no request")

// receive reads a request and the descriptors that came with it, which the
// caller closes whatever the error. There is one if there is no error.
func receive(c *net.UnixConn) (Request, received, error) {
	message := make([]byte, requestSize+1) // one more tells that there was more
	// The alignment leaves room for a second descriptor; what does not fit the
	// kernel does not install, and says so.
	control := make([]byte, unix.CmsgSpace(4))
	n, controlled, flags, _, readErr := c.ReadMsgUnix(message, control) // sets MSG_CMSG_CLOEXEC
	// A message without a byte reads like the end, and may have descriptors.
	file, err := descriptors(control[:controlled])
	if readErr != nil {
		return Request{}, file, errSilent
	}
	if err != nil {
		return Request{}, file, err
	}
	request, err := ParseRequest(message[:n])
	if err != nil {
		return Request{}, file, err
	}
	if len(file) != 1 || flags&unix.MSG_CTRUNC != 0 {
		return Request{}, file, fmt.Errorf("%s: send exactly one descriptor, the socket's", request.Op)
	}
	return request, file, nil
}

// descriptors are those in a control message.
func descriptors(control []byte) (received, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	var file received
	for _, m := range messages {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_RIGHTS {
			fds, err := unix.ParseUnixRights(&m)
			if err != nil {
				return file, err
			}
			file = append(file, fds...)
		}
	}
	return file, nil
}

// received is what came with a request. As a syscall.Conn it is the first, and
// only, of the descriptors. It stays out of Go's poller, and what it shares with
// the client (O_NONBLOCK) as it is.
type received []int

func (r received) SyscallConn() (syscall.RawConn, error) { return r, nil }

func (r received) Control(f func(fd uintptr)) error {
	f(uintptr(r[0]))
	return nil
}

func (received) Read(func(uintptr) bool) error  { return errors.ErrUnsupported }
func (received) Write(func(uintptr) bool) error { return errors.ErrUnsupported }
