package loader

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"syscall"

	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// registered returns the slots in use, by the cookie of their socket.
func (s *state) registered() (map[uint64]uint32, error) {
	records, err := s.listeners.Records()
	if err != nil {
		return nil, err
	}
	slots := make(map[uint64]uint32, len(records))
	for slot := range records {
		cookie, err := s.sockets.Cookie(slot)
		if err != nil {
			return nil, err
		}
		if cookie != 0 {
			slots[cookie] = slot
		}
	}
	return slots, nil
}

// repair finishes what a killed command began, and buries the listeners that
// died. Afterwards every slot is active or draining and alive, dead, or free.
func (s *state) repair(now uint32) error {
	records, err := s.listeners.Records()
	if err != nil {
		return err
	}
	_, after := s.picks.Load()
	var shares [maps.NoSlot + 1]bool
	for _, slot := range after {
		shares[slot] = true
	}
	var late []uint32
	changed := false // somebody died, or began to drain and was not seen through
	for slot, record := range records {
		cookie, err := s.sockets.Cookie(slot)
		if err != nil {
			return err
		}
		state := s.listeners.State(slot)
		switch {
		case cookie == 0 && state <= maps.SlotJoining:
			s.listeners.SetState(slot, maps.SlotFree)
			if err := s.listeners.Unrecord(slot); err != nil {
				return err
			}
		case cookie == 0 && record.Dead == 0:
			s.listeners.Bury(slot)
			record.Dead, record.Died = 1, now
			if err := s.listeners.Record(slot, record); err != nil {
				return err
			}
			changed = true
		case cookie == 0:
		case state <= maps.SlotJoining, state == maps.SlotActive && !shares[slot]:
			late = append(late, slot)
		case state == maps.SlotDraining && shares[slot]:
			changed = true
		}
	}
	if len(late) > 0 {
		slices.Sort(late)
		return s.activate(now, late...)
	}
	if changed {
		return s.redeal(now)
	}
	return nil
}

// vacancy chooses the slot for a new listener: the one that has been dead for
// longest, or one that was never used. Flows of the dead one are told from the
// new one's by the incarnation.
func vacancy(records map[uint32]maps.Listener, now uint32) (uint32, error) {
	best, longest := uint32(maps.NoSlot), int32(math.MinInt32) // the clock may have wrapped
	for slot, record := range records {
		if record.Dead == 0 {
			continue
		}
		dead := maps.Age(now, record.Died)
		if dead > longest || dead == longest && slot < best {
			best, longest = slot, dead
		}
	}
	if best != maps.NoSlot {
		return best, nil
	}
	for slot := range uint32(maps.Slots) {
		if _, used := records[slot]; !used {
			return slot, nil
		}
	}
	return 0, fmt.Errorf("%w: a group has %d", ErrFull, maps.Slots)
}

// seat puts a socket into a slot, without a share yet. Each step leaves a state
// that repair completes or takes back: first the state, then the number by
// which the flows of the slot's last listener are none of the new one's, then
// the record, then the socket. It keeps records, those of all slots, up to date.
func (s *state) seat(m sockets.Socket, conn syscall.Conn, now uint32, records map[uint32]maps.Listener) (uint32, error) {
	slot, err := vacancy(records, now)
	if err != nil {
		return 0, err
	}
	base, err := s.counters.Slot(slot)
	if err != nil {
		return 0, err
	}
	record := maps.Listener{Cookie: m.Cookie, Base: base, Weight: 1, Generation: 1, Joined: now}
	if len(m.Holders) > 0 {
		record.Pid = uint32(m.Holders[0].PID)
		record.Command = packCommand(m.Holders[0].Command)
	}
	s.listeners.SetState(slot, maps.SlotJoining)
	fault.Point("slot joining")
	s.listeners.NextIncarnation(slot)
	fault.Point("slot numbered")
	if err := s.listeners.Record(slot, record); err != nil {
		return 0, err
	}
	records[slot] = record
	fault.Point("record written")
	err = control(conn, func(fd int) error { return s.sockets.Insert(slot, fd) })
	if err == nil {
		fault.Point("socket in slot")
		return slot, nil
	}
	delete(records, slot)
	s.listeners.SetState(slot, maps.SlotFree)
	if errors.Is(err, maps.ErrInUse) || errors.Is(err, maps.ErrUnfit) {
		err = fmt.Errorf("%w: %s: %w", ErrUnregistrable, describe(m), err)
	}
	return 0, errors.Join(err, s.listeners.Unrecord(slot))
}

func describe(m sockets.Socket) string {
	if len(m.Holders) == 0 {
		return fmt.Sprintf("socket %d", m.Cookie)
	}
	holders := make([]string, 0, len(m.Holders))
	for _, h := range m.Holders {
		holders = append(holders, h.String())
	}
	return strings.Join(holders, ", ")
}

// activate gives slots their share.
func (s *state) activate(now uint32, slots ...uint32) error {
	level := make([]uint16, 0, len(slots))
	for _, slot := range slots {
		s.listeners.SetState(slot, maps.SlotActive)
		fault.Point("slot active")
		level = append(level, uint16(slot))
	}
	return s.dealAll(now, nil, level)
}

// redeal repairs the pick table after listeners left or changed.
func (s *state) redeal(now uint32, level ...uint32) error {
	var at []uint16
	for _, slot := range level {
		at = append(at, uint16(slot))
	}
	return s.dealAll(now, nil, at)
}

// deal starts from a new table.
func (s *state) deal(now uint32, table maps.Table) error {
	records, err := s.listeners.Records()
	if err != nil {
		return err
	}
	for slot := range records {
		if s.listeners.State(slot) == maps.SlotJoining {
			s.listeners.SetState(slot, maps.SlotActive)
			fault.Point("slot active")
		}
	}
	return s.dealAll(now, table, nil)
}

// dealAll repairs the pick table, or a new one, for the listeners as they are.
func (s *state) dealAll(now uint32, table maps.Table, level []uint16) error {
	records, err := s.listeners.Records()
	if err != nil {
		return err
	}
	active, settled := map[uint16]uint32{}, map[uint16]uint32{}
	for slot, record := range records {
		cookie, err := s.sockets.Cookie(slot)
		if err != nil {
			return err
		}
		if cookie == 0 {
			continue
		}
		switch s.listeners.State(slot) {
		case maps.SlotActive:
			active[uint16(slot)] = record.Weight
			settled[uint16(slot)] = record.Weight
		case maps.SlotDraining:
			settled[uint16(slot)] = 0
		}
	}
	settling, after := s.picks.Load()
	if table != nil {
		settling, after = slices.Clone(table), table
	}
	limit := s.picks.Limit()
	settling, after = settling.Grow(len(active), limit), after.Grow(len(active), limit)
	after.Deal(active, level...)
	if waiting, _ := s.config.Waiting(now); waiting == maps.NotWaiting {
		settling = after
	} else {
		settling.Deal(settled)
	}
	fault.Point("table dealt")
	if err := s.picks.Store(settling, after); err != nil {
		return err
	}
	fault.Point("table in force")
	return nil
}

// evict empties all slots, so that other tools may have the sockets at once
// and not only when the kernel has freed the array.
func (s *state) evict() error {
	records, err := s.listeners.Records()
	if err != nil {
		return err
	}
	var errs []error
	for slot := range records {
		errs = append(errs, s.sockets.Remove(slot))
		fault.Point("slot emptied")
	}
	return errors.Join(errs...)
}
