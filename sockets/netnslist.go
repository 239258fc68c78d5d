package sockets

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// theLister is loaded at the first call and stays until Unload.
var theLister struct {
	sync.Mutex
	objects bpf.NetnsObjects
	loaded  bool
}

// NetNSCookies lists the network namespaces that there are in the kernel, by
// their cookies, whatever keeps them and wherever that is: a process, a mount, a
// descriptor, a socket. A number may be listed that is none's; one that is not
// listed is none's, and never will be before the next boot.
//
// It needs CAP_BPF and CAP_PERFMON (else ErrPermission) and a kernel with BTF
// (else ErrUnsupported). It may be called concurrently.
func NetNSCookies() ([]uint64, error) {
	l := &theLister
	l.Lock()
	defer l.Unlock()
	if !l.loaded {
		if err := bpf.LoadNetnsObjects(&l.objects, nil); err != nil {
			return nil, fmt.Errorf("list network namespaces: %w", loadError(err))
		}
		l.loaded = true
	}
	// The program begins at the namespace of the thread that runs it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, err := l.objects.RpselNetns.Run(&ebpf.RunOptions{}); err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var cookies [4096]uint64
	var count, whole uint32
	if err := errors.Join(l.objects.Cookies.Get(&cookies), l.objects.Count.Get(&count), l.objects.Whole.Get(&whole)); err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	if whole == 0 {
		return nil, fmt.Errorf("list network namespaces: there are more than %d, or the list changed meanwhile", len(cookies))
	}
	return slices.Clone(cookies[:count]), nil
}
