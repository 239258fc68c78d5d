package cgroup

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/ancestor"
)

// Own returns the directory of the calling process's cgroup in the cgroup2
// file system. Where the caller's mount namespace hides that file system, the
// directory is given by way of the root of an ancestor process.
//
// Errors: ErrNoCgroup2, ErrOutside.
func Own() (string, error) { return visible(locate) }

// Root returns the highest directory of the cgroup2 file system that can be
// seen, as Own does: the root of the hierarchy, in a container usually the root
// of the cgroup namespace.
//
// Errors: ErrNoCgroup2, ErrOutside.
func Root() (string, error) { return visible(highest) }

// visible looks for a directory among the caller's mounts, then among those of
// its ancestors.
func visible(in func(cgroups, mountinfo string) ([]string, error)) (string, error) {
	dir, err := visibleOf("/proc/self/mountinfo", "", in)
	if err == nil {
		return dir, nil
	}
	for _, root := range ancestor.Roots() {
		if found, otherErr := visibleOf(filepath.Join(filepath.Dir(root), "mountinfo"), root, in); otherErr == nil {
			return found, nil
		}
	}
	return "", err
}

// visibleOf looks among the mounts of a process, whose root directory is root.
func visibleOf(mountinfo, root string, in func(cgroups, mountinfo string) ([]string, error)) (string, error) {
	cgroups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	mounts, err := os.ReadFile(mountinfo)
	if err != nil {
		return "", err
	}
	dirs, err := in(string(cgroups), string(mounts))
	if err != nil {
		return "", err
	}
	for _, dir := range dirs {
		dir = root + dir
		// What is mounted may be hidden below another mount.
		if isCgroup2(dir) {
			return dir, nil
		}
	}
	return "", fmt.Errorf("%s: %w: another file system is mounted over it", dirs[0], ErrOutside)
}

const howToMount = "mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2"

// highest lists the mount points of cgroup2 in the text of
// /proc/self/mountinfo, the highest first, and never none without an error.
// Whether they are writable does not matter: programs can be attached all the
// same.
func highest(_, mountinfo string) ([]string, error) {
	var mounts []mount
	err := fmt.Errorf("%w: %s", ErrNoCgroup2, howToMount)
	for line := range strings.Lines(mountinfo) {
		m, ok := parseMount(line)
		switch {
		case !ok:
		case strings.HasPrefix(m.root, "/..") && strings.Trim(m.root, "/.") != "":
			// A part beside the cgroup namespace has nothing of it below.
			err = fmt.Errorf("%s: %w: %s", m.point, ErrOutside, howToMount)
		default:
			mounts = append(mounts, m)
		}
	}
	if len(mounts) == 0 {
		return nil, err
	}
	slices.SortStableFunc(mounts, func(a, b mount) int { return cmp.Compare(a.depth(), b.depth()) })
	dirs := make([]string, 0, len(mounts))
	for _, m := range mounts {
		dirs = append(dirs, m.point)
	}
	return dirs, nil
}

// locate finds the caller's cgroup in the texts of /proc/self/cgroup and
// /proc/self/mountinfo (cgroups(7), proc_pid_mountinfo(5)). It gives all places
// where the cgroup is visible, writable ones first, and never none without an
// error.
func locate(cgroups, mountinfo string) ([]string, error) {
	own, mounted := "", false
	for line := range strings.Lines(cgroups) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			own, mounted = path, true
		}
	}
	if !mounted {
		return nil, fmt.Errorf("%w: %s", ErrNoCgroup2, howToMount)
	}

	var writable, readOnly []string
	mounted = false
	for line := range strings.Lines(mountinfo) {
		m, ok := parseMount(line)
		if !ok {
			continue
		}
		mounted = true
		below, ok := pathBelow(own, m.root)
		if !ok {
			continue
		}
		dir := filepath.Join(m.point, below)
		if m.readOnly {
			readOnly = append(readOnly, dir)
		} else {
			writable = append(writable, dir)
		}
	}
	if !mounted {
		return nil, fmt.Errorf("%w: %s", ErrNoCgroup2, howToMount)
	}
	dirs := append(writable, readOnly...)
	if len(dirs) == 0 {
		return nil, fmt.Errorf("%s: %w of this cgroup namespace: %s", own, ErrOutside, howToMount)
	}
	return dirs, nil
}

// mount is a mount of a cgroup2 file system, or of a part of it.
type mount struct {
	root     string // the part, as this cgroup namespace names it
	point    string
	readOnly bool
}

// depth is how far below the root of the cgroup namespace the part is, negative
// above it.
func (m mount) depth() int {
	depth := 0
	for name := range strings.SplitSeq(strings.Trim(m.root, "/"), "/") {
		switch name {
		case "":
		case "..":
			depth--
		default:
			depth++
		}
	}
	return depth
}

// parseMount reads a line of mountinfo; ok is false if it is of another file
// system.
func parseMount(line string) (m mount, ok bool) {
	before, after, _ := strings.Cut(line, " - ")
	fields, fs := strings.Fields(before), strings.Fields(after)
	if len(fields) < 6 || len(fs) < 3 || fs[0] != "cgroup2" {
		return m, false
	}
	readOnly := func(options string) bool { return slices.Contains(strings.Split(options, ","), "ro") }
	return mount{
		root:     unescape(fields[3]),
		point:    unescape(fields[4]),
		readOnly: readOnly(fields[5]) || readOnly(fs[2]),
	}, true
}

// pathBelow gives path relative to root. A path with ".." leads out of the
// cgroup namespace, to names that cannot be known.
func pathBelow(path, root string) (string, bool) {
	if strings.HasPrefix(path, "/..") || strings.HasPrefix(root, "/..") {
		return "", false
	}
	if root == "/" {
		return path, true
	}
	below, ok := strings.CutPrefix(path, root)
	return below, ok && (below == "" || below[0] == '/')
}

// unescape undoes the octal escapes of mountinfo (fs/proc_namespace.c mangle).
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isCgroup2(dir string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
}

// OldControllers tells whether the cgroup v1 controllers net_cls or net_prio
// are mounted. Where they are in use, kernels before 5.15 take every socket for
// one of the root cgroup (8520e224f547), and programs elsewhere never run.
func OldControllers() (bool, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	return oldControllers(string(mounts)), err
}

func oldControllers(mountinfo string) bool {
	for line := range strings.Lines(mountinfo) {
		_, after, _ := strings.Cut(line, " - ")
		fs := strings.Fields(after)
		if len(fs) < 3 || fs[0] != "cgroup" {
			continue
		}
		for option := range strings.SplitSeq(fs[2], ",") {
			if option == "net_cls" || option == "net_prio" {
				return true
			}
		}
	}
	return false
}
