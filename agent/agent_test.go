package agent_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/internal/door"
	"github.com/rpsel/rpsel/internal/testnet"
)

func TestMain(m *testing.M) { testnet.Main(m) }

// desk is an agent that registers everything in slot 5 and drains nothing.
type desk struct{}

func (desk) Register(_ door.Peer, conn syscall.Conn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var inner error
	raw.Control(func(fd uintptr) { _, inner = unix.Getsockname(int(fd)) })
	return 5, inner
}
func (desk) Drain(door.Peer, syscall.Conn) error  { return errors.New("the test says no") }
func (desk) Resume(door.Peer, syscall.Conn) error { return nil }

// startAgent opens a door for the user that the test runs as, and returns the
// run directory.
func startAgent() (dir string, stop func(), err error) {
	dir, err = os.MkdirTemp("", "rpsel-run-")
	if err != nil {
		return "", nil, err
	}
	d, err := door.Open(dir, desk{})
	if err == nil {
		err = d.SetOwners([]uint32{uint32(os.Geteuid())})
	}
	return dir, func() {
		d.Close()
		os.RemoveAll(dir)
	}, err
}

func socket(t *testing.T) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestClient(t *testing.T) {
	dir, stop, err := startAgent()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	c, conn := agent.Client{Dir: dir}, socket(t)
	if slot, err := c.Register(t.Context(), conn); slot != 5 || err != nil {
		t.Errorf("register: %d, %v", slot, err)
	}
	if err := c.Drain(t.Context(), conn); !errors.Is(err, agent.ErrRefused) || err.Error() != "drain: the agent refused: the test says no" {
		t.Errorf("drain: %v", err)
	}
	if err := c.Resume(t.Context(), conn); err != nil {
		t.Errorf("resume: %v", err)
	}
	// It was borrowed.
	if _, err := conn.WriteTo(nil, conn.LocalAddr()); err != nil {
		t.Error(err)
	}
	conn.Close()
	if _, err := c.Register(t.Context(), conn); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed socket: %v", err)
	}
}

// listen makes a door that is not an agent's.
func listen(t *testing.T) (dir string, l *net.UnixListener) {
	t.Helper()
	dir = t.TempDir()
	l, err := net.ListenUnix(door.Network, &net.UnixAddr{Name: door.Path(dir, uint32(os.Geteuid())), Net: door.Network})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return dir, l
}

// Where there is no agent, the error says so, and what to do.
func TestNoAgent(t *testing.T) {
	empty := t.TempDir()
	stale, l := listen(t)
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, c := range []struct {
		name, dir string
		want      error
		text      string
	}{
		{"no directory", filepath.Join(empty, "none"), agent.ErrNoAgent, "start it, or name its run directory"},
		{"no door", empty, agent.ErrNotOwner, `"rpsel attach --port PORT --owner `},
		{"a killed agent's", stale, agent.ErrNoAgent, "it has ended: start it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := agent.Client{Dir: c.dir}.Register(t.Context(), socket(t))
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, c.text)
			}
		})
	}
}

// Answers that are none, or never come.
func TestBadAgent(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer []byte
		want   string
	}{
		{"it ends", nil, "no rpsel agent: it ended, or was too busy to answer: try again"},
		{"garbage", []byte("hello"), "the answer is not an rpsel agent's"},
		{"too long", append(door.Answer{Text: strings.Repeat("x", 2000)}.Marshal(), 'x'), "the answer is not an rpsel agent's"},
		{"another version", bytes.Replace(door.Answer{}.Marshal(), []byte{1}, []byte{9}, 1), "the agent speaks version 9, this library 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, l := listen(t)
			go func() {
				conn, err := l.Accept()
				if err == nil {
					conn.Read(make([]byte, 100))
					conn.Write(c.answer)
					conn.Close()
				}
			}()
			_, err := agent.Client{Dir: dir}.Register(t.Context(), socket(t))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("silence", func(t *testing.T) {
		dir, _ := listen(t)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := (agent.Client{Dir: dir}).Drain(ctx, socket(t)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		cancelled, giveUp := context.WithCancelCause(t.Context())
		why := errors.New("the server ends")
		go giveUp(why)
		if err := (agent.Client{Dir: dir}).Drain(cancelled, socket(t)); !errors.Is(err, why) {
			t.Errorf("got %v", err)
		}
	})
}

func TestDir(t *testing.T) {
	for _, usual := range []string{"", "/sys/fs/bpf", "/sys/fs/bpf/"} {
		if dir, err := agent.Dir(usual); dir != agent.DefaultDir || err != nil {
			t.Errorf("%q: %q, %v", usual, dir, err)
		}
	}
	if dir, err := agent.Dir(t.TempDir()); err == nil {
		t.Errorf("no bpffs: %q", dir)
	}
	bpffs := testnet.BPFFS(t)
	dir, err := agent.Dir(bpffs)
	if again, _ := agent.Dir(bpffs + "/"); err != nil || dir != again || !strings.HasPrefix(dir, agent.DefaultDir+"/bpffs-") {
		t.Errorf("%q, %q, %v", dir, again, err)
	}
	if other, err := agent.Dir(testnet.BPFFS(t)); err != nil || other == dir {
		t.Errorf("another bpffs: %q, %v", other, err)
	}
}

// Servers link this package: it may not drag in what only the agent needs.
func TestLight(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "github.com/rpsel/rpsel/agent").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for dep := range strings.Lines(string(out)) {
		dep = strings.TrimSpace(dep)
		if dep == "net/http" || strings.Contains(dep, "cilium") || strings.HasSuffix(dep, "/loader") || strings.HasSuffix(dep, "/sockets") {
			t.Errorf("it needs %s", dep)
		}
	}
}
