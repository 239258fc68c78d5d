package loader

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/maps"
)

// recount counts the flows of each listener, with policy least. The program keeps
// the counts up from then on; what changes just now may be counted twice or not
// at all, until its next round.
func (s *state) recount() error {
	if s.policy() != maps.PolicyLeast || s.counted {
		return nil
	}
	table, err := s.table()
	if err != nil {
		return err
	}
	defer table.Close()
	var flows [maps.Slots]uint32
	for w := range table.Words(0, maps.Forever) {
		if w.SameIncarnation(s.listeners.Incarnation(w.Slot())) {
			flows[w.Slot()]++
		}
	}
	for slot, n := range flows {
		s.loads.Set(uint32(slot), n)
	}
	return nil
}

// leftUntracked tells a program that has not run yet that flows were left
// untracked in a second: by policies that do not go by the pick table those would
// move.
func (s *state) leftUntracked(second uint32) error {
	const noted = 1 << 31 // TICKED in bpf/select.c
	err := s.House.Update(uint32(0), bpf.SelectHouse{Full: second | noted}, ebpf.UpdateExist)
	if err != nil {
		return fmt.Errorf("note untracked flows: %w", err)
	}
	return nil
}

// seatRows looks whether the rows of CPUs are as they should be, with the policies
// that use them, and may make them so. It reports whether one was not.
func (s *state) seatRows(r *roll, weights map[uint16]uint32, store bool) (changed bool, err error) {
	row := func(int) maps.Table { return maps.RowOf(weights) }
	switch s.policy() {
	case maps.PolicyRR:
	case maps.PolicyCPU:
		all, err := readNodes()
		if err != nil {
			return false, err
		}
		on := running{}
		for slot, weight := range weights {
			if cpu, ok := lastCPU(r.records[uint32(slot)]); ok {
				if on[cpu] == nil {
					on[cpu] = map[uint16]uint32{}
				}
				on[cpu][slot] = weight
			}
		}
		row = func(cpu int) maps.Table {
			if here := on[cpu]; here != nil {
				return maps.RowOf(here)
			}
			return maps.RowOf(all.nearest(cpu, on))
		}
	default:
		return false, nil
	}
	for cpu := range s.rows.CPUs() {
		due := row(cpu)
		if slices.Equal(due, s.rows.Load(cpu)) {
			continue
		}
		changed = true
		if store {
			s.rows.Store(cpu, due)
		}
	}
	return changed, nil
}

// lastCPU reads on which CPU the process of a listener last ran
// (proc_pid_stat(5), field 39).
func lastCPU(l maps.Listener) (int, bool) {
	fields := statOf(int(l.Pid))
	if len(fields) <= 39-3 {
		return 0, false
	}
	cpu, err := strconv.Atoi(fields[39-3])
	return cpu, err == nil
}

// running is who ran on which CPU: weights by slot.
type running map[int]map[uint16]uint32

// node is a NUMA node.
type node struct {
	cpus     []int
	distance []int // to each, in the order of nodes
}

// who ran on its CPUs.
func (n node) who(on running) map[uint16]uint32 {
	there := map[uint16]uint32{}
	for _, cpu := range n.cpus {
		for slot, weight := range on[cpu] {
			there[slot] = weight
		}
	}
	return there
}

type nodes []node

// nearest returns the listeners on the nearest node that has any. On the only
// node that has some it is nobody: for all there is the group's own pick table.
func (all nodes) nearest(cpu int, on running) map[uint16]uint32 {
	own := slices.IndexFunc(all, func(n node) bool { return slices.Contains(n.cpus, cpu) })
	if own < 0 {
		return nil
	}
	var best map[uint16]uint32
	distance, serving := 0, 0
	for i, n := range all {
		there := n.who(on)
		if len(there) == 0 {
			continue
		}
		serving++
		if d := all[own].distance[i]; best == nil || d < distance {
			best, distance = there, d
		}
	}
	if serving < 2 {
		return nil
	}
	return best
}

const nodesDir = "/sys/devices/system/node"

// readNodes reads the machine's nodes; none, if the kernel has no NUMA.
func readNodes() (nodes, error) {
	online, err := os.ReadFile(filepath.Join(nodesDir, "online"))
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	numbers, err := parseList(string(online))
	if err != nil {
		return nil, fmt.Errorf("nodes online: %w", err)
	}
	var all nodes
	for _, number := range numbers {
		n, err := readNode(number)
		if err != nil {
			return nil, fmt.Errorf("node %d: %w", number, err)
		}
		all = append(all, n)
	}
	return all, nil
}

func readNode(number int) (n node, err error) {
	dir := filepath.Join(nodesDir, fmt.Sprintf("node%d", number))
	cpus, err := os.ReadFile(filepath.Join(dir, "cpulist"))
	if err != nil {
		return n, err
	}
	if n.cpus, err = parseList(string(cpus)); err != nil {
		return n, err
	}
	distances, err := os.ReadFile(filepath.Join(dir, "distance"))
	if err != nil {
		return n, err
	}
	for _, field := range strings.Fields(string(distances)) {
		d, err := strconv.Atoi(field)
		if err != nil {
			return n, err
		}
		n.distance = append(n.distance, d)
	}
	return n, nil
}

// parseList parses a list as the kernel writes it, like 0-3,8.
func parseList(text string) (numbers []int, err error) {
	if text = strings.TrimSpace(text); text == "" {
		return nil, nil // a node without CPUs
	}
	for part := range strings.SplitSeq(text, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.Atoi(first)
		if err != nil {
			return nil, err
		}
		to, err := strconv.Atoi(last)
		if err != nil {
			return nil, err
		}
		for n := from; n <= to; n++ {
			numbers = append(numbers, n)
		}
	}
	return numbers, nil
}
