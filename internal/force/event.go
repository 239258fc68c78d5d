package force

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/sockets"
)

// Event is about one socket.
type Event struct {
	// Proto and Addr say what it is bound to, or is about to be.
	Proto sockets.Proto
	Addr  netip.AddrPort
	// Cookie identifies the socket until the next boot (SO_COOKIE). That of an
	// MPTCP socket is the one of the TCP socket below it.
	Cookie uint64
	// PID called bind(2). It is the process in the initial pid namespace.
	PID int
	// Command is the name of that process, up to 15 bytes.
	Command string
}

// String renders an event as people write it, such as
// "openvpn (pid 4711): udp 0.0.0.0:1194".
func (e Event) String() string {
	return fmt.Sprintf("%s (pid %d): %s %s", e.Command, e.PID, e.Proto, e.Addr)
}

// Handler is told what a command does with its sockets. Its functions are
// called one after the other, by one goroutine, and none need be there. What
// the functions do not keep up with waits in a buffer of some 3600 events.
type Handler struct {
	// Start is called once, before all others.
	Start func()
	// Listening gets sockets that can be registered now: UDP sockets that are
	// bound, TCP sockets that listen. It gets all that have come up to then.
	Listening func([]Event)
	// Binding gets each matching bind, before the kernel looks for a conflict,
	// if the settings ask for it. The error says which option could not be set;
	// the bind then fails with EPERM.
	Binding func(Event, error)
}

// handle reads events until the context ends, and closes the reader.
func (h Handler) handle(ctx context.Context, r *ringbuf.Reader) error {
	defer context.AfterFunc(ctx, func() { r.Close() })()
	defer r.Close()
	if h.Start != nil {
		h.Start()
	}
	var record ringbuf.Record
	var listening []Event
	for {
		err := r.ReadInto(&record)
		if errors.Is(err, ringbuf.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		var raw bpf.BindEvent
		if _, err := binary.Decode(record.RawSample, binary.NativeEndian, &raw); err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		event := eventOf(raw)
		switch {
		case raw.Binding == 0:
			listening = append(listening, event)
		case h.Binding != nil:
			h.Binding(event, optionError(raw))
		}
		if record.Remaining == 0 && len(listening) > 0 {
			if h.Listening != nil {
				h.Listening(listening)
			}
			listening = nil
		}
	}
}

func eventOf(raw bpf.BindEvent) Event {
	var addr [16]byte
	for i, word := range raw.Addr {
		binary.NativeEndian.PutUint32(addr[4*i:], word)
	}
	ip := netip.AddrFrom16(addr)
	if raw.Family == unix.AF_INET {
		ip = ip.Unmap()
	}
	command, _, _ := bytes.Cut(raw.Command[:], []byte{0})
	return Event{
		Proto:   sockets.Proto(raw.Protocol),
		Addr:    netip.AddrPortFrom(ip, raw.Port),
		Cookie:  raw.Cookie,
		PID:     int(raw.Pid),
		Command: string(command),
	}
}

// optionError says which option could not be set.
func optionError(raw bpf.BindEvent) error {
	if raw.Error == 0 {
		return nil
	}
	name := map[uint32]string{
		unix.SO_REUSEPORT:    "SO_REUSEPORT",
		unix.SO_REUSEADDR:    "SO_REUSEADDR",
		unix.SO_BINDTODEVICE: "SO_BINDTODEVICE",
	}[raw.Option]
	return os.NewSyscallError("setsockopt "+name, syscall.Errno(-raw.Error))
}
