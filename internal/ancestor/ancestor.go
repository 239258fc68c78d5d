// Package ancestor finds what a mount namespace hides: "ip netns exec" mounts a
// new /sys, below which neither bpffs nor cgroup2 are seen.
package ancestor

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Roots lists the root directories of those ancestors of this process
// that live in another mount namespace, the nearest first.
func Roots() []string {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil
	}
	var roots []string
	for pid := os.Getppid(); pid > 0; pid = parent(pid) {
		proc := fmt.Sprintf("/proc/%d", pid)
		if ns, err := os.Readlink(proc + "/ns/mnt"); err == nil && ns != own {
			roots = append(roots, proc+"/root")
		}
	}
	return roots
}

// parent returns the parent of a process, 0 if there is none to be seen.
func parent(pid int) int {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name in parentheses may hold anything, spaces and parentheses too.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	ppid, _ := strconv.Atoi(fields[1])
	return ppid
}
