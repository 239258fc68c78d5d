package chaos

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/testnet"
)

// seed is drawn, or RPSEL_CHAOS_SEED.
func seed(t *testing.T) uint64 {
	t.Helper()
	text := os.Getenv("RPSEL_CHAOS_SEED")
	if text == "" {
		return rand.Uint64N(1e9)
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatal("RPSEL_CHAOS_SEED:", err)
	}
	return n
}

const (
	fewest   = 8 // listeners, when nothing has happened for some steps
	most     = 16
	fullStep = 40 // every so many steps all flows are asked
)

// TestChaos does at random what may happen to a group, and asks the clients
// after each step.
func TestChaos(t *testing.T) {
	n := seed(t)
	t.Logf("RPSEL_CHAOS_SEED=%d", n)
	w := newWorld(t, n)
	if err := w.begin(); err != nil {
		t.Fatal(w.explain(err))
	}
	actions := w.actions()
	for end := time.Now().Add(testnet.Soak(t, 10*time.Second)); time.Now().Before(end); {
		w.next()
		a := w.draw(actions)
		w.done[a.name]++
		err := a.do()
		if err == nil && !w.keptUp() {
			err = w.during(w.awaitAgent)
		}
		if err == nil {
			err = w.learnGenerations()
		}
		if err == nil {
			err = w.check(w.sample())
		}
		if err == nil && w.step%fullStep == 0 {
			if err = w.check(everyFlow); err == nil {
				err = w.checkStatus()
			}
		}
		if err != nil {
			t.Fatalf("%s: %s\nRPSEL_CHAOS_SEED=%d", a.name, w.explain(err), n)
		}
	}
	if err := w.check(everyFlow); err != nil {
		t.Fatalf("in the end: %s\nRPSEL_CHAOS_SEED=%d", w.explain(err), n)
	}
	t.Logf("%d steps, %d packets lost to sockets that closed: %v", w.step, w.lost, w.done)
}

