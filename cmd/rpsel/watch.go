package main

import (
	"bytes"
	"context"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/loader"
)

// watcher is what "status --watch" has seen.
type watcher struct {
	env     *env
	scope   *scope
	view    view
	asJSON  bool
	screen  *screen // nil: no terminal that can be redrawn
	at      time.Time
	list    []loader.Status
	notes   []string // what should not be overlooked
	history history
}

// watchStatus shows the scope's groups, anew every so often, until interrupted.
func watchStatus(e *env, s *scope, every time.Duration, asJSON, noHeader bool) (err error) {
	// SIGQUIT, by Ctrl-\, would leave the terminal as it is, with Go's stacks on it.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	defer stop()
	w := &watcher{env: e, scope: s, asJSON: asJSON, history: history{}, view: view{every: every, header: !noHeader}}
	// The first look comes before the screen: what is wrong with the command line is said at once.
	if err := w.look(); err != nil {
		return err
	}
	signals := make(chan os.Signal, 8)
	if f, ok := terminal(e.out); ok && !asJSON && redraws(os.Getenv("TERM")) {
		w.screen = &screen{file: f, colours: os.Getenv("NO_COLOR") == ""}
		w.view.blocks = speaksUTF8(os.Getenv)
		signal.Notify(signals, unix.SIGWINCH, unix.SIGTSTP)
		defer signal.Stop(signals)
		if err := w.screen.enter(); err != nil {
			return err
		}
		defer w.screen.leave()
	}
	if err := w.show(); err != nil {
		return err
	}
	ticks := time.NewTicker(every)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
			if err := w.look(); err != nil {
				return err
			}
		case got := <-signals:
			if got == unix.SIGTSTP {
				if err := w.screen.suspend(); err != nil {
					return err
				}
			}
		}
		if err := w.show(); err != nil {
			return err
		}
	}
}

// look reads how the groups stand. That there are none is no error: they may come.
func (w *watcher) look() error {
	list, err := w.scope.look()
	if err != nil {
		return err
	}
	var talk bytes.Buffer
	e := &env{err: &talk, quiet: w.env.quiet, verbose: w.env.verbose}
	w.scope.findAgent(e)
	w.scope.warnOf(e, list)
	before := w.notes
	w.at, w.list, w.notes = time.Now(), list, strings.FieldsFunc(talk.String(), func(r rune) bool { return r == '\n' })
	w.history.add(w.at, list)
	if w.screen == nil {
		for _, note := range w.notes {
			if !slices.Contains(before, note) {
				w.env.say("%s", note)
			}
		}
	}
	return nil
}

// show shows what the last look has seen.
func (w *watcher) show() error {
	switch {
	case w.screen != nil:
		width, height := w.screen.size()
		v := w.view
		v.width = width
		lines := append(v.draw(w.scope, w.at, w.list, w.history), notesOf(w.notes)...)
		return w.screen.draw(fit(lines, width, height))
	case w.asJSON:
		document := w.scope.statusJSON(w.list)
		document.Time = w.at.UTC().Format(time.RFC3339Nano)
		return writeJSON(w.env.out, document)
	default:
		var block strings.Builder
		for _, l := range w.view.draw(w.scope, w.at, w.list, w.history) {
			block.WriteString(l.text + "\n")
		}
		_, err := w.env.out.Write([]byte(block.String() + "\n"))
		return err
	}
}
