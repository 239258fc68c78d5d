package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rpsel/rpsel/test/vm/guest"
)

// memory is what a machine has, in MiB.
const memory = 2048

// machine is one boot of one kernel.
type machine struct {
	kernel  kernel
	image   string        // its file system
	console string        // file for what the kernel says
	accel   string        // kvm or tcg
	silence time.Duration // longer than this without an event, and it hangs
}

// args are the kernel's command line.
func (m *machine) args() string {
	a := m.kernel.arch
	// A kernel in trouble restarts, which -no-reboot makes the end. One that gets no time,
	// because the host has other things to do, is in none: it would take its processors for
	// hanging. Silence is what tells, and the time limit of the tests.
	args := "console=" + a.console + " rdinit=/init panic=-1 oops=panic loglevel=5" +
		" rcupdate.rcu_cpu_stall_timeout=300 watchdog_thresh=60 sysctl.kernel.hung_task_timeout_secs=600"
	if m.accel == "tcg" {
		args += " " + a.args + " " + m.kernel.args[a.name]
	}
	return args
}

// errSilent: the machine has not said a word, so it has done nothing.
var errSilent = errors.New("the machine has not started")

// run boots the machine and hands on its events. It returns nil if the machine
// has done all that it was ordered to, whatever came out of it.
func (m *machine) run(ctx context.Context, on func(guest.Event)) error {
	ctx, kill := context.WithCancelCause(ctx)
	defer kill(nil)
	a := m.kernel.arch
	args := []string{
		"-machine", a.machine + ",accel=" + m.accel, "-cpu", a.cpu[m.accel], "-smp", "2", "-m", strconv.Itoa(memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-device", "virtio-rng-pci",
		// The console and, undisturbed by it, the events.
		"-serial", "file:" + m.console, "-chardev", "stdio,id=events,signal=off",
		"-kernel", m.kernel.image, "-initrd", m.image,
		"-append", m.args(),
	}
	cmd := exec.CommandContext(ctx, a.qemu, append(args, a.port...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%w: install %s", err, a.in)
	}
	hangs := time.AfterFunc(m.silence, func() {
		kill(fmt.Errorf("nothing came for %v, so it was killed", m.silence))
	})
	var started, done bool
	var broken string
	read := bufio.NewReader(out)
	for {
		line, err := read.ReadBytes('\n')
		if err != nil {
			break // the machine has ended
		}
		var e guest.Event
		if err := json.Unmarshal(line, &e); err != nil {
			continue // firmware and loader may write there before the guest does
		}
		hangs.Reset(m.silence)
		started = started || e.Kernel != ""
		done = done || e.Done
		broken += e.Broken
		on(e)
	}
	err = cmd.Wait()
	hangs.Stop()
	switch {
	case broken != "":
		return errors.New(broken)
	case done:
		return nil
	}
	reason := "it ended before its time"
	if cause := context.Cause(ctx); cause != nil {
		reason = cause.Error()
	} else if err != nil {
		reason = strings.TrimSpace(fmt.Sprintf("qemu: %v %s", err, said.Bytes()))
	}
	reason = fmt.Sprintf("%s; the end of its console:\n%s", reason, m.tail())
	if !started {
		return fmt.Errorf("%w: %s", errSilent, reason)
	}
	return errors.New(reason)
}

// tail is what the kernel said last.
func (m *machine) tail() string {
	const lines = 40
	text, err := os.ReadFile(m.console)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(text), "\r", "")), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// trouble is what no kernel says that is well.
var trouble = regexp.MustCompile(`(?m)^.*(?:\bBUG: |WARNING: CPU|WARNING: .* at |Oops: |general protection fault|INFO: rcu|blocked for more than).*$`)

// complaint is the first line of the console that tells of a bug in the kernel,
// or of one of ours that it found.
func (m *machine) complaint() string {
	text, err := os.ReadFile(m.console)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(trouble.FindString(string(text)))
}

// boot makes the machine of a kernel in dir and runs it: emulated, if it does
// not start otherwise, and once more if it does not start at all.
func boot(ctx context.Context, b built, k kernel, dir, source string, order func(emulated bool) guest.Order, silence time.Duration, on func(guest.Event)) (*machine, error) {
	m := &machine{
		kernel: k, image: filepath.Join(dir, "image-"+k.name), silence: silence,
		console: filepath.Join(dir, "console-"+k.name+".log"),
	}
	defer os.Remove(m.image)
	var err error
	for _, m.accel = range k.arch.accelerators() {
		if err = m.write(ctx, b, source, order(m.accel == "tcg")); err != nil {
			break
		}
		if err = m.run(ctx, on); !errors.Is(err, errSilent) {
			break
		}
	}
	return m, err
}

// write makes the machine's file system.
func (m *machine) write(ctx context.Context, b built, source string, o guest.Order) error {
	f, err := os.Create(m.image)
	if err != nil {
		return err
	}
	buffered := bufio.NewWriterSize(f, 1<<20)
	return errors.Join(b.image(ctx, buffered, m.kernel, source, o), buffered.Flush(), f.Close())
}
