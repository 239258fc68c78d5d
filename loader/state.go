package loader

import (
	"errors"
	"fmt"
	stdmaps "maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/maps"
)

// pinned is what a group's directory holds, of this layout or an older one.
type pinned struct {
	dir     os.FileInfo // the directory; its name may be another's by now
	layout  uint32
	replies bool // with a program that sees them
	counted bool // it has counting: TCP, from layout 2 on, where the kernel can
	bpf.SelectPrograms
	bpf.SelectMaps
	counting
}

// programs and maps name the file of each pin.
func (p *pinned) programs() map[string]**ebpf.Program {
	programs := map[string]**ebpf.Program{programPin: &p.RpselSelect, "clock": &p.RpselClock}
	if p.replies {
		programs[replyPin] = &p.RpselReply
	}
	if p.counted {
		programs["count"], programs["opened"], programs["adopt"] = &p.RpselCount, &p.RpselOpened, &p.RpselAdopt
	}
	return programs
}

func (p *pinned) maps() map[string]**ebpf.Map {
	m := &p.SelectMaps
	all := map[string]**ebpf.Map{
		bpf.SelectMapConfig: &m.Config, bpf.SelectMapCounters: &m.Counters,
		bpf.SelectMapDetails: &m.Details, bpf.SelectMapFlows: &m.Flows,
		bpf.SelectMapHouse: &m.House, bpf.SelectMapLoads: &m.Loads,
		bpf.SelectMapRows: &m.Rows, bpf.SelectMapTurns: &m.Turns,
		bpf.SelectMapListeners: &m.Listeners, bpf.SelectMapLive: &m.Live,
		bpf.SelectMapPicks: &m.Picks, bpf.SelectMapSlotCounters: &m.SlotCounters,
		bpf.SelectMapSlots: &m.Slots, bpf.SelectMapSocks: &m.Socks,
		bpf.SelectMapReader: &m.Reader, bpf.SelectMapReports: &m.Reports,
		bpf.SelectMapPeers: &m.Peers,
		bpf.SelectMapConns: &m.Conns, bpf.SelectMapMovedConns: &m.MovedConns,
	}
	if p.counted {
		all[bpf.ConnsMapOwners] = &p.Owners
	}
	return all
}

const programPin = "prog"

// laterMaps are those that layout 1 did not have.
var laterMaps = []string{bpf.SelectMapHouse, bpf.SelectMapLoads, bpf.SelectMapRows, bpf.SelectMapTurns,
	bpf.SelectMapReader, bpf.SelectMapReports, bpf.SelectMapPeers, bpf.SelectMapConns, bpf.SelectMapMovedConns}

// close gives back the descriptors.
func (p *pinned) close() error {
	return errors.Join(p.SelectPrograms.Close(), p.SelectMaps.Close(), p.counting.close())
}

// state is a group's program and maps, opened.
type state struct {
	pinned
	config    *maps.Config
	picks     *maps.Picks
	listeners *maps.Listeners
	sockets   *maps.Sockets
	counters  *maps.Counters
	loads     *maps.Loads
	rows      *maps.Rows
	links     map[uint64]*link.RawLink // to cgroups, as long as they are not pinned
	conns     *maps.Conns
	programID func() (uint32, error) // of RpselSelect; asked once, for the answer takes long
}

// close gives back memory and descriptors.
func (s *state) close() error {
	var errs []error
	for _, l := range s.links {
		errs = append(errs, l.Close())
	}
	return errors.Join(append(errs, s.unview(), s.pinned.close())...)
}

// unview gives back the memory.
func (s *state) unview() error {
	return errors.Join(s.picks.Close(), s.listeners.Close(), s.loads.Close(), s.rows.Close(), s.conns.Close(), s.config.Close())
}

