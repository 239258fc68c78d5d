package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// LosePatience makes locks give up at once, until the returned function is
// called.
func LosePatience() (restore func()) {
	patience := lockPatience
	lockPatience = time.Nanosecond
	return func() { lockPatience = patience }
}

// Vacancy chooses a slot for a process that has none.
func Vacancy(records map[uint32]maps.Listener, now uint32) (uint32, error) {
	return vacancy(math.MaxUint64, process{}, &roll{records: records, running: map[process]bool{}}, now)
}

// SettleAfter makes a plan, runs change and settles by the plan. It returns the
// pick table as it is while the group settles.
func (g *Group) SettleAfter(conn syscall.Conn, change func()) (maps.Table, error) {
	p, err := makePlan(g.key, conn, g.state, Options{})
	if err != nil {
		return nil, err
	}
	change()
	err = g.settle(conn, p, Options{})
	settling, _, loadErr := g.state.picks.Load()
	return settling, errors.Join(err, loadErr)
}

// Freeze tells the program that a freeze began some seconds ago, or (negative)
// that there is none.
func (g *Group) Freeze(ago int) error {
	now, err := g.state.now()
	if err != nil {
		return err
	}
	frozen := &g.state.config.Values().Frozen
	if ago < 0 {
		atomic.StoreUint32(frozen, 0)
	} else {
		atomic.StoreUint32(frozen, (now-uint32(ago))&(1<<24-1)|1<<31)
	}
	return nil
}

// Joiner says to which generation a listener belongs whose process has none, when
// so many of the newest are alive and the last of them joined some seconds ago.
func Joiner(newest, members uint32, alive int, ago uint64) uint32 {
	return batch{newest, members, 1000}.admit(alive, 1000+ago)
}

// JoinedAgo makes the last member of the newest generation have joined some
// seconds ago.
func (g *Group) JoinedAgo(seconds uint64) error {
	boot, err := bootSecond()
	g.state.config.Values().Joined = boot - seconds
	return err
}

// DiedEarlier makes the dead listeners have died some seconds earlier.
func (g *Group) DiedEarlier(seconds uint32) error {
	records, err := g.state.listeners.Records()
	if err != nil {
		return err
	}
	for slot, record := range records {
		if record.Dead == 0 {
			continue
		}
		record.Died = (record.Died - seconds) & (1<<24 - 1)
		if err := g.state.listeners.Record(slot, record); err != nil {
			return err
		}
	}
	return nil
}

// WaitUntil makes the wait of a group that waits end in some seconds.
func (g *Group) WaitUntil(left uint32) error {
	now, err := g.state.now()
	atomic.StoreUint32(&g.state.config.Values().Until, (now+left)&(1<<24-1))
	return err
}

// AnotherProcess makes a slot's record that of an earlier process with that pid.
func (g *Group) AnotherProcess(slot uint32) error {
	records, err := g.state.listeners.Records()
	if err != nil {
		return err
	}
	record := records[slot]
	record.Started--
	return g.state.listeners.Record(slot, record)
}

// RecordWeight is as far as a SetWeight comes that is killed.
func (g *Group) RecordWeight(slot uint32, weight uint32) error {
	records, err := g.state.listeners.Records()
	if err != nil {
		return err
	}
	record := records[slot]
	record.Weight = weight | maps.Undealt
	return g.state.listeners.Record(slot, record)
}

// Fill marks entries of the flow table as flows in a state that were heard of a
// second ago, and are none of those that have been there.
func (g *Group) Fill(n int, state maps.State) error {
	memory, err := g.state.SelectMaps.Flows.Memory()
	if err != nil {
		return err
	}
	now, err := g.state.now()
	if err != nil {
		return err
	}
	taken, identity := map[uint32]bool{}, make([]byte, 8)
	for at := int64(0); at < int64(memory.Size()); at += 16 {
		if _, err := memory.ReadAt(identity, at); err != nil {
			return err
		}
		taken[maps.Word(binary.NativeEndian.Uint64(identity)).Tag()] = true
	}
	tag := uint32(0)
	for taken[tag] {
		tag++
	}
	word := binary.NativeEndian.AppendUint64(nil, uint64(maps.MakeWord(0, 0, state, now-1, tag)))
	for i := range n {
		if _, err := memory.WriteAt(word, int64(16*i+8)); err != nil {
			return err
		}
	}
	return nil
}

// SweepAll sweeps the whole flow table.
func (g *Group) SweepAll() error {
	now, err := g.state.now()
	if err != nil {
		return err
	}
	buckets := int(g.state.SelectMaps.Flows.MaxEntries())
	for range (buckets + sweepBuckets - 1) / sweepBuckets {
		if _, err := g.sweep(g.state, now); err != nil {
			return err
		}
	}
	return nil
}

