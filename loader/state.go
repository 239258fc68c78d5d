package loader

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/maps"
)

// state is a group's program and maps, opened.
type state struct {
	bpf.SelectPrograms
	bpf.SelectMaps
	flows     *maps.Flows
	config    *maps.Config
	picks     *maps.Picks
	listeners *maps.Listeners
	sockets   *maps.Sockets
	counters  *maps.Counters
	programID func() (uint32, error) // of RpselSelect; asked once, for the answer takes long
}

// pins names the file of each map and program. It is the list of what a
// group's directory holds.
func (s *state) pins() map[string]pinner {
	return map[string]pinner{
		"prog":          s.RpselSelect,
		"clock":         s.RpselClock,
		"config":        s.Config,
		"counters":      s.Counters,
		"details":       s.Details,
		"flows":         s.Flows,
		"listeners":     s.Listeners,
		"live":          s.Live,
		"picks":         s.Picks,
		"slot_counters": s.SlotCounters,
		"slots":         s.Slots,
		"socks":         s.Socks,
	}
}

type pinner interface {
	Pin(path string) error
	Close() error
}

// close gives back memory and descriptors.
func (s *state) close() error {
	var errs []error
	for _, view := range []interface{ Close() error }{s.flows, s.picks, s.listeners, s.config} {
		errs = append(errs, view.Close())
	}
	return errors.Join(append(errs, s.SelectPrograms.Close(), s.SelectMaps.Close())...)
}

// view maps what user space reads and writes.
func (s *state) view() (err error) {
	s.flows, s.config, s.picks, s.listeners = &maps.Flows{}, &maps.Config{}, &maps.Picks{}, &maps.Listeners{}
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
	flows, err := maps.OpenFlows(s.SelectMaps.Flows, s.Details)
	if err != nil {
		return err
	}
	s.flows = flows
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
	return nil
}

