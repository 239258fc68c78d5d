package loader

import (
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// batchTime is how long a generation waits for the next of its members, and the
// generation before it keeps new flows, if there are not as many members as
// that has.
const batchTime = 5 * time.Second

// process tells a process from a later one with the same pid.
type process struct {
	pid     uint32
	started uint64 // ticks since boot, as in /proc/PID/stat; 0: unknown
}

// processOf is the process that a socket's record names.
func processOf(m sockets.Socket) process {
	if len(m.Holders) == 0 {
		return process{}
	}
	pid := m.Holders[0].PID
	return process{uint32(pid), startOf(pid)}
}

// has reports whether the listener is, or was, one of the process.
func (p process) has(l maps.Listener) bool {
	return p.started != 0 && l.Started == p.started && l.Pid == p.pid
}

// startOf reads when a process started (proc_pid_stat(5), field 22).
func startOf(pid int) uint64 {
	fields := statOf(pid)
	if len(fields) < 20 {
		return 0
	}
	started, err := strconv.ParseUint(fields[22-3], 10, 64)
	if err != nil {
		return 0
	}
	return started
}

// statOf reads what the kernel tells of a process (proc_pid_stat(5)), from field
// 3 on; nothing, if it is gone.
func statOf(pid int) []string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	// The name in parentheses may have anything in it; field 3 comes after it.
	return strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
}

// batch is the newest generation.
type batch struct {
	generation uint32
	members    uint32 // the most that were active in it when one joined
	joined     uint64 // second since boot in which the last one did
}

// left is how much longer a generation is incomplete if nobody joins. The second
// of the last join had begun already.
func (b batch) left(boot uint64) uint32 {
	if passed := boot - b.joined; passed <= uint64(seconds(batchTime)) {
		return seconds(batchTime) + 1 - uint32(passed)
	}
	return 0
}

// admit returns the generation of a joiner when so many of the newest are alive:
// the newest while it is incomplete or lacks a member, else the next.
func (b batch) admit(alive int, boot uint64) uint32 {
	if b.generation > 0 && (b.left(boot) > 0 || alive < int(b.members)) {
		return b.generation
	}
	return b.generation + 1
}

// bootSecond reads the clock by which members join.
func bootSecond() (uint64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return uint64(now.Sec), nil
}

func (s *state) newest() batch {
	v := s.config.Values()
	return batch{v.Generation, v.Members, v.Joined}
}

// generationOf says to which generation a listener of a process belongs. A
// process that has a listener, or had one, stays what it is.
func (s *state) generationOf(p process, r *roll, now uint32, boot uint64) uint32 {
	generation := uint32(0)
	for _, record := range r.records {
		if p.has(record) {
			generation = max(generation, record.Generation)
		}
	}
	if generation != 0 {
		return generation
	}
	s.fallBack(r, now, boot)
	b := s.newest()
	return b.admit(s.members(r, b.generation), boot)
}

// fallBack makes an older generation the newest again if nobody is left of the
// newer ones, and listeners of it died since: whoever joins now comes in their
// place. A version that was tried and stopped would else make each later crash
// restart the first of a generation, with all new flows.
func (s *state) fallBack(r *roll, now uint32, boot uint64) {
	b, before := s.newest(), latest(s.active(r))
	if before == 0 || before >= b.generation || b.members == 0 || b.left(boot) > 0 {
		return
	}
	const never = math.MaxInt32
	ended := int32(never) // so many seconds ago the newest did
	for slot, record := range r.records {
		switch {
		case record.Generation <= before:
		case r.cookies[slot] != 0:
			return // it drains
		default:
			ended = min(ended, maps.Past(now, record.Died))
		}
	}
	lost := 0
	for slot, record := range r.records {
		if record.Generation == before && r.cookies[slot] == 0 && maps.Past(now, record.Died) < ended {
			lost++
		}
	}
	if lost == 0 || ended == never {
		return
	}
	v := s.config.Values()
	// Killed in between, the next to join finds what this one found.
	v.Members = uint32(s.members(r, before) + lost)
	v.Generation = before
}

// members counts the listeners of a generation that live and do not drain, those
// without a share yet included.
func (s *state) members(r *roll, generation uint32) (n int) {
	for slot, record := range r.records {
		if record.Generation == generation && r.cookies[slot] != 0 && s.listeners.State(slot) != maps.SlotDraining {
			n++
		}
	}
	return n
}

// enroll notes that a listener of a generation has joined. The first one begins
// it: also again, when all others have gone, so that as many may come back as
// will. The number comes last: without it repair does this again.
func (s *state) enroll(generation uint32, r *roll, boot uint64) {
	v, b := s.config.Values(), s.newest()
	if generation < b.generation {
		return
	}
	first := generation > b.generation || s.members(r, generation) == 1
	if first || b.left(boot) > 0 {
		v.Joined = boot
		fault.Point("generation dated")
	}
	if first {
		v.Members = 0
		v.Generation = generation
		fault.Point("generation begun")
	}
}

// closeGeneration makes the next process to join open another.
func (s *state) closeGeneration() {
	v := s.config.Values()
	v.Joined = 0
	v.Members = 0
}

