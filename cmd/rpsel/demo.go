package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/demo"
	"github.com/rpsel/rpsel/loader"
)

// demoFlows is how many flows the demo drives, if it may open as many files.
const demoFlows = 3000

func newDemoCmd(e *env) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show plain Linux and rpsel side by side",
		Long: `Show plain Linux and rpsel side by side, in a network namespace that is gone
afterwards: start three listeners on one UDP port, drive flows to them, kill the
first and start another one. Counted are the flows that move although their own
listener is alive. It takes some seconds and touches nothing outside.`,
		Example: `  rpsel demo
  rpsel demo -j`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return runDemo(e, asJSON) },
	}
	addJSONFlag(cmd, &asJSON)
	addQuietFlag(cmd, e)
	return cmd
}

// The hidden commands that the demo starts itself as.
const (
	demoInside   = "demo-inside"
	demoListener = "demo-listener"
)

// self is a command line of this program. The kernel kills it when the calling
// thread ends.
func self(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// runDemo runs the demo as a process in namespaces of its own: however that
// ends, the kernel cleans up.
func runDemo(e *env, asJSON bool) error {
	args := []string{demoInside}
	if asJSON {
		args = append(args, "--json")
	}
	if e.quiet {
		args = append(args, "--quiet")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	inside := self(args...)
	inside.SysProcAttr.Cloneflags = unix.CLONE_NEWNET | unix.CLONE_NEWNS
	inside.Stdout, inside.Stderr = e.out, e.err
	if f, ok := terminal(e.out); ok {
		inside.Stdout = f
	}
	if f, ok := terminal(e.err); ok {
		inside.Stderr = f
	}

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	if err := inside.Start(); errors.Is(err, unix.EPERM) {
		return fmt.Errorf("make a network namespace: %w: CAP_SYS_ADMIN is missing: run as root", loader.ErrPermission)
	} else if err != nil {
		return fmt.Errorf("start the demo: %w", err)
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case s := <-signals:
				// It may be on its way out already.
				_ = inside.Process.Signal(s)
			case <-ended:
				return
			}
		}
	}()
	var exit *exec.ExitError
	if err := inside.Wait(); errors.As(err, &exit) && exit.Exited() {
		return &codedError{code: exit.ExitCode()} // it has said why
	} else if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	return nil
}

func newDemoInsideCmd(e *env) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:    demoInside,
		Hidden: true,
		Args:   noArgs,
		RunE: func(*cobra.Command, []string) error {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			// Its children are to die with the demo, not with some thread.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if err := demo.Prepare(); errors.Is(err, unix.EPERM) {
				return fmt.Errorf("%w: %v: CAP_NET_ADMIN and CAP_SYS_ADMIN are needed: run as root", loader.ErrPermission, err)
			} else if err != nil {
				return err
			}
			p := progress{e: e}
			p.screen, _ = terminal(e.err)
			result, err := demo.Run(ctx, demo.Options{
				Flows:    affordable(demoFlows),
				Listener: func(name string) *exec.Cmd { return self(demoListener, name) },
				Progress: p.step,
			})
			p.done()
			switch {
			case errors.Is(err, context.Canceled):
				return errors.New("demo: interrupted, nothing is left of it")
			case err != nil:
				return fmt.Errorf("demo: %w", err)
			case asJSON:
				return writeJSON(e.out, struct {
					Schema int `json:"schema"`
					demo.Result
				}{schema, result})
			}
			bar := "#"
			if _, ok := terminal(e.out); ok {
				bar = "█"
			}
			return drawDemo(e.out, result, bar)
		},
	}
	addJSONFlag(cmd, &asJSON)
	addQuietFlag(cmd, e)
	return cmd
}

func newDemoListenerCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use:    demoListener + " NAME",
		Hidden: true,
		Args:   oneArg("NAME"),
		RunE:   func(_ *cobra.Command, args []string) error { return demo.Serve(args[0], os.Stdin, e.out) },
	}
}

// affordable bounds the flows by the files this process may open: the demo
// needs one for each flow, a third more at the end, and some others.
func affordable(flows int) int {
	const others = 100
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return flows
	}
	files := int(min(limit.Cur, 1<<20))
	return max(min(flows, (files-others)*3/4), 1)
}

// progress tells what the demo does: one line that is rewritten on a terminal,
// else one line a step.
type progress struct {
	e      *env
	screen *os.File // nil: not a terminal
	width  int
}

func (p *progress) step(text string) {
	if p.screen == nil {
		p.e.say("%s", text)
		return
	}
	if !p.e.quiet {
		fmt.Fprintf(p.screen, "\r%-*s", p.width, text)
		p.width = len(text)
	}
}

// done wipes the line.
func (p *progress) done() {
	if p.width > 0 {
		fmt.Fprintf(p.screen, "\r%*s\r", p.width, "")
	}
}

// barWidth is the length of a bar that stands for all flows.
const barWidth = 40

// drawDemo draws the result with bars made of one character.
func drawDemo(w io.Writer, r demo.Result, bar string) error {
	_, err := fmt.Fprintf(w, "%d listeners on one UDP port: flows that moved although their own listener was alive\n\n", r.Listeners)
	if err != nil {
		return err
	}
	t := table{columns: []column{{"EVENT", false}, {"SYSTEM", false}, {"FLOWS", true}, {"MOVED", true}, {"SHARE", true}, {"", false}}}
	row := func(event, system string, c demo.Count) {
		length := (c.Moved*barWidth + c.Flows - 1) / max(c.Flows, 1) // one flow is seen
		t.add(event, system, strconv.Itoa(c.Flows), strconv.Itoa(c.Moved), percent(c.Moved, c.Flows), strings.Repeat(bar, length))
	}
	if r.Sticky.Attach != nil {
		row("rpsel attaches", "rpsel", *r.Sticky.Attach)
	}
	row("first listener killed", "plain Linux", r.Plain.Kill)
	row("", "rpsel", r.Sticky.Kill)
	row("another one started", "plain Linux", r.Plain.Start)
	row("", "rpsel", r.Sticky.Start)
	if err := t.write(w, true); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "\nOf new flows after that, the new listener got %s on plain Linux, %s with rpsel.\n", percent(r.Plain.Fresh.Got, r.Plain.Fresh.Flows), percent(r.Sticky.Fresh.Got, r.Sticky.Fresh.Flows))
	return err
}

func percent(part, whole int) string {
	return fmt.Sprintf("%.1f %%", 100*float64(part)/float64(max(whole, 1)))
}
