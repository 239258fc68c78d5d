package maps

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// ForgetPeers takes clients for which match returns true out of a map of peers. Who
// comes meanwhile may be missed.
func ForgetPeers(m *ebpf.Map, match func(client netip.Addr) bool) error {
	const batch = 4096 // more than a bucket of the kernel's ever holds
	var cursor ebpf.MapBatchCursor
	keys, words := make([]bpf.SelectPeer, batch), make([]uint64, batch)
	for {
		n, err := m.BatchLookup(&cursor, keys, words, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read peers: %w", err)
		}
		for _, key := range keys[:n] {
			if !match(clientOf(key.Client[0], key.Client[1], 0).Addr()) {
				continue
			}
			if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("forget a peer: %w", err)
			}
		}
		if err != nil {
			return nil // there are no more
		}
	}
}
