package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// target chooses listeners: a process's in every group, or one slot.
type target struct {
	scope
	pid  int // 0: not given
	slot int // -1: not given
}

func (t *target) addFlags(cmd *cobra.Command) {
	t.addGroupFlags(cmd)
	t.slot = -1
	cmd.Flags().Var(numberValue{&t.pid, 1, maxPID}, "pid", "the listeners of the process `PID`")
	cmd.Flags().Var(numberValue{&t.slot, 0, maps.Slots - 1}, "slot", "the listener in this `SLOT`")
	t.completePID(cmd)
	t.completeSlot(cmd, false)
	t.addBPFFSFlag(cmd)
}

// chosen is a listener to act on.
type chosen struct {
	group *loader.Group
	loader.Listener
}

func (c chosen) name(s *scope) string {
	return fmt.Sprintf("%s slot %d, %s (pid %d)", s.groupName(c.group.Key()), c.Slot, c.Command, c.PID)
}

// waitsFor is how much a listener has that a drain waits for: flows, or
// connections, of which some may wait in its queue that nobody has counted.
func (c chosen) waitsFor(now loader.Listener) int {
	if c.group.Key().Proto == sockets.TCP {
		return max(now.Connections, now.RxQueue)
	}
	return now.Flows
}

// counted puts that in words.
func (c chosen) counted(n int) string {
	switch {
	case c.group.Key().Proto != sockets.TCP:
		return plural(n, "flow")
	case c.Connections < 0:
		return "connections are not counted"
	default:
		return plural(n, "connection")
	}
}

// canWait refuses to wait for connections that nobody counts.
func (c chosen) canWait(s *scope) error {
	if c.Connections >= 0 {
		return nil
	}
	return fmt.Errorf(`%s: --wait: %w, "rpsel check" says why: drain without --wait, and see "ss -tn" for those that are left`, c.name(s), loader.ErrUncounted)
}

// find opens the groups and finds the listeners, dead ones left out. The caller
// closes the groups.
func (t *target) find(cmd *cobra.Command) (groups []*loader.Group, _ []chosen, err error) {
	if err := t.needPort(cmd); err != nil {
		return nil, nil, err
	}
	if (t.pid == 0) == (t.slot < 0) {
		return nil, nil, usageError("%s needs one of --pid PID and --slot SLOT", cmd.CommandPath())
	}
	if groups, err = t.open(); err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			closeAll(groups)
		}
	}()
	list, err := statuses(groups)
	if err != nil {
		return nil, nil, err
	}
	if err := (flowFilter{slot: t.slot, pid: t.pid}).check(list); err != nil {
		return nil, nil, err
	}
	if err := needOwn(t.pid, list); err != nil {
		return nil, nil, err
	}
	var found []chosen
	for i, status := range list {
		for _, l := range status.Listeners {
			if l.State != "dead" && (l.Slot == t.slot || t.pid != 0 && l.HeldBy(t.pid)) {
				found = append(found, chosen{groups[i], l})
			}
		}
	}
	if len(found) == 0 {
		return nil, nil, notFound(`%s: the listener is dead: "rpsel status" lists those that are not`, &t.scope)
	}
	return groups, found, nil
}

// writeAltered prints as JSON what became of listeners that were acted on. One
// that died since is dead.
func writeAltered(e *env, s *scope, groups []*loader.Group, listeners []chosen) error {
	type alteredJSON struct {
		Slot         int    `json:"slot"`
		PID          int    `json:"pid"`
		Command      string `json:"command"`
		Cookie       uint64 `json:"cookie"`
		StateBefore  string `json:"state_before"`
		State        string `json:"state"`
		WeightBefore int    `json:"weight_before"`
		Weight       int    `json:"weight"`
		Flows        int    `json:"flows"`
		Connections  *int   `json:"connections"` // null: unknown
	}
	type groupAlteredJSON struct {
		groupJSON
		Listeners []alteredJSON `json:"listeners"`
	}
	answer := struct {
		Schema int                `json:"schema"`
		Groups []groupAlteredJSON `json:"groups"`
	}{schema, []groupAlteredJSON{}}
	for _, g := range groups {
		status, err := g.Status()
		if err != nil {
			return err
		}
		altered := groupAlteredJSON{s.groupJSON(g.Key(), status.NetNSInode), []alteredJSON{}}
		for _, l := range listeners {
			if l.group != g {
				continue
			}
			now, ok := listenerIn(status, l.Slot)
			if !ok || now.Cookie != l.Cookie {
				now = loader.Listener{State: "dead", Weight: l.Weight}
			}
			altered.Listeners = append(altered.Listeners, alteredJSON{
				Slot: l.Slot, PID: l.PID, Command: l.Command, Cookie: l.Cookie,
				StateBefore: l.State, State: now.State, WeightBefore: l.Weight, Weight: now.Weight, Flows: now.Flows,
				Connections: nullIfNegative(now.Connections),
			})
		}
		if len(altered.Listeners) > 0 {
			answer.Groups = append(answer.Groups, altered)
		}
	}
	return writeJSON(e.out, answer)
}

// drainPoll is how often --wait looks. Flows end by the clock, in whole
// seconds, and nothing tells when.
const drainPoll = 250 * time.Millisecond

