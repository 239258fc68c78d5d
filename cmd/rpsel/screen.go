package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// terminal returns the terminal that a command's output goes to, if it is one.
func terminal(w io.Writer) (*os.File, bool) {
	if p, ok := w.(plain); ok {
		w = p.w
	}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return f, true
	}
	return nil, false
}

// redraws tells whether a kind of terminal does what screen asks of it: all do that
// are in use, but for those without a name and Emacs's.
func redraws(kind string) bool { return kind != "" && kind != "dumb" }

// speaksUTF8 tells whether the locale does (locale(7)). Where none is set, as with
// sudo, so do all terminals of today.
func speaksUTF8(getenv func(string) string) bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if locale := strings.ToLower(getenv(name)); locale != "" {
			return strings.Contains(locale, "utf-8") || strings.Contains(locale, "utf8")
		}
	}
	return true
}

// screen redraws a terminal. What was on it comes back in the end. It is not safe
// for concurrent use.
type screen struct {
	file    *os.File
	colours bool
	before  unix.Termios
}

// What is asked of the terminal (xterm's ctlseqs): its other screen, no cursor, no
// line that goes on in the next.
const (
	enterScreen = "\x1b[?1049h\x1b[?25l\x1b[?7l"
	leaveScreen = "\x1b[?7h\x1b[?25h\x1b[?1049l"
)

// enter takes the terminal. What is typed is not shown, but Ctrl-C and Ctrl-Z work.
func (s *screen) enter() error {
	before, err := unix.IoctlGetTermios(int(s.file.Fd()), unix.TCGETS)
	if err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	s.before = *before
	silent := *before
	silent.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(int(s.file.Fd()), unix.TCSETS, &silent); err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	_, err = s.file.WriteString(enterScreen)
	return err
}

// leave gives the terminal back, and forgets what was typed. There is nobody to tell
// if that fails.
func (s *screen) leave() {
	_, _ = s.file.WriteString(leaveScreen)
	_ = unix.IoctlSetTermios(int(s.file.Fd()), unix.TCSETSF, &s.before)
}

// suspend does what Ctrl-Z does to others, and returns when the process goes on. Not if
// it leads its session: then there is no shell that could go on with it.
func (s *screen) suspend() error {
	if session, err := unix.Getsid(0); err != nil || session == unix.Getpid() {
		return nil
	}
	s.leave()
	// Go keeps its handler for SIGTSTP. A stop of this very thread comes before the call returns.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGSTOP); err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	return s.enter()
}

// size is how many columns and lines there are.
func (s *screen) size() (width, height int) {
	width, height, err := term.GetSize(int(s.file.Fd()))
	if err != nil || width < 1 || height < 1 {
		return 80, 24
	}
	return width, height
}

// draw shows lines, which fit, in the place of all that was there.
func (s *screen) draw(lines []textLine) error {
	var frame strings.Builder
	frame.WriteString("\x1b[H")
	for i, l := range lines {
		if i > 0 {
			frame.WriteString("\r\n")
		}
		text := string(harmless([]byte(l.text)))
		if s.colours && l.colour != ordinary {
			text = "\x1b[" + string(l.colour) + "m" + text + "\x1b[m"
		}
		// Erased before it is written: afterwards the cursor may be on the last character.
		frame.WriteString("\x1b[2K" + text)
	}
	if _, height := s.size(); len(lines) < height {
		frame.WriteString("\r\n\x1b[J")
	}
	_, err := s.file.WriteString(frame.String())
	return err
}
