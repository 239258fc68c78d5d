package loader

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// Counters count runs of the program. Runs is the sum of the six outcomes that
// follow it; the last three are parts of Untracked and New. A run is not a
// packet: a train of datagrams joined by GRO is one run. None of them goes down
// while the group has state, whatever becomes of its listeners.
type Counters struct {
	Runs uint64
	// Hit: the flow was known, and its listener alive.
	Hit uint64
	// New: the flow was not known, and is from then on.
	New uint64
	// Rehomed: the flow was known, its listener dead, and it got another one.
	Rehomed uint64
	// Untracked: a listener was picked for this packet alone.
	Untracked uint64
	// Fallback: no listener could be picked, and the kernel's own hash did.
	Fallback uint64
	// Migrated: a TCP connection that a closing listener had not accepted got another.
	Migrated uint64
	// ParseError: untracked, since the packet could not be read.
	ParseError uint64
	// TableFull: untracked, since there was no room.
	TableFull uint64
	// Evicted: new, in the place of another new flow.
	Evicted uint64
}

// Served counts runs of the program that selected a slot, by outcome as in
// Counters, and the bytes of their transport headers and payloads.
type Served struct{ Hit, New, Rehomed, Untracked, Migrated, Bytes uint64 }

// Listener is what there is to say of a registered listener.
type Listener struct {
	// Slot is its place in the group, from 0 on, and Cookie the number of its
	// socket (SO_COOKIE). A slot is another listener's once its own is dead.
	Slot   int
	Cookie uint64
	// PID and Command are of a process that holds the socket now, or of the
	// one that held it when it joined.
	PID     int
	Command string
	// Holders are all processes that hold it now, PID the first of them: servers
	// that fork may share a listener. None if they cannot be seen.
	Holders []int
	// State is "active", "draining" or "dead".
	State string
	// Weight is its share of new flows, relative to the others'; 0 while it
	// drains.
	Weight int
	// Generation is the batch of processes that it came with, see PolicyNewest.
	Generation int
	// Flows is how many tracked flows it has.
	Flows int
	// Recent is how many of them began in the last RecentTime.
	Recent int
	// Connections is how many connections a TCP listener has open: accepted by its
	// process, or waiting for that. A dead listener's are those that its process
	// has kept. -1 if this kernel cannot count them (CanCount).
	Connections int
	// Runs of the program that selected it since it joined, by outcome, and
	// the bytes of their transport headers and payloads.
	Hit, New, Rehomed, Untracked, Migrated, Bytes uint64
	// Total is the same over all listeners that have been in the slot: it does not
	// go down while the group has state.
	Total Served
	// RxQueue is what waits in the socket and Drops what it had to drop, both
	// -1 if unknown.
	RxQueue, Drops int
	// Joined is how long ago it was registered.
	Joined time.Duration
}

// HeldBy reports whether the listener is a process's, be it with others.
func (l Listener) HeldBy(pid int) bool { return l.PID == pid || slices.Contains(l.Holders, pid) }

// RecentTime is what Listener.Recent looks back.
const RecentTime = 10 * time.Second

// Status is a group's state at one time.
type Status struct {
	// Key names the group.
	Key Key
	// NetNSInode is what people know the network namespace by; 0 if the group
	// has no member.
	NetNSInode uint64
	// Attached tells that the live group has rpsel's program.
	Attached bool
	// Age is how long ago the group's state was made, in whole seconds; half a year
	// at most.
	Age time.Duration
	// What it was attached with, or changed to since. Idle times are in whole seconds.
	Policy        string
	Confirm       Confirm
	Affinity      Affinity
	ClientPrefix  ClientPrefix
	First         First
	Idle, IdleNew time.Duration
	// Owner is the user whose processes may register through the agent; nil:
	// nobody.
	Owner *uint32
	// Generation is the newest.
	Generation int
	// Settling is how much longer the group settles, and Turning how much
	// longer, at most, the newest generation waits for new flows; 0 if it does not.
	Settling, Turning time.Duration
	// Tracked is how many flows are known, Established how many of them are
	// confirmed, and Capacity how many the table is made for.
	Tracked, Established, Capacity int
	// Counters are those of the whole group since its state was made; an upgrade that
	// changes them begins anew.
	Counters Counters
	// Listeners are sorted by slot, Unregistered in the kernel's order.
	Listeners    []Listener
	Unregistered []Unregistered
	// AllDraining tells that there is no active listener left, so that new
	// flows go to draining ones.
	AllDraining bool
}

// Status reads how the group stands. It changes nothing.
func (g *Group) Status() (Status, error) {
	return g.read(reading{liveGroup, (*Group).countFlows})
}

// reading is how a status is read.
type reading struct {
	find  func(Key) (sockets.Group, error)
	count func(g *Group, status *Status, now uint32) error
}

func (g *Group) read(how reading) (Status, error) {
	for {
		now, err := g.current()
		if err != nil {
			return Status{}, err
		}
		status, err := now.status(how)
		if err != nil || status.Attached {
			return status, err
		}
		// The program that was attached a moment ago may be that of an upgrade.
		if again, err := g.current(); err != nil || again.state == now.state {
			return status, err
		}
	}
}