// view maps what user space reads and writes, all of it or nothing.
func (s *state) view() (err error) {
	s.config, s.picks, s.listeners = &maps.Config{}, &maps.Picks{}, &maps.Listeners{}
	s.loads, s.rows, s.conns = &maps.Loads{}, &maps.Rows{}, &maps.Conns{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.unview())
		}
	}()
	s.sockets = maps.NewSockets(s.Socks)
	s.counters = maps.NewCounters(s.SlotCounters, s.SelectMaps.Counters)
	s.programID = sync.OnceValues(func() (uint32, error) {
		info, err := s.RpselSelect.Info()
		if err != nil {
			return 0, err
		}
		id, _ := info.ID()
		return uint32(id), nil
	})
	config, err := maps.OpenConfig(s.SelectMaps.Config)
	if err != nil {
		return err
	}
	s.config = config
	picks, err := maps.OpenPicks(s.SelectMaps.Picks, config)
	if err != nil {
		return err
	}
	s.picks = picks
	listeners, err := maps.OpenListeners(s.Slots, s.Live, s.SelectMaps.Listeners)
	if err != nil {
		return err
	}
	s.listeners = listeners
	loads, err := maps.OpenLoads(s.SelectMaps.Loads)
	if err != nil {
		return err
	}
	s.loads = loads
	rows, err := maps.OpenRows(s.SelectMaps.Rows)
	if err != nil {
		return err
	}
	s.rows = rows
	conns, err := maps.OpenConns(s.SelectMaps.Conns)
	if err != nil {
		return err
	}
	s.conns = conns
	return nil
}

// table maps the flow table, for as long as it is looked at: its memory counts as
// the process's, and an agent has many groups. The caller closes it.
func (p *pinned) table() (*maps.Flows, error) {
	return maps.OpenFlows(p.SelectMaps.Flows, p.Details)
}

// now reads the second of the program's clock.
func (p *pinned) now() (uint32, error) {
	// A socket filter is only run over a frame with an Ethernet header.
	second, _, err := p.RpselClock.Test(make([]byte, 64))
	if errors.Is(err, unix.EPERM) {
		// The library loads a program to find out whether programs can be run.
		return 0, capability.Denied("read the program's clock", capability.BPF)
	}
	if err != nil {
		return 0, fmt.Errorf("read the program's clock: %w", err)
	}
	return second, nil
}

// clockMult turns jiffies into seconds by a multiplication and a shift. The
// coarse clocks tick once a jiffy, so that their resolution tells CONFIG_HZ.
func clockMult() (uint32, error) {
	var tick unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick); err != nil {
		return 0, os.NewSyscallError("clock_getres", err)
	}
	hz := math.Round(1e9 / float64(tick.Nano()))
	return uint32((1 << 32) / hz), nil
}

// seconds rounds up: no flow is forgotten before its time.
func seconds(d time.Duration) uint32 { return uint32((d + time.Second - 1) / time.Second) }

// settledAt is the second in which a group has settled for d at least: the
// present one has begun already.
func settledAt(now uint32, d time.Duration) uint32 {
	if d == 0 {
		return now
	}
	return now + seconds(d) + 1
}

// constants are what is fixed when a program is loaded.
type constants struct {
	key                         Key
	flows, clockMult, pickPairs uint32
	fixed                       *bpf.SelectConfig // what it says of the affinity, of first packets and of confirmation
}

// setOwner changes the owner, if the options say so.
func (s *state) setOwner(o Options) {
	if o.Owner != nil {
		s.config.SetOwner(*o.Owner, *o.Owner != NoOwner)
	}
}

// HaveTimer reports whether the kernel has the timer by which a group's program
// keeps house (Linux 5.15). Without it the agent has to.
func HaveTimer() bool { return features.HaveProgramHelper(ebpf.SkReuseport, asm.FnTimerInit) == nil }

// timer is HaveTimer as the program wants to know it.
var timer = sync.OnceValue(func() uint32 {
	if HaveTimer() {
		return 1
	}
	return 0
})

