package sockets

import (
	"github.com/rpsel/rpsel/bpf"
	"github.com/rpsel/rpsel/internal/iterator"
)

// FilteredHolders looks through all processes with the filter of the last Find,
// as Find itself does before Linux 6.1, and gives the processes that it found
// descriptors in.
func FilteredHolders() (pids []int, err error) {
	theFinder.Lock()
	defer theFinder.Unlock()
	r, err := theFinder.open(0)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	records, err := iterator.ReadAll[bpf.FindRecord](r)
	for _, r := range records {
		pids = append(pids, int(r.Pid))
	}
	return pids, err
}

// HoldersOf are the holders of a socket with these descriptors.
func HoldersOf(held []bpf.FindRecord) []Holder { return socketOf(held).Holders }
