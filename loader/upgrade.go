package loader

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// UpgradeOptions say what an upgrade is to change besides. The zero value is
// nothing.
type UpgradeOptions struct {
	// Flows is how many flows the table holds from then on, MinFlows to
	// MaxFlows. Zero leaves it as it is.
	Flows int
	// DryRun checks all, and changes nothing.
	DryRun bool
}

// Upgraded is what an Upgrade did, or would do.
type Upgraded struct {
	Key Key
	// UpToDate tells that there was nothing to do.
	UpToDate bool
	// Program tells that the group's running program is replaced. One that has
	// no socket left, or another program, gets only its state upgraded.
	Program bool
	// The layouts and sizes of the flow table, before and after.
	FromLayout, Layout     int
	FromCapacity, Capacity int
	// Flows is how many flows are tracked.
	Flows int
	// Made names the maps that are made anew; the others are those in use.
	Made []string
}

// Upgrade puts this binary's program, and its layout of the state, in the place
// of an attached group's. At no time is the group without a program, and no
// tracked flow moves. The socket array and the slots stay, as does every map
// whose layout and size are right: old and new program share them.
//
// If the flow table is made anew, flows that come while it is copied are served
// by the pick table, and tracked from their next packet on: if a listener joins
// or leaves before that, they may move, as any new flow may.
//
// Either all is done or nothing, also if the process is killed: what is left to
// do then is done by the next command.
//
// Errors: ErrNotAttached, ErrNewer, ErrIncompatible, ErrTooSmall, ErrLocked,
// ErrPermission, ErrUnsupported, ErrNoBPFFS, sockets.ErrUnseen, sockets.ErrGone.
func (fs FS) Upgrade(key Key, o UpgradeOptions) (Upgraded, error) {
	u := Upgraded{Key: key}
	if o.Flows != 0 && (o.Flows < MinFlows || o.Flows > MaxFlows) {
		return u, fmt.Errorf("flows %d: use %d to %d", o.Flows, MinFlows, MaxFlows)
	}
	if !o.DryRun {
		l, err := fs.lockGroup(key)
		if err != nil {
			return u, fmt.Errorf("upgrade %w", err)
		}
		defer l.Unlock()
	}
	old, err := fs.pinned(key)
	if err != nil {
		return u, err
	}
	defer old.close()
	if err := fs.upgrade(&u, old, o); err != nil {
		return u, fmt.Errorf("upgrade %s: %w", key, err)
	}
	return u, nil
}