func (g *Group) status(how reading) (Status, error) {
	s, v := g.state, g.state.config.Values()
	status := Status{
		Key:          g.key,
		Policy:       policyOf(s.policy()).String(),
		Generation:   int(v.Generation),
		Confirm:      confirmOf(v),
		Capacity:     int(v.Capacity),
		Listeners:    []Listener{},
		Unregistered: []Unregistered{},
	}
	now, err := s.now()
	if err != nil {
		return status, err
	}
	status.Age = age(now, v.Attached)
	status.Affinity, status.ClientPrefix = affinityOf(v)
	status.First = firstOf(v)
	limits := s.config.Limits()
	status.Idle = time.Duration(limits.Established) * time.Second
	status.IdleNew = time.Duration(limits.New) * time.Second
	if uid, ok := s.config.Owner(); ok {
		status.Owner = &uid
	}
	// The last second has begun already, see settledAt.
	if waiting, left := s.config.Waiting(now); waiting == maps.Settling {
		status.Settling = time.Duration(max(1, left-1)) * time.Second
	}
	r, err := s.roll()
	if err != nil {
		return status, fmt.Errorf("%s: %w", g.key, err)
	}
	if next, left := s.pending(now, s.active(r)); next != 0 {
		status.Turning = time.Duration(max(1, left-1)) * time.Second
	}

	live, err := how.find(g.key)
	if err != nil {
		return status, err
	}
	status.NetNSInode = uint64(live.NetNSInode)
	status.Attached = live.HasProgram && ours(live.Program, s.RpselSelect)
	if err := g.listeners(&status, live, now); err != nil {
		return status, fmt.Errorf("%s: %w", g.key, err)
	}
	if err := how.count(g, &status, now); err != nil {
		return status, err
	}
	if s.counted {
		open, err := s.countOpen()
		if err != nil {
			return status, fmt.Errorf("%s: %w", g.key, err)
		}
		for i := range status.Listeners {
			l := &status.Listeners[i]
			l.Connections = open[l.Slot]
		}
	} else if g.key.Proto == TCP {
		for i := range status.Listeners {
			status.Listeners[i].Connections = -1
		}
	}
	return status, nil
}

// listeners fills in who is registered and who is not, and the counters.
func (g *Group) listeners(status *Status, live sockets.Group, now uint32) error {
	s := g.state
	records, err := s.listeners.Records()
	if err != nil {
		return err
	}
	members := map[uint64]sockets.Socket{}
	for _, m := range live.Members {
		members[m.Cookie] = m
	}
	group, err := s.counters.Group()
	if err != nil {
		return err
	}
	c := &status.Counters
	c.Fallback, c.ParseError, c.TableFull, c.Evicted = group.Fallback, group.ParseError, group.TableFull, group.Evicted

	// A slot that nobody could be put into has no record, but counts of before.
	totals := map[uint32]maps.SlotCounters{}
	for slot := range uint32(maps.Slots) {
		if s.listeners.Incarnation(slot) == 0 {
			continue
		}
		n, err := s.counters.Slot(slot)
		if err != nil {
			return err
		}
		totals[slot] = n
		c.Hit += n.Hit
		c.New += n.New
		c.Rehomed += n.Rehomed
		c.Untracked += n.Untracked
		c.Migrated += n.Migrated
	}

	active, draining := 0, 0
	for slot, record := range records {
		cookie, err := s.sockets.Cookie(slot)
		if err != nil {
			return err
		}
		n := totals[slot]
		l := Listener{
			Slot: int(slot), Cookie: record.Cookie, PID: int(record.Pid), Command: unpackCommand(record.Command),
			State: "dead", Weight: int(record.Weight &^ maps.Undealt), Generation: int(record.Generation),
			Hit: n.Hit - record.Base.Hit, New: n.New - record.Base.New, Rehomed: n.Rehomed - record.Base.Rehomed,
			Untracked: n.Untracked - record.Base.Untracked, Migrated: n.Migrated - record.Base.Migrated,
			Bytes: n.Bytes - record.Base.Bytes, RxQueue: -1, Drops: -1, Joined: age(now, record.Joined),
			Total: Served{n.Hit, n.New, n.Rehomed, n.Untracked, n.Migrated, n.Bytes},
		}
		switch state := s.listeners.State(slot); {
		case cookie == 0:
		case state == maps.SlotDraining:
			l.State, l.Weight = "draining", 0
			draining++
		default:
			l.State = "active"
			active++
		}
		if m, ok := members[cookie]; ok && cookie != 0 {
			l.RxQueue, l.Drops = int(m.RxQueue), int(m.Drops)
			if len(m.Holders) > 0 {
				l.PID, l.Command = m.Holders[0].PID, m.Holders[0].Command
			}
			for _, h := range m.Holders {
				if !slices.Contains(l.Holders, h.PID) {
					l.Holders = append(l.Holders, h.PID)
				}
			}
			delete(members, cookie)
		}
		status.Listeners = append(status.Listeners, l)
	}
	c.Runs = c.Hit + c.New + c.Rehomed + c.Untracked + c.Fallback + c.Migrated
	slices.SortFunc(status.Listeners, func(a, b Listener) int { return cmp.Compare(a.Slot, b.Slot) })
	status.AllDraining = active == 0 && draining > 0

	for _, m := range live.Members {
		if _, left := members[m.Cookie]; left {
			status.Unregistered = append(status.Unregistered, Unregistered{m, confirmOf(s.config.Values()).check(m)})
		}
	}
	return nil
}

// countFlows fills in how many flows there are, and who has them.
func (g *Group) countFlows(status *Status, now uint32) error {
	table, err := g.state.table()
	if err != nil {
		return err
	}
	defer table.Close()
	var flows, recent [maps.Slots]int
	for e := range table.All(now, g.state.config.Limits()) {
		status.Tracked++
		if e.Word.State() == maps.Established {
			status.Established++
		}
		slot := e.Word.Slot()
		if !e.Word.SameIncarnation(g.state.listeners.Incarnation(slot)) {
			continue
		}
		flows[slot]++
		if age(now, e.Created) < RecentTime {
			recent[slot]++
		}
	}
	for i := range status.Listeners {
		l := &status.Listeners[i]
		l.Flows, l.Recent = flows[l.Slot], recent[l.Slot]
	}
	return nil
}
