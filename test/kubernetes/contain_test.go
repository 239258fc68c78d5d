package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// contained is what a container is made of, beside the namespaces it starts in.
// This program makes it: "contain JSON [COMMAND…]" becomes the command.
type contained struct {
	Files        map[string]string // of the image: path in the container to path here
	Mounts       []mount           // volumes
	UID          int
	Capabilities []uint // all that are left
	NoNewPrivs   bool
	Seccomp      bool
	ReadOnly     bool // the image
	Args         []string
}

type mount struct{ From, At string }

// maybeContain becomes a container if the program was started as one.
func maybeContain() {
	if len(os.Args) < 3 || os.Args[1] != "contain" {
		return
	}
	runtime.LockOSThread() // to the exec, which takes over what this thread has
	var c contained
	err := json.Unmarshal([]byte(os.Args[2]), &c)
	if err == nil {
		err = c.become()
	}
	fmt.Fprintln(os.Stderr, "contain:", err)
	os.Exit(1)
}

func (c contained) become() error {
	if err := os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNS|unix.CLONE_NEWCGROUP)); err != nil {
		return err
	}
	if err := c.enterRoot(); err != nil {
		return err
	}
	if err := keepCapabilities(c.Capabilities); err != nil {
		return err
	}
	if c.UID != 0 {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(c.UID), syscall.Setuid(c.UID)); err != nil {
			return err
		}
	}
	if c.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return os.NewSyscallError("prctl", err)
		}
	}
	if c.Seccomp {
		if err := filterSyscalls(); err != nil {
			return err
		}
	}
	return syscall.Exec(c.Args[0], c.Args, os.Environ())
}

// What runtimes hide and protect below /proc and /sys, see the runtime
// specification's default of runc and containerd.
var (
	masked   = []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"}
	readOnly = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// enterRoot makes the container's file systems and forgets the machine's.
func (c contained) enterRoot() error {
	const root = "/mnt"
	const careful = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	do := func(source, at, kind string, flags uintptr, data string) error {
		if err := unix.Mount(source, at, kind, flags, data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", source, at, err)
		}
		return nil
	}
	bind := func(from, at string) error {
		info, err := os.Stat(from)
		if err != nil {
			return err
		}
		if info.IsDir() {
			err = os.MkdirAll(at, 0o755)
		} else if err = os.MkdirAll(filepath.Dir(at), 0o755); err == nil {
			var file *os.File
			if file, err = os.OpenFile(at, os.O_CREATE, 0o644); err == nil {
				err = file.Close()
			}
		}
		if err != nil {
			return err
		}
		return do(from, at, "", unix.MS_BIND|unix.MS_REC, "")
	}
	remount := func(at string) error {
		return do("none", at, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
	}
	if err := errors.Join(
		do("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		do("image", root, "tmpfs", 0, "mode=755"),
	); err != nil {
		return err
	}
	for at, from := range c.Files {
		if err := bind(from, root+at); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		at, kind string
		flags    uintptr
	}{
		{"/proc", "proc", careful},
		{"/dev", "tmpfs", unix.MS_NOSUID},
		{"/sys", "sysfs", careful | unix.MS_RDONLY},
		{"/sys/fs/cgroup", "cgroup2", careful | unix.MS_RDONLY},
	} {
		os.MkdirAll(root+m.at, 0o755)
		if err := do(m.kind, root+m.at, m.kind, m.flags, ""); err != nil {
			return err
		}
	}
	if err := bind("/dev/null", root+"/dev/null"); err != nil {
		return err
	}
	for _, path := range masked {
		info, err := os.Stat(root + path)
		switch {
		case errors.Is(err, os.ErrNotExist):
			continue
		case err != nil:
			return err
		case info.IsDir():
			err = do("masked", root+path, "tmpfs", unix.MS_RDONLY, "")
		default:
			err = bind("/dev/null", root+path)
		}
		if err != nil {
			return err
		}
	}
	for _, path := range readOnly {
		if _, err := os.Stat(root + path); errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := errors.Join(bind(root+path, root+path), remount(root+path)); err != nil {
			return err
		}
	}
	for _, m := range c.Mounts {
		if err := bind(m.From, root+m.At); err != nil {
			return err
		}
	}
	if c.ReadOnly {
		if err := remount(root); err != nil {
			return err
		}
	}
	// The old root goes on top of the new one, and from there away.
	return errors.Join(os.Chdir(root), unix.PivotRoot(".", "."), unix.Unmount(".", unix.MNT_DETACH), os.Chdir("/"))
}

// keepCapabilities takes all others from the calling thread for good.
func keepCapabilities(keep []uint) error {
	for bit := uint(0); ; bit++ {
		on, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(bit), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			return nil // there are no more
		}
		if on == 1 && !slices.Contains(keep, bit) {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(bit), 0, 0, 0); err != nil {
				return os.NewSyscallError("prctl PR_CAPBSET_DROP", err)
			}
		}
	}
}

// denied are calls that the profile RuntimeDefault of runc and containerd refuses
// to containers with the capabilities of the manifests, of those that rpsel makes
// somewhere.
var denied = []uint32{
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_SETNS, unix.SYS_UNSHARE, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_CHROOT,
	unix.SYS_FSOPEN, unix.SYS_MOVE_MOUNT, unix.SYS_KEYCTL, unix.SYS_USERFAULTFD, unix.SYS_IO_URING_SETUP,
}

// filterSyscalls lets them fail with EPERM.
func filterSyscalls() error {
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}} // its number
	for i, nr := range denied {
		filter = append(filter, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: uint8(len(denied) - i), K: nr})
	}
	filter = append(filter,
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
	)
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
	runtime.KeepAlive(filter)
	return os.NewSyscallError("prctl PR_SET_SECCOMP", err)
}
