package testnet

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ServerOptions say what a server binds. The zero value of every field but
// Network and Addr works.
type ServerOptions struct {
	// Network is udp4, udp6, tcp4 or tcp6.
	Network string
	// Addr is a literal address and port. With port 0 the kernel chooses one
	// for the first socket, which the next ones share.
	Addr string
	// Name is what the server answers with, "s" by default. In a group it is
	// followed by the socket's index.
	Name string
	// ReusePort sets SO_REUSEPORT.
	ReusePort bool
	// V6Only keeps IPv4 off an IPv6 socket.
	V6Only bool
	// MPTCP makes MPTCP listeners of TCP ones.
	MPTCP bool
	// Hold keeps a TCP server from accepting connections until Accept.
	Hold bool
	// Bound keeps TCP sockets from listening until Listen. Servers are reported
	// as soon as they are bound.
	Bound bool
	// Socket is a listener to serve instead of making one, for a server with one
	// socket. The caller closes it.
	Socket *os.File `json:"-"`
	// UID is the user the process becomes before it makes its sockets.
	UID int
	// Sockopts are set before bind.
	Sockopts []Sockopt
	// Reply is how the server answers, one of Replies, "sendto" by default.
	Reply string
	// Cgroup is the cgroup2 directory the process starts in, "" for the test's.
	Cgroup string
	// Wrap is a command line that runs the server's, which is appended to it.
	Wrap []string
}

// Sockopt is an integer socket option.
type Sockopt struct{ Level, Name, Value int }

// Server is a process with one or more echo sockets. Its methods may not be
// called concurrently.
type Server struct {
	// Addr is the address all its sockets are bound to.
	Addr netip.AddrPort
	// Names are what its sockets answer with, by index.
	Names []string

	t       testing.TB
	ns      *NetNS
	work    work
	cookies []uint64 // of its sockets
	cmd     *exec.Cmd
	stderr  bytes.Buffer
	control *os.File
	reports *bufio.Reader
	waited  bool
}

// StartServer starts a server with one socket and returns when it is bound.
func StartServer(t testing.TB, ns *NetNS, o ServerOptions) *Server {
	t.Helper()
	s, err := TryServer(t, ns, o)
	must(t, err)
	return s
}

// TryServer is StartServer where it may fail. The error has what the process
// wrote on its standard error.
func TryServer(t testing.TB, ns *NetNS, o ServerOptions) (*Server, error) {
	t.Helper()
	if o.Name == "" {
		o.Name = "s"
	}
	return start(t, ns, work{ServerOptions: o, Names: []string{o.Name}})
}

// StartGroup starts a process with n sockets, bound in the order of their
// indexes, and returns when all are.
func StartGroup(t testing.TB, ns *NetNS, n int, o ServerOptions) *Server {
	t.Helper()
	if o.Name == "" {
		o.Name = "s"
	}
	w := work{ServerOptions: o}
	for i := range n {
		w.Names = append(w.Names, fmt.Sprint(o.Name, i))
	}
	s, err := start(t, ns, w)
	must(t, err)
	return s
}

