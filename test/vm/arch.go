package main

import (
	"os"
	"regexp"

	"golang.org/x/sys/unix"
)

// arch is a processor architecture, and the machine that QEMU makes of it.
type arch struct {
	name    string            // to Go and Debian
	qemu    string            // the program
	in      string            // the package with that
	machine string            // its -machine
	cpu     map[string]string // its -cpu, by accelerator
	virtual *regexp.Regexp    // what a host's /proc/cpuinfo says if that can run such machines itself; nil: they are emulated
	console string            // what the guest calls its first serial port
	events  string            // and the one that events come over
	port    []string          // makes that one of the chardev "events"
	args    string            // more for the kernel's command line, emulated
}

// arches have two serial ports each. An emulated machine gets no time while this
// one is busy: x86's timer must not be taken for broken.
var arches = []arch{
	{
		name: "amd64", qemu: "qemu-system-x86_64", in: "qemu-system-x86", machine: "q35",
		// Emulated, cmpxchg16b now and then leaves flags that are none (seen with QEMU
		// 7.2: Linux 6.12, which allocates memory by it, then dies of a double fault).
		cpu:     map[string]string{"kvm": "max", "tcg": "max,cx16=off"},
		virtual: regexp.MustCompile(`(?m)^flags.* (vmx|svm)( |$)`),
		console: "ttyS0", events: "/dev/ttyS1", port: []string{"-serial", "chardev:events"},
		args: "no_timer_check",
	},
	{
		name: "arm64", qemu: "qemu-system-aarch64", in: "qemu-system-arm", machine: "virt",
		// The architecture's own cipher for signed pointers is slow to emulate.
		cpu:     map[string]string{"tcg": "max,pauth-impdef=on"},
		console: "ttyAMA0", events: "/dev/ttyS0", port: []string{"-device", "pci-serial,chardev=events"},
	},
}

// accelerators are what to try, in this order, until a machine starts: the
// processor's own virtualization where there is one, then emulation.
func (a arch) accelerators() []string {
	// There may be a /dev/kvm that nothing runs with, in a guest for example.
	if cpu, err := os.ReadFile("/proc/cpuinfo"); err == nil && a.virtual != nil && a.virtual.Match(cpu) &&
		unix.Access("/dev/kvm", unix.R_OK|unix.W_OK) == nil {
		return []string{"kvm", "tcg"}
	}
	return []string{"tcg", "tcg"}
}