// upgrade does it, with the lock held, and tells in u what it did.
func (fs FS) upgrade(u *Upgraded, old *pinned, o UpgradeOptions) (err error) {
	config, err := old.values()
	if err != nil {
		return err
	}
	if err := old.check(config); err != nil {
		return fmt.Errorf("%w: %w", ErrIncompatible, err)
	}
	u.FromLayout, u.Layout = int(old.layout), maps.ABI
	u.FromCapacity, u.Capacity = int(config.Capacity), int(config.Capacity)
	if o.Flows != 0 {
		u.Capacity = o.Flows
	}
	if u.Flows, err = old.countFlows(); err != nil {
		return err
	}
	if u.Capacity != u.FromCapacity && u.Flows > u.Capacity {
		return fmt.Errorf("flows %d: %w: %d are tracked: use at least as many", u.Capacity, ErrTooSmall, u.Flows)
	}
	s, made, err := old.successor(u.Key, config, u.Capacity)
	if err != nil {
		return err
	}
	defer s.close()
	u.Made = made
	same, err := samePrograms(old, &s.pinned)
	if err != nil {
		return err
	}
	if u.UpToDate = same && len(made) == 0; u.UpToDate {
		return nil
	}
	if old.counted && !s.counted {
		return fmt.Errorf("%w: its connections could not be counted any more", ErrUnsupported)
	}
	live, err := liveGroup(u.Key)
	if err != nil {
		return err
	}
	if live.Kernel == 0 {
		n, err := maps.NewSockets(old.Socks).Count()
		if err == nil && n > 0 {
			err = sockets.ErrUnseen
		}
		if err != nil {
			return err
		}
	}
	u.Program = live.HasProgram && ours(live.Program, old.RpselSelect)
	if o.DryRun {
		return nil
	}

	if s.counted && !old.counted {
		if err := s.ownAll(live); err != nil {
			return err
		}
		if err := s.adopt(u.Key, 0); err != nil {
			return err
		}
	}
	tmp, err := fs.pinAside(u.Key, s)
	if err != nil {
		return err
	}
	if err := fs.keepLinks(u.Key, tmp); err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	// From the attach on there is no way back: what is aside is in force.
	committed := false
	defer func() {
		if !committed {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	if slices.Contains(made, bpf.SelectMapFlows) {
		f, err := old.freeze()
		if err != nil {
			return err
		}
		defer func() { // the new program's configuration has never been frozen
			if !committed {
				f.head.Thaw()
			}
			f.close()
		}()
		if u.Flows, err = f.copyFlows(s); err != nil {
			return err
		}
		if err := s.leftUntracked(f.since); err != nil {
			return err
		}
		if err := s.recount(); err != nil {
			return err
		}
	}
	if u.Program {
		if err := through(live, func(conn syscall.Conn) error { return attachProgram(conn, s.RpselSelect) }); err != nil {
			return err
		}
		committed = true
		fault.Point("program attached")
	}
	if err := fs.exchange(u.Key, tmp); err != nil {
		return err
	}
	committed = true
	fault.Point("states exchanged")
	_, err = fs.tend(u.Key, s)
	return errors.Join(err, os.RemoveAll(tmp))
}

// values reads the configuration as one of the present layout.
func (p *pinned) values() (bpf.SelectConfig, error) {
	if p.layout == 1 {
		return maps.ReadConfig1(p.Config)
	}
	config, err := maps.OpenConfig(p.Config)
	if err != nil {
		return bpf.SelectConfig{}, err
	}
	defer config.Close()
	return *config.Values(), nil
}

// successor loads this binary's program on the maps of an older state, and makes
// those anew that have another layout or size, with what they held; but for the
// flows. It returns their names. Nothing of the older state changes. The map of
// the timer is each program's own.
func (p *pinned) successor(key Key, config bpf.SelectConfig, capacity int) (_ *state, made []string, err error) {
	c := constants{key, uint32(capacity), config.ClockMult, p.Picks.MaxEntries(), &config}
	spec, err := c.spec()
	if err != nil {
		return nil, nil, err
	}
	var anew []string
	if p.layout == 1 {
		anew = append(anew, bpf.SelectMapConfig, bpf.SelectMapLive, bpf.SelectMapListeners)
		anew = append(anew, laterMaps...)
	}
	if capacity != int(config.Capacity) {
		anew = append(anew, bpf.SelectMapConfig, bpf.SelectMapFlows, bpf.SelectMapDetails)
		if p.Peers != nil && p.Peers.MaxEntries() != spec.Maps[bpf.SelectMapPeers].MaxEntries {
			// What it held comes back with each client's next data packet or so.
			anew = append(anew, bpf.SelectMapPeers)
		}
	}
	keep := map[string]*ebpf.Map{}
	for name, m := range p.maps() {
		if name == bpf.SelectMapHouse {
			continue
		}
		if slices.Contains(anew, name) {
			made = append(made, name)
			continue
		}
		if err := spec.Maps[name].Compatible(*m); err != nil {
			return nil, nil, fmt.Errorf("%w: %s: %v: detach it", ErrIncompatible, name, err)
		}
		keep[name] = *m
	}
	slices.Sort(made)
	s, err := load(c, keep)
	if err != nil {
		return nil, nil, err
	}
	if slices.Contains(made, bpf.SelectMapConfig) {
		config.Abi, config.Frozen, config.Capacity = maps.ABI, 0, uint32(capacity)
		*s.config.Values() = config
	}
	if p.layout == 1 {
		var active int
		active, err = s.listeners.Read1(p.Live, p.SelectMaps.Listeners)
		s.config.Values().Members = uint32(active)
	}
	if err != nil {
		s.close()
		return nil, nil, err
	}
	return s, made, nil
}

// samePrograms compares programs by the kernel's digest of their instructions,
// which the maps and constants are no part of.
func samePrograms(a, b *pinned) (bool, error) {
	others := b.programs()
	if len(a.programs()) != len(others) {
		return false, nil
	}
	for name, program := range a.programs() {
		one, err := (*program).Info()
		if err != nil {
			return false, err
		}
		other, err := (*others[name]).Info()
		if err != nil {
			return false, err
		}
		if one.Tag != other.Tag {
			return false, nil
		}
	}
	return true, nil
}

// freeze keeps a program from writing to its flow table while that is copied.
type freeze struct {
	old   *pinned
	head  *maps.Head
	since uint32
}

// freeze begins. The caller thaws what it freezes, and closes it.
func (p *pinned) freeze() (_ *freeze, err error) {
	f := &freeze{old: p}
	if f.head, err = maps.OpenHead(p.Config); err != nil {
		return nil, err
	}
	if f.since, err = p.now(); err != nil {
		return nil, errors.Join(err, f.close())
	}
	f.head.Freeze(f.since)
	fault.Point("flows frozen")
	if err := gracePeriod(); err != nil {
		f.head.Thaw()
		return nil, errors.Join(err, f.close())
	}
	fault.Point("grace period over")
	return f, nil
}

func (f *freeze) close() error { return f.head.Close() }

// renew makes the freeze last for FreezeSeconds from now on. It fails if it has
// ended meanwhile: a process may be stopped for any time.
func (f *freeze) renew() error {
	now, err := f.old.now()
	if err != nil {
		return err
	}
	if maps.Age(now, f.since) >= maps.FreezeSeconds {
		return fmt.Errorf("copying the flows was interrupted for %d seconds: try again", maps.FreezeSeconds)
	}
	f.since = now
	f.head.Freeze(now)
	return nil
}

// renewEvery is after how many flows a freeze is renewed: some milliseconds.
const renewEvery = 1 << 16

// copyFlows copies all flows that have not expired, and returns how many.
func (f *freeze) copyFlows(to *state) (n int, err error) {
	from, err := f.old.table()
	if err != nil {
		return 0, err
	}
	defer from.Close()
	into, err := to.table()
	if err != nil {
		return 0, err
	}
	defer into.Close()
	homeless := 0
	for e := range from.All(f.since, to.config.Limits()) {
		if n%renewEvery == 0 {
			if err := f.renew(); err != nil {
				return 0, err
			}
		}
		n++
		if !place(into, e) {
			homeless++
		}
	}
	if homeless > 0 {
		return 0, fmt.Errorf("flows %d: %w: %d of %d flows find their buckets full: use more", to.config.Values().Capacity, ErrTooSmall, homeless, n)
	}
	fault.Point("flows copied")
	return n, f.renew()
}

// place is how a flow is put into its new table. A test has another way.
var place = (*maps.Flows).Place

// gracePeriod returns when every run of a program that is under way has ended.
// That is what the kernel waits for when a map of maps is changed
// (maybe_wait_bpf_programs in kernel/bpf/syscall.c); membarrier(2) waits for it
// too, but not on machines with nohz_full (kernel/sched/membarrier.c).
func gracePeriod() error {
	inner := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	m, err := ebpf.NewMap(inner)
	if err != nil {
		return fmt.Errorf("wait for the program: %w", err)
	}
	defer m.Close()
	outer, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 1, InnerMap: inner})
	if err != nil {
		return fmt.Errorf("wait for the program: %w", err)
	}
	defer outer.Close()
	if err := outer.Put(uint32(0), m); err != nil {
		return fmt.Errorf("wait for the program: %w", err)
	}
	return nil
}
