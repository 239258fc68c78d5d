package force

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/internal/statedir"
	"github.com/rpsel/rpsel/loader"
)

// asidePrefix starts the names of directories that are being made.
const asidePrefix = "tmp_"

// pinned are bind programs that wait on a bpffs for whoever attaches them.
// Nothing of theirs reports: nobody would read it.
type pinned struct {
	Bind4 *ebpf.Program `ebpf:"rpsel_bind4"`
	Bind6 *ebpf.Program `ebpf:"rpsel_bind6"`
	// Settings are the constants of both.
	Settings *ebpf.Map `ebpf:".rodata"`
}

// bindDir is where bind programs are pinned, beside the directories of the network
// namespaces, which have numbers.
func bindDir(fs loader.FS) string { return filepath.Join(statedir.FS(fs).Root(), "bind") }

// PinDir is the directory of the programs for the settings' protocol, port and
// address: PROTO_PORT, or PROTO_PORT_ADDR with the address in hexadecimal.
func PinDir(fs loader.FS, s Settings) string {
	name := fmt.Sprintf("%s_%d", s.Proto, s.Port)
	if s.Addr.IsValid() {
		name += "_" + hex.EncodeToString(s.Addr.Unmap().AsSlice())
	}
	return filepath.Join(bindDir(fs), name)
}

// Pin loads programs that force the settings, and pins them as bind4 and bind6
// in PinDir, for a systemd unit's
//
//	BPFProgram=bind4:/sys/fs/bpf/rpsel/bind/udp_1194/bind4
//
// systemd attaches them to the cgroup of the unit by BPF_PROG_ATTACH with
// BPF_F_ALLOW_MULTI, beside those of other tools (src/core/bpf-foreign.c), and
// does so whether or not a process of rpsel is alive by then. The settings need
// a protocol and a port; Trace has no effect.
//
// Programs that are there already and do the same stay, and with them what
// units are attached to; changed is false. Others are replaced one by one: a
// path that leads to a program always does. A unit that has the old one keeps
// it until it starts anew. Only one process may pin and unpin at a time.
//
// Errors: ErrNoDevice, ErrUnsupported, ErrPermission, loader.ErrNoBPFFS.
func Pin(fs loader.FS, s Settings) (changed bool, err error) {
	if s.Proto == 0 || s.Port == 0 {
		return false, errors.New("pin bind programs: name a protocol and a port")
	}
	s.Trace = false
	if err := s.check(); err != nil {
		return false, err
	}
	fresh, err := s.loadPinned()
	if err != nil {
		return false, err
	}
	defer fresh.close()
	if err := statedir.FS(fs).Make(bindDir(fs)); err != nil {
		return false, err
	}
	sweepAside(fs)
	dir := PinDir(fs, s)
	if fresh.same(dir) {
		return false, nil
	}
	if err := fresh.publish(bindDir(fs), dir); err != nil {
		return false, fmt.Errorf("pin bind programs: %w", err)
	}
	return true, nil
}

// Unpin removes what Pin made for the protocol, port and address. Units that
// have the programs keep them until they stop. What is not there is fine.
func Unpin(fs loader.FS, s Settings) error {
	sweepAside(fs)
	if err := os.RemoveAll(PinDir(fs, s)); err != nil {
		return fmt.Errorf("unpin bind programs: %w", err)
	}
	statedir.FS(fs).Remove(bindDir(fs))
	return nil
}

// Pinned lists the protocols, ports and addresses for which programs are
// pinned, sorted by the names of their directories. The other settings are
// zero.
func Pinned(fs loader.FS) ([]Settings, error) {
	entries, err := os.ReadDir(bindDir(fs))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("list bind programs: %w: run as root", ErrPermission)
	}
	if err != nil {
		return nil, fmt.Errorf("list bind programs: %w", err)
	}
	var all []Settings
	for _, e := range entries {
		if s, ok := parsePinName(e.Name()); ok {
			all = append(all, s)
		}
	}
	return all, nil
}

// parsePinName undoes the last part of PinDir.
func parsePinName(name string) (s Settings, ok bool) {
	parts := strings.Split(name, "_")
	if len(parts) < 2 || len(parts) > 3 || s.Proto.UnmarshalText([]byte(parts[0])) != nil {
		return Settings{}, false
	}
	port, err := strconv.ParseUint(parts[1], 10, 16)
	if err != nil {
		return Settings{}, false
	}
	s.Port = uint16(port)
	if len(parts) == 3 {
		raw, err := hex.DecodeString(parts[2])
		if s.Addr, ok = netip.AddrFromSlice(raw); err != nil || !ok {
			return Settings{}, false
		}
	}
	return s, true
}

// sweepAside removes what a killed process left.
func sweepAside(fs loader.FS) {
	left, _ := filepath.Glob(filepath.Join(bindDir(fs), asidePrefix+"*"))
	for _, dir := range left {
		os.RemoveAll(dir)
	}
}

// loadPinned loads the programs.
func (s Settings) loadPinned() (*pinned, error) {
	spec, err := s.spec()
	if err != nil {
		return nil, err
	}
	// The programs name the ring, and never write to it: as small as can be.
	spec.Maps[bpf.BindMapEvents].MaxEntries = uint32(os.Getpagesize())
	var p pinned
	if err := loadInto(spec, &p); err != nil {
		return nil, err
	}
	return &p, nil
}

func (p *pinned) close() {
	p.Bind4.Close()
	p.Bind6.Close()
	p.Settings.Close()
}

// same tells whether a directory has these programs with these constants.
func (p *pinned) same(dir string) bool {
	for name, fresh := range map[string]*ebpf.Program{"bind4": p.Bind4, "bind6": p.Bind6} {
		old, err := ebpf.LoadPinnedProgram(filepath.Join(dir, name), nil)
		if err != nil {
			return false
		}
		oldInfo, err1 := old.Info()
		freshInfo, err2 := fresh.Info()
		old.Close()
		// The tag is a hash of the instructions, without the constants.
		if err1 != nil || err2 != nil || oldInfo.Tag != freshInfo.Tag {
			return false
		}
	}
	old, err := ebpf.LoadPinnedMap(filepath.Join(dir, "settings"), nil)
	if err != nil {
		return false
	}
	defer old.Close()
	was, err1 := old.LookupBytes(uint32(0))
	is, err2 := p.Settings.LookupBytes(uint32(0))
	return err1 == nil && err2 == nil && bytes.Equal(was, is)
}

// publish pins the programs aside, below root, and puts one after the other in
// place. The settings come last, so that what was killed before is not taken
// for complete.
func (p *pinned) publish(root, dir string) error {
	aside, err := os.MkdirTemp(root, asidePrefix) // mode 0700
	if err != nil {
		return err
	}
	defer os.RemoveAll(aside)
	fault.Point("bind directory made aside")
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	fault.Point("bind directory made")
	// Other settings under the old name would look right when half is replaced.
	if err := os.Remove(filepath.Join(dir, "settings")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, object := range []struct {
		name string
		pin  func(path string) error
	}{{"bind4", p.Bind4.Pin}, {"bind6", p.Bind6.Pin}, {"settings", p.Settings.Pin}} {
		path := filepath.Join(aside, object.name)
		if err := object.pin(path); err != nil {
			return err
		}
		if err := os.Chmod(path, 0o600); err != nil {
			return err
		}
		if err := os.Rename(path, filepath.Join(dir, object.name)); err != nil {
			return err
		}
		fault.Point("bind program put in place")
	}
	return nil
}
