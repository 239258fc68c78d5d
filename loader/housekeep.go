package loader

import (
	"errors"
	"fmt"
	"time"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/maps"
)

// Housekept is what a Housekeep did.
type Housekept struct {
	// Buried is how many listeners it found dead.
	Buried int
	// Repaired tells that the pick table, or who may serve, was not as it should
	// be: listeners died, a turn or a wait had come to its end, or a killed
	// command had left something half done.
	Repaired bool
	// Forgotten is how many expired flows it removed.
	Forgotten int
}

// sweepBuckets is how many buckets of the flow table one Housekeep sweeps: two
// MiB, for which it takes a millisecond.
const sweepBuckets = 1 << 14

// Housekeep does what is no packet's business: it buries listeners that died and
// deals their share of new flows to the others, follows a turn of generations,
// completes what killed commands left, and, where the program does not do it
// itself for want of a timer (HaveTimer), removes expired flows, in a part of the
// table at a time (every 30 seconds, on from where the last one of this Group
// ended). Traffic does not need it, but stays evener by it, and on a group where
// it runs every few hours no expired flow is left when the clock wraps.
//
// It is cheap: it takes the lock only if there is something to do.
//
// Errors: ErrNotAttached, ErrLocked.
func (g *Group) Housekeep() (Housekept, error) {
	var h Housekept
	if err := g.follow(); err != nil {
		return h, err // it was detached
	}
	current, err := g.current()
	if err != nil {
		return h, err
	}
	s := current.state
	now, err := s.now()
	if err != nil {
		return h, err
	}
	found, err := current.look(now)
	if err != nil {
		return h, fmt.Errorf("%s: %w", g.key, err)
	}
	if !found.none() || found.moved {
		err = g.repaired(func(_ uint32, found findings) error {
			h.Buried, h.Repaired = len(found.died), !found.none()
			return nil
		})
	}
	kept, houseErr := s.kept(now)
	if s.counted && houseErr == nil {
		houseErr = g.recountOpen(s)
	}
	watched, readErr := maps.Read(s.Reader, now)
	// Who watches sweeps by itself, to tell of what expired.
	if houseErr = errors.Join(houseErr, readErr); houseErr == nil && !kept && !watched {
		h.Forgotten, houseErr = g.sweep(s, now)
	}
	return h, errors.Join(err, houseErr)
}

// ticksLate is after how many seconds without a tick the timer does not run: that
// of a group that has had no packet yet, or of a kernel without timers.
const ticksLate = 3

// kept reports whether the program's timer keeps house.
func (s *state) kept(now uint32) (bool, error) {
	var h bpf.SelectHouse
	if err := s.House.Lookup(uint32(0), &h); err != nil {
		return false, fmt.Errorf("look after the timer: %w", err)
	}
	return h.Ticked != 0 && maps.Age(now, h.Ticked) <= ticksLate, nil
}

// sweepPause is how long after a sweep the next one is due. Tests are less patient.
var sweepPause = 30 * time.Second

// recountOpen sets counts of connections right, if that is due.
func (g *Group) recountOpen(s *state) error {
	if last := g.countedAt.Load(); last != nil && time.Since(*last) < sweepPause {
		return nil
	}
	at := time.Now()
	g.countedAt.Store(&at)
	_, err := s.countOpen()
	return err
}

// sweep removes expired flows of the next part of the table, if that is due.
func (g *Group) sweep(s *state, now uint32) (forgotten int, err error) {
	if last := g.sweptAt.Load(); s.config.Frozen(now) || last != nil && time.Since(*last) < sweepPause {
		return 0, nil
	}
	flows, err := s.table()
	if err != nil {
		return 0, err
	}
	defer flows.Close()
	at := time.Now()
	g.sweptAt.Store(&at)
	buckets := flows.Buckets()
	first := int(g.swept.Load()) % buckets // an upgrade may have made another table
	end := min(first+sweepBuckets, buckets)
	g.swept.Store(int64(end % buckets))
	n := flows.Sweep(first, end, now, s.config.Limits(), nil)
	if n > 0 {
		err = s.recount()
	}
	return n, err
}
