package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/rpsel/rpsel/bpf"
)

// ReportKind is what happened to a flow (enum report_kind in bpf/rpsel.h).
type ReportKind uint8

// What the program reports.
const (
	ReportNew         ReportKind = iota + 1
	ReportEstablished            // confirmed
	ReportRehome                 // its listener died: it has another one
	ReportEvict                  // a new flow gave way to another one
	ReportExpire                 // it was silent for too long
)

// Report is what the program says of a flow.
type Report struct {
	Kind   ReportKind
	Client netip.AddrPort
	// At is a time of CLOCK_BOOTTIME.
	At time.Duration
	// Word is the flow's, as it is or was; Was that before it was rehomed.
	Word, Was Word
}

// readSeconds is how long the program believes that somebody reads
// (RPSEL_READ_SECONDS in bpf/rpsel.h).
const readSeconds = 5

// Reports reads what the program reports. At most one process may; who has one is
// the caller's business.
type Reports struct {
	reader mapped[bpf.SelectReader]
	outer  *ebpf.Map
	ring   *ebpf.Map
	reads  *ringbuf.Reader
	told   uint64 // of the dropped
	record ringbuf.Record
}

// OpenReports brings the program a ring for its reports, of so many bytes, in the place of one that a
// killed reader left. The program uses it from the first Renew on. The caller keeps
// the maps, and closes them after the Reports.
func OpenReports(reader, reports *ebpf.Map, size uint32) (_ *Reports, err error) {
	r := &Reports{outer: reports}
	if r.reader, err = mapArray[bpf.SelectReader](reader); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	if r.ring, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: size}); err != nil {
		return nil, fmt.Errorf("make a ring for reports: %w", err)
	}
	if r.reads, err = ringbuf.NewReader(r.ring); err != nil {
		return nil, fmt.Errorf("read reports: %w", err)
	}
	r.Stop() // a reader that was killed has not
	if err := reports.Put(uint32(0), r.ring); err != nil {
		return nil, fmt.Errorf("bring the program a ring: %w", err)
	}
	r.told = atomic.LoadUint64(&r.reader.values[0].Dropped)
	return r, nil
}

// Read reports whether somebody reads the program's reports.
func Read(reader *ebpf.Map, now uint32) (bool, error) {
	var v bpf.SelectReader
	if err := reader.Lookup(uint32(0), &v); err != nil {
		return false, fmt.Errorf("look for a reader: %w", err)
	}
	return isRead(v.Read, now), nil
}

func isRead(second, now uint32) bool {
	ago := Age(now, second)
	return second != 0 && ago < readSeconds && ago > -readSeconds
}

// Renew tells the program that somebody reads, for some seconds; it has to be
// called every second. It reports false if the program has been told too long ago,
// or never: then nothing was reported in between.
func (r *Reports) Renew(now uint32) (gapless bool) {
	// A second less, for what the program read of its clock before.
	before := atomic.SwapUint32(&r.reader.values[0].Read, now&secondMask|1<<31)
	return before != 0 && Age(now, before) < readSeconds-1
}

// Dropped returns how many reports found the ring full since the last call.
func (r *Reports) Dropped() uint64 {
	all := atomic.LoadUint64(&r.reader.values[0].Dropped)
	n := all - r.told
	r.told = all
	return n
}

// Next waits for a report, until the deadline: then it returns
// os.ErrDeadlineExceeded. It tells whether there is another one already.
func (r *Reports) Next(deadline time.Time) (report Report, more bool, err error) {
	r.reads.SetDeadline(deadline)
	if err := r.reads.ReadInto(&r.record); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return Report{}, false, os.ErrDeadlineExceeded
		}
		return Report{}, false, fmt.Errorf("read reports: %w", err)
	}
	var raw bpf.SelectReport
	if _, err := binary.Decode(r.record.RawSample, binary.NativeEndian, &raw); err != nil {
		return Report{}, false, fmt.Errorf("read reports: %w", err)
	}
	return Report{
		Kind:   ReportKind(raw.Kind),
		Client: clientOf(raw.Client[0], raw.Client[1], raw.Port),
		At:     time.Duration(raw.At),
		Word:   Word(raw.Word),
		Was:    Word(raw.Was),
	}, r.record.Remaining > 0, nil
}

// Stop tells the program that nobody reads. What it has reported can still be read.
func (r *Reports) Stop() { atomic.StoreUint32(&r.reader.values[0].Read, 0) }

// Close tells the program that nobody reads, and takes the ring away, unless that
// is another's by now: the next reader of a group that was upgraded may be faster.
func (r *Reports) Close() error {
	var errs []error
	if r.reads != nil {
		if r.inUse() {
			r.Stop()
			errs = append(errs, r.outer.Delete(uint32(0)))
		}
		errs = append(errs, r.reads.Close())
		r.reads = nil
	}
	return errors.Join(append(errs, r.ring.Close(), r.reader.Close())...)
}

// inUse reports whether the program has this ring.
func (r *Reports) inUse() bool {
	var id uint32
	info, err := r.ring.Info()
	if err != nil || r.outer.Lookup(uint32(0), &id) != nil {
		return false
	}
	own, ok := info.ID()
	return ok && uint32(own) == id
}