func newDrainCmd(e *env) *cobra.Command {
	var t target
	var wait, asJSON bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "drain --port PORT {--pid PID | --slot SLOT}",
		Short: "End new flows for a listener",
		Long: `End new flows for a listener. It keeps the flows it has until they go idle, and
gets new ones only when every other listener drains too. With --wait the command
returns when the last flow is idle, or the listener is gone; it fails when the
listener is resumed meanwhile, or its group detached.

A TCP listener keeps the connections it has. There --wait returns when the last of
them is closed, also if the server has closed its listener by then.`,
		Example: `  rpsel drain --port 1194 --slot 0
  rpsel drain --port 1194 --slot 0 --wait --timeout 1h`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("timeout") && !wait {
				return usageError("--timeout goes with --wait")
			}
			groups, listeners, err := t.find(cmd)
			if err != nil {
				return err
			}
			defer closeAll(groups)
			for _, l := range listeners {
				if err := l.canWait(&t.scope); wait && err != nil {
					return err
				}
			}
			for _, l := range listeners {
				if err := l.group.Drain(l.Slot); err != nil {
					return err
				}
				e.say("%s: %s, %s", l.name(&t.scope), already(l.State == "draining", "draining"), l.counted(l.waitsFor(l.Listener))+sharedWith(l.Listener))
			}
			if err := warnAllDraining(e, &t.scope, groups); err != nil {
				return err
			}
			if wait {
				if err := awaitDrained(e, &t.scope, listeners, timeout); err != nil {
					return err
				}
			}
			if asJSON {
				return writeAltered(e, &t.scope, groups, listeners)
			}
			return nil
		},
	}
	t.addFlags(cmd)
	cmd.Flags().BoolVar(&wait, "wait", false, "return when its last flow is idle (TCP: its last connection closed), or the listener is gone")
	cmd.Flags().Var(durationValue{&timeout, time.Millisecond, loader.MaxIdle}, "timeout", "give up waiting after this `DURATION`, with exit code 6 (default: never)")
	addJSONFlag(cmd, &asJSON)
	addQuietFlag(cmd, e)
	return cmd
}

// sharedWith names other processes that have the same listener, which drains for them too.
func sharedWith(l loader.Listener) string {
	others := slices.DeleteFunc(slices.Clone(l.Holders), func(pid int) bool { return pid == l.PID })
	if len(others) == 0 {
		return ""
	}
	return fmt.Sprintf("; it is also that of pid %s", strings.Trim(strings.ReplaceAll(fmt.Sprint(others), " ", ", "), "[]"))
}

// already says that something is so, or was before.
func already(before bool, state string) string {
	if before {
		return state + " already"
	}
	return state
}

func warnAllDraining(e *env, s *scope, groups []*loader.Group) error {
	list, err := statuses(groups)
	for _, status := range list {
		if status.AllDraining {
			e.warn("%s: every listener drains: new flows go to them all the same", s.groupName(status.Key))
		}
	}
	return err
}

// awaitDrained waits until none of the listeners has a flow, or connection, until the timeout
// if there is one, or an interrupt. It fails if one does not drain any more.
func awaitDrained(e *env, s *scope, listeners []chosen, timeout time.Duration) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	return waitDrained(ctx, e, s, listeners)
}

func waitDrained(ctx context.Context, e *env, s *scope, listeners []chosen) error {
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	last := -1
	for {
		// A handshake that began before the drain may end after it, and is seen when it
		// has: with TCP nothing is left if that is so twice.
		quiet := last == 0 || listeners[0].group.Key().Proto != sockets.TCP
		left := 0
		for _, l := range listeners {
			status, err := l.group.Status()
			if err != nil {
				return err
			}
			now, known := listenerIn(status, l.Slot)
			known = known && now.Cookie == l.Cookie
			switch {
			case !known || now.State == "dead":
				// Its group may have been detached from it instead.
				open, err := s.fs().Open(l.group.Key())
				if err != nil {
					return err
				}
				open.Close()
				if known {
					left += now.Connections
				}
			case now.State != "draining":
				return fmt.Errorf("%s: it drains no longer: somebody resumed it, or attached its group anew", l.name(s))
			default:
				left += l.waitsFor(now)
			}
		}
		if left == 0 && quiet {
			return nil
		}
		if left == 0 {
			// What waited when its listener was registered nobody has counted.
			if err := countAccepted(listeners); err != nil {
				return err
			}
		}
		words := listeners[0].counted(left)
		if left != last && left > 0 {
			e.say("%s left", words)
		}
		last = left
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
		switch err := ctx.Err(); {
		case errors.Is(err, context.DeadlineExceeded):
			return &codedError{exitTimeout, fmt.Errorf("%s: %s left after --timeout: the listener drains on, wait again", s, words)}
		case err != nil:
			return fmt.Errorf("%s: interrupted with %s left: the listener drains on", s, words)
		}
	}
}

// countAccepted counts what TCP listeners have accepted that waited when they were
// registered.
func countAccepted(listeners []chosen) error {
	for _, l := range listeners {
		if l.group.Key().Proto != sockets.TCP {
			continue
		}
		err := l.group.CountAccepted()
		if err != nil && !errors.Is(err, loader.ErrNotAttached) { // the next look says so
			return err
		}
	}
	return nil
}

func newResumeCmd(e *env) *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "resume --port PORT {--pid PID | --slot SLOT}",
		Short:   "Give a draining listener new flows again",
		Long:    `Give a draining listener its share of new flows again. No existing flow moves.`,
		Example: `  rpsel resume --port 1194 --slot 0`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			groups, listeners, err := t.find(cmd)
			if err != nil {
				return err
			}
			defer closeAll(groups)
			for _, l := range listeners {
				if err := l.group.Resume(l.Slot); err != nil {
					return err
				}
				e.say("%s: %s", l.name(&t.scope), already(l.State == "active", "active"))
			}
			if asJSON {
				return writeAltered(e, &t.scope, groups, listeners)
			}
			return nil
		},
	}
	t.addFlags(cmd)
	addJSONFlag(cmd, &asJSON)
	addQuietFlag(cmd, e)
	return cmd
}