// active counts the active listeners by generation.
func (s *state) active(r *roll) map[uint32]int {
	n := map[uint32]int{}
	for slot, record := range r.records {
		if r.cookies[slot] != 0 && s.listeners.State(slot) == maps.SlotActive {
			n[record.Generation]++
		}
	}
	return n
}

// latest is the newest generation that has somebody, or 0.
func latest(active map[uint32]int) (generation uint32) {
	for g := range active {
		generation = max(generation, g)
	}
	return generation
}

func (s *state) policy() uint32 { return atomic.LoadUint32(&s.config.Values().Policy) }

// serving says which generation has new flows now, or until the group has done
// waiting, and whether it need not wait for the next one any more.
func (s *state) serving(what maps.Waiting, active map[uint32]int) (generation uint32, over bool) {
	was, newest := s.config.Values().Serving, latest(active)
	switch {
	case newest == 0:
		return was, false
	case s.policy() != maps.PolicyNewest, what == maps.NotWaiting, newest <= was, active[newest] >= active[was]:
		return newest, what == maps.Turning
	default:
		return was, false
	}
}

// turn decides who has new flows when some more slots become active, before they
// are. A generation that appears waits, unless it is as large as the one before.
// The wait ends by the program's clock.
func (s *state) turn(now uint32, r *roll, joining ...uint32) {
	v := s.config.Values()
	what, _ := s.config.Waiting(now)
	active := s.active(r)
	before := latest(active)
	serving, _ := s.serving(what, active)
	v.Serving = serving
	for _, slot := range joining {
		generation, state := r.records[slot].Generation, s.listeners.State(slot)
		if r.cookies[slot] == 0 || state == maps.SlotActive {
			continue
		}
		active[generation]++
		if state == maps.SlotJoining && generation == v.Generation {
			v.Members = max(v.Members, uint32(active[generation]))
		}
	}
	if newest := latest(active); s.policy() == maps.PolicyNewest && newest > before && active[newest] < active[serving] {
		s.await(now, seconds(batchTime)+1)
		fault.Point("turn begun")
		return
	}
	serving, over := s.serving(what, active)
	v.Serving = serving
	if over {
		s.config.Wait(maps.NotWaiting, now, now)
		fault.Point("turn ended")
	}
}

// await makes the group wait for the next generation, and until it has settled.
func (s *state) await(now, turn uint32) {
	what, settling := s.config.Waiting(now)
	if what != maps.Settling || s.config.Values().Affinity != maps.AffinityFlow {
		// With another affinity the program pays no heed to settling.
		s.config.Wait(maps.Turning, now, now+turn)
		return
	}
	s.config.Wait(maps.Settling, now, now+max(settling, turn))
}

// pending returns the generation that is about to take over, or 0, and in how
// many seconds it does.
func (s *state) pending(now uint32, active map[uint32]int) (generation, left uint32) {
	what, left := s.config.Waiting(now)
	serving, _ := s.serving(what, active)
	if newest := latest(active); newest > serving && what != maps.NotWaiting {
		return newest, left
	}
	return 0, 0
}

// settle makes the group settle from now on, and not turn before its time.
func (s *state) settle(now uint32, d time.Duration) error {
	r, err := s.roll()
	if err != nil {
		return err
	}
	boot, err := bootSecond()
	if err != nil {
		return err
	}
	v := s.config.Values()
	if v.Affinity != maps.AffinityFlow {
		d = 0 // nothing is left where the kernel's hash has it
	}
	v.Settled, v.Ruled = settledAt(now, d), now
	turn := uint32(0)
	if next, left := s.pending(now, s.active(r)); next != 0 {
		turn = min(left, s.newest().left(boot))
	}
	switch {
	case turn == 0:
		s.config.Wait(maps.Settling, now, v.Settled)
	case d == 0:
		s.config.Wait(maps.Turning, now, now+turn)
	default:
		s.config.Wait(maps.Settling, now, max(now+turn, v.Settled))
	}
	return nil
}

// setPolicy changes who gets new flows, from the next on. A killed command is
// completed by repair.
func (s *state) setPolicy(now uint32, p Policy) error {
	if p == policyKept || s.policy() == p.number() {
		return nil
	}
	r, err := s.roll()
	if err != nil {
		return err
	}
	boot, err := bootSecond()
	if err != nil {
		return err
	}
	v, active := s.config.Values(), s.active(r)
	if left := s.newest().left(boot); p == PolicyNewest && left > 0 {
		// The newest is not complete: it waits as if the policy had been so before.
		size := active[v.Generation]
		delete(active, v.Generation)
		if before := latest(active); size > 0 && size < active[before] {
			v.Serving = before
			s.await(now, left)
		}
	}
	v.Ruled = now
	if what, _ := s.config.Waiting(now); what != maps.Settling {
		v.Settled = now // or, in half a year, it would seem to lie ahead
	}
	atomic.StoreUint32(&v.Policy, p.number())
	fault.Point("policy set")
	if err := s.recount(); err != nil {
		return err
	}
	var level []uint16
	for slot := range r.records {
		level = append(level, uint16(slot))
	}
	return s.redeal(now, level...)
}
