package loader

import (
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/maps"
)

// Whoever may write to the pins may write anything. What of that would lead user
// space astray, or make it change another group, is refused when state is opened.

// ownSizes are the maps whose size is the group's own.
var ownSizes = []string{bpf.SelectMapFlows, bpf.SelectMapDetails, bpf.SelectMapPicks, bpf.SelectMapPeers, bpf.SelectMapRows}

// programTypes are what is pinned by each name.
var programTypes = map[string]ebpf.ProgramType{
	programPin: ebpf.SkReuseport, "clock": ebpf.SocketFilter, replyPin: ebpf.CGroupSKB,
	"count": ebpf.Tracing, "opened": ebpf.Tracing, "adopt": ebpf.Tracing,
}

// maxLayout is a layout that no rpsel will ever come to.
const maxLayout = 1000

// fits reports whether the pinned maps are those of the specification.
func (p *pinned) fits(spec *ebpf.CollectionSpec) error {
	for name, m := range p.maps() {
		want := spec.Maps[name].Copy()
		if slices.Contains(ownSizes, name) {
			want.MaxEntries = (*m).MaxEntries()
		}
		if err := want.Compatible(*m); err != nil {
			return fmt.Errorf("%s: %w: %w", name, err, maps.ErrDamaged)
		}
	}
	return nil
}

// checkOwn reports whether the pinned programs are of the right types, and the pinned
// maps the program's, and not those of another group.
func (p *pinned) checkOwn() error {
	for name, program := range p.programs() {
		if is := (*program).Type(); is != programTypes[name] {
			return fmt.Errorf("%s is a program of type %v: %w", name, is, maps.ErrDamaged)
		}
	}
	info, err := p.RpselSelect.Info()
	if err != nil {
		return err
	}
	own, ok := info.MapIDs()
	if !ok {
		return nil // this kernel does not tell
	}
	for name, m := range p.maps() {
		switch {
		case *m == nil: // of a later layout
			continue
		case name == bpf.ConnsMapOwners, name == bpf.SelectMapListeners && p.layout == 1:
			continue // the program does not look at it
		}
		info, err := (*m).Info()
		if err != nil {
			return err
		}
		if id, ok := info.ID(); ok && !slices.Contains(own, id) {
			return fmt.Errorf("%s is another program's: %w", name, maps.ErrDamaged)
		}
	}
	return nil
}

// check reports what in the configuration cannot be.
func (p *pinned) check(v bpf.SelectConfig) error {
	mult, err := clockMult()
	if err != nil {
		return err
	}
	within := func(n, low, high uint32) bool { return n >= low && n <= high }
	idle := func(n uint32) bool { return within(n, 1, uint32(MaxIdle/time.Second)) }
	offset, length := AffinityBytes(int(v.Offset), int(v.Length)).bytes()
	for _, field := range []struct {
		name string
		ok   bool
	}{
		{"flows", within(v.Capacity, MinFlows, MaxFlows) && p.SelectMaps.Flows.MaxEntries() == maps.BucketsFor(int(v.Capacity)) &&
			p.Details.MaxEntries() == p.SelectMaps.Flows.MaxEntries()*maps.BucketSize},
		{"idle", idle(v.Idle) && idle(v.IdleNew)},
		{"policy", policyOf(v.Policy) != policyKept},
		{"affinity", v.Affinity <= maps.AffinityBytes && v.Prefix4 <= 32 && v.Prefix6 <= 128},
		{"bytes", v.Affinity != maps.AffinityBytes || length > 0 && offset == int(v.Offset)},
		{"confirm", v.Confirm <= maps.ConfirmReply},
		{"first", v.First <= maps.FirstOpenVPN},
		{"clock", v.ClockMult == mult},
	} {
		if !field.ok {
			return fmt.Errorf("config: %s: %w", field.name, maps.ErrDamaged)
		}
	}
	return nil
}

// readable reports whether what is read of the state as a whole can be.
func (s *state) readable() error {
	_, _, err := s.picks.Load()
	if err == nil {
		_, err = s.listeners.Records()
	}
	return err
}