// load loads a program, and maps of its own where keep has none. With TCP it counts
// connections from then on, each once, beside another one on the same maps.
func load(c constants, keep map[string]*ebpf.Map) (_ *state, err error) {
	spec, err := c.spec()
	if err != nil {
		return nil, err
	}
	s := &state{pinned: pinned{layout: maps.ABI, replies: confirmOf(c.fixed) == ConfirmReply}, links: map[uint64]*link.RawLink{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.pinned.close())
		}
	}()
	o := &ebpf.CollectionOptions{MapReplacements: keep}
	err = spec.LoadAndAssign(&struct {
		*bpf.SelectPrograms
		*bpf.SelectMaps
	}{&s.SelectPrograms, &s.SelectMaps}, o)
	if err != nil {
		return nil, bpf.Refused("the selection program", err)
	}
	if !s.replies {
		s.RpselReply.Close()
		s.RpselReply = nil
	}
	if c.key.Proto == TCP {
		if err := s.startCounting(c.key, keep); err != nil {
			return nil, err
		}
	}
	return s, s.view()
}

// maxPeers is how many clients' numbers are kept at most: of 96 bytes each, the least
// recently used give way.
const maxPeers = 1 << 16

// udpHeader is how many bytes come before the payload.
const udpHeader = 8

// spec describes the program and its maps.
func (c constants) spec() (*ebpf.CollectionSpec, error) {
	spec, err := specOf(c.key.Proto, loadSelect)
	if err != nil {
		return nil, err
	}
	if c.key.Proto == TCP {
		if err := spec.Variables[bpf.SelectVarTcp].Set(uint32(1)); err != nil {
			return nil, fmt.Errorf("set %s: %w", bpf.SelectVarTcp, err)
		}
	}
	buckets := maps.BucketsFor(int(c.flows))
	_, prefix := affinityOf(c.fixed)
	mask4, mask6 := prefix.masks()
	values := map[string]any{
		bpf.SelectVarBuckets:      buckets,
		bpf.SelectVarConfirm:      c.fixed.Confirm,
		bpf.SelectVarAffinity:     c.fixed.Affinity,
		bpf.SelectVarPrefix4:      mask4,
		bpf.SelectVarPrefix6:      mask6,
		bpf.SelectVarKeyOffset:    udpHeader + c.fixed.Offset,
		bpf.SelectVarKeyLength:    max(1, c.fixed.Length),
		bpf.SelectVarFirstPackets: c.fixed.First,
		bpf.SelectVarClockMult:    c.clockMult,
		bpf.SelectVarTimer:        timer(),
	}
	if confirmOf(c.fixed) == ConfirmReply {
		stdmaps.Copy(values, serverConstants(c.key))
	}
	for name, value := range values {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	spec.Maps[bpf.SelectMapFlows].MaxEntries = buckets
	spec.Maps[bpf.SelectMapDetails].MaxEntries = buckets * maps.BucketSize
	spec.Maps[bpf.SelectMapPicks].MaxEntries = c.pickPairs
	if c.fixed.First != maps.FirstAny {
		spec.Maps[bpf.SelectMapPeers].MaxEntries = min(c.flows, maxPeers)
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, err
	}
	spec.Maps[bpf.SelectMapRows].MaxEntries = uint32(cpus)
	return spec, nil
}

// specOf describes all maps that a group of a protocol has.
func specOf(proto Proto, load func() (*ebpf.CollectionSpec, error)) (*ebpf.CollectionSpec, error) {
	spec, err := load()
	if err != nil {
		return nil, err
	}
	if proto != TCP {
		spec.Maps[bpf.SelectMapConns].MaxEntries, spec.Maps[bpf.SelectMapMovedConns].MaxEntries = 1, 1
		return spec, nil
	}
	counting, err := bpf.LoadConns()
	if err != nil {
		return nil, err
	}
	spec.Maps[bpf.ConnsMapOwners] = counting.Maps[bpf.ConnsMapOwners]
	return spec, nil
}

// loadSelect is this binary's program. A test has another one.
var loadSelect = bpf.LoadSelect

// create loads a program with maps of its own for a group that has members
// members.
func create(key Key, members int, o Options) (_ *state, err error) {
	mult, err := clockMult()
	if err != nil {
		return nil, err
	}
	var config bpf.SelectConfig
	setAffinity(&config, key.Proto, o)
	config.First = o.First.number()
	config.Confirm = o.Confirm.number()
	s, err := load(constants{key, uint32(o.Flows), mult, maps.PickPairs(members), &config}, nil)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	now, err := s.now()
	if err != nil {
		return nil, err
	}
	c := s.config.Values()
	*c = config
	c.Abi = maps.ABI
	c.Policy = o.Policy.number()
	c.Capacity = uint32(o.Flows)
	c.Attached = now
	c.ClockMult = mult
	s.config.SetLimits(maps.Limits{New: seconds(o.IdleNew), Established: seconds(o.Idle)})
	s.setOwner(o)
	return s, s.settle(now, o.Settle)
}

// pinAside pins the state under a name that says nothing yet. It returns the
// directory.
func (fs FS) pinAside(key Key, s *state) (_ string, err error) {
	tmp := fs.aside(key)
	if err := os.Mkdir(tmp, dirMode); err != nil {
		return "", fmt.Errorf("make state: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	fault.Point("directory made aside")
	pin := func(name string, object interface{ Pin(string) error }) error {
		path := filepath.Join(tmp, name)
		err := object.Pin(path)
		if err == nil {
			err = os.Chmod(path, fileMode)
		}
		if err != nil {
			return fmt.Errorf("pin %s: %w", name, err)
		}
		fault.Point("pinned")
		return nil
	}
	for name, p := range s.programs() {
		if err := pin(name, *p); err != nil {
			return "", err
		}
	}
	for name, m := range s.maps() {
		if err := pin(name, *m); err != nil {
			return "", err
		}
	}
	for id, l := range s.links {
		if err := pinLink(l, filepath.Join(tmp, linkPin(id))); err != nil {
			return "", err
		}
		fault.Point("link pinned aside")
		delete(s.links, id)
		l.Close()
	}
	if s.counts != nil {
		if err := pin(countingPin, s.counts); err != nil {
			return "", err
		}
	}
	s.dir, err = os.Stat(tmp)
	return tmp, err
}

// publish pins the state aside and puts it in place by one rename, so that
// nobody ever sees half of it.
func (fs FS) publish(key Key, s *state) error {
	tmp, err := fs.pinAside(key, s)
	if err != nil {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, fs.groupDir(key), unix.RENAME_NOREPLACE); err != nil {
		return errors.Join(os.NewSyscallError("renameat2", err), os.RemoveAll(tmp))
	}
	fault.Point("state put in place")
	return nil
}

// open opens the state of a group. It needs no lock.
func (fs FS) open(key Key) (*state, error) {
	p, err := fs.pinned(key)
	if err != nil {
		return nil, err
	}
	s, err := p.state(key)
	if err != nil {
		p.close()
		return nil, err
	}
	return s, nil
}

// pinned opens what is pinned of a group, of this layout or an older one. It
// needs no lock: if the group is upgraded or detached meanwhile, and perhaps
// attached anew, it looks again.
func (fs FS) pinned(key Key) (*pinned, error) {
	if err := fs.dirs().Writable(); err != nil {
		return nil, err
	}
	for {
		dir, err := fs.inForce(key)
		if err != nil {
			return nil, err
		}
		before, err := os.Stat(dir)
		switch {
		case errors.Is(err, os.ErrPermission):
			return nil, fmt.Errorf("%s: %w: run as root", key, ErrPermission)
		case err != nil && dir != fs.groupDir(key):
			continue // it has been put in place
		case err != nil:
			return nil, fmt.Errorf("%s: %w: attach it first", key, ErrNotAttached)
		}
		p, err := openPins(key, dir)
		if after, statErr := os.Stat(dir); statErr == nil && os.SameFile(before, after) {
			if err != nil && dir != fs.groupDir(key) {
				// An upgrade that has just put its state in place removes the old one here.
				if now, lookErr := fs.inForce(key); lookErr == nil && now != dir {
					continue
				}
			}
			if p != nil {
				p.dir = before
			}
			return p, err
		}
		if err == nil {
			p.close()
		}
	}
}

// openPins opens what is pinned in a group's directory. The layout is looked at
// before anything else: what a newer one holds is not known.
func openPins(key Key, dir string) (_ *pinned, err error) {
	p := &pinned{}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.Config, err = ebpf.LoadPinnedMap(filepath.Join(dir, bpf.SelectMapConfig), nil); err != nil {
		return nil, openError(key, filepath.Join(dir, bpf.SelectMapConfig), err)
	}
	head, err := maps.OpenHead(p.Config)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %v: detach it", key, ErrIncompatible, err)
	}
	p.layout = head.Layout()
	head.Close()
	switch {
	case p.layout == 0 || p.layout > maxLayout:
		return nil, fmt.Errorf("%s: %w: it has no layout: %w", key, ErrIncompatible, maps.ErrDamaged)
	case p.layout > maps.ABI:
		return nil, fmt.Errorf("%s: %w (layout %d, this one speaks %d): use that one", key, ErrNewer, p.layout, maps.ABI)
	}
	_, missing := os.Stat(filepath.Join(dir, countingPin))
	p.counted = missing == nil
	for name, m := range p.maps() {
		if *m != nil || p.layout == 1 && slices.Contains(laterMaps, name) {
			continue
		}
		if *m, err = ebpf.LoadPinnedMap(filepath.Join(dir, name), nil); err != nil {
			return nil, openError(key, filepath.Join(dir, name), err)
		}
	}
	_, missing = os.Stat(filepath.Join(dir, replyPin))
	p.replies = missing == nil
	for name, program := range p.programs() {
		if *program, err = ebpf.LoadPinnedProgram(filepath.Join(dir, name), nil); err != nil {
			return nil, openError(key, filepath.Join(dir, name), err)
		}
	}
	if err := p.checkOwn(); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", key, ErrIncompatible, err)
	}
	return p, nil
}

// state makes what is pinned in the present layout usable. It takes p over,
// unless it fails.
func (p *pinned) state(key Key) (*state, error) {
	if p.layout != maps.ABI {
		return nil, fmt.Errorf("%s: %w (layout %d, this one speaks %d): \"rpsel upgrade\" brings it up to date", key, ErrOlder, p.layout, maps.ABI)
	}
	spec, err := specOf(key.Proto, bpf.LoadSelect)
	if err != nil {
		return nil, err
	}
	if err := p.fits(spec); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", key, ErrIncompatible, err)
	}
	s := &state{pinned: *p}
	if err := s.view(); err != nil {
		return nil, err
	}
	err = p.check(*s.config.Values())
	if err == nil {
		err = s.readable()
	}
	switch {
	case err != nil:
		err = fmt.Errorf("%s: %w: %w", key, ErrIncompatible, err)
	case confirmOf(s.config.Values()) == ConfirmReply && !s.replies:
		err = openError(key, replyPin, os.ErrNotExist)
	default:
		return s, nil
	}
	return nil, errors.Join(err, s.unview())
}

