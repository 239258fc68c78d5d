package loader

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/sockets"
)

// DefaultFS is where a bpffs usually is.
const DefaultFS FS = "/sys/fs/bpf"

// FS is the mount point of the BPF file system that holds rpsel's state. The
// empty string is DefaultFS; where "ip netns exec" or the like hides that below
// a new /sys, it is reached by way of the root of an ancestor process.
//
// State of a group is in the directory rpsel/NETNS/GROUP, made aside under a
// name that begins with tmp_ and put in place by one rename. Directories have
// mode 0700, files 0600.
type FS string

const (
	rootName  = "rpsel"
	tmpPrefix = "tmp_"
	dirMode   = 0o700
	fileMode  = 0o600
)

// lockPatience is how long a command waits for another one. Tests are less
// patient.
var lockPatience = 10 * time.Second

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

func (fs FS) root() string { return filepath.Join(fs.mount(), rootName) }

func (fs FS) netnsDir(cookie uint64) string {
	return filepath.Join(fs.root(), strconv.FormatUint(cookie, 10))
}

func (fs FS) groupDir(k Key) string { return filepath.Join(fs.netnsDir(k.NetNS), dirName(k)) }

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

// prepare mounts the bpffs if it is missing, and makes the directory of the
// namespace.
func (fs FS) prepare(netns uint64) error {
	if !fs.mounted() {
		if err := fs.mountBPFFS(); err != nil {
			return err
		}
	}
	if err := fs.writable(); err != nil {
		return err
	}
	for _, dir := range []string{fs.root(), fs.netnsDir(netns)} {
		if err := os.Mkdir(dir, dirMode); err != nil && !errors.Is(err, os.ErrExist) {
			if errors.Is(err, os.ErrPermission) {
				return fmt.Errorf("make %s: %w: run as root", dir, ErrPermission)
			}
			return fmt.Errorf("make %s: %w", dir, err)
		}
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

// dirName names the directory of a group. A bpffs takes no name with a dot in
// it, hence the address in hexadecimal.
func dirName(k Key) string {
	address := k.Addr.Addr().AsSlice()
	s := fmt.Sprintf("%s_%s_%d", k.Proto, hex.EncodeToString(address), k.Addr.Port())
	if k.Device != 0 {
		s += fmt.Sprintf("_dev%d", k.Device)
	}
	if k.V6Only {
		s += "_v6only"
	}
	if k.UID != 0 {
		s += fmt.Sprintf("_uid%d", k.UID)
	}
	return s
}

// parseDirName undoes dirName. It reports false for names that are no group's.
func parseDirName(netns uint64, name string) (Key, bool) {
	parts := strings.Split(name, "_")
	if len(parts) < 3 {
		return Key{}, false
	}
	k := Key{NetNS: netns}
	if k.Proto.UnmarshalText([]byte(parts[0])) != nil {
		return Key{}, false
	}
	raw, err := hex.DecodeString(parts[1])
	address, ok := netip.AddrFromSlice(raw)
	port, portErr := strconv.ParseUint(parts[2], 10, 16)
	if err != nil || !ok || portErr != nil {
		return Key{}, false
	}
	k.Addr = netip.AddrPortFrom(address, uint16(port))
	for _, part := range parts[3:] {
		device, isDevice := strings.CutPrefix(part, "dev")
		uid, isUID := strings.CutPrefix(part, "uid")
		var n uint64
		switch {
		case part == "v6only":
			k.V6Only = true
		case isDevice:
			n, err = strconv.ParseUint(device, 10, 32)
			k.Device = uint32(n)
		case isUID:
			n, err = strconv.ParseUint(uid, 10, 32)
			k.UID = uint32(n)
		default:
			return Key{}, false
		}
		if err != nil {
			return Key{}, false
		}
	}
	return k, dirName(k) == name
}

// Keys lists the groups with state in a network namespace, given by its cookie,
// or in all of them (zero), sorted. Where there is no bpffs there are none.
func (fs FS) Keys(netns uint64) ([]Key, error) {
	if !fs.mounted() {
		return nil, nil
	}
	namespaces, err := os.ReadDir(fs.root())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, readDirError(err)
	}
	var keys []Key
	for _, ns := range namespaces {
		cookie, err := strconv.ParseUint(ns.Name(), 10, 64)
		if err != nil || netns != 0 && netns != cookie {
			continue
		}
		groups, err := os.ReadDir(fs.netnsDir(cookie))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, readDirError(err)
		}
		for _, g := range groups {
			if k, ok := parseDirName(cookie, g.Name()); ok {
				keys = append(keys, k)
			}
		}
	}
	slices.SortFunc(keys, func(a, b Key) int {
		if a.NetNS != b.NetNS {
			return int(min(max(int64(a.NetNS-b.NetNS), -1), 1))
		}
		return strings.Compare(dirName(a), dirName(b))
	})
	return keys, nil
}

