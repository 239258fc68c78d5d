package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os/signal"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/loader"
)

func newEventsCmd(e *env) *cobra.Command {
	var s scope
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Print what happens to flows and listeners, as it happens",
		Long: `Print what happens in the groups that are attached now, one line each, until
interrupted. With --json each is an object.

  NEW, ESTABLISHED    a client's first packet; one of a second or more later
  REHOME              the flow's listener died: it has another one
  EVICT               the table is full: a new flow gave way to another one
  EXPIRE              the client was silent for too long
  JOIN, LEAVE, DRAIN, RESUME
                      of a listener, seen within a quarter of a second
  DROPPED             events of flows are missing here: they came too fast

Only one process can read a group's events at a time. While none does they cost
nothing.

A group whose state cannot be used, that somebody else reads, or that is detached
meanwhile does not hide the others: it is said on standard error. If there are no
others it is an error.`,
		Example: `  rpsel events --port 1194
  rpsel events -N all -j`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			groups, err := s.openReadable(e)
			if err != nil {
				return err
			}
			defer closeAll(groups)
			if len(groups) == 0 {
				e.say(`nothing is attached: "rpsel attach" makes a port sticky`)
				return nil
			}
			if err := sayUntracked(e, &s, groups); err != nil {
				return err
			}
			return watchAll(ctx, e, &s, groups, asJSON)
		},
	}
	s.addGroupFlags(cmd)
	cmd.Flags().Lookup("netns").Usage = allNetNSUsage
	s.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	addQuietFlag(cmd, e)
	return cmd
}

// watchAll prints the events of all groups until the context ends. A group that cannot
// be watched, or no longer, does not hide the others: it is an error if there are none.
func watchAll(ctx context.Context, e *env, s *scope, groups []*loader.Group, asJSON bool) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var printing sync.Mutex
	results := make(chan error)
	for _, g := range groups {
		go func() {
			name, netns := s.groupName(g.Key()), s.inodeOf(g.Key())
			if s.netns == allNetNS {
				name += fmt.Sprintf(" netns %d", netns)
			}
			ready := func() {
				printing.Lock()
				defer printing.Unlock()
				e.say("%s: reading events", name)
			}
			results <- g.Watch(ctx, ready, func(events []loader.Event) error {
				printing.Lock()
				defer printing.Unlock()
				return writeEvents(e, g.Key(), netns, name, events, asJSON)
			})
		}()
	}
	var first error
	failed := 0
	for range groups {
		err := <-results
		switch {
		case err == nil:
		case unusable(err), errors.Is(err, loader.ErrNotAttached), errors.Is(err, loader.ErrWatched):
			if failed++; failed == len(groups) {
				return err
			}
			printing.Lock()
			e.warn("%s", errorText(err, false))
			printing.Unlock()
		case first == nil:
			first = err // the others say the same of their group
			stop()
		}
	}
	return first
}

type eventJSON struct {
	Time    string  `json:"time"`
	Event   string  `json:"event"`
	Proto   string  `json:"proto"`
	Local   string  `json:"local"`
	Client  *string `json:"client"` // null: of a listener
	Slot    *int    `json:"slot"`   // null: of none
	PID     int     `json:"pid"`    // 0: of a listener that was replaced
	Command string  `json:"command"`
	From    *int    `json:"from_slot"` // of a rehomed flow
	Dropped *int    `json:"dropped"`   // null: not known, or not that event
	NetNS   uint64  `json:"netns"`     // 0: its servers had gone
}

func writeEvents(e *env, key loader.Key, netns uint64, name string, events []loader.Event, asJSON bool) error {
	w := bufio.NewWriterSize(e.out, 1<<16)
	for _, event := range events {
		if asJSON {
			if err := writeJSON(w, newEventJSON(key, netns, event)); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(w, "%s  %-11s  %s", event.Time.Format("15:04:05.000"), strings.ToUpper(string(event.Kind)), name)
		if event.Kind == loader.EventDropped {
			if event.Dropped < 0 {
				fmt.Fprintln(w, "  some events, nobody knows how many")
			} else {
				fmt.Fprintf(w, "  %s\n", plural(event.Dropped, "event"))
			}
			continue
		}
		if event.Client.IsValid() {
			fmt.Fprintf(w, "  %s", event.Client)
		}
		fmt.Fprintf(w, "  slot %d", event.Slot)
		if event.PID != 0 {
			fmt.Fprintf(w, ", %s (pid %d)", event.Command, event.PID)
		}
		if event.From >= 0 {
			fmt.Fprintf(w, ", from slot %d", event.From)
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

func newEventJSON(key loader.Key, netns uint64, event loader.Event) eventJSON {
	j := eventJSON{
		Time: event.Time.UTC().Format(time.RFC3339Nano), Event: string(event.Kind),
		Proto: key.Proto.String(), Local: key.Addr.String(),
		PID: event.PID, Command: event.Command, From: nullIfNegative(event.From), NetNS: netns,
	}
	if event.Client.IsValid() {
		client := event.Client.String()
		j.Client = &client
	}
	if event.Kind == loader.EventDropped {
		j.Dropped = nullIfNegative(event.Dropped)
	} else {
		j.Slot = &event.Slot
	}
	return j
}
