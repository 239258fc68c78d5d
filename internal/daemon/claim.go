package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/internal/door"
)

// ErrRunning: another agent keeps this BPF file system.
var ErrRunning = errors.New("an agent is running")

// Mode is how an agent learns of new listeners.
type Mode string

// The modes.
const (
	Events  Mode = "events"  // the kernel tells
	Polling Mode = "polling" // it asks the kernel, four times a second
)

// Info is what an agent says of itself.
type Info struct {
	PID  int  `json:"pid"`
	Mode Mode `json:"mode"`
	// Reason is why it polls.
	Reason string `json:"reason"`
	// Refused is what its file says of groups and is not so, since it cannot be
	// changed while they are attached.
	Refused []string `json:"refused"`
}

const (
	lockName = "agent.lock"
	infoName = "agent.json"
	lockMode = 0o600
)

// claim is the right to keep a BPF file system. It ends with the process.
type claim struct {
	dir  string
	lock *os.File
}

// newClaim makes the run directory and takes its lock.
func newClaim(bpffs string) (*claim, error) {
	dir, err := agent.Dir(bpffs)
	if err != nil {
		return nil, err
	}
	if err := door.MakeDir(dir); err != nil {
		return nil, fmt.Errorf("make the run directory: %w", err)
	}
	// Whoever may read it may lock it for reading, and keep the agent out.
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, lockMode)
	if err != nil {
		return nil, err
	}
	if err := lock.Chmod(lockMode); err != nil {
		lock.Close()
		return nil, err
	}
	err = unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	if errors.Is(err, unix.EAGAIN) {
		err = fmt.Errorf("%w%s: stop it first, or name another BPF file system with --bpffs", ErrRunning, holder(dir))
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	os.Remove(filepath.Join(dir, infoName)) // of one that was killed
	return &claim{dir, lock}, nil
}

// holder names the agent that has the lock. It may have only just taken it.
func holder(dir string) string {
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if i, err := readInfo(dir); err == nil {
			return fmt.Sprintf(" (pid %d)", i.PID)
		}
	}
	return ""
}

// say tells those who look how the agent works.
func (c *claim) say(i Info) error {
	text, err := json.Marshal(i)
	if err != nil {
		return err
	}
	path := filepath.Join(c.dir, infoName)
	if err := os.WriteFile(path+".new", append(text, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// drop gives the right back.
func (c *claim) drop() {
	os.Remove(filepath.Join(c.dir, infoName))
	c.lock.Close()
}

func readInfo(dir string) (Info, error) {
	var i Info
	text, err := os.ReadFile(filepath.Join(dir, infoName))
	if err != nil {
		return i, err
	}
	return i, json.Unmarshal(text, &i)
}

// Running finds the agent that keeps a BPF file system; nil: there is none.
func Running(bpffs string) (*Info, error) {
	dir, err := agent.Dir(bpffs)
	if err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	// Asking takes nothing, so that an agent that starts now is not refused.
	held := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(lock.Fd(), unix.F_OFD_GETLK, &held); err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	if held.Type == unix.F_UNLCK {
		return nil, nil
	}
	i, err := readInfo(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // it is about to start, or to end
	}
	if err != nil {
		return nil, err
	}
	return &i, nil
}
