// Package demo shows on real processes and packets what rpsel is for: it kills
// and starts listeners of a port and counts the flows that move although their
// own listener is alive, on plain Linux and with rpsel.
//
// It must run in a process that is alone in its network and mount namespaces,
// which Prepare sets up, and which end with the process.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// address is where the listeners are. The namespace is the demo's own, so any
// port is free.
var address = netip.MustParseAddrPort("127.0.0.1:1194")

// listeners is how many there are at first.
const listeners = 3

// Options say how a demo runs.
type Options struct {
	// Flows is how many flows each half drives; each takes a descriptor.
	Flows int
	// Listener returns a command that calls Serve with this name. It is
	// started with standard input and output of its own.
	Listener func(name string) *exec.Cmd
	// Progress is told what is being done.
	Progress func(step string)
}

// Count is how many of some flows moved.
type Count struct {
	Flows int `json:"flows"`
	Moved int `json:"moved"`
}

// Half is what happened on one of the two systems. The counts are of flows
// whose own listener was alive all the time.
type Half struct {
	// Attach is nil for plain Linux.
	Attach *Count `json:"attach,omitempty"`
	// Kill is the death of the listener that was bound first.
	Kill Count `json:"kill"`
	// Start is the start of another one after that.
	Start Count `json:"start"`
	// Fresh are flows that began then.
	Fresh Fresh `json:"fresh"`
}

// Fresh is how many new flows there were, and how many of them the listener
// got that was started last.
type Fresh struct {
	Flows int `json:"flows"`
	Got   int `json:"got"`
}

// Result is what a demo found.
type Result struct {
	Listeners int  `json:"listeners"`
	Plain     Half `json:"plain"`
	Sticky    Half `json:"rpsel"`
}

// Prepare sets up the namespaces of the process: a loopback that is up and a
// BPF file system of its own.
func Prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("mount / private", err)
	}
	if err := unix.Mount("bpf", string(loader.DefaultFS), "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs on %s: %w", loader.DefaultFS, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return os.NewSyscallError("set lo up", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo))
}

// Run runs both halves. It ends early, and with the error of the context, when
// that is cancelled. All its processes have ended when it returns.
func Run(ctx context.Context, o Options) (Result, error) {
	result := Result{Listeners: listeners}
	for _, half := range []struct {
		sticky bool
		name   string
		into   *Half
	}{{false, "plain Linux", &result.Plain}, {true, "rpsel", &result.Sticky}} {
		r := runner{Options: o, sticky: half.sticky, name: half.name}
		counts, err := r.run(ctx)
		if ctx.Err() != nil {
			return result, ctx.Err()
		}
		if err != nil {
			return result, fmt.Errorf("%s: %w", half.name, err)
		}
		*half.into = counts
	}
	return result, nil
}

// runner runs one half.
type runner struct {
	Options
	sticky  bool
	name    string
	servers []*server
	flows   []*flow
}

func (r *runner) run(ctx context.Context) (h Half, err error) {
	defer func() {
		for _, f := range r.flows {
			f.conn.Close()
		}
		for _, s := range r.servers {
			s.kill()
		}
		if r.sticky {
			err = errors.Join(err, detach())
		}
	}()
	r.step("start %d listeners, drive %d flows", listeners, r.Flows)
	for i := range listeners {
		if err := r.start(ctx, fmt.Sprintf("listener %d", i+1)); err != nil {
			return h, err
		}
	}
	if err := r.open(ctx, r.Flows); err != nil {
		return h, err
	}
	if r.sticky {
		r.step("attach while they run")
		if err := attach(); err != nil {
			return h, err
		}
		count, err := r.ask(ctx, "")
		if err != nil {
			return h, err
		}
		h.Attach = &count
	}

	r.step("kill the first listener")
	r.servers[0].kill()
	if h.Kill, err = r.ask(ctx, r.servers[0].name); err != nil {
		return h, err
	}

	r.step("start another listener")
	joiner := fmt.Sprintf("listener %d", listeners+1)
	if err := r.start(ctx, joiner); err != nil {
		return h, err
	}
	if r.sticky {
		if err := attach(); err != nil { // registers what is new
			return h, err
		}
	}
	if h.Start, err = r.ask(ctx, ""); err != nil {
		return h, err
	}

	r.step("drive new flows")
	old := len(r.flows)
	if err := r.open(ctx, r.Flows/3); err != nil {
		return h, err
	}
	for _, f := range r.flows[old:] {
		h.Fresh.Flows++
		if f.owner == joiner {
			h.Fresh.Got++
		}
	}
	return h, nil
}

