package force_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/force"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// bindPins are the paths in a unit's BPFProgram=, and their hooks.
var bindPins = map[string]ebpf.AttachType{
	"bind4": ebpf.AttachCGroupInet4Bind,
	"bind6": ebpf.AttachCGroupInet6Bind,
}

// attachPins does to the world's cgroup what systemd does to that of a unit
// with BPFProgram=bind4:DIR/bind4 and BPFProgram=bind6:DIR/bind6.
func (w *world) attachPins(dir string) {
	w.t.Helper()
	for name, hook := range bindPins {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(dir, name), nil)
		must(w.t, err)
		must(w.t, link.RawAttachProgram(link.RawAttachProgramOptions{
			Target: int(w.dir.File().Fd()), Program: p, Attach: hook, Flags: unix.BPF_F_ALLOW_MULTI,
		}))
		must(w.t, p.Close())
	}
}

// ids tells which programs the paths lead to.
func ids(t testing.TB, dir string) map[string]ebpf.ProgramID {
	t.Helper()
	found := map[string]ebpf.ProgramID{}
	for name := range bindPins {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(dir, name), nil)
		must(t, err)
		info, err := p.Info()
		must(t, err)
		found[name], _ = info.ID()
		must(t, p.Close())
	}
	return found
}

// Servers of a unit that has the pinned programs share the port, and nothing
// else is shared. No process of rpsel is there.
func TestPin(t *testing.T) {
	addr := netip.MustParseAddr
	for _, test := range []struct {
		name, dir        string
		settings         force.Settings
		network, address string
		matches          bool
	}{
		{"udp", "udp_7777", force.Settings{Proto: sockets.UDP, Port: 7777}, "udp4", "127.0.0.1:7777", true},
		{"udp6", "udp_7777", force.Settings{Proto: sockets.UDP, Port: 7777}, "udp6", "[::1]:7777", true},
		{"tcp", "tcp_7777", force.Settings{Proto: sockets.TCP, Port: 7777}, "tcp4", "127.0.0.1:7777", true},
		{"address", "udp_7777_7f000001", force.Settings{Proto: sockets.UDP, Port: 7777, Addr: addr("::ffff:127.0.0.1")}, "udp4", "127.0.0.1:7777", true},
		{"other address", "udp_7777_7f000002", force.Settings{Proto: sockets.UDP, Port: 7777, Addr: addr("127.0.0.2")}, "udp4", "127.0.0.1:7777", false},
		{"other port", "udp_7778", force.Settings{Proto: sockets.UDP, Port: 7778}, "udp4", "127.0.0.1:7777", false},
		{"other protocol", "tcp_7777", force.Settings{Proto: sockets.TCP, Port: 7777}, "udp4", "127.0.0.1:7777", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			fs := loader.FS(testnet.BPFFS(t))
			test.settings.Reuseport = force.On
			changed, err := force.Pin(fs, test.settings)
			if err != nil || !changed {
				t.Fatalf("Pin: %v, %v", changed, err)
			}
			dir := force.PinDir(fs, test.settings)
			if name := filepath.Base(dir); name != test.dir {
				t.Errorf("PinDir is %s, want %s", name, test.dir)
			}

			w := newWorld(t)
			plain := w.serve(nil, test.network, test.address, "plain")
			w.failsInUse(nil, test.network, test.address, "plain")
			plain.stop()

			w.attachPins(dir)
			w.serve(nil, test.network, test.address, "a")
			if !test.matches {
				w.failsInUse(nil, test.network, test.address, "b")
				return
			}
			w.serve(nil, test.network, test.address, "b")
			if diff := cmp.Diff([]string{"a", "b"}, w.answers(test.network[:3], test.address)); diff != "" {
				t.Errorf("who answered, -want +got:\n%s", diff)
			}
		})
	}
}

// Programs that do the same stay, others are replaced, and what a killed
// process left is repaired.
func TestPinAgain(t *testing.T) {
	fs := loader.FS(testnet.BPFFS(t))
	s := force.Settings{Proto: sockets.UDP, Port: 7777, Reuseport: force.On}
	dir := force.PinDir(fs, s)
	pin := func(s force.Settings, want bool) map[string]ebpf.ProgramID {
		t.Helper()
		changed, err := force.Pin(fs, s)
		if err != nil || changed != want {
			t.Errorf("Pin: changed %v, %v, want %v", changed, err, want)
		}
		if left, _ := filepath.Glob(filepath.Dir(dir) + "/tmp_*"); len(left) > 0 {
			t.Errorf("left aside: %q", left)
		}
		return ids(t, dir)
	}
	replaced := func(before, after map[string]ebpf.ProgramID) {
		t.Helper()
		for name := range bindPins {
			if before[name] == after[name] {
				t.Errorf("%s is the same as before", name)
			}
		}
	}
	first := pin(s, true)
	for path, mode := range map[string]os.FileMode{
		filepath.Dir(dir): 0o700, dir: 0o700, dir + "/bind4": 0o600, dir + "/bind6": 0o600, dir + "/settings": 0o600,
	} {
		info, err := os.Stat(path)
		must(t, err)
		if info.Mode().Perm() != mode {
			t.Errorf("%s has mode %v, want %v", path, info.Mode().Perm(), mode)
		}
	}
	if diff := cmp.Diff(first, pin(s, false)); diff != "" {
		t.Errorf("pinned again, -first +second:\n%s", diff)
	}

	off := s
	off.Reuseport = force.Off
	second := pin(off, true)
	replaced(first, second)
	third := pin(s, true)
	replaced(second, third)

	must(t, os.Remove(dir+"/bind6"))
	replaced(third, pin(s, true))
	must(t, os.Mkdir(filepath.Dir(dir)+"/tmp_4711", 0o700))
	pin(s, false)

	for _, bad := range []force.Settings{{Proto: sockets.UDP}, {Port: 7777}} {
		if _, err := force.Pin(fs, bad); err == nil {
			t.Errorf("Pin(%+v) gives no error", bad)
		}
	}
}

// The directory of the programs is no group's, and goes with the last of them.
func TestPinned(t *testing.T) {
	dir := testnet.BPFFS(t)
	fs := loader.FS(dir)
	list := func(want ...force.Settings) {
		t.Helper()
		got, err := force.Pinned(fs)
		must(t, err)
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("Pinned, -want +got:\n%s", diff)
		}
		keys, err := fs.Keys(0)
		if err != nil || len(keys) > 0 {
			t.Errorf("Keys: %v, %v", keys, err)
		}
	}
	list()
	one := force.Settings{Proto: sockets.TCP, Port: 7777, Addr: netip.MustParseAddr("::1")}
	two := force.Settings{Proto: sockets.UDP, Port: 7777}
	for _, s := range []force.Settings{two, one} {
		_, err := force.Pin(fs, s)
		must(t, err)
	}
	list(one, two)
	must(t, force.Unpin(fs, one))
	list(two)
	must(t, force.Unpin(fs, one)) // not there
	must(t, force.Unpin(fs, two))
	list()
	entries, err := os.ReadDir(filepath.Join(dir, "rpsel"))
	if !os.IsNotExist(err) {
		t.Errorf("left: %v, %v", entries, err)
	}
}
