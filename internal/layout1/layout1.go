// Package layout1 makes groups as rpsel made them when its state had layout 1,
// with the program of then, for the tests of upgrades.
package layout1

import (
	"bytes"
	_ "embed"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// object is bpf/select_bpfel.o of commit 56e52cd, the last one with layout 1.
//
//go:embed testdata/select_bpfel.o
var object []byte

// Spec is the program of layout 1 and its maps.
func Spec(t testing.TB) *ebpf.CollectionSpec {
	t.Helper()
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	must(t, err)
	return spec
}

// Options say how a group is attached.
type Options struct {
	Flows int
	// Settle is for how many seconds the group settles.
	Settle uint32
	// Weights are those of the listeners, in the kernel's order; 1 where it
	// ends.
	Weights []uint32
}

// Attach attaches the groups on a port of a namespace, and returns their keys.
func Attach(t testing.TB, bpffs string, ns *testnet.NetNS, port uint16, o Options) []sockets.Key {
	t.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: port})
	must(t, err)
	if len(groups) == 0 {
		t.Fatalf("nothing on port %d", port)
	}
	var keys []sockets.Key
	for _, g := range groups {
		attach(t, bpffs, g, o)
		keys = append(keys, g.Key)
	}
	return keys
}

func attach(t testing.TB, bpffs string, g sockets.Group, o Options) {
	t.Helper()
	affinity := uint32(maps.AffinityFlow)
	if g.Proto == sockets.TCP {
		affinity = maps.AffinityNone
	}
	var tick unix.Timespec
	must(t, unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick))
	mult := uint32((1 << 32) / math.Round(1e9/float64(tick.Nano())))
	buckets := maps.BucketsFor(o.Flows)

	spec := Spec(t)
	must(t, spec.Variables["buckets"].Set(buckets))
	must(t, spec.Variables["affinity"].Set(affinity))
	must(t, spec.Variables["clock_mult"].Set(mult))
	spec.Maps["flows"].MaxEntries = buckets
	spec.Maps["details"].MaxEntries = buckets * maps.BucketSize
	spec.Maps["picks"].MaxEntries = maps.PickPairs(len(g.Members))
	c, err := ebpf.NewCollection(spec)
	must(t, err)
	defer c.Close()
	now, _, err := c.Programs["rpsel_clock"].Test(make([]byte, 64))
	must(t, err)

	var live maps.Live1
	var order []uint16
	for slot, m := range g.Members {
		weight := uint32(1)
		if slot < len(o.Weights) {
			weight = o.Weights[slot]
		}
		must(t, c.Maps["slots"].Put(uint32(slot), bpf.SelectSlot{Incarnation: 1, State: uint32(maps.SlotActive)}))
		record := maps.Listener1{
			Cookie: m.Cookie, Weight: weight, Generation: 1,
			Pid: uint32(m.Holders[0].PID), Joined: now,
		}
		copy(record.Command[:15], m.Holders[0].Command)
		must(t, c.Maps["listeners"].Put(uint32(slot), record))
		must(t, onSocket(m, func(fd int) error {
			return c.Maps["socks"].Update(uint32(slot), uint64(fd), ebpf.UpdateNoExist)
		}))
		live.Active |= 1 << slot
		order = append(order, uint16(slot))
	}
	must(t, c.Maps["live"].Put(uint32(0), live))
	table := maps.KernelTable(order, spec.Maps["picks"].MaxEntries)
	for k := 0; k < len(table); k += 2 {
		var pair bpf.SelectPickPair
		for i := range pair.Entries {
			if k+i < len(table) {
				pair.Entries[i] = uint32(table[k+i])<<16 | uint32(table[k+i])
			}
		}
		must(t, c.Maps["picks"].Put(uint32(k/2), pair))
	}
	// An hour for new flows, not half a minute: an emulated machine's upgrade may take that.
	config := maps.Config1{
		Table: uint64(len(table)), Abi: 1, Idle: 300, IdleNew: 3600, Affinity: affinity,
		Capacity: uint32(o.Flows), Attached: now, ClockMult: mult,
	}
	if o.Settle > 0 {
		config.Settled, config.Settling = now+o.Settle, 1
	}
	must(t, c.Maps["config"].Put(uint32(0), config))

	dir := dirOf(bpffs, g.Key)
	must(t, os.MkdirAll(dir, 0o700))
	for name, m := range c.Maps {
		if !strings.HasPrefix(name, ".") { // not that of the constants
			must(t, m.Pin(filepath.Join(dir, name)))
		}
	}
	must(t, c.Programs["rpsel_select"].Pin(filepath.Join(dir, "prog")))
	must(t, c.Programs["rpsel_clock"].Pin(filepath.Join(dir, "clock")))
	must(t, onSocket(g.Members[0], func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, c.Programs["rpsel_select"].FD())
	}))
}

// PickOnly makes a group, of layout 1 or 2, give all new flows to one slot: so
// that whoever forgets a flow is noticed.
func PickOnly(t testing.TB, bpffs string, key sockets.Key, slot uint32) {
	t.Helper()
	picks, err := ebpf.LoadPinnedMap(filepath.Join(dirOf(bpffs, key), "picks"), nil)
	must(t, err)
	defer picks.Close()
	both := slot<<16 | slot
	for k := range picks.MaxEntries() {
		must(t, picks.Put(k, bpf.SelectPickPair{Entries: [2]uint32{both, both}}))
	}
}

// dirOf is where a group's state is.
func dirOf(bpffs string, key sockets.Key) string {
	name := fmt.Sprintf("%s_%x_%d", key.Proto, key.Addr.Addr().AsSlice(), key.Addr.Port())
	if key.V6Only {
		name += "_v6only"
	}
	return filepath.Join(bpffs, "rpsel", fmt.Sprint(key.NetNS), name)
}

// onSocket lends f a socket of another process.
func onSocket(m sockets.Socket, f func(fd int) error) error {
	conn, err := m.Take()
	if err != nil {
		return err
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	if err == nil {
		err = controlErr
	}
	return err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