// NoTracing makes attaching to tracepoints fail, until the returned function is
// called.
func NoTracing() (restore func()) {
	attachTracing = func(link.TracingOptions) (link.Link, error) { return nil, ebpf.ErrNotSupported }
	return func() { attachTracing = link.AttachTracing }
}

func init() {
	sweepPause = 0
	lockPatience = time.Minute // flock(2) is not fair, and a machine may be slow
}

// AfterSearch makes something happen once the sockets of all groups have been found,
// until the returned function is called.
func AfterSearch(f func()) (restore func()) {
	searchAll = func(q sockets.Query) ([]sockets.Group, error) {
		groups, err := sockets.Find(q)
		f()
		return groups, err
	}
	return func() { searchAll = sockets.Find }
}

// OtherProgram makes attaching load a program that differs from this binary's
// by an instruction that does nothing, until the returned function is called.
func OtherProgram() (restore func()) {
	loadSelect = func() (*ebpf.CollectionSpec, error) {
		spec, err := bpf.LoadSelect()
		if err != nil {
			return nil, err
		}
		program := spec.Programs[bpf.SelectProgRpselSelect]
		// After the first instruction, which no jump crosses, and which keeps r1.
		program.Instructions = slices.Insert(program.Instructions, 1, asm.Mov.Reg(asm.R1, asm.R1))
		return spec, nil
	}
	return func() { loadSelect = bpf.LoadSelect }
}

// Unreadable makes attaching load a program that cannot read the addresses of
// packets, until the returned function is called.
func Unreadable() (restore func()) {
	loadSelect = func() (*ebpf.CollectionSpec, error) {
		spec, err := bpf.LoadSelect()
		if err != nil {
			return nil, err
		}
		program := spec.Programs[bpf.SelectProgRpselSelect].Instructions
		for i, instruction := range program {
			if instruction.IsBuiltinCall() && asm.BuiltinFunc(instruction.Constant) == asm.FnSkbLoadBytesRelative {
				program[i] = asm.Mov.Imm(asm.R0, -14).WithMetadata(instruction.Metadata)
			}
		}
		return spec, nil
	}
	return func() { loadSelect = bpf.LoadSelect }
}

// NoRoom makes every flow find its buckets full, until the returned function is
// called.
func NoRoom() (restore func()) {
	place = func(*maps.Flows, maps.Entry) bool { return false }
	return func() { place = (*maps.Flows).Place }
}

// NoTimer makes attaching load a program as for a kernel without bpf_timer, until
// the returned function is called.
func NoTimer() (restore func()) {
	before := timer
	timer = func() uint32 { return 0 }
	return func() { timer = before }
}

// Entries is how many entries of the flow table are not empty, be they expired.
func (g *Group) Entries() (n int, err error) {
	now, err := g.state.now()
	if err != nil {
		return 0, err
	}
	flows, err := g.state.table()
	if err != nil {
		return 0, err
	}
	defer flows.Close()
	forever := maps.Limits{New: 1 << 22, Established: 1 << 22}
	for range flows.Words(now, forever) {
		n++
	}
	return n, nil
}

// Picked is how many entries of the pick table name a slot.
func (g *Group) Picked(slot int) (n int) {
	waiting, after, _ := g.state.picks.Load()
	for k := range after {
		if waiting[k] == uint16(slot) || after[k] == uint16(slot) {
			n++
		}
	}
	return n
}

// Live reports whether a slot is searched when the pick table has nobody.
func (g *Group) Live(slot int) bool {
	for rank := maps.RankNext; rank <= maps.RankDraining; rank++ {
		if g.state.listeners.HasRank(uint32(slot), rank) {
			return true
		}
	}
	return false
}

// Now is the second of the program's clock.
func (g *Group) Now() (uint32, error) { return g.state.now() }

// Kept reports whether the program keeps house.
func (g *Group) Kept() (bool, error) {
	now, err := g.state.now()
	if err != nil {
		return false, err
	}
	return g.state.kept(now)
}

// ProgramID is the number of the group's program.
func (g *Group) ProgramID() (uint32, error) { return g.state.programID() }

// SmallRing makes Watch have room for some 70 reports, until the returned function
// is called.
func SmallRing() (restore func()) {
	before := ringSize
	ringSize = 4096
	return func() { ringSize = before }
}

// Load is how many flows the program believes the listener in a slot to have.
func (g *Group) Load(slot int) int { return g.state.loads.Get(uint32(slot)) }

// SetLoad makes it believe so.
func (g *Group) SetLoad(slot int, flows uint32) { g.state.loads.Set(uint32(slot), flows) }

// Peer is a client known by its number.
type Peer struct {
	Slot      int
	Ambiguous bool // another listener has one with that number
	Heard     int  // how many seconds ago the word was written
}

