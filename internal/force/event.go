package force

import (
	"context"
	"os"
	"syscall"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/watch"
)

// Handler is told what a command does with its sockets. Its functions are
// called one after the other, by one goroutine, and none need be there. What
// the functions do not keep up with waits in a buffer of some 3600 events.
type Handler struct {
	// Start is called once, before all others.
	Start func()
	// Listening gets sockets that can be registered now: UDP sockets that are
	// bound, TCP sockets that listen. It gets all that have come up to then.
	Listening func([]watch.Event)
	// Binding gets each matching bind, before the kernel looks for a conflict,
	// if the settings ask for it. The error says which option could not be set;
	// the bind then fails with EPERM.
	Binding func(watch.Event, error)
}

// handle reads events until the context ends, and closes the reader.
func (h Handler) handle(ctx context.Context, r *ringbuf.Reader) error {
	defer context.AfterFunc(ctx, func() { r.Close() })()
	defer r.Close()
	if h.Start != nil {
		h.Start()
	}
	var listening []watch.Event
	return watch.Read(r, func(raw bpf.WatchEvent, last bool) {
		event := watch.EventOf(raw)
		switch {
		case raw.Binding == 0:
			listening = append(listening, event)
		case h.Binding != nil:
			h.Binding(event, optionError(raw))
		}
		if last && len(listening) > 0 {
			if h.Listening != nil {
				h.Listening(listening)
			}
			listening = nil
		}
	})
}

// optionError says which option could not be set.
func optionError(raw bpf.WatchEvent) error {
	if raw.Error == 0 {
		return nil
	}
	name := map[uint16]string{
		unix.SO_REUSEPORT:    "SO_REUSEPORT",
		unix.SO_REUSEADDR:    "SO_REUSEADDR",
		unix.SO_BINDTODEVICE: "SO_BINDTODEVICE",
	}[raw.Option]
	return os.NewSyscallError("setsockopt "+name, syscall.Errno(-raw.Error))
}