func (r *runner) step(format string, args ...any) {
	r.Progress(r.name + ": " + fmt.Sprintf(format, args...))
}

// server is the process of a listener.
type server struct {
	name string
	cmd  *exec.Cmd
	// control keeps it alive: when the demo dies, however it dies, this closes
	// and the listener ends.
	control io.Closer
	waited  bool
}

// start starts a listener and returns when it is bound.
func (r *runner) start(ctx context.Context, name string) error {
	cmd := r.Listener(name)
	control, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	r.servers = append(r.servers, &server{name: name, cmd: cmd, control: control})
	stop := context.AfterFunc(ctx, func() { out.Close() })
	defer stop()
	if _, err := io.ReadFull(out, make([]byte, len(ready))); err != nil {
		return fmt.Errorf("%s did not start: %w", name, err)
	}
	return nil
}

// kill kills the process and returns when its socket is closed: the kernel
// closes the files before a process can be waited for.
func (s *server) kill() {
	if s.waited {
		return
	}
	s.waited = true
	// It may have ended by itself, on the same SIGINT.
	_ = s.cmd.Process.Signal(syscall.SIGKILL)
	_ = s.cmd.Wait()
	s.control.Close()
}

// flow is a client and the listener that answered it last.
type flow struct {
	conn  net.Conn
	owner string
}

// open adds n flows and lets each find its listener.
func (r *runner) open(ctx context.Context, n int) error {
	for range n {
		conn, err := net.Dial("udp4", address.String())
		if err != nil {
			return fmt.Errorf("open flow %d: %w", len(r.flows), err)
		}
		f := &flow{conn: conn}
		r.flows = append(r.flows, f)
		if f.owner, err = f.ask(ctx); err != nil {
			return err
		}
	}
	return nil
}

// ask lets each flow send a packet and counts those that another listener
// answers than before, but for those of the one that died.
func (r *runner) ask(ctx context.Context, died string) (c Count, err error) {
	for _, f := range r.flows {
		owner, err := f.ask(ctx)
		if err != nil {
			return c, err
		}
		if f.owner != died {
			c.Flows++
			if f.owner != owner {
				c.Moved++
			}
		}
		f.owner = owner
	}
	return c, nil
}

// How often a flow asks before it gives up, and how long it waits each time.
const (
	tries    = 10
	patience = 500 * time.Millisecond
)

// ask sends a packet and returns the name of the listener that answers.
func (f *flow) ask(ctx context.Context) (string, error) {
	answer := make([]byte, 64)
	var err error
	for range tries {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		if _, err = f.conn.Write([]byte{'?'}); err != nil {
			continue // an ICMP error for the packet before
		}
		if err = f.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return "", err
		}
		var n int
		if n, err = f.conn.Read(answer); err == nil {
			return string(answer[:n]), nil
		}
	}
	return "", fmt.Errorf("no listener answers: %w", err)
}

// group finds the group of the listeners.
func group() (sockets.Group, error) {
	ns, err := sockets.OpenNetNS("")
	if err != nil {
		return sockets.Group{}, err
	}
	defer ns.Close()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Proto: sockets.UDP, Port: address.Port(), Addr: address.Addr()})
	if err != nil {
		return sockets.Group{}, err
	}
	if len(groups) != 1 {
		return sockets.Group{}, fmt.Errorf("%s: %w", address, sockets.ErrGone)
	}
	return groups[0], nil
}

// attach does what "rpsel attach" does.
func attach() error {
	g, err := group()
	if err != nil {
		return err
	}
	conn, err := g.Members[0].Take()
	if err != nil {
		return err
	}
	defer conn.Close()
	// No flow is older than the attach but those that ask right after it. All ask in
	// turn, and are not to be forgotten where a turn takes more than half a minute.
	attached, err := loader.Attach(conn, loader.Options{Settle: -1, Idle: time.Hour, IdleNew: time.Hour})
	if err != nil {
		return err
	}
	return attached.Close()
}

// detach removes the state, if there is any.
func detach() error {
	keys, err := loader.DefaultFS.Keys(0)
	for _, k := range keys {
		_, detachErr := loader.DefaultFS.Detach(k)
		err = errors.Join(err, detachErr)
	}
	return err
}
