package chaos

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/rpsel/rpsel/internal/daemon"
	"github.com/rpsel/rpsel/internal/statedir"
)

// keeper is a running "rpsel agent".
type keeper struct {
	cmd *exec.Cmd
	log tail
}

// tail keeps the last lines that are written to it.
type tail struct {
	mu    sync.Mutex
	lines []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, p...)
	const long = 8192
	if over := len(t.lines) - long; over > 0 {
		t.lines = bytes.Clone(t.lines[over:])
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.lines)
}

// startAgent starts an agent. It has no configuration: it keeps what commands
// have attached.
func (w *world) startAgent() error {
	a := &keeper{}
	a.cmd = exec.Command(w.rpsel, "agent", "--bpffs", w.bpffs)
	a.cmd.Stderr = &a.log
	// The test process may be killed.
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := w.ns.Start(a.cmd); err != nil {
		return err
	}
	w.agent = a
	w.say("start the agent, pid %d", a.cmd.Process.Pid)
	return w.awaitAgent()
}

// stopAgent ends the agent by a signal, and returns when it is gone.
func (w *world) stopAgent(s os.Signal) error {
	a := w.agent
	w.agent = nil
	err := a.cmd.Process.Signal(s)
	if err != nil {
		return err
	}
	a.cmd.Wait()
	w.say("%v to the agent: %v", s, a.cmd.ProcessState)
	if s == syscall.SIGTERM && !a.cmd.ProcessState.Success() {
		return fmt.Errorf("the agent ended by %v: %v: %s", s, a.cmd.ProcessState, a.log.String())
	}
	return nil
}

// cleanAgent ends the agent and removes its run directory.
func (w *world) cleanAgent() {
	if w.agent != nil {
		w.agent.cmd.Process.Kill()
		w.agent.cmd.Wait()
	}
}

// awaitAgent returns when the agent has done what it is for, which is what an
// operator can see: it runs, its group is attached, all listeners are registered.
func (w *world) awaitAgent() error {
	deadline := time.Now().Add(2 * time.Minute)
	for {
		var s status
		if w.attachedOnce {
			var err error
			if s, err = w.status(); err != nil {
				return err
			}
		}
		switch {
		case !w.agentRuns():
		case !w.attachedOnce || len(w.alive()) == 0:
			return nil
		case s.Groups[0].Attached && len(s.Groups[0].Unregistered) == 0:
			// The last of them is active before it has its share.
			if err := statedir.FS(w.bpffs).AwaitUnlocked(w.ns.Cookie(), time.Minute); err != nil {
				return err
			}
			// A group that has only just come settles for a second: here time
			// is nothing to wait for.
			if s.Groups[0].Settling > 0 {
				if _, err := w.run(0, "attach", attachFlags...); err != nil {
					return err
				}
			}
			w.attached()
			if s.Groups[0].Settling > 0 {
				w.reshare()
			}
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the agent has not done its work: %+v\n%s", s, w.agent.log.String())
		}
		time.Sleep(2 * time.Millisecond) // nothing tells
	}
}

// agentRuns tells whether the agent that was started has begun.
func (w *world) agentRuns() bool {
	info, err := daemon.Running(w.bpffs)
	return err == nil && info != nil && info.PID == w.agent.cmd.Process.Pid
}

// keptUp tells that the agent has nothing to do.
func (w *world) keptUp() bool {
	return w.agent == nil || !w.attachedOnce || len(w.alive()) == 0 || w.sticky && len(w.unregistered()) == 0
}

// comeAndGo lets listeners come, and kills the agent while it is at them. The
// next one makes good for it.
func (w *world) comeAndGo() error {
	if err := w.during(func() error {
		w.start(1 + w.rng.IntN(3))
		time.Sleep(time.Duration(w.rng.Int64N(int64(15 * time.Millisecond)))) // at some instant
		return w.stopAgent(syscall.SIGKILL)
	}); err != nil {
		return err
	}
	if w.sticky {
		w.reshare()
		for _, l := range w.unregistered() {
			l.doubt = true
		}
		if err := w.check(w.sample()); err != nil {
			return fmt.Errorf("after the agent was killed: %w", err)
		}
	}
	return w.during(w.startAgent)
}
