package loader_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// groupDir is where the state of the namespace's group is.
func groupDir(root string, ns *testnet.NetNS) string {
	return filepath.Join(root, "rpsel", fmt.Sprint(ns.Cookie()), "udp_7f000001_1194")
}

// allAnswered sends from some new clients, and fails the test if one has no answer.
func allAnswered(t *testing.T, when string, ns *testnet.NetNS) {
	t.Helper()
	err := ns.Do(func() error {
		for range 10 {
			conn, err := net.Dial("udp4", fleetAddr)
			if err != nil {
				return err
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(30 * time.Second))
			if _, err := conn.Write([]byte("?")); err != nil {
				return err
			}
			if _, err := conn.Read(make([]byte, 64)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Errorf("%s: %v", when, err)
	}
}

// inTime runs f, and fails the test if it panics or does not end.
func inTime(t *testing.T, name string, f func() error) error {
	t.Helper()
	type end struct {
		err   error
		panic any
	}
	done := make(chan end, 1)
	go func() {
		var e end
		defer func() {
			e.panic = recover()
			done <- e
		}()
		e.err = f()
	}()
	select {
	case e := <-done:
		if e.panic != nil {
			t.Errorf("%s panics: %v", name, e.panic)
		}
		return e.err
	case <-time.After(2 * time.Minute):
		t.Fatalf("%s does not end", name)
		return nil
	}
}

// useAll lets user space do all it can with a group whose state may be anything,
// and detaches it. What fails says of which group, and the way out, in one line.
func useAll(t *testing.T, fs loader.FS, ns *testnet.NetNS, key loader.Key) {
	t.Helper()
	try := func(name string, f func() error) {
		t.Helper()
		err := inTime(t, name, f)
		if err == nil {
			return
		}
		wayOut := strings.Contains(err.Error(), "detach")
		for _, plain := range []error{loader.ErrNoListener, loader.ErrTooSmall, loader.ErrNewer} {
			wayOut = wayOut || errors.Is(err, plain)
		}
		if said := err.Error(); strings.Contains(said, "\n") || !strings.Contains(said, key.String()) || !wayOut {
			t.Errorf("%s: said %q, want one line that names the group and the way out", name, said)
		}
	}
	try("use", func() error {
		g, err := fs.Open(key)
		if err != nil {
			return err
		}
		defer g.Close()
		try("status", func() error { _, err := g.Status(); return err })
		try("flows", func() error {
			for f, err := range g.Flows() {
				if err != nil {
					return err
				}
				f.From(netip.PrefixFrom(f.Client.Addr(), 0))
			}
			return nil
		})
		try("forecast", func() error { _, err := g.DetachForecast(); return err })
		try("housekeep", func() error { _, err := g.Housekeep(); return err })
		try("drain", func() error { return g.Drain(0) })
		try("resume", func() error { return g.Resume(0) })
		try("weight", func() error { return g.SetWeight(1, 3) })
		try("flush", func() error { _, err := g.Flush(func(f loader.Flow) bool { return f.Slot == 1 }); return err })
		return nil
	})
	conn := member(t, ns)
	for name, o := range map[string]loader.Options{
		"attach": {}, "attach --settle": {Settle: time.Minute}, "attach --policy rr": {Policy: loader.PolicyRR},
	} {
		try(name, func() error {
			g, err := fs.Attach(conn, o)
			if err == nil {
				err = g.Close()
			}
			return err
		})
	}
	conn.Close()
	try("upgrade", func() error { _, err := fs.Upgrade(key, loader.UpgradeOptions{}); return err })
	try("upgrade --flows", func() error { _, err := fs.Upgrade(key, loader.UpgradeOptions{Flows: 2000}); return err })
	d, err := fs.Detach(key)
	if errors.Is(err, loader.ErrNewer) {
		if err := os.RemoveAll(groupDir(string(fs), ns)); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err != nil || !d.Program {
		t.Errorf("detach: %+v, %v", d, err)
	}
	if _, err := os.Lstat(groupDir(string(fs), ns)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

// scribbled are the maps that a test writes to.
var scribbled = []string{
	bpf.SelectMapConfig, bpf.SelectMapSlots, bpf.SelectMapPicks, bpf.SelectMapLive, bpf.SelectMapFlows, bpf.SelectMapDetails,
	bpf.SelectMapLoads, bpf.SelectMapRows, bpf.SelectMapReader, bpf.SelectMapConns, bpf.SelectMapHouse, bpf.SelectMapListeners,
	bpf.SelectMapPeers,
}

// scribble writes data into a map: into its memory from a place on, again and again
// if it is to be all of it; or as keys and values.
func scribble(m *ebpf.Map, at uint32, all bool, data []byte) error {
	memory, err := m.Memory()
	if err != nil {
		return scribbleElements(m, at, data)
	}
	size := int(m.MaxEntries() * m.ValueSize())
	first := int(at) % size
	if all {
		data = bytes.Repeat(data, (size-first)/len(data)+1)
	}
	_, err = memory.WriteAt(data[:min(len(data), size-first)], int64(first))
	return err
}

func scribbleElements(m *ebpf.Map, at uint32, data []byte) error {
	part := func(n uint32, data []byte) []byte {
		return bytes.Repeat(data, int(n)/len(data)+1)[:n]
	}
	key := part(m.KeySize(), append(data, byte(at)))
	switch {
	case m.Type() == ebpf.Array:
		key = make([]byte, 4)
	case at&1 == 0: // what it has already
		if next, err := m.NextKeyBytes(nil); err == nil && next != nil {
			key = next
		}
	}
	return m.Put(key, part(m.ValueSize(), data))
}

// P9: whatever somebody has written into a pinned map, user space neither panics
// nor hangs, each packet is answered, and the group can be detached.
func FuzzState(f *testing.F) {
	testnet.Privileged(f)
	for i := range scribbled {
		f.Add(byte(i), uint32(0), true, []byte{0xff})
		f.Add(byte(i), uint32(1), true, []byte{0x5a, 0x13, 0x80})
	}
	f.Add(byte(0), uint32(0), false, []byte{0, 0, 0, 0, 0xf0, 0xff, 0, 0}) // a table behind the map's end
	f.Add(byte(0), uint32(0), false, make([]byte, 8))                      // and one of no size
	f.Add(byte(0), uint32(4), false, []byte{1, 0, 0, 0})
	f.Add(byte(11), uint32(0), false, []byte{0, 0, 0, 0})
	ns, root := testnet.New(f), testnet.BPFFS(f)
	testnet.StartGroup(f, ns, 3, udpServer)
	f.Fuzz(func(t *testing.T, which byte, at uint32, all bool, data []byte) {
		if len(data) == 0 {
			return
		}
		name := scribbled[int(which)%len(scribbled)]
		// Replace, for state that was made to look newer is left behind.
		g := attach(t, loader.FS(root), ns, loader.Options{Flows: 1000, Settle: -1, Replace: true})
		key := g.Key()
		allAnswered(t, "attached", ns)
		m, err := ebpf.LoadPinnedMap(filepath.Join(groupDir(root, ns), name), nil)
		if err != nil {
			t.Fatal(err)
		}
		err = scribble(m, at, all, data)
		m.Close()
		if err != nil {
			t.Fatal(name, err)
		}
		allAnswered(t, "scribbled into "+name, ns)
		useAll(t, loader.FS(root), ns, key)
		allAnswered(t, "detached", ns)
	})
}

// P9: what is pinned may be gone, another group's, or nothing of ours. A group is
// detached all the same, and the other one stays as it was.
func TestWrongPins(t *testing.T) {
	root := testnet.BPFFS(t)
	there := testnet.New(t)
	testnet.StartGroup(t, there, 2, udpServer)
	theirs, others := attach(t, loader.FS(root), there, noSettle), groupDir(root, there)
	before, state := status(t, theirs).Listeners, tree(t, others)

	ns := testnet.New(t)
	testnet.StartGroup(t, ns, 3, udpServer)
	dir := groupDir(root, ns)

	pin := func(name string, spec *ebpf.MapSpec) error {
		m, err := ebpf.NewMap(spec)
		if err != nil {
			return err
		}
		defer m.Close()
		return m.Pin(filepath.Join(dir, name))
	}
	gone := func(name string) error { return os.Remove(filepath.Join(dir, name)) }
	link := func(name, from string) error {
		return errors.Join(gone(name), os.Link(filepath.Join(others, from), filepath.Join(dir, name)))
	}
	some := []string{"prog", bpf.SelectMapConfig, bpf.SelectMapFlows, bpf.SelectMapListeners}
	all := append([]string{"prog", "clock", bpf.SelectMapSocks, bpf.SelectMapSlotCounters, bpf.SelectMapCounters, bpf.SelectMapTurns,
		bpf.SelectMapReports, bpf.SelectMapMovedConns}, scribbled...)
	for _, c := range []struct {
		name   string
		of     []string
		change func(name string) error
	}{
		{"gone", all, gone},
		{"another group's", all, func(name string) error { return link(name, name) }},
		{"another map", some, func(name string) error {
			return errors.Join(gone(name), pin(name, &ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 3, MaxEntries: 2}))
		}},
		{"a smaller map", []string{bpf.SelectMapSlots, bpf.SelectMapLive, bpf.SelectMapDetails, bpf.SelectMapLoads, bpf.SelectMapPicks, bpf.SelectMapSocks}, func(name string) error {
			m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
			if err != nil {
				return err
			}
			defer m.Close()
			return errors.Join(gone(name), pin(name, &ebpf.MapSpec{Type: m.Type(), KeySize: m.KeySize(), ValueSize: m.ValueSize(), MaxEntries: 1, Flags: m.Flags()}))
		}},
		{"another program", some, func(name string) error { return link(name, "clock") }},
		{"the program", []string{"clock"}, func(name string) error { return link(name, "prog") }},
		{"a link to itself", some, func(name string) error {
			return errors.Join(gone(name), os.Symlink(name, filepath.Join(dir, name)))
		}},
		{"a directory", some, func(name string) error {
			return errors.Join(gone(name), os.Mkdir(filepath.Join(dir, name), 0o700))
		}},
		{"instead of the directory", []string{"../udp_7f000001_1194"}, func(name string) error {
			return errors.Join(os.RemoveAll(dir), pin(name, &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}))
		}},
		{"there besides", []string{"reply_1", "counting", "more", "../more", "../tmp_1", "../tmp_1_udp_7f000001_1194/prog"}, func(name string) error {
			return errors.Join(os.MkdirAll(filepath.Join(dir, filepath.Dir(name), "some", "below"), 0o700), pin(name, &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}))
		}},
	} {
		for _, name := range c.of {
			t.Run(name+" is "+c.name, func(t *testing.T) {
				g := attach(t, loader.FS(root), ns, loader.Options{Flows: 1000, Settle: -1})
				allAnswered(t, "attached", ns)
				if err := c.change(name); err != nil {
					t.Fatal(err)
				}
				allAnswered(t, "changed", ns)
				useAll(t, loader.FS(root), ns, g.Key())
				allAnswered(t, "detached", ns)
				if diff := cmp.Diff(state, tree(t, others)); diff != "" {
					t.Fatalf("state of the other group: %s", diff)
				}
			})
		}
	}
	s := status(t, theirs)
	if diff := cmp.Diff(before, s.Listeners, cmpopts.IgnoreFields(loader.Listener{}, "Joined")); diff != "" || !s.Attached {
		t.Errorf("the other group changed, attached %t: %s", s.Attached, diff)
	}
}
