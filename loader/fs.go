package loader

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/statedir"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// DefaultFS is where a bpffs usually is: /sys/fs/bpf.
const DefaultFS = FS(statedir.Usual)

// FS is the mount point of the BPF file system that holds rpsel's state. The
// empty string is DefaultFS; where "ip netns exec" or the like hides that below
// a new /sys, it is reached by way of the root of an ancestor process.
//
// State of a group is in the directory rpsel/NETNS/GROUP, made aside under a
// name that begins with tmp_ and put in place by one rename. Directories have
// mode 0700, files 0600.
type FS string

const (
	tmpPrefix = "tmp_"
	dirMode   = 0o700
	fileMode  = 0o600
)

func (fs FS) dirs() statedir.FS { return statedir.FS(fs) }

func (fs FS) netnsDir(cookie uint64) string { return fs.dirs().NetNS(cookie) }

func (fs FS) groupDir(k Key) string { return filepath.Join(fs.netnsDir(k.NetNS), dirName(k)) }

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
	namespaces, err := fs.dirs().NetNSes()
	if err != nil {
		return nil, err
	}
	var keys []Key
	for _, cookie := range namespaces {
		if netns != 0 && netns != cookie {
			continue
		}
		groups, err := os.ReadDir(fs.netnsDir(cookie))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, statedir.ReadError(err)
		}
		for _, g := range groups {
			if k, ok := parseDirName(cookie, g.Name()); ok {
				keys = append(keys, k)
			}
		}
	}
	slices.SortFunc(keys, func(a, b Key) int {
		return cmp.Or(cmp.Compare(a.NetNS, b.NetNS), strings.Compare(dirName(a), dirName(b)))
	})
	return keys, nil
}

// sweepAside clears up what commands left behind that were killed while they
// made, upgraded or removed a group. A state whose program is the one that runs
// is put in place, the others go. The caller holds the lock, so nobody is at it.
func (fs FS) sweepAside(netns uint64) error {
	entries, err := os.ReadDir(fs.netnsDir(netns))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		dir := filepath.Join(fs.netnsDir(netns), e.Name())
		if key, ok := parseAside(netns, e.Name()); ok {
			running, err := fs.supersedes(key, dir)
			if errors.Is(err, sockets.ErrUnseen) {
				continue // for who can see it
			}
			if err == nil && running {
				err = fs.exchange(key, dir)
			}
			if err != nil {
				return err
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// lockGroup takes the lock for a group that has state, and clears up what killed
// commands left.
func (fs FS) lockGroup(key Key) (*statedir.Lock, error) {
	l, err := fs.lock(key.NetNS)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: attach it first", key, ErrNotAttached)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	if err := fs.sweepAside(key.NetNS); err != nil {
		l.Unlock()
		return nil, fmt.Errorf("%s: clear up after a killed command: %w", key, err)
	}
	return l, nil
}

// supersedes reports whether the state in a directory aside is the one in force:
// of an upgrade that has attached its program, and not put its state in place
// yet. Only an upgrade has both at a time.
func (fs FS) supersedes(key Key, dir string) (bool, error) {
	if _, err := os.Stat(fs.groupDir(key)); err != nil {
		return false, nil
	}
	pin := filepath.Join(dir, programPin)
	program, err := ebpf.LoadPinnedProgram(pin, nil)
	if err != nil {
		if err = openError(key, pin, err); errors.Is(err, ErrIncompatible) {
			return false, nil // half made, half removed, or no upgrade's
		}
		return false, err
	}
	defer program.Close()
	live, err := liveGroup(key)
	if err != nil {
		return false, err
	}
	if live.Kernel == 0 {
		pin := filepath.Join(dir, bpf.SelectMapSocks)
		socks, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			if err = openError(key, pin, err); errors.Is(err, ErrIncompatible) {
				return false, nil
			}
			return false, err
		}
		defer socks.Close()
		n, err := maps.NewSockets(socks).Count()
		if err == nil && n > 0 {
			err = fmt.Errorf("%s: %w", key, sockets.ErrUnseen)
		}
		return false, err
	}
	return live.HasProgram && ours(live.Program, program), nil
}

// exchange puts a group's state in the place of the one there. What was there is
// aside then.
func (fs FS) exchange(key Key, aside string) error {
	return os.NewSyscallError("renameat2", unix.Renameat2(unix.AT_FDCWD, aside, unix.AT_FDCWD, fs.groupDir(key), unix.RENAME_EXCHANGE))
}

// inForce is the directory of a group's state: the usual one, unless an upgrade
// has got as far as to attach the program of another. If it was killed, so that
// nobody holds the lock, the other one is put in place.
func (fs FS) inForce(key Key) (string, error) {
	// If the directory cannot be read, nor can what is in it.
	entries, _ := os.ReadDir(fs.netnsDir(key.NetNS))
	for _, e := range entries {
		if of, ok := parseAside(key.NetNS, e.Name()); !ok || of != key {
			continue
		}
		dir := filepath.Join(fs.netnsDir(key.NetNS), e.Name())
		running, err := fs.supersedes(key, dir)
		if err != nil && !errors.Is(err, sockets.ErrUnseen) {
			return "", err
		}
		if !running {
			continue
		}
		l, err := fs.dirs().Lock(key.NetNS, 0)
		switch {
		case errors.Is(err, ErrLocked):
			return dir, nil
		case errors.Is(err, os.ErrNotExist):
			err = nil // the upgrade is done, and the last group detached since
		case err == nil:
			err = fs.sweepAside(key.NetNS)
			l.Unlock()
		}
		return fs.groupDir(key), err
	}
	return fs.groupDir(key), nil
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
		return statedir.ReadError(err)
	}
	if err != nil {
		return err
	}
	defer l.Unlock()
	err = fs.sweepAside(netns)
	fs.tidy(netns)
	return err
}

// tidy removes directories that hold nothing any more. The caller has the lock.
func (fs FS) tidy(netns uint64) { fs.dirs().Remove(fs.netnsDir(netns)) }

// aside is a name for a directory that is being made or removed.
func (fs FS) aside(k Key) string {
	return filepath.Join(fs.netnsDir(k.NetNS), fmt.Sprintf("%s%d_%s", tmpPrefix, os.Getpid(), dirName(k)))
}

// parseAside undoes aside.
func parseAside(netns uint64, name string) (Key, bool) {
	rest, ok := strings.CutPrefix(name, tmpPrefix)
	if !ok {
		return Key{}, false
	}
	_, group, _ := strings.Cut(rest, "_")
	return parseDirName(netns, group)
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
