package testnet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Silence begins a datagram that a server does not answer.
const Silence = "silence"

// Replies are the ways a server may answer (ServerOptions.Reply).
var Replies = []string{"sendto", "sendmsg", "sendmmsg", "gso", "large", "connected"}

// reply answers a client.
func (w *work) reply(fd int, answer []byte, client unix.Sockaddr) error {
	switch w.Reply {
	case "", "sendto":
		return unix.Sendto(fd, answer, 0, client)
	case "sendmsg":
		return unix.Sendmsg(fd, answer, nil, client, 0)
	case "sendmmsg":
		return sendmmsg(fd, answer, client)
	case "gso": // the answer twice, as one packet up to the device
		segment := binary.NativeEndian.AppendUint16(nil, uint16(len(answer)))
		control := make([]byte, unix.CmsgSpace(len(segment)))
		h := (*unix.Cmsghdr)(unsafe.Pointer(&control[0]))
		h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
		h.SetLen(unix.CmsgLen(len(segment)))
		copy(control[unix.CmsgLen(0):], segment)
		return unix.Sendmsg(fd, bytes.Repeat(answer, 2), control, client, 0)
	case "large": // in many parts
		return unix.Sendto(fd, append(answer, make([]byte, 60000)...), 0, client)
	case "connected": // from a socket for this client
		other, err := w.bind()
		if err != nil {
			return err
		}
		defer unix.Close(other)
		if err := unix.Connect(other, client); err != nil {
			return os.NewSyscallError("connect", err)
		}
		_, err = unix.Write(other, answer)
		return err
	}
	return fmt.Errorf("there is no reply by %s", w.Reply)
}

// sendmmsg sends one message by the system call for many.
func sendmmsg(fd int, data []byte, to unix.Sockaddr) error {
	var name []byte
	family := func(f uint16, port int) []byte {
		return binary.BigEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, f), uint16(port))
	}
	switch to := to.(type) {
	case *unix.SockaddrInet4:
		name = append(append(family(unix.AF_INET, to.Port), to.Addr[:]...), make([]byte, 8)...)
	case *unix.SockaddrInet6:
		name = append(family(unix.AF_INET6, to.Port), 0, 0, 0, 0)
		name = binary.NativeEndian.AppendUint32(append(name, to.Addr[:]...), to.ZoneId)
	}
	iov := unix.Iovec{Base: &data[0]}
	iov.SetLen(len(data))
	message := struct {
		header unix.Msghdr
		sent   uint32
		_      uint32
	}{header: unix.Msghdr{Name: &name[0], Namelen: uint32(len(name)), Iov: &iov}}
	message.header.SetIovlen(1)
	_, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), 1, 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("sendmmsg", errno)
	}
	return nil
}

// Send sends a datagram with a payload from each client, and waits for nothing.
func (c *Clients) Send(payload string) {
	c.t.Helper()
	must(c.t, c.ns.Do(func() error {
		for port := c.first; port < c.first+c.n; port++ {
			fd, err := c.open(port)
			if err != nil {
				return err
			}
			err = unix.Sendto(fd, []byte(payload), 0, sockaddr(c.remote))
			unix.Close(fd)
			if err != nil {
				return os.NewSyscallError("sendto", err)
			}
		}
		return nil
	}))
}
