package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

func TestMain(m *testing.M) { testnet.Main(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// parent makes a cgroup for the test, which has to leave it empty.
func parent(t testing.TB) string {
	t.Helper()
	testnet.Privileged(t)
	own, err := Own()
	must(t, err)
	dir := filepath.Join(own, fmt.Sprintf("rpsel-test-%d", os.Getpid()))
	must(t, os.Mkdir(dir, 0o755))
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func create(t testing.TB, dir string) *Dir {
	t.Helper()
	d, err := Create(dir)
	must(t, err)
	t.Cleanup(func() {
		if err := d.Remove(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
		d.Close()
	})
	return d
}

// inhabit starts a process in a cgroup and returns what ends it.
func inhabit(t testing.TB, d *Dir) (leave func()) {
	t.Helper()
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	must(t, err)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.File().Fd()), Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	leave = func() {
		stdin.Close()
		cmd.Wait()
	}
	t.Cleanup(leave)
	return leave
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func TestSweep(t *testing.T) {
	dir := parent(t)
	for _, test := range []struct {
		name                 string
		open, inhabit, child bool
		want                 bool // gone
	}{
		{name: "abandoned", want: true},
		{name: "abandoned with cgroups below", child: true, want: true},
		{name: "its reaper lives", open: true},
		{name: "its processes live", inhabit: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := create(t, dir)
			path := d.Path()
			leave := func() {}
			if test.inhabit {
				leave = inhabit(t, d)
			}
			if test.child {
				must(t, os.Mkdir(filepath.Join(path, "below"), 0o755))
			}
			held := d
			if !test.open {
				// What the kernel does when the process is killed.
				file, err := os.Open(path)
				must(t, err)
				must(t, d.Close())
				held = FromFile(file, path)
				defer held.Close()
			}
			must(t, Sweep(dir))
			if gone := !exists(path); gone != test.want {
				t.Errorf("gone is %t", gone)
			}
			leave()
			must(t, held.Remove())
			if exists(path) {
				t.Error("it is still there")
			}
		})
	}
}

// The sweeper looks above as well, and at nothing that is not ours.
func TestSweepAbove(t *testing.T) {
	dir := parent(t)
	abandoned, err := Create(dir)
	must(t, err)
	abandoned.Close()
	below := filepath.Join(dir, "below")
	must(t, os.Mkdir(below, 0o755))
	defer os.Remove(below)
	must(t, Sweep(below))
	if exists(abandoned.Path()) || !exists(below) {
		t.Errorf("abandoned is there: %t, the other one: %t", exists(abandoned.Path()), exists(below))
	}
}

func TestAwaitEmpty(t *testing.T) {
	d := create(t, parent(t))
	leave := inhabit(t, d)
	done := make(chan error)
	go func() { done <- d.AwaitEmpty(context.Background()) }()
	if err := d.Remove(); !errors.Is(err, ErrBusy) {
		t.Errorf("remove with a process in it: %v", err)
	}
	leave()
	must(t, <-done)
	must(t, d.Remove())
	must(t, d.AwaitEmpty(context.Background())) // gone is empty
}

func TestAwaitCanceled(t *testing.T) {
	d := create(t, parent(t))
	leave := inhabit(t, d)
	defer leave()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- d.AwaitEmpty(ctx) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestAwaitRemoval(t *testing.T) {
	d := create(t, parent(t))
	done := make(chan error)
	go func() { done <- d.AwaitRemoval(context.Background()) }()
	must(t, d.Remove())
	must(t, <-done)
}

// A child of a threaded cgroup is of no use before it is threaded itself.
func TestCreateThreaded(t *testing.T) {
	dir := parent(t)
	threaded := filepath.Join(dir, "threaded")
	must(t, os.Mkdir(threaded, 0o755))
	defer os.Remove(threaded)
	must(t, os.WriteFile(threaded+"/cgroup.type", []byte("threaded"), 0))
	d, err := Create(threaded)
	must(t, err)
	defer d.Close()
	kind, err := os.ReadFile(d.Path() + "/cgroup.type")
	must(t, err)
	if got := strings.TrimSpace(string(kind)); got != "threaded" {
		t.Errorf("type is %q", got)
	}
	must(t, d.Remove())
}

func TestOpenRefuses(t *testing.T) {
	testnet.Privileged(t)
	if _, err := Open("/tmp"); !errors.Is(err, ErrNotCgroup2) {
		t.Error(err)
	}
	if _, err := Open("/nowhere"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// program loads one that lets every bind pass.
func program(t testing.TB, name string) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Bind,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	must(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

// attach attaches a program as another tool would.
func attach(t testing.TB, dir string, p *ebpf.Program, flags uint32) {
	t.Helper()
	d, err := Open(dir)
	must(t, err)
	defer d.Close()
	must(t, link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: int(d.File().Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Bind, Flags: flags,
	}))
}

func TestAttachBesideOthers(t *testing.T) {
	const exclusive, override, multi = 0, unix.BPF_F_ALLOW_OVERRIDE, unix.BPF_F_ALLOW_MULTI
	for _, test := range []struct {
		name  string
		flags []uint32 // of the programs from top to bottom; absent for none
		want  string   // in the error; "" for none
	}{
		{"none", nil, ""},
		{"multi", []uint32{multi}, ""},
		{"override", []uint32{override}, "other0, attached to TOP with ALLOW_OVERRIDE"},
		{"exclusive", []uint32{exclusive}, "other0 is attached to TOP exclusively"},
		{"override above multi", []uint32{override, multi}, ""},
		{"multi above override", []uint32{multi, override}, "other1, attached to TOP/1 with ALLOW_OVERRIDE"},
		{"multi above exclusive", []uint32{multi, exclusive}, "other1 is attached to TOP/1 exclusively"},
	} {
		t.Run(test.name, func(t *testing.T) {
			top := parent(t)
			dir := top
			for i, flags := range test.flags {
				if i > 0 {
					dir = fmt.Sprintf("%s/%d", dir, i)
					must(t, os.Mkdir(dir, 0o755))
					made := dir
					t.Cleanup(func() { os.Remove(made) })
				}
				attach(t, dir, program(t, fmt.Sprint("other", i)), flags)
			}
			d := create(t, dir)
			before, err := d.effective(ebpf.AttachCGroupInet4Bind)
			must(t, err)
			err = d.Attach([]Program{{program(t, "ours"), ebpf.AttachCGroupInet4Bind}})
			after, queryErr := d.effective(ebpf.AttachCGroupInet4Bind)
			must(t, queryErr)
			if test.want == "" {
				must(t, err)
				if len(after) != len(before)+1 {
					t.Errorf("%d programs run, before %d", len(after), len(before))
				}
				return
			}
			want := strings.ReplaceAll(test.want, "TOP", top)
			if !errors.Is(err, ErrOccupied) || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v\nwant %s", err, want)
			}
			if len(after) != len(before) {
				t.Errorf("%d programs run, before %d", len(after), len(before))
			}
		})
	}
}

// An existing cgroup may have programs itself.
func TestLinkBesideOthers(t *testing.T) {
	for _, test := range []struct {
		name  string
		flags uint32
		ok    bool
	}{{"multi", unix.BPF_F_ALLOW_MULTI, true}, {"override", unix.BPF_F_ALLOW_OVERRIDE, false}, {"exclusive", 0, false}} {
		t.Run(test.name, func(t *testing.T) {
			dir := parent(t)
			attach(t, dir, program(t, "other"), test.flags)
			d, err := Open(dir)
			must(t, err)
			defer d.Close()
			links, err := d.Link([]Program{{program(t, "ours"), ebpf.AttachCGroupInet4Bind}})
			if !test.ok {
				if !errors.Is(err, ErrOccupied) || !strings.Contains(err.Error(), "other is attached to "+dir+" exclusively") {
					t.Error(err)
				}
				return
			}
			must(t, err)
			must(t, links.Close())
			if ids, err := d.effective(ebpf.AttachCGroupInet4Bind); err != nil || len(ids) != 1 {
				t.Errorf("programs %v run after, error %v", ids, err)
			}
		})
	}
}

// Programs above the cgroup namespace cannot be looked at; what they do can.
func TestAttachBelowUnseen(t *testing.T) {
	for _, test := range []struct {
		name  string
		flags uint32
		want  string
	}{
		{"override", unix.BPF_F_ALLOW_OVERRIDE, "ours would switch off program"},
		{"exclusive", 0, "attached exclusively, above this cgroup namespace"},
		{"multi", unix.BPF_F_ALLOW_MULTI, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := parent(t)
			attach(t, dir, program(t, "other"), test.flags)
			d := create(t, dir)
			err := d.attachEach([]Program{{program(t, "ours"), ebpf.AttachCGroupInet4Bind}}, func(p Program) error {
				return link.RawAttachProgram(link.RawAttachProgramOptions{
					Target: int(d.File().Fd()), Program: p.Program, Attach: p.Hook, Flags: unix.BPF_F_ALLOW_MULTI,
				})
			})
			if test.want == "" {
				must(t, err)
			} else if !errors.Is(err, ErrOccupied) || !strings.Contains(err.Error(), test.want) {
				t.Error(err)
			}
		})
	}
}
