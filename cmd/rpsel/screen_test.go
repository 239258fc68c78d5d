package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// emulator is a terminal, as far as rpsel asks for one. What it does not know is a
// mistake.
type emulator struct {
	mu            sync.Mutex
	width, height int
	shown, other  [][]rune // the screen, and the one that is not shown
	line, column  int
	alternate     bool
	noCursor      bool
	noWrap        bool
	coloured      int // how often
	strange       []string
	all           []byte
}

func newEmulator(width, height int) *emulator {
	e := &emulator{}
	e.resize(width, height)
	return e
}

// resize empties both screens, as no terminal does: what is on it then was drawn since.
func (e *emulator) resize(width, height int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.width, e.height, e.line, e.column = width, height, 0, 0
	e.shown, e.other = make([][]rune, height), make([][]rune, height)
}

var sequence = regexp.MustCompile(`^\x1b\[([?0-9;]*)([A-Za-z])`)

func (e *emulator) Write(output []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, output...)
	for rest := output; len(rest) > 0; {
		if m := sequence.FindSubmatch(rest); m != nil {
			e.obey(string(m[1]), string(m[2]))
			rest = rest[len(m[0]):]
			continue
		}
		r, n := utf8.DecodeRune(rest)
		rest = rest[n:]
		switch {
		case r == '\r':
			e.column = 0
		case r == '\n' && e.line == e.height-1:
			e.shown = append(e.shown[1:], nil)
		case r == '\n':
			e.line++
		case r < ' ' || r == utf8.RuneError:
			e.strange = append(e.strange, fmt.Sprintf("%q", r))
		default:
			e.put(r)
		}
	}
	return len(output), nil
}

func (e *emulator) put(r rune) {
	if e.column == e.width {
		if !e.noWrap {
			e.strange = append(e.strange, "a line that is too long")
		}
		e.column--
	}
	for len(e.shown[e.line]) <= e.column {
		e.shown[e.line] = append(e.shown[e.line], ' ')
	}
	e.shown[e.line][e.column] = r
	e.column++
}

func (e *emulator) obey(parameters, command string) {
	switch parameters + command {
	case "H":
		e.line, e.column = 0, 0
	case "2K":
		e.shown[e.line] = nil
	case "J":
		e.shown[e.line] = e.shown[e.line][:min(e.column, len(e.shown[e.line]))]
		for i := e.line + 1; i < e.height; i++ {
			e.shown[i] = nil
		}
	case "?1049h", "?1049l":
		if e.alternate != (command == "h") {
			e.alternate = !e.alternate
			e.shown, e.other = e.other, e.shown
		}
	case "?25h", "?25l":
		e.noCursor = command == "l"
	case "?7h", "?7l":
		e.noWrap = command == "l"
	default:
		if command != "m" {
			e.strange = append(e.strange, parameters+command)
		}
		e.coloured++
	}
}

func (e *emulator) text() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var b strings.Builder
	for _, line := range e.shown {
		b.WriteString(string(line) + "\n")
	}
	return strings.TrimRight(b.String(), "\n")
}

func (e *emulator) colours() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.coloured
}

// watched is "rpsel status --watch" on a terminal.
type watched struct {
	*emulator
	cmd        *exec.Cmd
	master     *os.File
	slave      *os.File
	before     unix.Termios
	readToEnd  chan error
	stderrText strings.Builder
}

// startWatch runs it as the leader of the terminal's session.
func startWatch(t *testing.T, ns *testnet.NetNS, env []string, args ...string) *watched {
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := &exec.Cmd{Path: path, Args: append([]string{"rpsel", "status", "--watch=100ms"}, args...)}
	return startOnTerminal(t, ns, cmd, env)
}

func startOnTerminal(t *testing.T, ns *testnet.NetNS, cmd *exec.Cmd, env []string) *watched {
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	w := &watched{emulator: newEmulator(120, 30), master: master, slave: slave, readToEnd: make(chan error, 1)}
	if err := pty.Setsize(master, &pty.Winsize{Cols: 120, Rows: 30}); err != nil {
		t.Fatal(err)
	}
	w.before = w.termios(t)
	go func() {
		_, err := io.Copy(w, master)
		w.readToEnd <- err
	}()
	if _, err := slave.WriteString("$ rpsel\r\n"); err != nil {
		t.Fatal(err)
	}
	w.cmd = cmd
	cmd.Env = append(append(os.Environ(), "TERM=xterm", "LC_ALL=C.UTF-8", "NO_COLOR="), env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, &w.stderrText
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if w.cmd.ProcessState == nil {
			w.cmd.Process.Kill()
			w.cmd.Wait()
		}
		slave.Close()
		if err := <-w.readToEnd; !errors.Is(err, unix.EIO) { // nobody has the other side open
			t.Errorf("terminal: %v", err)
		}
		master.Close()
	})
	return w
}

