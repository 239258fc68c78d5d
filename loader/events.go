package loader

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/statedir"
	"github.com/rpsel/rpsel/maps"
)

// EventKind is what happened.
type EventKind string

// What may happen to a flow, to a listener, and to the events themselves.
const (
	EventNew         EventKind = "new"
	EventEstablished EventKind = "established"
	EventRehome      EventKind = "rehome" // its listener died, it has another one
	EventEvict       EventKind = "evict"  // a new flow gave way to another one
	EventExpire      EventKind = "expire" // it was silent for too long
	EventJoin        EventKind = "join"
	EventLeave       EventKind = "leave"
	EventDrain       EventKind = "drain"
	EventResume      EventKind = "resume"
	EventDropped     EventKind = "dropped" // events are missing here
)

// Event is something that happened in a group.
type Event struct {
	Kind EventKind
	// Time is when. Of listeners it is when that was seen, within a quarter of a second.
	Time time.Time
	// Client is whose flow it is; not valid if it is a listener's event.
	Client netip.AddrPort
	// Slot is the listener's, PID and Command those of the process that held its
	// socket when it joined; 0 and "" if another listener has the slot by now.
	Slot    int
	PID     int
	Command string
	// From is the slot that a rehomed flow had before, else -1.
	From int
	// Dropped is how many reports of flows are missing, -1 if that is not known.
	Dropped int
}

// watchEvery is how often Watch looks for what no packet tells.
const watchEvery = 250 * time.Millisecond

const (
	readEach   = 50 * time.Millisecond // how often the ring is looked at: the program wakes nobody
	eventBatch = 1000                  // events given to the caller at a time
	renewEach  = time.Second           // how often the program is told that somebody reads
	sweepEach  = 2 * time.Second       // how often expired flows are looked for, where no timer does
)

// ringSize is room for some 75 000 reports, in bytes. A test has less.
var ringSize uint32 = 1 << 22

// Watch gives f what happens in the group, in order, until the context ends, which
// is no error, or f returns one. It calls f from one goroutine.
//
// Flows are reported by the program, from the time on when ready is called; what
// the reader is too slow for is dropped and counted. Listeners are looked at every quarter
// of a second: one whose slot another one takes in between, or that
// drains and resumes, is not told of. A flow's event comes after that of its listener. Flows that somebody
// flushes are not told of.
//
// Only one process may watch a group at a time. With none the program takes no
// notice; one that is killed is forgotten within seconds.
//
// Errors: ErrWatched, ErrNotAttached (also once it is detached).
func (g *Group) Watch(ctx context.Context, ready func(), f func([]Event) error) error {
	w := &watch{g: g, f: f, ready: ready}
	for {
		err := w.run(ctx)
		if !errors.Is(err, errReplaced) {
			return err
		}
		// What the program reported while nobody had its ring is lost.
		w.add(Event{Kind: EventDropped, Time: time.Now(), From: -1, Dropped: -1})
	}
}

// errReplaced tells that a group was upgraded.
var errReplaced = errors.New("the state was replaced")

// watch is one Watch.
type watch struct {
	g      *Group
	f      func([]Event) error
	ready  func() // nil: was called
	events []Event
	boot   time.Time           // when CLOCK_BOOTTIME was zero
	seated *[maps.Slots]seated // nil: nobody has looked yet

	s       *state // that is watched
	reports *maps.Reports
	renewed time.Time
	swept   time.Time
}

// seated is who is in a slot, as far as events have told.
type seated struct {
	incarnation uint32
	alive       bool
	draining    bool
	pid         int
	command     string
}

func (w *watch) add(e Event) { w.events = append(w.events, e) }

// flush gives the caller what there is.
func (w *watch) flush() error {
	if len(w.events) == 0 {
		return nil
	}
	err := w.f(w.events)
	w.events = nil
	return err
}

