package force

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/capability"
	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/sockets"
)

// Errors that callers may want to tell apart. All are wrapped with what they
// are about and the way out. Those of package cgroup come as well.
var (
	// ErrPermission: a capability is missing.
	ErrPermission = sockets.ErrPermission
	// ErrUnsupported: the kernel is too old for a setting.
	ErrUnsupported = sockets.ErrUnsupported
	// ErrNoUser: there is no such user.
	ErrNoUser = errors.New("no such user")
	// ErrNoDevice: there is no such network interface.
	ErrNoDevice = errors.New("no such network interface")
	// ErrNotFound: there is no such command.
	ErrNotFound = errors.New("command not found")
	// ErrNotExecutable: the command cannot be executed.
	ErrNotExecutable = errors.New("command cannot be executed")
)

// Switch says what is done to a socket option that is on or off. The zero value
// leaves it as the program has it.
type Switch uint8

// What can be done to an option.
const (
	Leave Switch = iota
	Off
	On
)

// String returns "leave", "off" or "on".
func (s Switch) String() string {
	switch s {
	case Leave:
		return "leave"
	case Off:
		return "off"
	case On:
		return "on"
	}
	return fmt.Sprintf("switch(%d)", uint8(s))
}

// UnmarshalText accepts "leave", "off" and "on".
func (s *Switch) UnmarshalText(text []byte) error {
	for _, known := range []Switch{Leave, Off, On} {
		if string(text) == known.String() {
			*s = known
			return nil
		}
	}
	return fmt.Errorf("%q: use on, off or leave", text)
}

// Settings say which binds are changed, and how. The zero value matches every
// bind of UDP and TCP to a specific port, and changes nothing.
//
// A bind to port 0 never matches.
type Settings struct {
	// Port is the local port that matches, 0 for every port.
	Port uint16
	// Addr is the address that matches, exactly: 0.0.0.0 and :: are the
	// wildcards only. ::ffff:192.0.2.1 and 192.0.2.1 are the same. The zero
	// Addr matches all.
	Addr netip.Addr
	// Proto is the protocol that matches, 0 for both.
	Proto sockets.Proto

	// Reuseport is for SO_REUSEPORT.
	Reuseport Switch
	// Reuseaddr is for SO_REUSEADDR. Other than Leave it needs Linux 6.1.
	Reuseaddr Switch
	// Device is the name of the network interface to bind to
	// (SO_BINDTODEVICE), "" for none.
	Device string

	// Trace asks for Handler.Binding.
	Trace bool
}

// String names the options that are forced, as setsockopt(2) users know them.
func (s Settings) String() string {
	var said []string
	if s.Device != "" {
		said = append(said, "SO_BINDTODEVICE "+s.Device)
	}
	for _, o := range []struct {
		name string
		to   Switch
	}{{"SO_REUSEADDR", s.Reuseaddr}, {"SO_REUSEPORT", s.Reuseport}} {
		if o.to != Leave {
			said = append(said, o.name+" "+o.to.String())
		}
	}
	if len(said) == 0 {
		return "nothing"
	}
	return strings.Join(said, ", ")
}

// check tells whether this machine can do it.
func (s Settings) check() error {
	kernel, err := features.LinuxVersionCode()
	if err != nil {
		return fmt.Errorf("kernel version: %w", err)
	}
	old, err := cgroup.OldControllers()
	if err != nil {
		return err
	}
	if err := s.supported(kernel, old); err != nil {
		return err
	}
	if s.Device == "" {
		return nil
	}
	// It may not be there any more, or in another namespace, when the program
	// binds; but a misspelt name is worth an error before it starts.
	if len(s.Device) >= unix.IFNAMSIZ {
		return fmt.Errorf("%q: %w: names have at most %d bytes", s.Device, ErrNoDevice, unix.IFNAMSIZ-1)
	}
	if _, err := net.InterfaceByName(s.Device); err != nil {
		return fmt.Errorf("%q: %w: ip link lists them", s.Device, ErrNoDevice)
	}
	return nil
}

// supported tells whether a kernel can do it.
func (s Settings) supported(kernel uint32, oldControllers bool) error {
	version := func(major, minor uint32) uint32 { return major<<16 | minor<<8 }
	switch {
	case kernel < version(5, 14):
		return fmt.Errorf("set socket options in bind(2): %w: Linux 5.14 or later is needed", ErrUnsupported)
	case kernel < version(5, 15) && oldControllers:
		return fmt.Errorf("cgroup programs beside the cgroup v1 controllers net_cls or net_prio: %w: unmount those, or use Linux 5.15 or later", ErrUnsupported)
	case s.Reuseaddr != Leave && kernel < version(6, 1):
		return fmt.Errorf("set SO_REUSEADDR in bind(2): %w: Linux 6.1 or later is needed", ErrUnsupported)
	}
	return nil
}

// load loads the programs. The caller closes them.
func (s Settings) load() (*bpf.BindObjects, error) {
	var objects bpf.BindObjects
	spec, err := s.spec()
	if err == nil {
		err = loadInto(spec, &objects)
	}
	if err != nil {
		return nil, err
	}
	return &objects, nil
}

// spec gives the programs the settings as their constants.
func (s Settings) spec() (*ebpf.CollectionSpec, error) {
	spec, err := bpf.LoadBind()
	if err != nil {
		return nil, fmt.Errorf("load bind programs: %w", err)
	}
	var device [unix.IFNAMSIZ]byte
	copy(device[:], s.Device)
	values := map[string]any{
		bpf.BindVarMatchPort:     s.Port,
		bpf.BindVarMatchProtocol: uint8(s.Proto),
		bpf.BindVarMatchAddr:     s.Addr.IsValid(),
		bpf.BindVarReuseport:     s.Reuseport.value(),
		bpf.BindVarReuseaddr:     s.Reuseaddr.value(),
		bpf.BindVarDevice:        device,
		bpf.BindVarTrace:         s.Trace,
	}
	if s.Addr.IsValid() {
		values[bpf.BindVarAddrToMatch] = s.Addr.As16()
	}
	for name, value := range values {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("load bind programs: %w", err)
		}
	}
	return spec, nil
}

// loadInto loads what the struct asks for.
func loadInto(spec *ebpf.CollectionSpec, objects any) error {
	if err := spec.LoadAndAssign(objects, nil); err != nil {
		return bpf.Refused("bind programs", err, capability.NetAdmin)
	}
	return nil
}

// value is what the programs know a Switch by.
func (s Switch) value() int32 { return int32(s) - 1 }

// programs lists what is attached. The fewer, the less other tools' programs
// can be in the way.
func (s Settings) programs(o *bpf.BindObjects) []cgroup.Program {
	all := []cgroup.Program{
		{Program: o.RpselBind4, Hook: ebpf.AttachCGroupInet4Bind},
		{Program: o.RpselBind6, Hook: ebpf.AttachCGroupInet6Bind},
	}
	if s.Proto != sockets.TCP {
		all = append(all,
			cgroup.Program{Program: o.RpselPostBind4, Hook: ebpf.AttachCGroupInet4PostBind},
			cgroup.Program{Program: o.RpselPostBind6, Hook: ebpf.AttachCGroupInet6PostBind})
	}
	if s.Proto != sockets.UDP {
		all = append(all, cgroup.Program{Program: o.RpselListen, Hook: ebpf.AttachCGroupSockOps})
	}
	return all
}