// now reads the second of the program's clock.
func (s *state) now() (uint32, error) {
	// A socket filter is only run over a frame with an Ethernet header.
	second, _, err := s.RpselClock.Test(make([]byte, 64))
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

// setOwner changes the owner, if the options say so.
func (s *state) setOwner(o Options) {
	if o.Owner != nil {
		s.config.SetOwner(*o.Owner, *o.Owner != NoOwner)
	}
}

// create loads a program with maps of its own for a group that has members
// members.
func create(key Key, members int, o Options) (_ *state, err error) {
	spec, err := bpf.LoadSelect()
	if err != nil {
		return nil, err
	}
	mult, err := clockMult()
	if err != nil {
		return nil, err
	}
	affinity := uint32(maps.AffinityFlow)
	if key.Proto == TCP {
		// An accepted connection is sticky by itself.
		affinity = maps.AffinityNone
	}
	buckets := maps.BucketsFor(o.Flows)
	for name, value := range map[string]uint32{
		bpf.SelectVarBuckets:   buckets,
		bpf.SelectVarAffinity:  affinity,
		bpf.SelectVarClockMult: mult,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	spec.Maps[bpf.SelectMapFlows].MaxEntries = buckets
	spec.Maps[bpf.SelectMapDetails].MaxEntries = buckets * maps.BucketSize
	spec.Maps[bpf.SelectMapPicks].MaxEntries = maps.PickPairs(members)

	s := &state{}
	if err := spec.LoadAndAssign(&struct {
		*bpf.SelectPrograms
		*bpf.SelectMaps
	}{&s.SelectPrograms, &s.SelectMaps}, nil); err != nil {
		return nil, loadError(err)
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if err := s.view(); err != nil {
		return nil, err
	}
	now, err := s.now()
	if err != nil {
		return nil, err
	}
	c := s.config.Values()
	c.Abi = maps.ABI
	c.Policy = o.Policy.number()
	c.Affinity = affinity
	c.Confirm = maps.ConfirmClient
	c.Capacity = uint32(o.Flows)
	c.Attached = now
	c.ClockMult = mult
	s.config.SetLimits(maps.Limits{New: seconds(o.IdleNew), Established: seconds(o.Idle)})
	s.setOwner(o)
	return s, s.settle(now, o.Settle)
}

// loadError says what a refusal to load means. Without CAP_BPF the library
// speaks of MEMLOCK.
func loadError(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("load the selection program: %w: CAP_BPF is missing, run as root", ErrPermission)
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("load the selection program: %w: Linux 5.14 or later is needed: %w", ErrUnsupported, err)
	default:
		return fmt.Errorf("load the selection program: %w", err)
	}
}

// publish pins the state aside and puts it in place by one rename, so that
// nobody ever sees half of it.
func (fs FS) publish(key Key, s *state) error {
	tmp := fs.aside(key)
	if err := os.Mkdir(tmp, dirMode); err != nil {
		return fmt.Errorf("make state: %w", err)
	}
	fault.Point("directory made aside")
	for name, object := range s.pins() {
		path := filepath.Join(tmp, name)
		err := object.Pin(path)
		if err == nil {
			err = os.Chmod(path, fileMode)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("pin %s: %w", name, err), os.RemoveAll(tmp))
		}
		fault.Point("pinned")
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, fs.groupDir(key), unix.RENAME_NOREPLACE); err != nil {
		return errors.Join(os.NewSyscallError("renameat2", err), os.RemoveAll(tmp))
	}
	fault.Point("state put in place")
	return nil
}

// open opens the pinned state of a group. It needs no lock: if the group is
// detached meanwhile, and perhaps attached anew, it looks again.
func (fs FS) open(key Key) (*state, error) {
	if err := fs.writable(); err != nil {
		return nil, err
	}
	dir := fs.groupDir(key)
	for {
		before, err := os.Stat(dir)
		if err != nil {
			if errors.Is(err, os.ErrPermission) {
				return nil, fmt.Errorf("%s: %w: run as root", key, ErrPermission)
			}
			return nil, fmt.Errorf("%s: %w: attach it first", key, ErrNotAttached)
		}
		s, err := openPins(key, dir)
		if after, statErr := os.Stat(dir); statErr == nil && os.SameFile(before, after) {
			return s, err
		}
		if err == nil {
			s.close()
		}
	}
}

// openPins opens what is pinned in a group's directory.
func openPins(key Key, dir string) (_ *state, err error) {
	spec, err := bpf.LoadSelect()
	if err != nil {
		return nil, err
	}
	s := &state{flows: &maps.Flows{}, config: &maps.Config{}, picks: &maps.Picks{}, listeners: &maps.Listeners{}}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for name, m := range map[string]**ebpf.Map{
		bpf.SelectMapConfig: &s.SelectMaps.Config, bpf.SelectMapCounters: &s.SelectMaps.Counters,
		bpf.SelectMapDetails: &s.Details, bpf.SelectMapFlows: &s.SelectMaps.Flows,
		bpf.SelectMapListeners: &s.SelectMaps.Listeners, bpf.SelectMapLive: &s.Live,
		bpf.SelectMapPicks: &s.SelectMaps.Picks, bpf.SelectMapSlotCounters: &s.SlotCounters,
		bpf.SelectMapSlots: &s.Slots, bpf.SelectMapSocks: &s.Socks,
	} {
		if *m, err = ebpf.LoadPinnedMap(filepath.Join(dir, name), nil); err != nil {
			return nil, openError(key, name, err)
		}
		want := spec.Maps[name].Copy()
		want.MaxEntries = (*m).MaxEntries() // the sizes are the group's own
		if err := want.Compatible(*m); err != nil {
			return nil, fmt.Errorf("%s: %w: %s: %v: detach it with the rpsel that attached it", key, ErrIncompatible, name, err)
		}
	}
	for name, p := range map[string]**ebpf.Program{"prog": &s.RpselSelect, "clock": &s.RpselClock} {
		if *p, err = ebpf.LoadPinnedProgram(filepath.Join(dir, name), nil); err != nil {
			return nil, openError(key, name, err)
		}
	}
	if err := s.view(); err != nil {
		return nil, err
	}
	if abi := s.config.Values().Abi; abi != maps.ABI {
		return nil, fmt.Errorf("%s: %w: it has layout %d, this rpsel speaks %d: use the rpsel that attached it", key, ErrIncompatible, abi, maps.ABI)
	}
	if s.SelectMaps.Picks.MaxEntries() == 0 || uint64(s.Details.MaxEntries()) != uint64(s.SelectMaps.Flows.MaxEntries())*maps.BucketSize {
		return nil, fmt.Errorf("%s: %w: its maps do not fit each other: detach it", key, ErrIncompatible)
	}
	return s, nil
}

func openError(key Key, name string, err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s: %w: %s is missing: detach it and attach it again", key, ErrIncompatible, name)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s: open %s: %w: run as root", key, name, ErrPermission)
	default:
		return fmt.Errorf("%s: open %s: %w", key, name, err)
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
