package bpf_test

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/testnet"
)

// budget is what a program may take at most. The instructions are the compiler's
// alone; the verifier's work differs between kernels, which there is room for.
type budget struct {
	instructions uint64 // of the program and its functions, whatever the constants
	stack        uint64 // bytes, of the function that takes most; the limit is 512 of a chain
	verified     uint64 // instructions the verifier looks at; the limit is a million
}

var budgets = map[string]budget{
	bpf.SelectProgRpselSelect: {instructions: 6500, stack: 256, verified: 150_000},
	bpf.SelectProgRpselReply:  {instructions: 2000, stack: 128, verified: 20_000},
	bpf.NetnsProgRpselNetns:   {instructions: 100, stack: 64, verified: 200_000}, // a loop, walked in full
}

// everyOther is the budget of what is on no packet's way.
var everyOther = budget{instructions: 1000, stack: 256, verified: 5000}

var stackDepth = regexp.MustCompile(`stack depth ([0-9+]+)`)

type values = map[string]any

// variants are all programs, with whatever constants make them other ones.
var variants = []struct {
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
}

// The verifier of this kernel accepts every program, and none takes more than its
// budget. "make info" shows what they take.
func TestVerifier(t *testing.T) {
	testnet.Privileged(t)
	timer := uint32(1)
	if err := features.HaveProgramHelper(ebpf.SkReuseport, asm.FnTimerInit); err != nil {
		timer = 0
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	if testing.Verbose() {
		fmt.Fprintln(table, "PROGRAM\tOF\tINSTRUCTIONS\tJITED BYTES\tSTACK\tVERIFIED\t")
		defer table.Flush()
	}
	shown := map[string]bool{} // what constants do not change is one row
	for _, test := range variants {
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
			c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats}})
			if err != nil {
				t.Fatalf("%+v", err)
			}
			defer c.Close()
			for _, name := range slices.Sorted(maps.Keys(c.Programs)) {
				took, jited := taken(t, spec.Programs[name], c.Programs[name])
				if row := fmt.Sprint(name, took, jited); testing.Verbose() && !shown[row] {
					shown[row] = true
					fmt.Fprintf(table, "%s\t%s\t%d\t%d\t%d\t%d\t\n", name, test.name, took.instructions, jited, took.stack, took.verified)
				}
				if took.verified != 0 {
					t.Attr("verified/"+test.name+"/"+name, strconv.FormatUint(took.verified, 10))
				}
				allowed, ok := budgets[name]
				if !ok {
					allowed = everyOther
				}
				for _, c := range []struct {
					what      string
					got, most uint64
				}{{"has instructions", took.instructions, allowed.instructions}, {"takes bytes of stack", took.stack, allowed.stack}, {"has the verifier look at instructions", took.verified, allowed.verified}} {
					if c.got > c.most {
						t.Errorf("%s %s: %d, at most %d are in its budget", name, c.what, c.got, c.most)
					}
				}
			}
		})
	}
}

// Whoever clears the bit of a dead listener looks at its slot once more, after
// that: what clears is a barrier. On CPUs other than x86 an atomic operation is
// one only if it returns what was; those that do not are for counts, and for bits
// that are set.
func TestClearingIsABarrier(t *testing.T) {
	spec, err := bpf.LoadSelect()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[asm.AtomicOp]int{}
	for _, program := range spec.Programs {
		for _, ins := range program.Instructions {
			seen[ins.OpCode.AtomicOp()]++
		}
	}
	if seen[asm.AndAtomic] != 0 || seen[asm.FetchAnd] == 0 {
		t.Errorf("%d times bits are cleared without a barrier, %d times with one", seen[asm.AndAtomic], seen[asm.FetchAnd])
	}
}

// taken is what a loaded program takes, and how many bytes of machine code it has
// become. What the kernel does not tell is 0.
func taken(t *testing.T, spec *ebpf.ProgramSpec, program *ebpf.Program) (took budget, jited uint32) {
	t.Helper()
	took.instructions = spec.Instructions.Size() / asm.InstructionSize
	info, err := program.Info()
	if err != nil {
		t.Fatal(err)
	}
	verified, _ := info.VerifiedInstructions() // since Linux 5.16
	took.verified = uint64(verified)
	jited, _ = info.JitedSize() // not without CAP_SYSLOG, nor where nothing is compiled
	depths := stackDepth.FindStringSubmatch(program.VerifierLog)
	if depths == nil {
		t.Fatalf("the verifier says nothing of the stack: %q", program.VerifierLog)
	}
	for depth := range strings.SplitSeq(depths[1], "+") {
		n, err := strconv.ParseUint(depth, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		took.stack = max(took.stack, n)
	}
	return took, jited
}
