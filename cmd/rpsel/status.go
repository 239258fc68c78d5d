package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/internal/daemon"
	"github.com/rpsel/rpsel/internal/owner"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func newStatusCmd(e *env) *cobra.Command {
	var s scope
	var asJSON, noHeader bool
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the sticky groups and their listeners",
		Long: `Show the sticky groups of this network namespace and their listeners.

What is wrong with a group is said on standard error, and is in the "warnings" of
--json. NEW/S is over the last 10 seconds. PACKETS counts runs of the program that chose
the listener: a train of datagrams that GRO joined is one. RXQ and DROPS are the
socket's own. CONNS, of TCP, are the connections that the listener has open now.

A group whose state cannot be used does not hide the others: it is said on standard
error, and is in the "unusable" of --json. If there are no others it is an error.

With --watch it is shown anew every so often, groups that come and go as well, until
Ctrl-C. A terminal is redrawn, without colours if NO_COLOR is set; anything else gets
block after block, and with --json each time is a line. PACKETS/S is since the time
before, and so are the histories of the whole group; SHARE is of the flows, of TCP
connections, or of packets where neither is counted.`,
		Example: `  rpsel status
  rpsel status --port 1194 -j
  rpsel status -N all
  rpsel status --port 1194 --watch
  rpsel status --watch=500ms -j`,
		Args: func(cmd *cobra.Command, args []string) error {
			if every > 0 && len(args) > 0 {
				return usageError("--watch and %q: write --watch=%[1]s", args[0])
			}
			return noArgs(cmd, args)
		},
		RunE: func(*cobra.Command, []string) error {
			if every > 0 {
				return watchStatus(e, &s, every, asJSON, noHeader)
			}
			list, err := s.look()
			if err == nil && len(list) == 0 {
				err = s.missing()
			}
			if err != nil {
				return err
			}
			s.findAgent(e)
			if len(list) == 0 {
				e.say(`nothing is attached: "rpsel attach" makes a port sticky`)
			}
			return s.printStatus(e, list, asJSON, noHeader)
		},
	}
	s.addGroupFlags(cmd)
	cmd.Flags().Lookup("netns").Usage = allNetNSUsage
	s.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	addNoHeaderFlag(cmd, &noHeader)
	addQuietFlag(cmd, e)
	addVerboseFlag(cmd, e, "say why listeners are not registered")
	cmd.Flags().VarP(durationValue{&every, 100 * time.Millisecond, time.Hour}, "watch", "w", "show it again and again, every `INTERVAL`")
	cmd.Flags().Lookup("watch").NoOptDefVal = "2s"
	return cmd
}

// printStatus prints groups as a table or as JSON, and says what should not be
// overlooked.
func (s *scope) printStatus(e *env, list []loader.Status, asJSON, noHeader bool) error {
	s.warnOf(e, list)
	if asJSON {
		return writeJSON(e.out, s.statusJSON(list))
	}
	for i, status := range list {
		if i > 0 {
			fmt.Fprintln(e.out)
		}
		if err := s.writeStatus(e.out, status, !noHeader); err != nil {
			return err
		}
	}
	return nil
}

// warnOf says what should not be overlooked about groups.
func (s *scope) warnOf(e *env, list []loader.Status) {
	if s.agent != nil && s.agent.Mode == daemon.Polling {
		e.warn("the agent (pid %d) polls for new listeners: %s", s.agent.PID, s.agent.Reason)
	}
	if s.agent != nil {
		for _, refused := range s.agent.Refused {
			e.warn("the agent (pid %d): %s", s.agent.PID, refused)
		}
	}
	s.warnDamaged(e)
	for _, status := range list {
		name := s.groupName(status.Key)
		for _, warning := range warnings(status) {
			e.warn("%s: %s", name, warning)
		}
		for _, u := range status.Unregistered {
			e.explain("%s: %s: %s", name, socketName(u.Socket), reason(u))
		}
	}
}

// alive tells whether the group has a socket.
func alive(status loader.Status) bool {
	return len(status.Unregistered) > 0 ||
		slices.ContainsFunc(status.Listeners, func(l loader.Listener) bool { return l.State != "dead" })
}

func reason(u loader.Unregistered) string {
	if u.Reason == nil {
		return `not registered yet: "rpsel attach" registers it`
	}
	return u.Reason.Error()
}

// writeStatus prints one group for people.
func (s *scope) writeStatus(w io.Writer, status loader.Status, header bool) error {
	if _, err := fmt.Fprintln(w, s.title(status)); err != nil {
		return err
	}
	t := statusTable(status, "PACKETS", func(l loader.Listener) string { return strconv.FormatUint(packets(l), 10) })
	return t.write(w, header)
}