// The control: where nothing is attached the same steps are caught at once, in
// the promises that plain Linux breaks.
func TestPlainLinuxIsCaught(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(*world)
		want string
	}{
		{"somebody dies", func(w *world) { w.kill(w.processes()[0]) }, "P1"},
		{"somebody comes", func(w *world) { w.start(1); w.flushed(everyFlow) }, "P3"},
		{"somebody drains", func(w *world) { w.drained(true, w.alive()[0]); w.flushed(everyFlow) }, "P4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, seed(t))
			for len(w.alive()) < fewest {
				w.start(1)
			}
			w.attached() // it is not
			if err := w.check(everyFlow); err != nil {
				t.Fatal(err)
			}
			c.do(w)
			if err := w.check(everyFlow); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}

// begin attaches to some listeners. Clients that share an entry of the flow
// table, which happens to one in some thousand sets, would make flushes
// ambiguous: so others are drawn.
func (w *world) begin() error {
	for len(w.alive()) < fewest {
		w.start(1)
	}
	for range 5 {
		if err := w.check(everyFlow); err != nil {
			return err
		}
		if err := w.attach(); err != nil {
			return err
		}
		if err := w.check(everyFlow); err != nil {
			return err
		}
		count, err := w.run(0, "flows", "--count")
		if err != nil {
			return err
		}
		if strings.TrimSpace(count) == strconv.Itoa(flows) {
			return nil
		}
		if err := w.detach(); err != nil {
			return err
		}
		w.readdress(byte(1 + w.rng.IntN(250)))
	}
	return errors.New("it is not every flow that is tracked")
}

// attach attaches, or registers who came.
func (w *world) attach() error {
	flags := attachFlags
	if !w.sticky {
		w.weights = w.rng.IntN(2) == 0
	}
	if !w.attachedOnce {
		w.newest = w.rng.IntN(3) == 0
	}
	if w.newest {
		flags = append(flags, "--policy", "newest")
	}
	return w.during(func() error {
		_, err := w.run(0, "attach", flags...)
		w.attached()
		return err
	})
}

// Nothing settles or goes idle here: both are matters of time.
var attachFlags = slices.Clip([]string{"--settle", "0", "--idle", "24h", "--idle-new", "24h"})

func (w *world) detach() error {
	_, err := w.run(0, "detach")
	w.detached()
	return err
}

// action is something that may happen, in some proportion to others.
type action struct {
	name   string
	chance func() int // 0: not now
	do     func() error
}

// draw draws an action.
func (w *world) draw(actions []action) action {
	total := 0
	for _, a := range actions {
		total += a.chance()
	}
	n := w.rng.IntN(total)
	for _, a := range actions {
		if n -= a.chance(); n < 0 {
			return a
		}
	}
	panic("no action")
}

// pick draws one of a list that is not empty.
func pick[T any](w *world, list []T) T { return list[w.rng.IntN(len(list))] }

// some draws a part of a list of two or more, neither none nor all.
func some[T any](w *world, list []T) []T {
	list = slices.Clone(list)
	w.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list[:1+w.rng.IntN(len(list)-1)]
}

// serving lists the processes with a registered listener that drains, or with
// one that does not.
func (w *world) serving(draining bool) []*testnet.Server {
	return slices.DeleteFunc(w.processes(), func(s *testnet.Server) bool {
		return !slices.ContainsFunc(w.of(s), func(l *listener) bool { return l.registered && l.draining == draining })
	})
}

func (w *world) actions() []action {
	when := func(n int, condition func() bool) func() int {
		return func() int {
			if condition() {
				return n
			}
			return 0
		}
	}
	processes := func(n int) func() bool { return func() bool { return len(w.processes()) >= n } }
	joiners := func() bool { return len(w.unregistered()) > 0 }
	nobody := func() bool { return len(w.alive()) == 0 }
	sticky := func() bool { return w.sticky }
	agentRuns := func() bool { return w.agent != nil }
	agentIsGone := func() bool { return w.agent == nil }
	canDrain := func() bool { return w.sticky && len(w.serving(false)) > 0 }
	canResume := func() bool { return w.sticky && len(w.serving(true)) > 0 }
	return []action{
		{"start", func() int { return map[bool]int{true: 20, false: 3}[len(w.alive()) < fewest] }, func() error {
			if len(w.alive()) >= most {
				return nil
			}
			return w.during(func() error { w.start(max(1, w.rng.IntN(6)-2)); return nil })
		}},
		{"kill", when(9, processes(1)), func() error {
			s := pick(w, w.processes())
			return w.during(func() error { w.kill(s); return nil }, w.of(s)...)
		}},
		{"kill some", when(2, processes(2)), func() error {
			s := some(w, w.processes())
			return w.during(func() error { w.kill(s...); return nil }, w.of(s...)...)
		}},
		{"kill all", when(1, processes(1)), func() error {
			w.kill(w.processes()...)
			return nil
		}},
		{"bind again", when(4, processes(1)), w.bindAgain},
		{"attach", when(12, joiners), w.attach},
		{"attach again", when(2, processes(1)), w.attach},
		{"attach, killed", when(4, processes(1)), w.attachKilled},
		{"attach, and somebody dies", when(2, processes(2)), w.attachDying},
		{"attach, nobody there", when(5, nobody), func() error {
			_, err := w.run(3, "attach", attachFlags...)
			return err
		}},
		{"detach", when(1, sticky), w.detach},
		{"drain", when(5, canDrain), func() error {
			return w.alter(pick(w, w.serving(false)), "drain", func(ls ...*listener) { w.drained(true, ls...) })
		}},
		{"drain all", when(1, canDrain), func() error {
			for _, s := range w.serving(false) {
				if err := w.alter(s, "drain", func(ls ...*listener) { w.drained(true, ls...) }); err != nil {
					return err
				}
			}
			return nil
		}},
		{"resume", when(6, canResume), func() error {
			return w.alter(pick(w, w.serving(true)), "resume", func(ls ...*listener) { w.drained(false, ls...) })
		}},
		{"weight", when(9, func() bool { return canDrain() && w.weights }), func() error {
			weight := 1 << w.rng.IntN(3)
			return w.alter(pick(w, w.serving(false)), "weight", func(ls ...*listener) { w.weightSet(weight, ls...) }, strconv.Itoa(weight))
		}},
		{"weigh all anew", when(1, canDrain), w.weighAll},
		{"open a generation", when(3, func() bool { return w.newest && w.sticky && len(w.alive()) < most-3 }), func() error {
			w.start(1 + w.rng.IntN(3))
			return w.during(func() error {
				_, err := w.run(0, "attach", append(attachFlags, "--generation", "new")...)
				w.attached()
				return err
			})
		}},
		{"other policy", when(1, sticky), func() error {
			w.newest = !w.newest
			w.reshare()
			return w.during(func() error {
				_, err := w.run(0, "attach", append(attachFlags, "--policy", map[bool]string{true: "newest", false: "hash"}[w.newest])...)
				w.attached()
				return err
			})
		}},
		{"flush some", when(8, sticky), func() error {
			n := w.rng.IntN(len(w.nets))
			_, err := w.run(0, "flush", "--client", w.nets[n].String())
			w.flushed(everyFlow[n*perNet : (n+1)*perNet])
			return err
		}},
		{"flush all", when(1, sticky), w.flushAll},
		{"upgrade", when(3, sticky), w.upgrade},
		{"agent starts", when(4, agentIsGone), func() error { return w.during(w.startAgent) }},
		{"agent killed", when(2, agentRuns), func() error {
			return w.during(func() error { return w.stopAgent(syscall.SIGKILL) })
		}},
		{"agent killed and started", when(2, agentRuns), func() error {
			return w.during(func() error {
				if err := w.stopAgent(syscall.SIGKILL); err != nil {
					return err
				}
				return w.startAgent()
			})
		}},
		{"agent stopped", when(1, agentRuns), func() error {
			return w.during(func() error { return w.stopAgent(syscall.SIGTERM) })
		}},
		{"agent killed at work", when(4, func() bool { return agentRuns() && len(w.alive()) < most-2 }), w.comeAndGo},
	}
}

// upgrade moves the group to another table, now and then killed at some instant
// before. Then the table may be frozen: new flows are served, and not tracked yet.
func (w *world) upgrade() error {
	args := [][]string{nil, {"--flows", "100000"}, {"--flows", "262144"}, {"--flows", "300000"}}[w.rng.IntN(4)]
	if w.rng.IntN(3) == 0 {
		if err := w.during(func() error {
			_, err := w.runKilled("upgrade", args...)
			return err
		}); err != nil {
			return err
		}
		if err := w.check(w.choose(300, func(f *flow) bool { return f.tracked })); err != nil {
			return fmt.Errorf("after the command was killed: %w", err)
		}
	}
	return w.during(func() error {
		_, err := w.run(0, "upgrade", args...)
		return err
	})
}

// weighAll begins anew, so that no share has been given out but by weight, and
// looks at all flows: it takes many to tell.
func (w *world) weighAll() error {
	if err := w.detach(); err != nil {
		return err
	}
	if err := w.attach(); err != nil {
		return err
	}
	w.weights = true
	for _, s := range w.processes() {
		weight := 1 << w.rng.IntN(3)
		if err := w.alter(s, "weight", func(ls ...*listener) { w.weightSet(weight, ls...) }, strconv.Itoa(weight)); err != nil {
			return err
		}
	}
	if err := w.learnGenerations(); err != nil {
		return err
	}
	if err := w.flushAll(); err != nil {
		return err
	}
	return w.check(everyFlow)
}

func (w *world) flushAll() error {
	_, err := w.run(0, "flush", "--all")
	w.flushed(everyFlow)
	return err
}

// bindAgain lets a process open another socket and close one, as servers do
// that are told to read their configuration again.
func (w *world) bindAgain() error {
	s := pick(w, w.processes())
	old := pick(w, w.of(s))
	return w.during(func() error {
		l := &listener{name: s.Add(), server: s, index: len(s.Names) - 1}
		w.bound(l)
		s.Close(old.index)
		w.say("%s binds again, as %s", old.name, l.name)
		w.died(old)
		return nil
	}, old)
}

// attachKilled kills the command at some instant: joiners are registered by
// then, or not. The next one finishes it.
func (w *world) attachKilled() error {
	var killed bool
	if err := w.during(func() (err error) {
		killed, err = w.runKilled("attach", attachFlags...)
		return err
	}); err != nil {
		return err
	}
	if !killed {
		w.attached()
		return nil
	}
	if w.sticky && len(w.unregistered()) > 0 {
		w.reshare()
		for _, l := range w.unregistered() {
			l.doubt = true
		}
	}
	if err := w.check(w.sample()); err != nil {
		return fmt.Errorf("after the command was killed: %w", err)
	}
	return w.attach()
}

// attachDying lets a process die while the command looks at it.
func (w *world) attachDying() error {
	s := pick(w, w.processes())
	if err := w.during(func() error {
		cmd := w.command("attach", attachFlags...)
		var talk bytes.Buffer
		cmd.Stderr = &talk
		if err := cmd.Start(); err != nil {
			return err
		}
		time.Sleep(w.instant("attach"))
		w.kill(s)
		cmd.Wait()
		w.say("rpsel attach meanwhile: %v", cmd.ProcessState)
		// 3: it looked at nobody else.
		if code := cmd.ProcessState.ExitCode(); code != 0 && code != 3 {
			return fmt.Errorf("rpsel attach, while a server died: %v: %s", cmd.ProcessState, talk.String())
		}
		return nil
	}, w.of(s)...); err != nil {
		return err
	}
	return w.attach()
}

// alter runs a command on a process's listeners. Now and then it is killed at
// some instant before: that has an effect or none, and the command is given
// again.
func (w *world) alter(s *testnet.Server, verb string, set func(...*listener), args ...string) error {
	args = append([]string{"--pid", strconv.Itoa(s.PID())}, args...)
	theirs := slices.DeleteFunc(w.of(s), func(l *listener) bool { return !l.registered })
	if w.rng.IntN(4) == 0 {
		var killed bool
		if err := w.during(func() (err error) {
			killed, err = w.runKilled(verb, args...)
			return err
		}); err != nil {
			return err
		}
		if killed {
			w.reshare()
			for _, l := range theirs {
				l.doubt = true
			}
			if err := w.check(w.sample()); err != nil {
				return fmt.Errorf("after the command was killed: %w", err)
			}
		}
	}
	return w.during(func() error {
		_, err := w.run(0, verb, args...)
		set(theirs...)
		return err
	})
}
