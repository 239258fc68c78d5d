//go:build linux

// Command init is the first and only process that a test machine starts by
// itself. It does what the Order says, reports it and ends the machine.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/test/vm/guest"
)

func main() {
	// An init that ends makes the kernel panic.
	defer unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // qemu takes this for its end
	ready := errors.Join(mount(), unix.Setrlimit(unix.RLIMIT_NOFILE, &files))
	o, err := order()
	if err != nil {
		fmt.Println("init:", err)
		return
	}
	r, err := newReporter(o.Port)
	if err != nil {
		fmt.Println("init:", err)
		return
	}
	if err := errors.Join(ready, work(r, o)); err != nil {
		r.tell(guest.Event{Broken: err.Error()})
	}
	r.tell(guest.Event{Done: true})
	unix.IoctlSetInt(int(r.port.Fd()), unix.TCSBRK, 1) // waits until all is out
}

// files is the limit of descriptors that systemd gives, instead of the kernel's 4096.
var files = unix.Rlimit{Cur: 1024, Max: 512 << 10}

// mounts are those that a distribution's init makes, as far as tests look at
// them.
var mounts = []struct{ fstype, dir, data string }{
	{"proc", "/proc", ""},
	{"sysfs", "/sys", ""},
	{"devtmpfs", "/dev", ""},
	{"devpts", "/dev/pts", "ptmxmode=0666"},
	{"tmpfs", "/dev/shm", ""},
	{"tmpfs", "/run", "mode=0755"},
	{"tmpfs", "/tmp", "mode=1777"},
	{"cgroup2", "/sys/fs/cgroup", ""},
	{"bpf", "/sys/fs/bpf", "mode=0700"},
}

// leaveRoot goes to a mount of the kernel's own root that lies on it: the one below is none that
// pivot_root(2), which makes containers, would leave.
func leaveRoot() error {
	const dir = "/mnt"
	return errors.Join(
		unix.Mount("/", dir, "", unix.MS_BIND, ""), unix.Chdir(dir),
		unix.Mount(dir, "/", "", unix.MS_MOVE, ""), unix.Chroot("."), unix.Chdir("/"))
}

func mount() (err error) {
	if err := leaveRoot(); err != nil {
		return fmt.Errorf("leave the first root: %w", err)
	}
	for _, m := range mounts {
		os.Mkdir(m.dir, 0o755) // most are there
		if mountErr := unix.Mount(m.fstype, m.dir, m.fstype, 0, m.data); mountErr != nil && mountErr != unix.EBUSY {
			err = errors.Join(err, fmt.Errorf("mount %s: %w", m.dir, mountErr))
		}
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		os.Symlink(target, "/dev/"+name)
	}
	return err
}

func order() (o guest.Order, err error) {
	text, err := os.ReadFile(guest.OrderFile)
	if err != nil {
		return o, err
	}
	if err := json.Unmarshal(text, &o); err != nil {
		return o, fmt.Errorf("%s: %w", guest.OrderFile, err)
	}
	return o, nil
}

func work(r *reporter, o guest.Order) error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return os.NewSyscallError("uname", err)
	}
	r.tell(guest.Event{Kernel: unix.ByteSliceToString(name.Release[:])})
	// Whatever needs more memory than there is shall fail with a word about it,
	// not some process that happens to be killed.
	if err := os.WriteFile("/proc/sys/vm/panic_on_oom", []byte("1"), 0); err != nil {
		return err
	}
	for _, path := range o.Modules {
		if err := load(path); err != nil {
			return fmt.Errorf("load %s: %w", path, err)
		}
	}
	if err := loopback(); err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	for _, run := range o.Runs {
		if err := start(r, run, o.Env); err != nil {
			return fmt.Errorf("%s: %w", run.Name, err)
		}
	}
	return nil
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

func loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// start runs a program and buries what it leaves behind: the processes it
// started become this one's children when their parent ends.
func start(r *reporter, run guest.Run, env []string) error {
	r.tell(guest.Event{Run: run.Name})
	out, in, err := os.Pipe()
	if err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	began := time.Now()
	p, err := os.StartProcess(run.Argv[0], run.Argv, &os.ProcAttr{
		Dir: run.Dir, Env: env, Files: []*os.File{null, in, in},
	})
	in.Close()
	if err != nil {
		return err
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		io.Copy(r, out)
	}()
	end, err := bury(p.Pid)
	if err != nil {
		return err
	}
	end.Took = time.Since(began)
	// Those that are left would keep the pipe open, and disturb the next run.
	unix.Kill(-1, unix.SIGKILL)
	<-copied
	out.Close()
	r.tell(guest.Event{End: &end})
	return nil
}

// bury waits for children until this one has ended.
func bury(pid int) (guest.End, error) {
	for {
		var status unix.WaitStatus
		switch ended, err := unix.Wait4(-1, &status, 0, nil); {
		case err == unix.EINTR:
		case err != nil:
			return guest.End{}, os.NewSyscallError("wait4", err)
		case ended == pid && status.Signaled():
			return guest.End{Code: -1, How: status.Signal().String()}, nil
		case ended == pid:
			return guest.End{Code: status.ExitStatus()}, nil
		}
	}
}

// reporter writes Events to the port.
type reporter struct {
	mu   sync.Mutex
	port *os.File
}

func newReporter(path string) (*reporter, error) {
	port, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(port.Fd()), unix.TCGETS)
	if err == nil {
		t.Oflag = 0 // no carriage returns
		err = unix.IoctlSetTermios(int(port.Fd()), unix.TCSETS, t)
	}
	return &reporter{port: port}, err
}

func (r *reporter) tell(e guest.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := json.NewEncoder(r.port).Encode(e); err != nil {
		fmt.Println("init:", err) // the console is all that is left
	}
}

// Write reports the output of a run.
func (r *reporter) Write(p []byte) (int, error) {
	r.tell(guest.Event{Output: p})
	return len(p), nil
}