// packets is how many runs of the program chose the listener.
func packets(l loader.Listener) uint64 { return l.Hit + l.New + l.Rehomed + l.Untracked + l.Migrated }

// title is one line about a group.
func (s *scope) title(status loader.Status) string {
	affinity := string(status.Affinity)
	if prefix := status.ClientPrefix.String(); prefix != "" {
		affinity += " " + prefix
	}
	if status.First != "" {
		affinity += "  first " + string(status.First)
	}
	if status.Confirm != loader.ConfirmClient {
		affinity += "  confirm " + string(status.Confirm)
	}
	title := fmt.Sprintf("%s  policy %s  affinity %s  flows %d/%d  rehomed %d  fallback %d",
		s.groupName(status.Key), status.Policy, affinity, status.Tracked, status.Capacity,
		status.Counters.Rehomed, status.Counters.Fallback)
	if status.Settling > 0 {
		title += fmt.Sprintf("  settling %v", status.Settling.Round(time.Second))
	}
	if status.Turning > 0 {
		title += fmt.Sprintf("  turning %v", status.Turning.Round(time.Second))
	}
	if status.Owner != nil {
		title += "  owner " + owner.Name(*status.Owner)
	}
	if s.netns == allNetNS {
		title += fmt.Sprintf("  netns %d", status.NetNSInode)
	}
	if !status.Attached {
		title += "  not attached"
	}
	return title
}

// statusTable has a row for each listener, and in one column what of says of it.
func statusTable(status loader.Status, title string, of func(loader.Listener) string) table {
	t := table{indent: "  ", columns: []column{
		{"SLOT", true}, {"PID", true}, {"COMMAND", false}, {"STATE", false}, {"WEIGHT", true},
		{"FLOWS", true}, {"NEW/S", true}, {title, true}, {"RXQ", true}, {"DROPS", true},
	}}
	tcp := status.Key.Proto == sockets.TCP
	if tcp {
		t.columns = append(t.columns, column{"CONNS", true})
	}
	for _, l := range status.Listeners {
		cells := []string{strconv.Itoa(l.Slot), unlessZero(l.PID), l.Command, l.State, strconv.Itoa(l.Weight),
			strconv.Itoa(l.Flows), rate(float64(l.Recent) / loader.RecentTime.Seconds()), of(l),
			unlessNegative(l.RxQueue), unlessNegative(l.Drops)}
		if tcp {
			cells = append(cells, unlessNegative(l.Connections))
		}
		t.add(cells...)
	}
	for _, u := range status.Unregistered {
		pid, command := 0, "-"
		if len(u.Socket.Holders) > 0 {
			pid, command = u.Socket.Holders[0].PID, u.Socket.Holders[0].Command
		}
		cells := []string{"-", unlessZero(pid), command, "unregistered", "-", "-", "-", "-",
			strconv.FormatUint(uint64(u.Socket.RxQueue), 10), strconv.FormatUint(uint64(u.Socket.Drops), 10)}
		if tcp {
			cells = append(cells, "-")
		}
		t.add(cells...)
	}
	return t
}

// rate writes how often a second something happens.
func rate(perSecond float64) string {
	if perSecond > 0 && perSecond < 10 {
		return strconv.FormatFloat(perSecond, 'f', 1, 64)
	}
	return strconv.Itoa(int(math.Round(perSecond)))
}

func unlessZero(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
}

func unlessNegative(n int) string {
	if n < 0 {
		return "-"
	}
	return strconv.Itoa(n)
}

// statusJSON is the document that status and attach print with --json.
type statusJSON struct {
	Schema int               `json:"schema"`
	Time   string            `json:"time,omitempty"` // with --watch
	Groups []groupStatusJSON `json:"groups"`
	Agent  *daemon.Info      `json:"agent,omitempty"` // only if one runs
	// Groups of which nothing can be told beside others; only if there are some.
	Unusable []unusableJSON `json:"unusable,omitempty"`
}

type unusableJSON struct {
	groupJSON
	Reason string `json:"reason"`
}

type groupStatusJSON struct {
	groupJSON
	Attached        bool               `json:"attached"`
	Policy          string             `json:"policy"`
	Affinity        string             `json:"affinity"`
	Confirm         string             `json:"confirm"`
	IdleSeconds     int                `json:"idle_seconds"`
	IdleNewSeconds  int                `json:"idle_new_seconds"`
	SettlingSeconds int                `json:"settling_seconds"`
	Flows           flowCountsJSON     `json:"flows"`
	Generation      int                `json:"generation"`
	TurningSeconds  int                `json:"turning_seconds"`
	Counters        countersJSON       `json:"counters"`
	Unregistered    []unregisteredJSON `json:"unregistered"`
	Listeners       []listenerJSON     `json:"listeners"`
	ClientPrefix    string             `json:"client_prefix"` // "": the whole address
	First           string             `json:"first"`         // "": nothing is read of first packets
	Owner           *uint32            `json:"owner"`         // null: nobody
	Warnings        []string           `json:"warnings"`
}

