package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
)

// flowFilter chooses flows.
type flowFilter struct {
	client netip.Prefix // invalid: all
	slot   int          // -1: all
	pid    int          // 0: all
	state  maps.State   // maps.Empty: all
}

func (f flowFilter) all() bool {
	return !f.client.IsValid() && f.slot < 0 && f.pid == 0 && f.state == maps.Empty
}

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

// match tells whether a flow is chosen, whose listener is l, or nobody any more.
func (f flowFilter) match(flow loader.Flow, l *loader.Listener) bool {
	return (!f.client.IsValid() || flow.From(f.client)) &&
		(f.slot < 0 || f.slot == flow.Slot) &&
		(f.pid == 0 || pidOf(flow, l) != 0 && l.HeldBy(f.pid)) &&
		(f.state == maps.Empty || f.state == flow.State)
}

func (f *flowFilter) addFlags(cmd *cobra.Command, s *scope) {
	cmd.Flags().Var((*prefixValue)(&f.client), "client", "only flows of these clients: an address or a `PREFIX`")
	f.slot = -1
	cmd.Flags().Var(numberValue{&f.slot, 0, maps.Slots - 1}, "slot", "only flows of the listener in this `SLOT`")
	completeBy(cmd, "client", s.completeClient())
	s.completeSlot(cmd, true)
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
each, on a line of its own.

A group whose state cannot be used does not hide the others: it is said on standard
error. If there are no others it is an error.`,
		Example: `  rpsel flows --port 1194
  rpsel flows --port 1194 --client 10.0.0.0/8 -j
  rpsel flows --port 1194 --slot 0 --count
  rpsel flows --port 1194 --state established --count`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			groups, err := s.openReadable(e)
			if err != nil {
				return err
			}
			defer closeAll(groups)
			if err := sayUntracked(e, &s, groups); err != nil {
				return err
			}
			if count {
				return printFlowCount(e, groups, filter)
			}
			list, err := listFlows(groups, filter)
			if err != nil {
				return err
			}
			if asJSON {
				return list.writeLines(e)
			}
			return list.writeTable(e, !noHeader)
		},
	}
	s.addGroupFlags(cmd)
	filter.addFlags(cmd, &s)
	cmd.Flags().Var(numberValue{&filter.pid, 1, maxPID}, "pid", "only flows of the listeners of the process `PID`")
	s.completePID(cmd)
	cmd.Flags().Var((*stateValue)(&filter.state), "state", "only flows in this state: new or established")
	complete(cmd, "state", "new", "established")
	cmd.Flags().BoolVar(&count, "count", false, "print how many there are, and nothing else")
	s.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	addNoHeaderFlag(cmd, &noHeader)
	return cmd
}

// sayUntracked says of which groups there are no flows to see.
func sayUntracked(e *env, s *scope, groups []*loader.Group) error {
	for _, g := range groups {
		affinity, err := g.Affinity()
		if err != nil {
			return err
		}
		if affinity == loader.AffinityNone {
			e.say("%s: nothing is tracked with affinity none", s.groupName(g.Key()))
		}
	}
	return nil
}

// printFlowCount looks at no more of each flow than the filter needs.
func printFlowCount(e *env, groups []*loader.Group, filter flowFilter) error {
	total := 0
	if filter.client.IsValid() || filter.pid != 0 {
		err := eachFlow(groups, filter, func(int, loader.Flow, int, string) { total++ })
		if err != nil {
			return err
		}
	} else {
		if filter.slot >= 0 {
			list, err := statuses(groups)
			if err != nil {
				return err
			}
			if err := filter.check(list); err != nil {
				return err
			}
		}
		for _, g := range groups {
			n, err := g.CountWhere(func(slot int, state maps.State) bool {
				return (filter.slot < 0 || filter.slot == slot) && (filter.state == maps.Empty || filter.state == state)
			})
			if err != nil {
				return err
			}
			total += n
		}
	}
	_, err := fmt.Fprintln(e.out, total)
	return err
}

// eachFlow calls f for the flows the filter chooses, with the number of their group,
// the process of their listener and the rule by which they have it.
func eachFlow(groups []*loader.Group, filter flowFilter, f func(group int, flow loader.Flow, pid int, rule string)) error {
	list, err := statuses(groups)
	if err != nil {
		return err
	}
	if err := filter.check(list); err != nil {
		return err
	}
	for i, g := range groups {
		listeners := make([]loader.Listener, maps.Slots)
		for _, l := range list[i].Listeners {
			listeners[l.Slot] = l
		}
		for flow, err := range g.Flows() {
			if err != nil {
				return err
			}
			if l := &listeners[flow.Slot]; filter.match(flow, l) {
				f(i, flow, pidOf(flow, l), ruleOf(flow, list[i].Policy))
			}
		}
	}
	return nil
}

// flowList is a list of flows that may be millions, so that each is small.
type flowList struct {
	keys  []loader.Key
	rules []string
	rows  []flowRow
}

type flowRow struct {
	high, low uint64 // of the client's address, in the order of addresses
	slot, pid int32  // pid 0: unknown
	age, idle int32  // seconds
	port      uint16
	group     uint16
	rule      uint8 // of the list's
	state     maps.State
	is6       bool
}

func (r *flowRow) client() netip.AddrPort {
	var addr [16]byte
	binary.BigEndian.PutUint64(addr[:8], r.high)
	binary.BigEndian.PutUint64(addr[8:], r.low)
	if r.is6 {
		return netip.AddrPortFrom(netip.AddrFrom16(addr), r.port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(addr[12:])), r.port)
}

// sortBytes is how many bytes a row is sorted by.
const sortBytes = 21

// sortByte is the nth of them, the least significant first: IPv4 comes before IPv6,
// whatever the address, then the address, the port and the group decide.
func (r *flowRow) sortByte(n int) byte {
	switch {
	case n < 2:
		return byte(r.group >> (8 * n))
	case n < 4:
		return byte(r.port >> (8 * (n - 2)))
	case n < 12:
		return byte(r.low >> (8 * (n - 4)))
	case n < 20:
		return byte(r.high >> (8 * (n - 12)))
	case r.is6:
		return 1
	default:
		return 0
	}
}

// sort deals the rows byte by byte, the least significant first, which keeps those that
// are equal in it as they were: of a million rows that takes a third of what comparing
// them does.
func (l *flowList) sort() {
	spare := make([]flowRow, len(l.rows))
	for n := range sortBytes {
		var next [256]int // how many rows have the byte, and then where the next goes
		for i := range l.rows {
			next[l.rows[i].sortByte(n)]++
		}
		if slices.Contains(next[:], len(l.rows)) {
			continue // all the same
		}
		at := 0
		for b, rows := range next {
			next[b] = at
			at += rows
		}
		for i := range l.rows {
			b := l.rows[i].sortByte(n)
			spare[next[b]] = l.rows[i]
			next[b]++
		}
		l.rows, spare = spare, l.rows
	}
}

func (l *flowList) add(group int, f loader.Flow, pid int, rule string) {
	number := slices.Index(l.rules, rule)
	if number < 0 {
		number = len(l.rules)
		l.rules = append(l.rules, rule)
	}
	addr := f.Client.Addr().As16()
	l.rows = append(l.rows, flowRow{
		high: binary.BigEndian.Uint64(addr[:8]), low: binary.BigEndian.Uint64(addr[8:]),
		port: f.Client.Port(), is6: f.Client.Addr().Is6(), slot: int32(f.Slot), pid: int32(pid),
		age: int32(f.Age / time.Second), idle: int32(f.Idle / time.Second),
		group: uint16(group), rule: uint8(number), state: f.State,
	})
}

// listFlows reads the flows the filter chooses, sorted.
func listFlows(groups []*loader.Group, filter flowFilter) (*flowList, error) {
	l := &flowList{}
	for _, g := range groups {
		l.keys = append(l.keys, g.Key())
	}
	if filter.all() {
		tracked := 0
		for _, g := range groups {
			n, _, err := g.CountFlows()
			if err != nil {
				return nil, err
			}
			tracked += n
		}
		l.rows = make([]flowRow, 0, tracked)
	}
	if err := eachFlow(groups, filter, l.add); err != nil {
		return nil, err
	}
	l.sort()
	return l, nil
}

// pidOf is the process of a flow's listener, which is in slot l. The slot of a
// listener that died may be another's by now.
func pidOf(f loader.Flow, l *loader.Listener) int {
	if f.Orphan && l.State != "dead" {
		return 0
	}
	return l.PID
}

func (l *flowList) writeTable(e *env, header bool) error {
	t := table{columns: []column{
		{"PROTO", false}, {"CLIENT", false}, {"LOCAL", false}, {"SLOT", true}, {"PID", true},
		{"STATE", false}, {"AGE", true}, {"IDLE", true},
	}}
	seconds := func(n int32) string { return (time.Duration(n) * time.Second).String() }
	for _, r := range l.rows {
		key := &l.keys[r.group]
		t.add(key.Proto.String(), r.client().String(), key.Addr.String(), strconv.Itoa(int(r.slot)), unlessZero(int(r.pid)),
			r.state.String(), seconds(r.age), seconds(r.idle))
	}
	return t.write(e.out, header)
}

// writeLines writes by hand what encoding/json would; no field needs escaping.
func (l *flowList) writeLines(e *env) error {
	w := bufio.NewWriterSize(e.out, 1<<16)
	heads := make([]string, len(l.keys))
	for i, key := range l.keys {
		heads[i] = fmt.Sprintf(`{"proto":"%s","local":"%s","client":"`, key.Proto, key.Addr)
	}
	var line []byte
	for _, r := range l.rows {
		line = append(line[:0], heads[r.group]...)
		line = r.client().AppendTo(line)
		line = append(line, `","slot":`...)
		line = strconv.AppendInt(line, int64(r.slot), 10)
		line = append(line, `,"pid":`...)
		line = strconv.AppendInt(line, int64(r.pid), 10)
		line = append(line, `,"state":"`...)
		line = append(line, r.state.String()...)
		line = append(line, `","age_seconds":`...)
		line = strconv.AppendInt(line, int64(r.age), 10)
		line = append(line, `,"idle_seconds":`...)
		line = strconv.AppendInt(line, int64(r.idle), 10)
		line = append(line, `,"rule":"`...)
		line = append(line, l.rules[r.rule]...)
		line = append(line, "\"}\n"...)
		if _, err := w.Write(line); err != nil {
			return err
		}
	}
	return w.Flush()
}
