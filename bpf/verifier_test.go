package bpf_test

import (
	"strconv"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
)

// The verifier of this kernel accepts every program, with whatever constants
// make it another one. How many instructions it looked at for that is noted.
func TestVerifier(t *testing.T) {
	testnet.Privileged(t)
	type values = map[string]any
	timer := uint32(1)
	if err := features.HaveProgramHelper(ebpf.SkReuseport, asm.FnTimerInit); err != nil {
		timer = 0
	}
	for _, test := range []struct {
		name   string
		load   func() (*ebpf.CollectionSpec, error)
		values values
	}{
		{"select-flow", bpf.LoadSelect, values{bpf.SelectVarAffinity: uint32(0)}},
		{"select-none", bpf.LoadSelect, values{bpf.SelectVarAffinity: uint32(1)}},
		{"select-client", bpf.LoadSelect, values{bpf.SelectVarAffinity: uint32(2)}},
		{"select-bytes", bpf.LoadSelect, values{
			bpf.SelectVarAffinity: uint32(3), bpf.SelectVarKeyOffset: uint32(8 + 1400), bpf.SelectVarKeyLength: uint32(64),
		}},
		{"select-reply", bpf.LoadSelect, values{bpf.SelectVarConfirm: uint32(1)}},
		{"select-openvpn", bpf.LoadSelect, values{bpf.SelectVarFirstPackets: uint32(1)}},
		{"select-openvpn-reply", bpf.LoadSelect, values{bpf.SelectVarFirstPackets: uint32(1), bpf.SelectVarConfirm: uint32(1)}},
		{"select-client-reply", bpf.LoadSelect, values{bpf.SelectVarAffinity: uint32(2), bpf.SelectVarConfirm: uint32(1)}},
		{"select-tcp", bpf.LoadSelect, values{bpf.SelectVarTcp: uint32(1), bpf.SelectVarAffinity: uint32(1)}},
		{"select-tcp-client", bpf.LoadSelect, values{bpf.SelectVarTcp: uint32(1), bpf.SelectVarAffinity: uint32(2)}},
		{"select-no-timer", bpf.LoadSelect, values{bpf.SelectVarTimer: uint32(0)}},
		{"conns", bpf.LoadConns, nil},
		{"find", bpf.LoadFind, nil},
		{"bind", bpf.LoadBind, values{
			bpf.BindVarReuseport: int32(1), bpf.BindVarReuseaddr: int32(1), bpf.BindVarDevice: [16]byte{'l', 'o'}, bpf.BindVarTrace: true,
		}},
		{"watch", bpf.LoadWatch, nil},
		{"netns", bpf.LoadNetns, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			spec, err := test.load()
			if err != nil {
				t.Fatal(err)
			}
			if v := spec.Variables[bpf.SelectVarTimer]; v != nil && test.values[bpf.SelectVarTimer] == nil {
				if err := v.Set(timer); err != nil {
					t.Fatal(err)
				}
			}
			for name, value := range test.values {
				if err := spec.Variables[name].Set(value); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			c, err := ebpf.NewCollection(spec)
			if err != nil {
				t.Fatalf("%+v", err)
			}
			defer c.Close()
			for name, program := range c.Programs {
				info, err := program.Info()
				if err != nil {
					t.Fatal(err)
				}
				n, ok := info.VerifiedInstructions()
				if !ok {
					continue // told since Linux 5.16
				}
				t.Logf("%s: %d instructions verified", name, n)
				t.Attr("verified/"+test.name+"/"+name, strconv.FormatUint(uint64(n), 10))
			}
		})
	}
}