type flowCountsJSON struct {
	Tracked     int `json:"tracked"`
	Established int `json:"established"`
	Capacity    int `json:"capacity"`
}

type countersJSON struct {
	Runs       uint64 `json:"runs"`
	Hit        uint64 `json:"hit"`
	New        uint64 `json:"new"`
	Rehomed    uint64 `json:"rehomed"`
	Untracked  uint64 `json:"untracked"`
	Fallback   uint64 `json:"fallback"`
	Migrated   uint64 `json:"migrated"`
	ParseError uint64 `json:"parse_error"`
	TableFull  uint64 `json:"table_full"`
	Evicted    uint64 `json:"evicted"`
}

type unregisteredJSON struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
	Reason  string `json:"reason"`
}

type listenerJSON struct {
	Slot       int    `json:"slot"`
	PID        int    `json:"pid"`
	Command    string `json:"command"`
	Cookie     uint64 `json:"cookie"`
	Generation int    `json:"generation"`
	State      string `json:"state"`
	Weight     int    `json:"weight"`
	Flows      int    `json:"flows"`
	Hit        uint64 `json:"hit"`
	New        uint64 `json:"new"`
	Rehomed    uint64 `json:"rehomed"`
	Untracked  uint64 `json:"untracked"`
	Migrated   uint64 `json:"migrated"`
	Bytes      uint64 `json:"bytes"`
	RxQueue    *int   `json:"rx_queue"` // null: unknown
	Drops      *int   `json:"drops"`    // null: unknown
	// Open now; 0 for UDP, null: unknown.
	Connections *int `json:"connections"`
}

func (s *scope) statusJSON(list []loader.Status) statusJSON {
	document := statusJSON{Schema: schema, Groups: []groupStatusJSON{}, Agent: s.agent}
	for _, d := range s.damaged {
		document.Unusable = append(document.Unusable, unusableJSON{s.groupJSON(d.Key, s.inodeOf(d.Key)), errorText(d.Err, false)})
	}
	for _, status := range list {
		g := groupStatusJSON{
			groupJSON: s.groupJSON(status.Key, status.NetNSInode),
			Attached:  status.Attached, Policy: status.Policy, Affinity: string(status.Affinity), Confirm: string(status.Confirm),
			IdleSeconds: wholeSeconds(status.Idle), IdleNewSeconds: wholeSeconds(status.IdleNew),
			SettlingSeconds: wholeSeconds(status.Settling), Generation: status.Generation, TurningSeconds: wholeSeconds(status.Turning),
			Flows:        flowCountsJSON{status.Tracked, status.Established, status.Capacity},
			Counters:     countersJSON(status.Counters),
			Unregistered: []unregisteredJSON{},
			Listeners:    []listenerJSON{},
			First:        string(status.First),
			Owner:        status.Owner,
			Warnings:     warnings(status),
			ClientPrefix: status.ClientPrefix.String(),
		}
		for _, u := range status.Unregistered {
			g.Unregistered = append(g.Unregistered, newUnregisteredJSON(u))
		}
		for _, l := range status.Listeners {
			g.Listeners = append(g.Listeners, listenerJSON{
				Slot: l.Slot, PID: l.PID, Command: l.Command, Cookie: l.Cookie, Generation: l.Generation,
				State: l.State, Weight: l.Weight, Flows: l.Flows, Connections: nullIfNegative(l.Connections),
				Hit: l.Hit, New: l.New, Rehomed: l.Rehomed, Untracked: l.Untracked, Migrated: l.Migrated, Bytes: l.Bytes,
				RxQueue: nullIfNegative(l.RxQueue), Drops: nullIfNegative(l.Drops),
			})
		}
		document.Groups = append(document.Groups, g)
	}
	return document
}

func newUnregisteredJSON(u loader.Unregistered) unregisteredJSON {
	j := unregisteredJSON{Reason: reason(u)}
	if len(u.Socket.Holders) > 0 {
		j.PID, j.Command = u.Socket.Holders[0].PID, u.Socket.Holders[0].Command
	}
	return j
}

func wholeSeconds(d time.Duration) int { return int(math.Ceil(d.Seconds())) }

func nullIfNegative(n int) *int {
	if n < 0 {
		return nil
	}
	return &n
}
