package maps

import (
	"testing"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
)

// A reader that was killed is taken for reading for some seconds, but not by the
// ring of the next one, which is used when that is ready.
func TestReaderKilled(t *testing.T) {
	testnet.Privileged(t)
	spec, err := bpf.LoadSelect()
	if err != nil {
		t.Fatal(err)
	}
	made := map[string]*ebpf.Map{}
	for _, name := range []string{bpf.SelectMapReader, bpf.SelectMapReports} {
		if made[name], err = ebpf.NewMap(spec.Maps[name]); err != nil {
			t.Fatal(err)
		}
		defer made[name].Close()
	}
	const now = 100
	reader := made[bpf.SelectMapReader]
	open := func() *Reports {
		t.Helper()
		r, err := OpenReports(reader, made[bpf.SelectMapReports], 1<<16)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	read := func(when string, want bool) {
		t.Helper()
		if got, err := Read(reader, now); err != nil || got != want {
			t.Errorf("%s: read is %v, %v", when, got, err)
		}
	}
	killed := open()
	killed.Renew(now)
	read("the first one", true)
	next := open()
	read("not ready", false)
	next.Renew(now)
	read("ready", true)
	if err := killed.Close(); err != nil {
		t.Error(err)
	}
	read("the other one's ring is no more", true)
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	read("closed", false)
}
