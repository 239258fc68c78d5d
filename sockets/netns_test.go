package sockets_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/sockets"
)

// All ways to name a namespace lead to the same.
func TestOpenNetNS(t *testing.T) {
	outside, err := sockets.OpenNetNS("")
	must(t, err)
	defer outside.Close()
	netNS(t)
	own, err := sockets.OpenNetNS("")
	must(t, err)
	defer own.Close()
	var stat unix.Stat_t
	must(t, unix.Stat("/proc/thread-self/ns/net", &stat))
	l := bind(t, "udp4", "127.0.0.1:0")
	key, err := sockets.KeyOf(l)
	must(t, err)
	if own.Cookie() != key.NetNS || own.Inode() != stat.Ino {
		t.Errorf("cookie %d, inode %d, want %d, %d", own.Cookie(), own.Inode(), key.NetNS, stat.Ino)
	}
	if own.Cookie() == outside.Cookie() || own.Inode() == outside.Inode() {
		t.Error("a new namespace is the old one")
	}

	name := fmt.Sprintf("rpsel-test-%d", os.Getpid())
	path := filepath.Join("/run/netns", name)
	must(t, os.MkdirAll("/run/netns", 0o755))
	must(t, os.WriteFile(path, nil, 0o444))
	t.Cleanup(func() { os.Remove(path) })
	must(t, unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	process := child(t) // started by this thread, so in its namespace

	for _, spec := range []string{name, path, fmt.Sprint(process.Process.Pid), fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())} {
		t.Run(spec, func(t *testing.T) {
			ns, err := sockets.OpenNetNS(spec)
			must(t, err)
			if ns.Cookie() != own.Cookie() || ns.Inode() != own.Inode() {
				t.Errorf("cookie %d, inode %d, want %d, %d", ns.Cookie(), ns.Inode(), own.Cookie(), own.Inode())
			}
			must(t, ns.Close())
			must(t, ns.Close())
		})
	}
}

// Namespaces are found by the processes in them and by their mounts, each once.
func TestNetNSes(t *testing.T) {
	netNS(t)
	inode := func() uint64 {
		var stat unix.Stat_t
		must(t, unix.Stat("/proc/thread-self/ns/net", &stat))
		return stat.Ino
	}
	child(t)
	child(t)
	wanted := map[string]uint64{"a process's": inode()}

	netNS(t)
	path := filepath.Join(t.TempDir(), "a name")
	must(t, os.WriteFile(path, nil, 0o444))
	must(t, unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	wanted["mounted"] = inode()

	netNS(t)
	wanted["own"] = inode()

	before := openFiles(t)
	all, err := sockets.NetNSes()
	must(t, err)
	found := map[uint64]int{}
	for _, ns := range all {
		found[ns.Inode()]++
		if ns.Cookie() == 0 {
			t.Errorf("namespace %d has no cookie", ns.Inode())
		}
		must(t, ns.Close())
	}
	for what, inode := range wanted {
		if found[inode] != 1 {
			t.Errorf("the %s namespace was found %d times", what, found[inode])
		}
	}
	if all[0].Inode() != wanted["own"] {
		t.Error("the own namespace is not the first")
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d descriptors became %d", before, after)
	}
}

func TestOpenNetNSNone(t *testing.T) {
	before := openFiles(t)
	regular := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(regular, nil, 0o600))
	for _, spec := range []string{"no-such-name", "/no/such/path", "1073741824", regular, regular + "/below", "/proc/self/ns/uts", "/run", "-1"} {
		t.Run(spec, func(t *testing.T) {
			_, err := sockets.OpenNetNS(spec)
			if !errors.Is(err, sockets.ErrNoNetNS) {
				t.Errorf("%v, want %v", err, sockets.ErrNoNetNS)
			}
		})
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors became %d", before, after)
	}
}

// Do enters the namespace, gives back the error, and leaves no thread behind.
func TestNetNSDo(t *testing.T) {
	outside, err := sockets.OpenNetNS("")
	must(t, err)
	defer outside.Close()
	netNS(t)
	own, err := sockets.OpenNetNS("")
	must(t, err)
	defer own.Close()
	before := openFiles(t)

	for _, ns := range []*sockets.NetNS{outside, own} {
		var cookie uint64
		must(t, ns.Do(func() error {
			here, err := sockets.OpenNetNS("")
			if err != nil {
				return err
			}
			cookie = here.Cookie()
			return here.Close()
		}))
		if cookie != ns.Cookie() {
			t.Errorf("function ran in namespace %d, want %d", cookie, ns.Cookie())
		}
	}
	want := errors.New("from inside")
	if err := own.Do(func() error { return want }); err != want {
		t.Errorf("got %v, want %v", err, want)
	}
	if err := own.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("no error from a function that did not return")
	}
	if now, err := sockets.OpenNetNS(""); err != nil || now.Cookie() != own.Cookie() {
		t.Errorf("the caller is in another namespace: %v", err)
	} else {
		now.Close()
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors became %d", before, after)
	}
}
