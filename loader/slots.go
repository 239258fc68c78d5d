package loader

import (
	"cmp"
	"errors"
	"fmt"
	stdmaps "maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// roll is who is in the slots of a group.
type roll struct {
	records map[uint32]maps.Listener
	cookies map[uint32]uint64 // 0: the listener is dead
	running map[process]bool  // that were looked for
}

func (s *state) roll() (*roll, error) {
	records, err := s.listeners.Records()
	if err != nil {
		return nil, err
	}
	r := &roll{records, make(map[uint32]uint64, len(records)), map[process]bool{}}
	for slot := range records {
		if r.cookies[slot], err = s.sockets.Cookie(slot); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// runs reports whether the process of a listener is still there.
func (r *roll) runs(l maps.Listener) bool {
	p := process{l.Pid, l.Started}
	running, known := r.running[p]
	if !known {
		running = p.started != 0 && startOf(int(p.pid)) == p.started
		r.running[p] = running
	}
	return running
}

// registered returns the slots in use, by the cookie of their socket.
func (r *roll) registered() map[uint64]uint32 {
	slots := make(map[uint64]uint32, len(r.cookies))
	for slot, cookie := range r.cookies {
		if cookie != 0 {
			slots[cookie] = slot
		}
	}
	return slots
}

// registered reads the roll for it.
func (s *state) registered() (map[uint64]uint32, error) {
	r, err := s.roll()
	if err != nil {
		return nil, err
	}
	return r.registered(), nil
}

// findings is what a group has that it should not have.
type findings struct {
	freed  []uint32 // slots that a killed command prepared for nobody
	died   []uint32
	late   []uint32 // slots without the share, or rank, they are due
	opened uint32   // a generation that a killed command did not note, or 0
	stale  bool     // the pick table, or who may serve, is of a time that is over
	links  strayed  // of ConfirmReply
	moved  bool     // rows are to be made anew: with policy cpu, listeners run elsewhere
}

func (f findings) none() bool {
	return len(f.freed)+len(f.died)+len(f.late) == 0 && f.opened == 0 && !f.stale && f.links.none()
}

// look finds what is to be repaired. It changes nothing, and needs no lock if
// somebody who has it looks again.
func (s *state) look(now uint32) (f findings, r *roll, err error) {
	if r, err = s.roll(); err != nil {
		return f, nil, err
	}
	v := s.config.Values()
	what, _ := s.config.Waiting(now)
	waiting, after, err := s.picks.Load()
	if err != nil {
		return f, nil, err
	}
	if what == maps.NotWaiting {
		f.stale = !slices.Equal(waiting, after) || atomic.LoadUint32(&v.Waiting) != uint32(what)
	}
	active := s.active(r)
	serving, over := s.serving(what, active)
	f.stale = f.stale || over || serving != v.Serving
	ranks := s.ranks(r, serving)
	present, next := s.weights(r, serving), s.weights(r, s.next(serving, active))
	due := after.Shares(next)
	var early, late [maps.NoSlot + 1]bool // who is in the halves of the table
	for k := range after {
		early[waiting[k]], late[after[k]] = true, true
	}
	for slot, record := range r.records {
		if r.cookies[slot] != 0 {
			f.opened = max(f.opened, record.Generation)
		}
		state, share := s.listeners.State(slot), uint16(slot)
		switch {
		case r.cookies[slot] == 0 && state <= maps.SlotJoining:
			f.freed = append(f.freed, slot)
		case r.cookies[slot] == 0 && record.Dead == 0:
			f.died = append(f.died, slot)
		case r.cookies[slot] == 0:
		case state <= maps.SlotJoining, due[share] > 0 && !late[share]:
			f.late = append(f.late, slot)
		case !s.listeners.HasRank(slot, ranks[slot]), record.Weight&maps.Undealt != 0:
			f.stale = true
		case early[share] && present[share] == 0 && what != maps.Settling, late[share] && next[share] == 0:
			f.stale = true
		}
	}
	if f.opened <= v.Generation {
		f.opened = 0
	}
	slices.Sort(f.late)
	f.moved, err = s.seatRows(r, next, false)
	return f, r, err
}

// repair finishes what a killed command began, buries the listeners that died,
// and follows a turn. Afterwards every slot is active or draining and alive,
// dead, or free. It returns what it found.
func (s *state) repair(now uint32) (findings, error) {
	f, r, err := s.look(now)
	if err != nil || f.none() && !f.moved {
		return f, err
	}
	if what, _ := s.config.Waiting(now); what == maps.NotWaiting {
		s.config.Wait(what, now, now)
	}
	for _, slot := range f.freed {
		s.listeners.SetState(slot, maps.SlotFree)
		if err := s.listeners.Unrecord(slot); err != nil {
			return f, err
		}
	}
	for _, slot := range f.died {
		s.listeners.Bury(slot)
		record := r.records[slot]
		record.Dead, record.Died = 1, now
		if err := s.listeners.Record(slot, record); err != nil {
			return f, err
		}
	}
	if f.opened != 0 {
		boot, err := bootSecond()
		if err != nil {
			return f, err
		}
		s.enroll(f.opened, r, boot)
		// If its listeners are active already, it is of before layout 2.
		s.config.Values().Members = uint32(s.active(r)[f.opened])
	}
	return f, s.activate(now, f.late...)
}

// vacancy chooses the slot for a listener of a process: the one that this very
// socket had, or one that a listener of the same process left, else the one that
// has been dead for longest, or one that was never used. Whose process runs keeps
// the record, which tells its generation when it binds again, as long as there is
// another slot. Flows of the dead one are told from the new one's by the
// incarnation.
func vacancy(cookie uint64, p process, r *roll, now uint32) (uint32, error) {
	type vacant struct {
		slot uint32
		own  int   // 0: of the same process
		dead int32 // seconds; the clock may have wrapped
	}
	var dead []vacant
	for slot, record := range r.records {
		if record.Dead == 0 {
			continue
		}
		if record.Cookie == cookie {
			return slot, nil
		}
		v := vacant{slot, 1, maps.Past(now, record.Died)}
		if p.has(record) {
			v.own = 0
		}
		dead = append(dead, v)
	}
	slices.SortFunc(dead, func(a, b vacant) int {
		return cmp.Or(cmp.Compare(a.own, b.own), cmp.Compare(b.dead, a.dead), cmp.Compare(a.slot, b.slot))
	})
	for _, v := range dead {
		if v.own == 0 || !r.runs(r.records[v.slot]) {
			return v.slot, nil
		}
	}
	for slot := range uint32(maps.Slots) {
		if _, used := r.records[slot]; !used {
			return slot, nil
		}
	}
	if len(dead) > 0 {
		return dead[0].slot, nil
	}
	return 0, fmt.Errorf("%w: a group has %d", ErrFull, maps.Slots)
}

// seat puts a socket into a slot, without a share yet. Each step leaves a state
// that repair completes or takes back: first the state, then the number by
// which the flows of the slot's last listener are none of the new one's, then
// the record, then the socket. It keeps r up to date.
//
// A TCP socket that had ended listening and listens again is who it was: it has its
// weight, its flows that no connection came for meanwhile, and drains if it did.
func (s *state) seat(m sockets.Socket, conn syscall.Conn, now uint32, r *roll) (uint32, error) {
	boot, err := bootSecond()
	if err != nil {
		return 0, err
	}
	p := processOf(m)
	slot, err := vacancy(m.Cookie, p, r, now)
	if err != nil {
		return 0, err
	}
	record, returns := r.records[slot], r.records[slot].Cookie == m.Cookie
	record.Dead, record.Died = 0, 0
	if !returns || s.listeners.State(slot) != maps.SlotDraining {
		s.listeners.SetState(slot, maps.SlotJoining)
		fault.Point("slot joining")
	}
	if !returns {
		base, err := s.counters.Slot(slot)
		if err != nil {
			return 0, err
		}
		record = maps.Listener{Cookie: m.Cookie, Base: base, Weight: 1, Generation: s.generationOf(p, r, now, boot), Joined: now, Pid: p.pid, Started: p.started, Cgroup: m.Cgroup}
		if len(m.Holders) > 0 {
			record.Command = packCommand(m.Holders[0].Command)
		}
		s.listeners.NextIncarnation(slot)
		s.loads.Set(slot, 0)
		if s.counted {
			s.conns.Begin(slot, s.listeners.Incarnation(slot))
		}
		fault.Point("slot numbered")
	} else if s.counted {
		// What waited in it is somebody else's, and counts with it until somebody looks.
		if _, err := s.countOpen(); err != nil {
			return 0, err
		}
	}
	if err := s.listeners.Record(slot, record); err != nil {
		return 0, err
	}
	fault.Point("record written")
	err = control(conn, func(fd int) error {
		if err := s.own(fd, slot); err != nil {
			return err
		}
		fault.Point("connections owned")
		return s.sockets.Insert(slot, fd)
	})
	if err == nil {
		r.records[slot], r.cookies[slot] = record, m.Cookie
		fault.Point("socket in slot")
		s.enroll(record.Generation, r, boot)
		return slot, nil
	}
	delete(r.records, slot)
	delete(r.cookies, slot)
	s.listeners.SetState(slot, maps.SlotFree)
	if errors.Is(err, maps.ErrInUse) || errors.Is(err, maps.ErrUnfit) {
		err = fmt.Errorf("%w: %s: %w", ErrUnregistrable, describe(m), err)
	}
	return 0, errors.Join(err, s.listeners.Unrecord(slot))
}

// describe names who has a socket. The caller, who may have borrowed it, is named only
// if nobody else has it.
func describe(m sockets.Socket) string {
	if len(m.Holders) == 0 {
		return fmt.Sprintf("socket %d", m.Cookie)
	}
	holders := make([]string, 0, len(m.Holders))
	for _, h := range m.Holders {
		if h.PID != os.Getpid() || len(m.Holders) == 1 {
			holders = append(holders, h.String())
		}
	}
	return strings.Join(holders, ", ")
}

// admit gives slots that were filled their share: not the one of a socket that
// drains, and is back.
func (s *state) admit(now uint32, slots ...uint32) error {
	return s.activate(now, slices.DeleteFunc(slices.Clone(slots), func(slot uint32) bool {
		return s.listeners.State(slot) == maps.SlotDraining
	})...)
}

// activate gives slots their share, and repairs the pick table.
func (s *state) activate(now uint32, slots ...uint32) error {
	level := make([]uint16, 0, len(slots))
	for _, slot := range slots {
		level = append(level, uint16(slot))
	}
	return s.deal(now, nil, slots, level)
}

// redeal repairs the pick table after listeners left or changed.
func (s *state) redeal(now uint32, level ...uint16) error { return s.deal(now, nil, nil, level) }

// dealAnew starts from a new table, for all that have joined.
func (s *state) dealAnew(now uint32, table maps.Table) error {
	r, err := s.roll()
	if err != nil {
		return err
	}
	var joining []uint32
	for slot := range r.records {
		if s.listeners.State(slot) == maps.SlotJoining {
			joining = append(joining, slot)
		}
	}
	return s.deal(now, table, joining, nil)
}

// deal makes slots active, and repairs the pick table, or a new one, for the
// listeners as they are. Slots in level are brought to their share exactly.
func (s *state) deal(now uint32, table maps.Table, joining []uint32, level []uint16) error {
	r, err := s.roll()
	if err != nil {
		return err
	}
	s.turn(now, r, joining...)
	for _, slot := range joining {
		s.listeners.SetState(slot, maps.SlotActive)
		fault.Point("slot active")
	}
	serving := s.config.Values().Serving
	s.rank(r, serving)
	fault.Point("slots ranked")
	for slot, record := range r.records {
		if record.Weight&maps.Undealt != 0 {
			level = append(level, uint16(slot))
		}
	}

	slices.Sort(level)
	level = slices.Compact(level)

	active := s.active(r)
	present, next := s.weights(r, serving), s.weights(r, s.next(serving, active))
	waiting, after, err := s.picks.Load()
	if table != nil {
		waiting, after = slices.Clone(table), table
	} else if err != nil {
		return err
	}
	n, limit := 0, s.picks.Limit()
	for _, members := range active {
		n += members
	}
	waiting, after = waiting.Grow(n, limit), after.Grow(n, limit)
	after.Deal(next, level...)
	switch what, _ := s.config.Waiting(now); what {
	case maps.NotWaiting:
		waiting = after
	case maps.Settling:
		// What the kernel's hash gave a listener it keeps, whoever it is.
		for slot := range r.records {
			if _, ok := present[uint16(slot)]; !ok && r.cookies[slot] != 0 {
				present[uint16(slot)] = 0
			}
		}
		waiting.Deal(present)
	case maps.Turning:
		waiting.Deal(present, level...)
	}
	fault.Point("table dealt")
	if err := s.picks.Store(waiting, after); err != nil {
		return err
	}
	if _, err := s.seatRows(r, next, true); err != nil {
		return err
	}
	fault.Point("table in force")
	for slot, record := range r.records {
		if record.Weight&maps.Undealt == 0 {
			continue
		}
		record.Weight &^= maps.Undealt
		if err := s.listeners.Record(slot, record); err != nil {
			return err
		}
	}
	return nil
}

// next is the generation that has new flows when the group has done waiting.
func (s *state) next(serving uint32, active map[uint32]int) uint32 {
	if newest := latest(active); newest != 0 {
		return newest
	}
	return serving
}

// weights are those of the listeners that have a share of new flows, when it is
// a generation's turn.
func (s *state) weights(r *roll, generation uint32) map[uint16]uint32 {
	weights := map[uint16]uint32{}
	for slot, record := range r.records {
		turn := s.policy() != maps.PolicyNewest || record.Generation == generation
		if turn && r.cookies[slot] != 0 && s.listeners.State(slot) == maps.SlotActive {
			weights[uint16(slot)] = record.Weight &^ maps.Undealt
		}
	}
	return weights
}

// ranks says by slot in which order active and draining listeners serve when the
// pick table has nobody. The generation that serves comes first, then the older
// ones.
func (s *state) ranks(r *roll, serving uint32) map[uint32]maps.Rank {
	active := s.active(r)
	newest := s.next(serving, active)
	order := slices.SortedFunc(stdmaps.Keys(active), func(a, b uint32) int {
		// What came in between has not had its turn.
		if (a > serving) != (b > serving) {
			return cmp.Compare(a, b)
		}
		return cmp.Compare(b, a)
	})
	if newest > serving {
		order = slices.DeleteFunc(order, func(g uint32) bool { return g == newest })
	}
	ranks := map[uint32]maps.Rank{}
	for slot, record := range r.records {
		switch state := s.listeners.State(slot); {
		case r.cookies[slot] == 0:
		case state == maps.SlotDraining:
			ranks[slot] = maps.RankDraining
		case state != maps.SlotActive:
		case s.policy() != maps.PolicyNewest:
			ranks[slot] = maps.RankFirst
		case record.Generation == newest && newest > serving:
			ranks[slot] = maps.RankNext
		default:
			ranks[slot] = min(maps.RankFirst+maps.Rank(slices.Index(order, record.Generation)), maps.RankOlder)
		}
	}
	return ranks
}

// rank puts the listeners into their ranks, the last first: whoever is searched
// early meanwhile belongs there.
func (s *state) rank(r *roll, serving uint32) {
	ranks := s.ranks(r, serving)
	for rank := maps.RankDraining; rank >= maps.RankNext; rank-- {
		for slot := range ranks {
			if ranks[slot] == rank && !s.listeners.HasRank(slot, rank) {
				s.listeners.SetRank(slot, rank)
			}
		}
	}
}

// evict empties all slots, so that other tools may have the sockets at once
// and not only when the kernel has freed the array.
func (p *pinned) evict() error {
	var errs []error
	socks := maps.NewSockets(p.Socks)
	for slot := range uint32(maps.Slots) {
		cookie, err := socks.Cookie(slot)
		if err == nil && cookie == 0 {
			continue
		}
		errs = append(errs, err, socks.Remove(slot))
		fault.Point("slot emptied")
	}
	return errors.Join(errs...)
}
