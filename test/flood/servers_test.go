package flood

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/sockets"
)

// The payload of a packet that counts: this word, the flow's number and the
// packet's. Packets of the flood have zeros.
const (
	mark    = 0x72707365
	udpSize = 8
)

func marked(flow, number uint32) (payload [testnet.SpoofedSize]byte) {
	binary.BigEndian.PutUint32(payload[:], mark)
	binary.BigEndian.PutUint32(payload[4:], flow)
	binary.BigEndian.PutUint32(payload[8:], number)
	return payload
}

// ledger knows who got the packets of each flow.
type ledger struct {
	owner []atomic.Int32  // who got its last packet; 0: nobody yet
	seen  []atomic.Uint32 // the highest number of its packets that arrived
	moves []atomic.Uint32 // how often a packet came to another one than the last
}

func newLedger(flows int) *ledger {
	return &ledger{make([]atomic.Int32, flows), make([]atomic.Uint32, flows), make([]atomic.Uint32, flows)}
}

func (l *ledger) receive(server int, flow, number uint32) {
	if was := l.owner[flow].Swap(int32(server) + 1); was != 0 && was != int32(server)+1 {
		l.moves[flow].Add(1)
	}
	for was := l.seen[flow].Load(); number > was && !l.seen[flow].CompareAndSwap(was, number); {
		was = l.seen[flow].Load()
	}
}

// server is a listener of the group, in this process.
type server struct {
	conn   *net.UDPConn
	cookie uint64
	ended  sync.WaitGroup
}

// buffer is room for the packets of all flows, should all come at once.
const buffer = 64 << 20

// serve binds a listener that notes in the ledger what it gets. Its socket filter
// throws away what has no mark, which is after it was selected: a full buffer would
// look like a flow that was lost.
func serve(ns *testnet.NetNS, network, address string, number int, book *ledger) (*server, error) {
	s := &server{}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: udpSize},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: mark, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 16},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	err := ns.Do(func() error {
		conns, err := sockets.ListenPacket(context.Background(), 1, network, address)
		if err != nil {
			return err
		}
		s.conn = conns[0]
		raw, err := s.conn.SyscallConn()
		if err != nil {
			return err
		}
		var setErr error
		err = raw.Control(func(fd uintptr) {
			setErr = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
				&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
			if setErr == nil {
				setErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer)
			}
		})
		if err == nil {
			err = setErr
		}
		if err == nil {
			s.cookie, err = sockets.Cookie(s.conn)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	s.ended.Go(func() {
		packet := make([]byte, 64)
		for {
			n, err := s.conn.Read(packet)
			if err != nil {
				return
			}
			if n == testnet.SpoofedSize {
				book.receive(number, binary.BigEndian.Uint32(packet[4:]), binary.BigEndian.Uint32(packet[8:]))
			}
		}
	})
	return s, nil
}

// close returns when the socket is gone: a search of all processes may hold it
// for a moment.
func (s *server) close(ns *testnet.NetNS, port uint16) error {
	s.conn.Close()
	s.ended.Wait()
	return ns.Do(func() error {
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			left, err := sockets.Bound(sockets.UDP, port)
			if err != nil || !slices.Contains(left, s.cookie) {
				return err
			}
		}
		return fmt.Errorf("socket %d is still there %v after its close", s.cookie, patience)
	})
}