func readDirError(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("read rpsel state: %w: run as root", ErrPermission)
	}
	return fmt.Errorf("read rpsel state: %w", err)
}

// lock takes the lock of a network namespace, for as long as one change takes.
type lock struct {
	dir *os.File
}

// lock waits for at most lockPatience. The directory must exist.
func (fs FS) lock(netns uint64) (*lock, error) {
	if err := fs.writable(); err != nil {
		return nil, err
	}
	path := fs.netnsDir(netns)
	deadline := time.Now().Add(lockPatience)
	for {
		dir, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		err = flockUntil(dir, deadline)
		if err != nil {
			dir.Close()
			return nil, err
		}
		held, err1 := dir.Stat()
		now, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(held, now) {
			return &lock{dir}, nil
		}
		// The directory was replaced while we waited: the lock is worth nothing.
		dir.Close()
		if err1 != nil {
			return nil, err1
		}
		if err2 != nil {
			return nil, err2
		}
	}
}

func (l *lock) unlock() { l.dir.Close() }

// lockNew is lock for a namespace whose directory may have to be made, or be
// removed by a detach while it waits.
func (fs FS) lockNew(netns uint64) (*lock, error) {
	for {
		if err := fs.prepare(netns); err != nil {
			return nil, err
		}
		l, err := fs.lock(netns)
		if !errors.Is(err, os.ErrNotExist) {
			return l, err
		}
	}
}

// flockUntil polls, since flock(2) knows no deadline.
func flockUntil(dir *os.File, deadline time.Time) error {
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return os.NewSyscallError("flock", err)
		case time.Now().After(deadline):
			return fmt.Errorf("%w: %s holds %s for more than %v: try again, or look what it waits for",
				ErrLocked, lockHolder(dir), dir.Name(), lockPatience)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// lockHolder names the process that has the directory locked (proc(5), locks).
func lockHolder(dir *os.File) string {
	var stat unix.Stat_t
	table, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Fstat(int(dir.Fd()), &stat) != nil {
		return "another process"
	}
	for line := range strings.Lines(string(table)) {
		// 1: FLOCK  ADVISORY  WRITE 4711 00:1b:12345 0 EOF
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" || !strings.HasSuffix(f[5], ":"+strconv.FormatUint(stat.Ino, 10)) {
			continue
		}
		command, _ := os.ReadFile("/proc/" + f[4] + "/comm")
		return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(command)), f[4])
	}
	return "another process"
}

// sweepAside removes what commands left behind that were killed while they
// made or removed a group. The caller holds the lock, so nobody is at it.
func (fs FS) sweepAside(netns uint64) error {
	entries, err := os.ReadDir(fs.netnsDir(netns))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) {
			if err := os.RemoveAll(filepath.Join(fs.netnsDir(netns), e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Sweep removes what killed commands left behind in a network namespace, given
// by its cookie. It waits for a command that is at work there.
//
// Errors: ErrLocked, ErrPermission, ErrNoBPFFS.
func (fs FS) Sweep(netns uint64) error {
	l, err := fs.lock(netns)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("read rpsel state: %w: run as root", ErrPermission)
	}
	if err != nil {
		return err
	}
	defer l.unlock()
	err = fs.sweepAside(netns)
	fs.tidy(netns)
	return err
}

// tidy removes directories that hold nothing any more. The caller has the lock.
func (fs FS) tidy(netns uint64) {
	if os.Remove(fs.netnsDir(netns)) == nil {
		os.Remove(fs.root())
	}
}

// aside is a name for a directory that is being made or removed.
func (fs FS) aside(k Key) string {
	return filepath.Join(fs.netnsDir(k.NetNS), fmt.Sprintf("%s%d_%s", tmpPrefix, os.Getpid(), dirName(k)))
}

// ownNetNS returns the cookie of the caller's namespace.
func ownNetNS() (uint64, error) {
	ns, err := sockets.OpenNetNS("")
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	return ns.Cookie(), nil
}
