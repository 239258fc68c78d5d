package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// warnings says what should not be overlooked about a group, each with the way out.
func warnings(s loader.Status) []string {
	list := []string{}
	if s.AllDraining {
		list = append(list, "every listener drains: new flows go to draining ones")
	}
	switch {
	case s.Attached:
	case alive(s) && s.NetNSInode == 0:
		list = append(list, fmt.Sprintf("whether its program is attached cannot be told: %v", sockets.ErrUnseen))
	case alive(s):
		list = append(list, `its program is not attached, the kernel's hash picks: "rpsel attach" attaches it again`)
	default:
		list = append(list, `no listener is left: start one and "rpsel attach" it, or "rpsel detach" to remove the state`)
	}
	for _, u := range s.Unregistered {
		if u.Socket.MPTCP && s.Attached && serves(s) {
			list = append(list, u.Socket.Starves())
		}
	}
	if tableRunsFull(s) {
		way := fmt.Sprintf(`"rpsel upgrade --port %d --flows %d" makes room`, s.Key.Addr.Port(), min(2*s.Capacity, loader.MaxFlows))
		if s.Capacity >= loader.MaxFlows {
			way = fmt.Sprintf(`"rpsel attach --port %d --idle-new" with less than %v forgets new flows sooner`, s.Key.Addr.Port(), s.IdleNew)
		}
		list = append(list, fmt.Sprintf("the table runs full, %d flows of %d (%d gave way to newer ones and %d packets went untracked so far): %s",
			s.Tracked, s.Capacity, s.Counters.Evicted, s.Counters.TableFull, way))
	}
	if share, ok := nearlyAllNew(s); ok {
		list = append(list, fmt.Sprintf("%d %% of the packets are new flows, so nothing sticks: if a proxy in front hides the clients use "+
			"--affinity bytes (of the payload), if clients change their port --affinity client, if they are silent for longer than %v --idle", share, s.Idle))
	}
	return list
}

// serves tells whether a listener is registered that the program can pick.
func serves(s loader.Status) bool {
	return slices.ContainsFunc(s.Listeners, func(l loader.Listener) bool { return l.State != "dead" })
}

// tableRunsFull is said from 90 % on: the table finds room for as many flows as it
// is made for, and not for many more, so that there is time to act.
func tableRunsFull(s loader.Status) bool { return s.Tracked >= (s.Capacity*9+9)/10 }

// When a group is judged by how many of its packets are new flows. In the first
// minute each client's first packet is one; a thousand packets are enough not to be
// by chance; and one packet a flow is what a server with sessions never has, two
// make it 50 %.
const (
	judgedAfter   = time.Minute
	judgedPackets = 1000
	judgedShare   = 90 // percent
)

// nearlyAllNew tells how many percent of the packets were of flows not known, if
// that is suspicious. Past and present have to agree: the counts of the listeners,
// and a table in which new flows come in and next to none is established.
func nearlyAllNew(s loader.Status) (share uint64, suspicious bool) {
	if s.Affinity != "flow" || s.Settling > 0 || s.Age < judgedAfter {
		return 0, false
	}
	var packets, fresh uint64
	recent := 0
	for _, l := range s.Listeners {
		if l.State == "dead" || l.Joined < judgedAfter {
			continue
		}
		packets += l.Hit + l.New + l.Rehomed + l.Untracked
		fresh += l.New + l.Untracked
		recent += l.Recent
	}
	if packets < judgedPackets || recent < int(loader.RecentTime/time.Second) || s.Established*10 > s.Tracked {
		return 0, false
	}
	share = fresh * 100 / packets
	return share, share >= judgedShare
}
