package sockets

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/capability"
)

// runNetNS is where ip-netns(8) keeps named namespaces.
const runNetNS = "/run/netns"

// NetNS is a network namespace held open. Its methods may be called
// concurrently, but not after Close.
type NetNS struct {
	file   *os.File
	inode  uint64
	cookie uint64
}

// OpenNetNS opens a network namespace: "" is the calling thread's, digits are
// a pid, what has a slash is a path, anything else a name in /run/netns. The
// caller closes it. ErrNoNetNS: there is none; ErrPermission: entering it needs
// CAP_SYS_ADMIN, or looking at that process CAP_SYS_PTRACE.
func OpenNetNS(spec string) (*NetNS, error) {
	var path, what string
	switch {
	case spec == "":
		path, what = "/proc/thread-self/ns/net", "own network namespace"
	case strings.Trim(spec, "0123456789") == "":
		path, what = filepath.Join("/proc", spec, "ns/net"), "network namespace of process "+spec
	case strings.Contains(spec, "/"):
		path, what = spec, "network namespace "+spec
	default:
		path, what = filepath.Join(runNetNS, spec), "network namespace "+spec
	}
	n, err := openNetNS(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return n, nil
}

// NetNSes opens the network namespaces that can be seen from here, each once:
// the caller's own first, then those of processes and those that are mounted
// somewhere (ip-netns(8), containers). Left out are those that the caller may
// not open or enter (CAP_SYS_PTRACE, CAP_SYS_ADMIN), and those that only threads,
// descriptors or sockets keep. The caller closes them.
func NetNSes() (_ []*NetNS, err error) {
	var all []*NetNS
	defer func() {
		if err != nil {
			for _, n := range all {
				n.Close()
			}
		}
	}()
	seen := map[uint64]bool{}
	add := func(path string) error {
		var stat unix.Stat_t
		if unix.Stat(path, &stat) == nil && seen[stat.Ino] {
			return nil
		}
		n, err := openNetNS(path)
		if errors.Is(err, ErrNoNetNS) || errors.Is(err, ErrPermission) {
			return nil // gone meanwhile, or none of the caller's business
		}
		if err != nil {
			return fmt.Errorf("network namespace %s: %w", path, err)
		}
		if seen[n.inode] {
			return n.Close()
		}
		seen[n.inode] = true
		all = append(all, n)
		return nil
	}
	if err := add("/proc/thread-self/ns/net"); err != nil {
		return nil, err
	}
	processes, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return nil, err
	}
	mounted, err := mountedNetNSes()
	if err != nil {
		return nil, err
	}
	for _, path := range append(processes, mounted...) {
		if err := add(path); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// mountedNetNSes lists where network namespaces are mounted.
func mountedNetNSes() ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	// As fs/proc_namespace.c mangle writes it.
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var paths []string
	for line := range strings.Lines(string(text)) {
		// 41 31 0:4 net:[4026532256] /run/netns/blue rw shared:9 - nsfs nsfs rw
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasPrefix(f[3], "net:[") {
			paths = append(paths, unescape.Replace(f[4]))
		}
	}
	return paths, nil
}

func openNetNS(path string) (*NetNS, error) {
	// O_NONBLOCK: the path may name a FIFO.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENAMETOOLONG):
		return nil, ErrNoNetNS
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, capability.Denied("open", capability.Ptrace)
	case err != nil:
		return nil, os.NewSyscallError("open", err)
	}
	unix.SetNonblock(fd, false) // keeps it out of Go's poller
	return netNSOf(fd, path)
}

// netNSOf makes a NetNS of a descriptor, which it takes over.
func netNSOf(fd int, path string) (_ *NetNS, err error) {
	n := &NetNS{file: os.NewFile(uintptr(fd), path)}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return nil, fmt.Errorf("%w: the file is something else", ErrNoNetNS)
	}
	if n.inode, err = inode(fd); err != nil {
		return nil, err
	}
	// Only a socket knows the cookie of its namespace.
	err = n.Do(func() error {
		s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		defer unix.Close(s)
		n.cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if errors.Is(err, unix.ENOPROTOOPT) {
			return fmt.Errorf("%w: SO_NETNS_COOKIE needs Linux 5.14", ErrUnsupported)
		}
		return os.NewSyscallError("getsockopt SO_NETNS_COOKIE", err)
	})
	if err != nil {
		return nil, err
	}
	return n, nil
}

// Cookie is the namespace's number, never reused before the next boot.
func (n *NetNS) Cookie() uint64 { return n.cookie }

// Path is what the namespace was opened by. It may lead to another one by now, or
// to none: whoever opens it again compares the cookie.
func (n *NetNS) Path() string { return n.file.Name() }

// Inode is the number people know the namespace by (stat /proc/PID/ns/net).
func (n *NetNS) Inode() uint64 { return n.inode }

// Close gives the descriptor back. Only the first call does something.
func (n *NetNS) Close() error {
	if err := n.file.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Do runs fn on a thread in the namespace and returns its error. Sockets that
// fn opens stay in the namespace; goroutines it starts run outside. It needs
// CAP_SYS_ADMIN, unless it is the namespace of the process.
func (n *NetNS) Do(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("function did not return") // runtime.Goexit
		defer func() { done <- err }()
		runtime.LockOSThread()
		back, enterErr := n.enter()
		if enterErr != nil {
			err = enterErr
			runtime.UnlockOSThread()
			return
		}
		// A thread that cannot go back is never unlocked, and so ends with
		// this goroutine instead of serving others from the wrong namespace.
		defer func() {
			if back() == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = fn()
	}()
	return <-done
}

// enter moves the calling thread into the namespace and returns the way back.
// A thread that is there already needs no privilege.
func (n *NetNS) enter() (back func() error, err error) {
	old, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open /proc/thread-self/ns/net", err)
	}
	if now, err := inode(old); err == nil && now == n.inode {
		unix.Close(old)
		return func() error { return nil }, nil
	}
	err = unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET)
	runtime.KeepAlive(n)
	if err != nil {
		unix.Close(old)
		if errors.Is(err, unix.EPERM) {
			return nil, capability.Denied("enter network namespace", capability.SysAdmin)
		}
		return nil, os.NewSyscallError("setns", err)
	}
	return func() error {
		defer unix.Close(old)
		return unix.Setns(old, unix.CLONE_NEWNET)
	}, nil
}

func inode(fd int) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	return stat.Ino, nil
}
