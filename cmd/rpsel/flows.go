package main

import (
	"bufio"
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
)

// flowFilter chooses flows.
type flowFilter struct {
	client netip.Prefix // invalid: all
	slot   int          // -1: all
	pid    int          // 0: all
}

func (f flowFilter) all() bool { return !f.client.IsValid() && f.slot < 0 && f.pid == 0 }

// check refuses a slot or process that is not there.
func (f flowFilter) check(list []loader.Status) error {
	if f.slot >= 0 {
		if err := needSlot(f.slot, list); err != nil {
			return err
		}
	}
	if f.pid != 0 {
		return needPID(f.pid, list)
	}
	return nil
}

// match tells whether a flow, whose listener is of process pid, is chosen.
func (f flowFilter) match(flow loader.Flow, pid int) bool {
	return (!f.client.IsValid() || flow.From(f.client)) &&
		(f.slot < 0 || f.slot == flow.Slot) &&
		(f.pid == 0 || f.pid == pid)
}

func (f *flowFilter) addFlags(cmd *cobra.Command) {
	cmd.Flags().Var((*prefixValue)(&f.client), "client", "only flows of these clients: an address or a `PREFIX`")
	f.slot = -1
	cmd.Flags().Var(numberValue{&f.slot, 0, maps.Slots - 1}, "slot", "only flows of the listener in this `SLOT`")
}

// maxPID is the largest process id (PID_MAX_LIMIT, include/linux/threads.h).
const maxPID = 4 << 20

func newFlowsCmd(e *env) *cobra.Command {
	var s scope
	var filter flowFilter
	var count, asJSON, noHeader bool
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "List the tracked flows",
		Long: `List the tracked flows, sorted by client. With --json there is one object for
each, on a line of its own.`,
		Example: `  rpsel flows --port 1194
  rpsel flows --port 1194 --client 10.0.0.0/8 -j
  rpsel flows --port 1194 --slot 0 --count`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			groups, err := s.open()
			if err != nil {
				return err
			}
			defer closeAll(groups)
			if count && filter.all() {
				return printFlowCount(e, groups)
			}
			rows, err := collectFlows(groups, filter)
			if err != nil {
				return err
			}
			switch {
			case count:
				_, err = fmt.Fprintln(e.out, len(rows))
				return err
			case asJSON:
				return writeFlowLines(e, rows)
			default:
				return writeFlowTable(e, rows, !noHeader)
			}
		},
	}
	s.addGroupFlags(cmd)
	filter.addFlags(cmd)
	cmd.Flags().Var(numberValue{&filter.pid, 1, maxPID}, "pid", "only flows of this process's listeners")
	cmd.Flags().BoolVar(&count, "count", false, "print how many there are, and nothing else")
	s.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	addNoHeaderFlag(cmd, &noHeader)
	return cmd
}

func printFlowCount(e *env, groups []*loader.Group) error {
	total := 0
	for _, g := range groups {
		tracked, _, err := g.CountFlows()
		if err != nil {
			return err
		}
		total += tracked
	}
	_, err := fmt.Fprintln(e.out, total)
	return err
}

// flowRow is a flow and whose it is.
type flowRow struct {
	loader.Flow
	proto loader.Proto
	pid   int // 0: unknown
}

// collectFlows reads the flows the filter chooses, sorted.
func collectFlows(groups []*loader.Group, filter flowFilter) ([]flowRow, error) {
	list, err := statuses(groups)
	if err != nil {
		return nil, err
	}
	if err := filter.check(list); err != nil {
		return nil, err
	}
	rows := []flowRow{}
	for i, g := range groups {
		listeners := make(map[int]loader.Listener, len(list[i].Listeners))
		for _, l := range list[i].Listeners {
			listeners[l.Slot] = l
		}
		for f, err := range g.Flows() {
			if err != nil {
				return nil, err
			}
			pid := pidOf(f, listeners[f.Slot])
			if filter.match(f, pid) {
				rows = append(rows, flowRow{f, g.Key().Proto, pid})
			}
		}
	}
	slices.SortFunc(rows, func(a, b flowRow) int {
		return cmp.Or(a.Client.Compare(b.Client), a.Local.Compare(b.Local), cmp.Compare(a.proto, b.proto))
	})
	return rows, nil
}

// pidOf is the process of a flow's listener, which is in slot l. The slot of a
// listener that died may be another's by now.
func pidOf(f loader.Flow, l loader.Listener) int {
	if f.Orphan && l.State != "dead" {
		return 0
	}
	return l.PID
}

func writeFlowTable(e *env, rows []flowRow, header bool) error {
	t := table{columns: []column{
		{"PROTO", false}, {"CLIENT", false}, {"LOCAL", false}, {"SLOT", true}, {"PID", true},
		{"STATE", false}, {"AGE", true}, {"IDLE", true},
	}}
	for _, r := range rows {
		t.add(r.proto.String(), r.Client.String(), r.Local.String(), strconv.Itoa(r.Slot), unlessZero(r.pid),
			r.State.String(), r.Age.String(), r.Idle.String())
	}
	return t.write(e.out, header)
}

// writeFlowLines writes by hand what encoding/json would, since there may be
// millions; no field needs escaping.
func writeFlowLines(e *env, rows []flowRow) error {
	w := bufio.NewWriterSize(e.out, 1<<16)
	var line []byte
	for _, r := range rows {
		line = append(line[:0], `{"proto":"`...)
		line = append(line, r.proto.String()...)
		line = append(line, `","local":"`...)
		line = r.Local.AppendTo(line)
		line = append(line, `","client":"`...)
		line = r.Client.AppendTo(line)
		line = append(line, `","slot":`...)
		line = strconv.AppendInt(line, int64(r.Slot), 10)
		line = append(line, `,"pid":`...)
		line = strconv.AppendInt(line, int64(r.pid), 10)
		line = append(line, `,"state":"`...)
		line = append(line, r.State.String()...)
		line = append(line, `","age_seconds":`...)
		line = strconv.AppendInt(line, int64(r.Age.Seconds()), 10)
		line = append(line, `,"idle_seconds":`...)
		line = strconv.AppendInt(line, int64(r.Idle.Seconds()), 10)
		line = append(line, "}\n"...)
		if _, err := w.Write(line); err != nil {
			return err
		}
	}
	return w.Flush()
}
