// Package iterator runs BPF iterators and reads what they write.
package iterator

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Map opens an iterator over the elements of a map.
func Map(program *ebpf.Program, over *ebpf.Map) (io.ReadCloser, error) {
	return open(link.AttachIter(link.IterOptions{Program: program, Map: over}))
}

// Files opens an iterator over the open files of a process, in the caller's pid
// namespace, or (0) of all. Before Linux 6.1 it is of all in either case: the
// program has to leave out the others.
func Files(program *ebpf.Program, pid int) (io.ReadCloser, error) {
	if pid == 0 {
		return open(link.AttachIter(link.IterOptions{Program: program}))
	}
	// The library links iterators to maps only (include/uapi/linux/bpf.h, union
	// bpf_attr, BPF_LINK_CREATE, and bpf_iter_link_info).
	info := &struct{ tid, pid, pidfd uint32 }{tid: uint32(pid)}
	var pinned runtime.Pinner
	pinned.Pin(info)
	defer pinned.Unpin()
	attr := struct {
		program, target, attachType, flags uint32
		info                               uint64
		infoLen, _                         uint32
	}{
		program: uint32(program.FD()), attachType: unix.BPF_TRACE_ITER,
		info: uint64(uintptr(unsafe.Pointer(info))), infoLen: uint32(unsafe.Sizeof(*info)),
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_LINK_CREATE, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return nil, os.NewSyscallError("bpf BPF_LINK_CREATE", errno)
	}
	one, err := link.NewFromFD(int(fd))
	if err != nil {
		return nil, err
	}
	return open(one.(*link.Iter), nil)
}

// open reads through a link, which it closes.
func open(l *link.Iter, err error) (io.ReadCloser, error) {
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.Open()
}

// ReadAll reads records of T to the end. After a million objects without one the
// kernel gives EAGAIN and goes on at the next read (kernel/bpf/bpf_iter.c).
func ReadAll[T any](r io.Reader) ([]T, error) {
	var data bytes.Buffer
	_, err := data.ReadFrom(r)
	for errors.Is(err, unix.EAGAIN) {
		_, err = data.ReadFrom(r)
	}
	if err != nil {
		return nil, err
	}
	var zero T
	size := int(unsafe.Sizeof(zero))
	if data.Len()%size != 0 {
		return nil, fmt.Errorf("%d bytes are no whole records", data.Len())
	}
	records := make([]T, data.Len()/size)
	copy(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(records))), data.Len()), data.Bytes())
	return records, nil
}
