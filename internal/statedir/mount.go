package statedir

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/ancestor"
)

// Mount is where the BPF file system with the state is, or would be mounted.
func (fs FS) Mount() string {
	if fs != "" {
		return string(fs)
	}
	if !isBPFFS(string(Usual)) {
		for _, root := range ancestor.Roots() {
			if path := root + string(Usual); isBPFFS(path) {
				return path
			}
		}
	}
	return string(Usual)
}

func isBPFFS(path string) bool {
	var stat unix.Statfs_t
	return unix.Statfs(path, &stat) == nil && stat.Type == unix.BPF_FS_MAGIC
}

// MakeMount mounts the bpffs if it is missing.
//
// Errors: ErrNoBPFFS, ErrPermission.
func (fs FS) MakeMount() error {
	if !fs.mounted() {
		return fs.mount()
	}
	return fs.Writable()
}

// mounted reports whether there is a bpffs.
func (fs FS) mounted() bool { return isBPFFS(fs.Mount()) }

// Writable refuses a bpffs that is mounted read-only. Not even reading works
// there: maps cannot be opened without writing permission.
func (fs FS) Writable() error {
	var stat unix.Statfs_t
	if unix.Statfs(fs.Mount(), &stat) == nil && stat.Flags&unix.ST_RDONLY != 0 {
		return fmt.Errorf("%w that can be written on %s: mount -o remount,rw it, or name another with --bpffs", ErrNoBPFFS, fs.Mount())
	}
	return nil
}

// Mountable refuses, with ErrNoBPFFS, to mount a BPF file system on the usual
// place in a mount namespace that is not that of the process's ancestors: it
// would go with the command that mounted it, and the state with it.
func (fs FS) Mountable() error {
	if fs == "" && len(ancestor.Roots()) > 0 {
		return fmt.Errorf("%w on %s outside of this mount namespace: mount one there, or name the network namespace with -N instead of entering it",
			ErrNoBPFFS, fs.Mount())
	}
	return nil
}

// mount mounts a BPF file system where one is looked for. The directory is
// made if it is missing, but not its parents. What is in a directory would be
// hidden by the mount.
func (fs FS) mount() error {
	if err := fs.Mountable(); err != nil {
		return err
	}
	madeErr := os.Mkdir(fs.Mount(), 0o755)
	if madeErr != nil && !errors.Is(madeErr, os.ErrExist) {
		return fmt.Errorf("%w: %v: name another place with --bpffs", ErrNoBPFFS, madeErr)
	}
	if entries, err := os.ReadDir(fs.Mount()); err == nil && len(entries) > 0 {
		return fmt.Errorf("%w on %s: it is a directory with other files: name an empty one with --bpffs", ErrNoBPFFS, fs.Mount())
	}
	err := unix.Mount("bpf", fs.Mount(), "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
	if err == nil {
		return nil
	}
	if madeErr == nil {
		os.Remove(fs.Mount())
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("mount bpffs on %s: %w: CAP_SYS_ADMIN is missing, or mount it beforehand", fs.Mount(), ErrPermission)
	}
	return fmt.Errorf("%w on %s: mount: %v: mount one and name it with --bpffs", ErrNoBPFFS, fs.Mount(), err)
}