func (w *watched) termios(t *testing.T) unix.Termios {
	t.Helper()
	now, err := unix.IoctlGetTermios(int(w.slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *now
}

func (w *watched) typed(t *testing.T, keys string) {
	t.Helper()
	if _, err := w.master.WriteString(keys); err != nil {
		t.Fatal(err)
	}
}

// until waits until the screen is as it should be.
func (w *watched) until(t *testing.T, what string, ok func(screen string) bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		screen := w.text()
		if ok(screen) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no %s on the screen:\n%s\n%s", what, screen, w.stderrText.String())
		}
	}
}

// ended waits for the end of the command, and checks that the terminal is as it was.
func (w *watched) ended(t *testing.T) {
	t.Helper()
	if err := w.cmd.Wait(); err != nil || w.stderrText.String() != "" {
		t.Errorf("%v, stderr %q", err, w.stderrText.String())
	}
	if diff := cmp.Diff(w.before, w.termios(t)); diff != "" {
		t.Errorf("terminal settings -before +after:\n%s", diff)
	}
	w.until(t, "prompt", func(screen string) bool { return screen == "$ rpsel" })
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.alternate || w.noCursor || w.noWrap {
		t.Errorf("other screen %v, no cursor %v, no wrap %v", w.alternate, w.noCursor, w.noWrap)
	}
	if len(w.strange) > 0 {
		t.Errorf("a terminal would not know %q", w.strange)
	}
}

func attachQuietly(t *testing.T, args ...string) {
	t.Helper()
	if code, _, talk := rpsel(append([]string{"attach", "-q", "--port", "1194", "--settle", "0"}, args...)...); code != exitDone {
		t.Fatalf("exit code %d: %s", code, talk)
	}
}

// On a terminal status redraws itself: groups come and go, packets are counted, the
// window changes its size. In the end the terminal is as it was.
func TestWatchTerminal(t *testing.T) {
	ns := testnet.New(t)
	fs := testnet.BPFFS(t)
	scope := []string{"-N", ns.Path(), "--bpffs", fs}
	w := startWatch(t, ns, nil, append(scope, "--port", "1194")...)
	w.until(t, "empty list", func(screen string) bool { return strings.Contains(screen, "nothing is attached") })
	if w.termios(t).Lflag&unix.ECHO != 0 {
		t.Error("what is typed is shown")
	}

	server := testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	attachQuietly(t, scope...)
	row := regexp.MustCompile(`(?m)^ +[01] +` + strconv.Itoa(server.PID()) + ` .* active `)
	w.until(t, "two listeners", func(screen string) bool { return len(row.FindAllString(screen, -1)) == 2 })
	clients := testnet.NewClients(t, ns, 100, server.Addr.String())
	packets := regexp.MustCompile(`(?m)^  packets/s +[\d.]+ +[1-9][\d.]*  [▁▂▃▄▅▆▇█]+$`)
	w.until(t, "history", func(screen string) bool {
		clients.Ask()
		return packets.MatchString(screen) && strings.Contains(screen, "flows 100/") && strings.Contains(screen, " %  ██")
	})

	w.resize(40, 5)
	if err := pty.Setsize(w.master, &pty.Winsize{Cols: 40, Rows: 5}); err != nil {
		t.Fatal(err)
	}
	w.until(t, "small screen", func(screen string) bool {
		lines := strings.Split(screen, "\n")
		return len(lines) == 5 && strings.HasPrefix(lines[4], "... ") && utf8.RuneCountInString(lines[1]) == 40
	})
	// Here the other screen would have to come back, but the emulator has emptied it.
	w.resize(120, 30)
	if err := pty.Setsize(w.master, &pty.Winsize{Cols: 120, Rows: 30}); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.other[0] = []rune("$ rpsel")
	w.mu.Unlock()

	// Its own terminal has no shell: there is nobody to wake it up after a Ctrl-Z.
	w.typed(t, "\x1a")
	if _, err := loader.FS(fs).Detach(loader.Key{NetNS: ns.Cookie(), Proto: loader.UDP, Addr: netip.MustParseAddrPort("127.0.0.1:1194")}); err != nil {
		t.Fatal(err)
	}
	w.until(t, "empty list", func(screen string) bool {
		return strings.Contains(screen, "udp port 1194 in network namespace "+ns.Path()+": nothing is attached") && !strings.Contains(screen, "HISTORY")
	})
	w.typed(t, "typed\x03") // Ctrl-C
	w.ended(t)
	if w.colours() == 0 {
		t.Error("no colours")
	}
}

