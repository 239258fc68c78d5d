package loader

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func (fs FS) mount() string {
	if fs != "" {
		return string(fs)
	}
	if !isBPFFS(string(DefaultFS)) {
		for _, root := range ancestorRoots() {
			if path := root + string(DefaultFS); isBPFFS(path) {
				return path
			}
		}
	}
	return string(DefaultFS)
}

// ancestorRoots lists the root directories of those ancestors of this process
// that live in another mount namespace, the nearest first.
func ancestorRoots() []string {
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

func isBPFFS(path string) bool {
	var stat unix.Statfs_t
	return unix.Statfs(path, &stat) == nil && stat.Type == unix.BPF_FS_MAGIC
}

// mounted reports whether there is a bpffs.
func (fs FS) mounted() bool { return isBPFFS(fs.mount()) }

// writable refuses a bpffs that is mounted read-only. Not even reading works
// there: maps cannot be opened without writing permission.
func (fs FS) writable() error {
	var stat unix.Statfs_t
	if unix.Statfs(fs.mount(), &stat) == nil && stat.Flags&unix.ST_RDONLY != 0 {
		return fmt.Errorf("%w that can be written on %s: mount -o remount,rw it, or name another with --bpffs", ErrNoBPFFS, fs.mount())
	}
	return nil
}

// mountBPFFS mounts a BPF file system where one is looked for. The directory is
// made if it is missing, but not its parents. What is in a directory would be
// hidden by the mount.
func (fs FS) mountBPFFS() error {
	if fs == "" && len(ancestorRoots()) > 0 {
		// Mounted here, it would go with this command, and the state with it.
		return fmt.Errorf("%w on %s outside of this mount namespace: mount one there, or name the network namespace with -N instead of entering it",
			ErrNoBPFFS, fs.mount())
	}
	madeErr := os.Mkdir(fs.mount(), 0o755)
	if madeErr != nil && !errors.Is(madeErr, os.ErrExist) {
		return fmt.Errorf("%w: %v: name another place with --bpffs", ErrNoBPFFS, madeErr)
	}
	if entries, err := os.ReadDir(fs.mount()); err == nil && len(entries) > 0 {
		return fmt.Errorf("%w on %s: it is a directory with other files: name an empty one with --bpffs", ErrNoBPFFS, fs.mount())
	}
	err := unix.Mount("bpf", fs.mount(), "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
	if err == nil {
		return nil
	}
	if madeErr == nil {
		os.Remove(fs.mount())
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("mount bpffs on %s: %w: CAP_SYS_ADMIN is missing, or mount it beforehand", fs.mount(), ErrPermission)
	}
	return fmt.Errorf("%w on %s: mount: %v: mount one and name it with --bpffs", ErrNoBPFFS, fs.mount(), err)
}
