package testnet

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// CPUs are those the calling thread may run on.
func CPUs(t testing.TB) (cpus []int) {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus
}

// Pin ties the goroutine to a CPU, for good: its thread ends with it. It may be called by
// any goroutine of a test.
func Pin(t testing.TB, cpu int) {
	t.Helper()
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		t.Errorf("to CPU %d: %v", cpu, err)
	}
}