// Peers lists them, by address and number.
func (g *Group) Peers() (map[string]Peer, error) {
	list := map[string]Peer{}
	now, err := g.state.now()
	if err != nil {
		return nil, err
	}
	err = g.eachPeer(func(p bpf.SelectPeer, w maps.Word) error {
		var addr [16]byte
		binary.NativeEndian.PutUint64(addr[:8], p.Client[0])
		binary.NativeEndian.PutUint64(addr[8:], p.Client[1])
		name := fmt.Sprintf("%s %d", netip.AddrFrom16(addr).Unmap(), p.Id)
		list[name] = Peer{int(w.Slot()), w.State() == 2, int(maps.Age(now, w.Second()))}
		return nil
	})
	return list, err
}

// AgePeers makes them have been heard of some seconds earlier.
func (g *Group) AgePeers(seconds uint32) error {
	return g.eachPeer(func(p bpf.SelectPeer, w maps.Word) error {
		const second = 0xffffff << 16
		aged := uint64(w)&^second | uint64(w.Second()-seconds)<<16&second
		return g.state.Peers.Update(p, aged, ebpf.UpdateExist)
	})
}

func (g *Group) eachPeer(f func(bpf.SelectPeer, maps.Word) error) error {
	var p bpf.SelectPeer
	var w uint64
	all := map[bpf.SelectPeer]maps.Word{}
	entries := g.state.Peers.Iterate()
	for entries.Next(&p, &w) {
		all[p] = maps.Word(w)
	}
	for p, w := range all {
		if err := f(p, w); err != nil {
			return err
		}
	}
	return entries.Err()
}

// ExpireAfter says for how many seconds new and established flows may be silent, and
// looks after nothing else.
func (g *Group) ExpireAfter(fresh, established uint32) {
	g.state.config.SetLimits(maps.Limits{New: fresh, Established: established})
}

// HadRoom makes the program forget that flows found no room.
func (g *Group) HadRoom() error {
	return g.state.House.Update(uint32(0), bpf.SelectHouse{}, ebpf.UpdateExist)
}

// FoundNoRoom makes the program believe that some seconds ago a flow found no room.
func (g *Group) FoundNoRoom(ago uint32) error {
	now, err := g.state.now()
	if err != nil {
		return err
	}
	return g.state.House.Update(uint32(0), bpf.SelectHouse{Full: (now-ago)&(1<<24-1) | 1<<31}, ebpf.UpdateExist)
}

// AttachedAgo makes the attach, or the last change of the policy, have been some
// seconds ago, if that was just now.
func (g *Group) AttachedAgo(seconds uint32) {
	v := g.state.config.Values()
	for _, second := range []*uint32{&v.Attached, &v.Ruled, &v.Settled} {
		*second = (*second - seconds) & (1<<24 - 1)
	}
}

// Look looks for what is to be repaired, as who has read the state before another
// process changed it.
func (g *Group) Look() error {
	now, err := g.state.now()
	if err == nil {
		_, err = g.look(now)
	}
	return err
}

// NoLink looks at a link that is not there.
func (fs FS) NoLink(key Key) error {
	return fs.withLink(key, 1, func(link.Link) error { return errors.New("there is one") })
}

// SameCgroup makes the listener in a slot one of the cgroup of another's.
func (g *Group) SameCgroup(slot, other uint32) error {
	records, err := g.state.listeners.Records()
	if err != nil {
		return err
	}
	record := records[slot]
	record.Cgroup = records[other].Cgroup
	return g.state.listeners.Record(slot, record)
}

// ReplyID is the number of the program that sees the replies.
func (g *Group) ReplyID() (uint32, error) {
	info, err := g.state.RpselReply.Info()
	if err != nil {
		return 0, err
	}
	id, _ := info.ID()
	return uint32(id), nil
}

// Counted is how many connections the program believes the listener in a slot to
// have open.
func (g *Group) Counted(slot int) int { return g.state.conns.Open(uint32(slot)) }

// Miscount makes it believe so.
func (g *Group) Miscount(slot, open int) {
	was := g.state.conns.Count(uint32(slot))
	g.state.conns.Correct(was, g.state.owner(uint32(slot)), open)
}

// Overlook makes it believe that a connection of the slot has not begun.
func (g *Group) Overlook(slot int, conn syscall.Conn) error {
	g.Miscount(slot, g.Counted(slot)-1)
	return control(conn, func(fd int) error { return g.state.own(fd, uint32(slot)) })
}

// Unseat leaves a slot as a registration does that the kernel refuses.
func (g *Group) Unseat(slot uint32) error {
	g.state.listeners.SetState(slot, maps.SlotFree)
	return g.state.listeners.Unrecord(slot)
}