// start starts this very program, which MaybeServe turns into a server.
func start(t testing.TB, ns *NetNS, w work) (_ *Server, err error) {
	t.Helper()
	w.Inherited = w.Socket != nil
	env, err := json.Marshal(w)
	must(t, err)
	self, err := os.Executable()
	must(t, err)
	argv := append(slices.Clone(w.Wrap), self)

	s := &Server{t: t, ns: ns, work: w, cmd: exec.Command(argv[0], argv[1:]...), Names: w.Names}
	childIn, control, err := os.Pipe()
	must(t, err)
	defer childIn.Close()
	reports, childOut, err := os.Pipe()
	must(t, err)
	defer childOut.Close()
	s.control, s.reports = control, bufio.NewReader(reports)
	s.cmd.Env = append(os.Environ(), envServe+"="+string(env))
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = childIn, childOut, &s.stderr
	if w.Socket != nil {
		s.cmd.ExtraFiles = []*os.File{w.Socket}
	}
	s.cmd.WaitDelay = 5 * time.Second // what a wrapper leaves may hold standard error
	if w.Cgroup != "" {
		dir, err := os.Open(w.Cgroup)
		must(t, err)
		defer dir.Close()
		s.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
	must(t, ns.Start(s.cmd))
	t.Cleanup(func() {
		s.Kill()
		control.Close()
		reports.Close()
	})
	childOut.Close() // or its end would not be seen

	if err := s.bound(); err != nil {
		s.Kill()
		return nil, fmt.Errorf("server %s on %s %s: %w", w.Names[0], w.Network, w.Addr, err)
	}
	return s, nil
}

// bound waits for the report on what is bound.
func (s *Server) bound() error {
	line, err := s.reports.ReadString('\n')
	if err != nil {
		s.wait()
		return errors.New(strings.TrimSpace("ended. " + s.stderr.String()))
	}
	fields := strings.Fields(line)
	s.cookies = nil
	for _, text := range fields[1:] {
		cookie, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return err
		}
		s.cookies = append(s.cookies, cookie)
	}
	s.Addr, err = netip.ParseAddrPort(fields[0])
	return err
}

// PID is the server's process.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Kill sends SIGKILL and returns when the process is gone and its sockets are
// closed. Only the first call of Kill or Stop does something.
func (s *Server) Kill() { s.end(syscall.SIGKILL) }

// Stop is Kill with SIGTERM.
func (s *Server) Stop() { s.end(syscall.SIGTERM) }

func (s *Server) end(signal os.Signal) {
	if !s.waited {
		s.cmd.Process.Signal(signal)
	}
	s.wait()
}

// wait reaps the process, and waits for its sockets to be gone, which is a moment
// later when a search of all processes looks at one just then (see work.close). A test
// that has one itself keeps it: so it is not waited for long.
func (s *Server) wait() {
	if s.waited {
		return
	}
	s.waited = true
	s.cmd.Wait()
	if len(s.cookies) > 0 {
		must(s.t, s.ns.Do(func() error {
			_, err := s.work.awaitGone(s.cookies, s.Addr.Port(), time.Second)
			return err
		}))
	}
}

// Close closes the socket with an index and returns when it is closed.
func (s *Server) Close(index int) {
	s.t.Helper()
	s.order("close %d\n", index)
}

// Shutdown ends listening on the TCP socket with an index, which stays bound.
func (s *Server) Shutdown(index int) {
	s.t.Helper()
	s.order("shutdown %d\n", index)
}

// Listen makes the TCP socket with an index listen, with room for as many
// connections that are not accepted. It may listen already.
func (s *Server) Listen(index, backlog int) {
	s.t.Helper()
	s.order("listen %d %d\n", index, backlog)
}

// Accept ends Hold.
func (s *Server) Accept() {
	s.t.Helper()
	s.order("accept\n")
}

// Add binds one more socket and returns its name.
func (s *Server) Add() string {
	s.t.Helper()
	name := fmt.Sprint(strings.TrimRight(s.Names[0], "0123456789"), len(s.Names))
	s.order("add %s\n", name)
	s.Names = append(s.Names, name)
	return name
}

// AskAgent lets the server ask the agent with this run directory to "register",
// "drain" or "resume" the socket with an index. It returns the slot of one that
// was registered.
func (s *Server) AskAgent(index int, what, dir string) (slot int, err error) {
	s.t.Helper()
	_, err = fmt.Fprintf(s.control, "ask %d %s %s\n", index, what, dir)
	must(s.t, err)
	line, err := s.reports.ReadString('\n')
	must(s.t, err)
	if text, failed := strings.CutPrefix(line, "error "); failed {
		return 0, errors.New(strings.TrimSpace(text))
	}
	_, err = fmt.Sscanf(line, "slot %d", &slot)
	must(s.t, err)
	return slot, nil
}

func (s *Server) order(format string, args ...any) {
	s.t.Helper()
	_, err := fmt.Fprintf(s.control, format, args...)
	must(s.t, err)
	must(s.t, s.bound())
}
