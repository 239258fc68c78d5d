package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// initialPIDNS is the number of the initial pid namespace (PROC_PID_INIT_INO in
// include/linux/proc_ns.h): from there all processes can be seen.
const initialPIDNS = 0xEFFFFFFC

// forgetNetNSes removes the state of network namespaces that are gone. lives are
// the groups that have a socket.
//
// A namespace counts as gone if all is so: no socket of its groups was found and
// all their slots are empty; no process and no thread is in it, no descriptor is
// open on it, it is not mounted in the mount namespace of any process; all of
// that was so at the sweep before, too; and the agent lives in the initial pid
// namespace, where it sees all processes. If it does not or something could not
// be looked at, the state stays. What can still lead there then is a socket of
// another kind or a descriptor on its way through a unix socket: whoever comes
// back on such a way finds his port without state, as after a reboot.
func (k *keeper) forgetNetNSes(lives map[loader.Key]bool) {
	empty := map[uint64][]loader.Key{}
	for key, g := range k.groups {
		slots, err := g.Slots()
		keys, seen := empty[key.NetNS]
		if err != nil || lives[key] || len(slots) > 0 || key.NetNS == k.own {
			empty[key.NetNS] = nil
		} else if !seen || keys != nil {
			empty[key.NetNS] = append(keys, key)
		}
	}
	before := k.orphaned
	k.orphaned = map[uint64]bool{}
	var used map[uint64]bool
	for cookie, keys := range empty {
		if len(keys) == 0 {
			continue
		}
		if used == nil {
			var err error
			used, err = netNSesInUse()
			k.fails("namespaces in use", err)
			if err != nil {
				return
			}
		}
		switch {
		case used[cookie]:
		case !before[cookie]:
			k.orphaned[cookie] = true
		default:
			k.forgetNetNS(cookie, keys)
		}
	}
}

func (k *keeper) forgetNetNS(cookie uint64, keys []loader.Key) {
	for _, key := range keys {
		k.groups[key].Close()
		delete(k.groups, key)
		if _, err := k.FS.Detach(key); err != nil && !errors.Is(err, loader.ErrNotAttached) {
			k.fails(fmt.Sprint("forget ", key), err, k.keyAttrs(key)...)
			continue
		}
		k.Log.Info("state removed: its network namespace is gone", "group", key.String(), "netns_cookie", cookie)
	}
	k.watchPorts()
}

// errHidden: not all processes can be seen.
var errHidden = errors.New("state of namespaces that are gone is not removed: the agent is not in the initial pid namespace")

// netNSesInUse returns the cookies of the network namespaces to which a process,
// a thread, a descriptor or a mount leads.
func netNSesInUse() (map[uint64]bool, error) {
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &own); err != nil || own.Ino != initialPIDNS {
		return nil, errHidden
	}
	ways := map[string]string{} // a path to each namespace, by its name, such as net:[4026531840]
	var failed error
	add := func(path string) {
		name, err := os.Readlink(path)
		if err != nil {
			failed = errors.Join(failed, unlessGone(err))
		} else if strings.HasPrefix(name, "net:[") {
			ways[name] = path
		}
	}
	each := func(dir string, f func(path string)) {
		entries, err := os.ReadDir(dir)
		failed = errors.Join(failed, unlessGone(err))
		for _, e := range entries {
			f(filepath.Join(dir, e.Name()))
		}
	}
	mounts := map[string]bool{} // mount namespaces that were looked at
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, process := range processes {
		each(process+"/task", func(thread string) { add(thread + "/ns/net") })
		each(process+"/fd", add)
		if ns, err := os.Readlink(process + "/ns/mnt"); err == nil && !mounts[ns] {
			mounts[ns] = true
			failed = errors.Join(failed, addMounts(process, ways))
		}
	}
	if failed != nil {
		return nil, failed
	}
	used := map[uint64]bool{}
	for name, way := range ways {
		ns, err := sockets.OpenNetNS(way)
		if err != nil { // also if that way is gone: there may be others
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		used[ns.Cookie()] = true
		ns.Close()
	}
	return used, nil
}

// addMounts adds the network namespaces that are mounted where a process lives.
func addMounts(process string, ways map[string]string) error {
	mounted, err := sockets.MountedNetNSes(process + "/mountinfo")
	if err != nil {
		return unlessGone(err)
	}
	for name, path := range mounted {
		if ways[name] == "" {
			ways[name] = process + "/root" + path
		}
	}
	return nil
}

// unlessGone passes over what a process that has just ended gives.
func unlessGone(err error) error {
	for _, gone := range []error{fs.ErrNotExist, unix.ESRCH, unix.EINVAL, unix.ENOTDIR} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	return err
}