// openError says what it means that a pin could not be opened.
func openError(key Key, path string, err error) error {
	var errno unix.Errno
	name := filepath.Base(path)
	if info, statErr := os.Lstat(path); statErr == nil && info.IsDir() {
		err = errors.New("a directory") // the kernel speaks of permission
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s: %w: %s is missing: detach it and attach it again", key, ErrIncompatible, name)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s: open %s: %w: run as root", key, name, ErrPermission)
	case errors.As(err, &errno) && errno != unix.ENOTDIR && errno != unix.ELOOP:
		return fmt.Errorf("%s: open %s: %w", key, name, err)
	default: // it is something else
		return fmt.Errorf("%s: %w: open %s: %w: %w", key, ErrIncompatible, name, err, maps.ErrDamaged)
	}
}

// remove takes a group's directory away: out of sight first, by one rename.
func (fs FS) remove(key Key) error {
	tmp := fs.aside(key)
	if err := os.Rename(fs.groupDir(key), tmp); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	fault.Point("state out of sight")
	return os.RemoveAll(tmp)
}

// command turns a process's name into what a record holds, and back.
func packCommand(name string) (c [16]uint8) {
	copy(c[:len(c)-1], name)
	return c
}

func unpackCommand(c [16]uint8) string {
	name, _, _ := strings.Cut(string(c[:]), "\x00")
	return name
}
