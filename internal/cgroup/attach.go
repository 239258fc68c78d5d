package cgroup

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/capability"
)

// Program is a BPF program and the hook it is for.
type Program struct {
	Program *ebpf.Program
	Hook    ebpf.AttachType
}

// Attach attaches programs to the cgroup beside those of other tools. They stay
// until the cgroup is removed. Nothing is attached if one cannot be.
//
// Errors: ErrOccupied, ErrPermission.
func (d *Dir) Attach(programs []Program) error {
	var done []Program
	err := d.attach(programs, func(p Program) error {
		err := link.RawAttachProgram(link.RawAttachProgramOptions{
			Target: int(d.file.Fd()), Program: p.Program, Attach: p.Hook, Flags: unix.BPF_F_ALLOW_MULTI,
		})
		if err == nil {
			done = append(done, p)
		}
		return err
	})
	if err == nil {
		return nil
	}
	errs := []error{err}
	for _, p := range done {
		errs = append(errs, link.RawDetachProgram(link.RawDetachProgramOptions{
			Target: int(d.file.Fd()), Program: p.Program, Attach: p.Hook,
		}))
	}
	return errors.Join(errs...)
}

// Link is Attach for programs that stay until their links are closed, or the
// process ends.
func (d *Dir) Link(programs []Program) (all Links, err error) {
	err = d.attach(programs, func(p Program) error {
		l, err := link.AttachRawLink(link.RawLinkOptions{
			Target: int(d.file.Fd()), Program: p.Program, Attach: p.Hook,
		})
		if err == nil {
			all = append(all, l)
		}
		return err
	})
	if err != nil {
		return nil, errors.Join(err, all.Close())
	}
	return all, nil
}

// Links hold programs in their places, in the order they were given.
type Links []*link.RawLink

// Close takes those off that are not pinned.
func (ls Links) Close() error {
	var errs []error
	for _, l := range ls {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// attach attaches by one, after a look at other tools' programs.
func (d *Dir) attach(programs []Program, one func(Program) error) error {
	for _, p := range programs {
		if err := d.checkAbove(p.Hook); err != nil {
			return err
		}
	}
	return d.attachEach(programs, one)
}

// attachEach attaches by one, and finds out whether programs are in the way
// that checkAbove cannot see.
func (d *Dir) attachEach(programs []Program, one func(Program) error) error {
	for _, p := range programs {
		before, err := d.effective(p.Hook)
		if err != nil {
			return err
		}
		if err := one(p); err != nil {
			if errors.Is(err, unix.EPERM) {
				return fmt.Errorf("%s of %s: %w: it is attached exclusively, above this cgroup namespace: run rpsel outside of the container", p.Hook, d.path, ErrOccupied)
			}
			return fmt.Errorf("attach %s to %s: %w", p.Hook, d.path, err)
		}
		after, err := d.effective(p.Hook)
		if err != nil {
			return err
		}
		for _, id := range before {
			if !slices.Contains(after, id) {
				return fmt.Errorf("%s of %s: %w: ours would switch off %s, attached with ALLOW_OVERRIDE above this cgroup namespace: run rpsel outside of the container",
					p.Hook, d.path, ErrOccupied, describe(id))
			}
		}
	}
	return nil
}

// checkAbove looks for a program that would refuse ours, or be switched off by
// it, from the cgroup itself up to the mount point. The next one that has
// programs at all decides (kernel/bpf/cgroup.c hierarchy_allows_attach,
// compute_effective_progs).
func (d *Dir) checkAbove(hook ebpf.AttachType) error {
	for dir := d.path; isCgroup2(dir); dir = filepath.Dir(dir) {
		above, err := Open(dir)
		if err != nil {
			return err
		}
		ids, flags, err := above.programs(hook)
		above.Close()
		if err != nil {
			return err
		}
		if len(ids) == 0 {
			continue
		}
		const wayOut = "detach it, attach it with BPF_F_ALLOW_MULTI, or run rpsel in a cgroup that is not below"
		switch {
		case flags&unix.BPF_F_ALLOW_MULTI != 0:
			return nil
		case flags&unix.BPF_F_ALLOW_OVERRIDE != 0 && dir != d.path:
			return fmt.Errorf("%s of %s: %w: ours would switch off %s, attached to %s with ALLOW_OVERRIDE: %s", hook, d.path, ErrOccupied, describe(ids[0]), dir, wayOut)
		default:
			return fmt.Errorf("%s of %s: %w: %s is attached to %s exclusively: %s", hook, d.path, ErrOccupied, describe(ids[0]), dir, wayOut)
		}
	}
	return nil
}

// describe names a program as bpftool does.
func describe(id ebpf.ProgramID) string {
	name := ""
	if p, err := ebpf.NewProgramFromID(id); err == nil {
		if info, err := p.Info(); err == nil {
			name = info.Name
		}
		p.Close()
	}
	return strings.TrimSpace(fmt.Sprintf("program %d %s", id, name))
}

// programs lists what is attached to the cgroup itself, and how.
func (d *Dir) programs(hook ebpf.AttachType) (ids []ebpf.ProgramID, flags uint32, err error) {
	if ids, err = d.query(hook, 0); err != nil || len(ids) == 0 {
		return ids, 0, err
	}
	// The library keeps the flags to itself (include/uapi/linux/bpf.h, union
	// bpf_attr, BPF_PROG_QUERY; without room for ids the kernel gives the rest).
	attr := struct {
		target, hook, queryFlags, attachFlags uint32
		ids                                   uint64
		count, _                              uint32
	}{target: uint32(d.file.Fd()), hook: uint32(hook)}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return nil, 0, fmt.Errorf("query %s of %s: %w", hook, d.path, errno)
	}
	return ids, attr.attachFlags, nil
}

// effective lists what runs for the processes of the cgroup.
func (d *Dir) effective(hook ebpf.AttachType) ([]ebpf.ProgramID, error) {
	return d.query(hook, unix.BPF_F_QUERY_EFFECTIVE)
}

func (d *Dir) query(hook ebpf.AttachType, flags uint32) ([]ebpf.ProgramID, error) {
	result, err := link.QueryPrograms(link.QueryOptions{Target: int(d.file.Fd()), Attach: hook, QueryFlags: flags})
	// The library takes a refusal for a kernel that does not know the command.
	if errors.Is(err, unix.EPERM) || err != nil && len(capability.Missing(capability.NetAdmin)) > 0 {
		return nil, fmt.Errorf("query programs of %s: %w without CAP_NET_ADMIN: run as root", d.path, ErrPermission)
	}
	if err != nil {
		return nil, fmt.Errorf("query %s of %s: %w", hook, d.path, err)
	}
	var ids []ebpf.ProgramID
	for _, p := range result.Programs {
		ids = append(ids, p.ID)
	}
	return ids, nil
}