// run watches until the context ends or the group's state is replaced.
func (w *watch) run(ctx context.Context) (err error) {
	if err := w.follow(); err != nil {
		return err
	}
	current, err := w.g.current()
	if err != nil {
		return err
	}
	w.s = current.state
	lock, err := w.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if w.reports, err = maps.OpenReports(w.s.Reader, w.s.Reports, ringSize); errors.Is(err, unix.EPERM) {
		return capability.Denied("make a ring for events", capability.BPF)
	} else if err != nil {
		return fmt.Errorf("%s: %w", w.g.key, err)
	}
	defer func() { err = errors.Join(err, w.reports.Close()) }()
	now, err := w.s.now()
	if err != nil {
		return err
	}
	w.reports.Renew(now)
	w.renewed = time.Now()
	if err := w.look(time.Now()); err != nil {
		return err
	}
	if w.ready != nil {
		w.ready()
		w.ready = nil
	}
	due := time.Now().Add(watchEvery)
	for ctx.Err() == nil {
		if err := w.next(time.Now().Add(readEach)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if at := time.Now(); at.After(due) {
			due = at.Add(watchEvery)
			if err := w.tick(); err != nil {
				return errors.Join(w.flush(), err)
			}
		}
	}
	// What happened until now is told.
	w.reports.Stop()
	for err == nil {
		err = w.next(time.Now())
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	w.dropped()
	return errors.Join(w.look(time.Now()), w.flush())
}

// next waits for a report until the deadline, and gives the caller what there is
// when there are many events, or no more.
func (w *watch) next(deadline time.Time) error {
	report, more, err := w.reports.Next(deadline)
	if err == nil {
		err = w.report(report)
	}
	if !more || len(w.events) >= eventBatch {
		return errors.Join(w.flush(), err)
	}
	return err
}

// dropped adds what the program had to drop.
func (w *watch) dropped() {
	if n := w.reports.Dropped(); n > 0 {
		w.add(Event{Kind: EventDropped, Time: time.Now(), From: -1, Dropped: int(n)})
	}
}

// follow looks for the state in force.
func (w *watch) follow() error {
	err := w.g.follow()
	if errors.Is(err, ErrNotAttached) {
		return fmt.Errorf("%s: %w: it was detached", w.g.key, ErrNotAttached)
	}
	return err
}

// lock makes this the only process that watches the state. It ends with the
// process, and is in no command's way.
func (w *watch) lock() (*os.File, error) {
	path, err := w.g.fs.inForce(w.g.key)
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.g.key, err)
	}
	err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%s: %w: %s does, and only one can", w.g.key, ErrWatched, statedir.LockHolder(dir))
	}
	if err == nil {
		var held os.FileInfo
		if held, err = dir.Stat(); err == nil && !os.SameFile(held, w.s.dir) {
			err = errReplaced // between the look and the lock
		}
	}
	if err != nil {
		dir.Close()
		return nil, err
	}
	return dir, nil
}

// tick does what is due besides reading.
func (w *watch) tick() error {
	if err := w.follow(); err != nil {
		return err
	}
	if current, err := w.g.current(); err != nil || current.state != w.s {
		return errors.Join(errReplaced, err)
	}
	at := time.Now()
	w.dropped()
	if err := w.look(at); err != nil {
		return err
	}
	if at.Sub(w.renewed) < renewEach {
		return nil
	}
	w.renewed = at
	now, err := w.s.now()
	if err != nil {
		return err
	}
	if !w.reports.Renew(now) {
		// This process was stopped.
		w.add(Event{Kind: EventDropped, Time: at, From: -1, Dropped: -1})
	}
	if at.Sub(w.swept) < sweepEach {
		return nil
	}
	w.swept = at
	return w.sweep(now)
}

// sweep removes expired flows if nobody else does: then it can tell of them.
func (w *watch) sweep(now uint32) error {
	if kept, err := w.s.kept(now); err != nil || kept || w.s.config.Frozen(now) {
		return err
	}
	flows, err := w.s.table()
	if err != nil {
		return err
	}
	defer flows.Close()
	at := time.Now()
	n := flows.Sweep(0, flows.Buckets(), now, w.s.config.Limits(), func(e maps.Entry) {
		w.flowEvent(EventExpire, at, e.Client, e.Word, 0)
	})
	if n > 0 {
		return w.s.recount()
	}
	return nil
}

