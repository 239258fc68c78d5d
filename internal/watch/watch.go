package watch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/sockets"
)

// Port is where listeners are expected.
type Port struct {
	Proto sockets.Proto
	Port  uint16
}

// key is what the programs know a Port by.
func (p Port) key() uint32 { return uint32(p.Proto)<<16 | uint32(p.Port) }

// Watcher is what Open attached. Its methods may be called concurrently, but
// none but Close after Close, and Run and Sync once at a time.
type Watcher struct {
	objects bpf.WatchObjects
	links   io.Closer
	closing context.Context
	close   context.CancelFunc
	running sync.Mutex // held by Run

	mu     sync.Mutex
	ports  map[Port]bool   // what the programs report
	reader *ringbuf.Reader // of Run; nil: it does not run
	synced chan struct{}   // closed and nil again when Run has come up with Sync
}

// Open attaches the programs to the cgroup at a path, or to the highest one
// that can be seen (""). They watch no port yet. The kernel takes them off with
// the Watcher, or when the process ends in whatever way. The caller closes it.
//
// Errors: sockets.ErrPermission, sockets.ErrUnsupported, and of package cgroup
// ErrNoCgroup2, ErrOutside, ErrNotCgroup2, ErrBeside ("" only: there is a process
// whose listeners would not be seen), and ErrOccupied, which names the program of
// another tool that leaves no place for ours.
//
// Where the cgroup v1 controllers net_cls or net_prio are in use, Linux before
// 5.15 takes all sockets for the root's (see cgroup.OldControllers).
func Open(cgroupDir string) (*Watcher, error) {
	if cgroupDir == "" {
		root, err := cgroup.Root()
		if err != nil {
			return nil, fmt.Errorf("watch: %w", err)
		}
		if err := cgroup.Everybody(root); err != nil {
			return nil, fmt.Errorf("watch: %w", err)
		}
		cgroupDir = root
	}
	dir, err := cgroup.Open(cgroupDir)
	if err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	defer dir.Close()
	w := &Watcher{ports: map[Port]bool{}}
	w.closing, w.close = context.WithCancel(context.Background())
	if err := bpf.LoadWatchObjects(&w.objects, nil); err != nil {
		return nil, bpf.Refused("watch programs", err, capability.NetAdmin)
	}
	w.links, err = dir.Link([]cgroup.Program{
		{Program: w.objects.RpselWatch4, Hook: ebpf.AttachCGroupInet4PostBind},
		{Program: w.objects.RpselWatch6, Hook: ebpf.AttachCGroupInet6PostBind},
		{Program: w.objects.RpselWatchListen, Hook: ebpf.AttachCGroupSockOps},
	})
	if err != nil {
		w.objects.Close()
		return nil, fmt.Errorf("watch: %w", err)
	}
	return w, nil
}

// SetPorts says which listeners are reported, instead of what was said before.
// Nothing is missed on a port that is in both.
func (w *Watcher) SetPorts(ports []Port) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	wanted := make(map[Port]bool, len(ports))
	for _, p := range ports {
		wanted[p] = true
		if w.ports[p] {
			continue
		}
		if err := w.objects.Ports.Put(p.key(), uint8(1)); err != nil {
			return fmt.Errorf("watch %s %d: %w", p.Proto, p.Port, err)
		}
		w.ports[p] = true
	}
	for p := range w.ports {
		if wanted[p] {
			continue
		}
		if err := w.objects.Ports.Delete(p.key()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("watch %s %d no longer: %w", p.Proto, p.Port, err)
		}
		delete(w.ports, p)
	}
	return nil
}

// Run gives f all events that have come up to then, again and again, until the
// context ends or Close is called; neither is an error. It calls f from one
// goroutine. What f does not keep up with waits in a buffer of some 3600 events,
// also between two Runs.
func (w *Watcher) Run(ctx context.Context, f func([]Event)) error {
	w.running.Lock()
	defer w.running.Unlock()
	r, err := ringbuf.NewReader(w.objects.Events)
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	defer r.Close()
	defer context.AfterFunc(ctx, func() { r.Close() })()
	defer context.AfterFunc(w.closing, func() { r.Close() })()
	w.mu.Lock()
	w.reader = r
	w.mu.Unlock()
	defer w.up(nil)

	var events []Event
	for {
		err := Read(r, func(raw bpf.WatchEvent, last bool) {
			events = append(events, EventOf(raw))
			if last {
				f(events)
				events = nil
			}
		})
		if !errors.Is(err, ringbuf.ErrFlushed) {
			return err
		}
		w.up(r)
	}
}

// up tells Sync that all is given, and notes who reads from now on.
func (w *Watcher) up(r *ringbuf.Reader) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reader = r
	if w.synced != nil {
		close(w.synced)
		w.synced = nil
	}
}

// Sync returns when Run has given all events of listeners that were there when it
// was called, or does not run.
func (w *Watcher) Sync() {
	w.mu.Lock()
	if w.reader == nil || w.reader.Flush() != nil {
		w.mu.Unlock()
		return
	}
	synced := make(chan struct{})
	w.synced = synced
	w.mu.Unlock()
	<-synced
}

// Read gives f what the programs report (bpf/event.h), until the reader is
// closed. The last is the last that has come up to then.
func Read(r *ringbuf.Reader, f func(raw bpf.WatchEvent, last bool)) error {
	var record ringbuf.Record
	for {
		err := r.ReadInto(&record)
		if errors.Is(err, ringbuf.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		var raw bpf.WatchEvent
		if _, err := binary.Decode(record.RawSample, binary.NativeEndian, &raw); err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		f(raw, record.Remaining == 0)
	}
}

// Missed is how many events were dropped since Open because the buffer was full.
func (w *Watcher) Missed() (uint64, error) {
	var perCPU []uint64
	if err := w.objects.Missed.Lookup(uint32(0), &perCPU); err != nil {
		return 0, fmt.Errorf("read missed events: %w", err)
	}
	var sum uint64
	for _, n := range perCPU {
		sum += n
	}
	return sum, nil
}

// Close takes the programs off, and waits for Run to end. Only the first call
// does something.
func (w *Watcher) Close() error {
	w.close()
	w.running.Lock()
	defer w.running.Unlock()
	return errors.Join(w.links.Close(), w.objects.Close())
}
