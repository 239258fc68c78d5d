package maps

import (
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// MaxRow is the size of the longest row (RPSEL_ROW in bpf/rpsel.h).
const MaxRow = 256

// Rows say who comes next on each CPU, for PolicyRR and PolicyCPU.
type Rows struct {
	mapped[bpf.SelectRow]
}

// OpenRows maps the rows. The caller keeps the map and may close it.
func OpenRows(m *ebpf.Map) (*Rows, error) {
	memory, err := mapArray[bpf.SelectRow](m)
	if err != nil {
		return nil, err
	}
	return &Rows{memory}, nil
}

// CPUs is how many rows there are.
func (r *Rows) CPUs() int { return len(r.values) }

// pair is where two entries are, which a store changes together.
func (r *Rows) pair(cpu, k int) *uint32 {
	return (*uint32)(unsafe.Pointer(&r.values[cpu].Slots[2*k]))
}

// Load returns the row of a CPU.
func (r *Rows) Load(cpu int) Table {
	t := make(Table, 0, MaxRow)
	for k := range MaxRow / 2 {
		entries := atomic.LoadUint32(r.pair(cpu, k))
		t = append(t, (*[2]uint16)(unsafe.Pointer(&entries))[:]...)
	}
	return t[:min(atomic.LoadUint64(&r.values[cpu].Size), MaxRow)]
}

// Store replaces the row of a CPU, with at most MaxRow entries. Any mixture of the
// old one and the new one may be in force meanwhile.
func (r *Rows) Store(cpu int, t Table) {
	row := make(Table, MaxRow)
	for k := copy(row, t); k < MaxRow; k++ {
		row[k] = NoSlot
	}
	for k := range MaxRow / 2 {
		atomic.StoreUint32(r.pair(cpu, k), *(*uint32)(unsafe.Pointer(&row[2*k])))
	}
	atomic.StoreUint64(&r.values[cpu].Size, uint64(len(t)))
}

// RowOf is a row in which every slot comes as often as its weight says, as far as
// it fits, one after the other. It is empty if there are more than MaxRow slots.
func RowOf(weights map[uint16]uint32) Table {
	var total, divisor uint32
	for _, weight := range weights {
		total += weight
		for a := weight; a != 0; {
			divisor, a = a, divisor%a
		}
	}
	if total == 0 || len(weights) > MaxRow {
		return nil
	}
	row := make(Table, min(total/divisor, MaxRow))
	for k := range row {
		row[k] = NoSlot
	}
	row.Deal(weights)
	return row
}