// report makes an event of what the program says. What happened to the listener
// comes first.
func (w *watch) report(r maps.Report) error {
	kind, ok := map[maps.ReportKind]EventKind{
		maps.ReportNew: EventNew, maps.ReportEstablished: EventEstablished, maps.ReportRehome: EventRehome,
		maps.ReportEvict: EventEvict, maps.ReportExpire: EventExpire,
	}[r.Kind]
	if !ok {
		return nil // of a newer program
	}
	at := w.time(r.At)
	slot, was := r.Word.Slot(), &w.seated[r.Was.Slot()]
	if w.s.listeners.Incarnation(slot) != w.seated[slot].incarnation ||
		r.Kind == maps.ReportRehome && was.alive && r.Was.SameIncarnation(was.incarnation) {
		if err := w.look(at); err != nil {
			return err
		}
	}
	w.flowEvent(kind, at, r.Client, r.Word, r.Was)
	return nil
}

// flowEvent adds the event of a flow.
func (w *watch) flowEvent(kind EventKind, at time.Time, client netip.AddrPort, word, was maps.Word) {
	e := Event{Kind: kind, Time: at, Client: client, Slot: int(word.Slot()), From: -1}
	if s := w.seated[e.Slot]; word.SameIncarnation(s.incarnation) {
		e.PID, e.Command = s.pid, s.command
	}
	if kind == EventRehome {
		e.From = int(was.Slot())
	}
	w.add(e)
}

// time turns a time of CLOCK_BOOTTIME into one for people.
func (w *watch) time(boot time.Duration) time.Time {
	if w.boot.IsZero() {
		var now unix.Timespec
		if unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
			return time.Now()
		}
		w.boot = time.Now().Add(-time.Duration(now.Nano()))
	}
	return w.boot.Add(boot)
}

// look compares the slots with what was told of them, and tells the difference. The
// first look tells nothing.
func (w *watch) look(at time.Time) error {
	first := w.seated == nil
	if first {
		w.seated = new([maps.Slots]seated)
	}
	var records map[uint32]maps.Listener
	for slot := range uint32(maps.Slots) {
		known := &w.seated[slot]
		now := seated{incarnation: w.s.listeners.Incarnation(slot), pid: known.pid, command: known.command}
		state := w.s.listeners.State(slot)
		if now.incarnation == 0 {
			continue
		}
		if state <= maps.SlotJoining {
			// The next one is not there yet.
			w.leave(at, int(slot), known)
			continue
		}
		cookie, err := w.s.sockets.Cookie(slot)
		if err != nil {
			return fmt.Errorf("%s: %w", w.g.key, err)
		}
		now.alive = cookie != 0
		now.draining = state == maps.SlotDraining
		another := now.incarnation != known.incarnation
		if another {
			if records == nil {
				if records, err = w.s.listeners.Records(); err != nil {
					return fmt.Errorf("%s: %w", w.g.key, err)
				}
			}
			now.pid, now.command = int(records[slot].Pid), unpackCommand(records[slot].Command)
		}
		if first {
			*known = now
			continue
		}
		if another {
			w.leave(at, int(slot), known)
			w.tell(EventJoin, at, int(slot), now)
			*known = seated{now.incarnation, true, false, now.pid, now.command}
		}
		switch {
		case !known.alive:
		case now.draining && !known.draining:
			w.tell(EventDrain, at, int(slot), now)
		case known.draining && !now.draining:
			w.tell(EventResume, at, int(slot), now)
		}
		if !now.alive {
			w.leave(at, int(slot), known) // perhaps it has only just joined
		}
		*known = now
	}
	return nil
}

// leave tells that a listener is gone, once.
func (w *watch) leave(at time.Time, slot int, known *seated) {
	if known.alive {
		known.alive = false
		w.tell(EventLeave, at, slot, *known)
	}
}

func (w *watch) tell(kind EventKind, at time.Time, slot int, who seated) {
	w.add(Event{Kind: kind, Time: at, Slot: slot, PID: who.pid, Command: who.command, From: -1})
}