// Ctrl-Z gives the shell its terminal as it was, and fg goes on.
func TestWatchSuspend(t *testing.T) {
	ns := testnet.New(t)
	fs := testnet.BPFFS(t)
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	named := filepath.Join(t.TempDir(), "rpsel")
	if err := os.Symlink(path, named); err != nil {
		t.Fatal(err)
	}
	shell := exec.Command("sh", "-mc", `"$@"; echo stopped; read line; fg >/dev/null`, "sh",
		named, "status", "--watch=100ms", "-N", ns.Path(), "--bpffs", fs)
	w := startOnTerminal(t, ns, shell, nil)
	empty := func(screen string) bool { return strings.Contains(screen, "nothing is attached") }
	w.until(t, "empty list", empty)
	w.typed(t, "\x1a")
	w.until(t, "prompt", func(screen string) bool {
		return strings.HasPrefix(screen, "$ rpsel\n") && strings.HasSuffix(screen, "\nstopped")
	})
	if diff := cmp.Diff(w.before, w.termios(t)); diff != "" {
		t.Errorf("terminal settings while it is stopped, -before +then:\n%s", diff)
	}
	w.typed(t, "\n")
	w.until(t, "empty list", empty)
	w.typed(t, "\x03")
	if err := w.cmd.Wait(); err != nil {
		t.Errorf("%v, stderr %q", err, w.stderrText.String())
	}
	if diff := cmp.Diff(w.before, w.termios(t)); diff != "" {
		t.Errorf("terminal settings -before +after:\n%s", diff)
	}
}

// However it ends, and whatever is asked for.
func TestWatchEnds(t *testing.T) {
	ns := testnet.New(t)
	fs := testnet.BPFFS(t)
	scope := []string{"-N", ns.Path(), "--bpffs", fs}
	testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	attachQuietly(t, scope...)
	for _, c := range []struct {
		name     string
		env      []string
		signal   syscall.Signal
		coloured bool
	}{
		{"SIGTERM", nil, syscall.SIGTERM, true},
		{"SIGINT", nil, syscall.SIGINT, true},
		{"SIGQUIT", nil, syscall.SIGQUIT, true},
		{"NO_COLOR", []string{"NO_COLOR=1"}, syscall.SIGTERM, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := startWatch(t, ns, c.env, scope...)
			w.until(t, "history", func(screen string) bool { return strings.Contains(screen, "\n  packets/s ") })
			if err := w.cmd.Process.Signal(c.signal); err != nil {
				t.Fatal(err)
			}
			w.ended(t)
			if n := w.colours(); (n > 0) != c.coloured {
				t.Errorf("coloured %d times", n)
			}
		})
	}

	// A terminal that cannot be redrawn gets what a file would.
	for _, kind := range []string{"dumb", ""} {
		t.Run("TERM="+kind, func(t *testing.T) {
			w := startWatch(t, ns, []string{"TERM=" + kind}, scope...)
			w.until(t, "second block", func(screen string) bool { return strings.Contains(screen, "\n  packets/s ") })
			if err := w.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := w.cmd.Wait(); err != nil {
				t.Error(err)
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			if slices.Contains(w.all, '\x1b') || !strings.HasPrefix(string(w.all), "$ rpsel\r\r\n20") {
				t.Errorf("output %q", w.all)
			}
		})
	}

	// What goes wrong on the way is said after the terminal is given back.
	t.Run("error", func(t *testing.T) {
		w := startWatch(t, ns, nil, "-N", ns.Path(), "--bpffs", fs)
		w.until(t, "history", func(screen string) bool { return strings.Contains(screen, "\n  packets/s ") })
		config := fmt.Sprintf("%s/rpsel/%d/udp_7f000001_1194/config", fs, ns.Cookie())
		if err := os.Remove(config); err != nil {
			t.Fatal(err)
		}
		if err := w.cmd.Wait(); w.cmd.ProcessState.ExitCode() != exitFailed || !strings.HasPrefix(w.stderrText.String(), "rpsel: udp 127.0.0.1:1194: ") {
			t.Errorf("%v, stderr %q", err, w.stderrText.String())
		}
		w.stderrText.Reset()
		w.until(t, "prompt", func(screen string) bool { return screen == "$ rpsel" })
	})
}
