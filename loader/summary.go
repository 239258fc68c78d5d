package loader

import (
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// Summary is how a group stands, but for Listener.Recent, which is 0.
type Summary struct {
	Status
	// Err is why it cannot be told; then the Key alone is known.
	Err error
}

// searchAll finds the sockets of all groups. For tests things happen after it.
var searchAll = sockets.Find

// Summarize reads how groups stand, for who asks often: all of their sockets are
// found by one search, and of each flow no more is looked at than its word. The
// answers are in the order of the groups. It changes nothing.
func Summarize(groups []*Group) []Summary {
	find := liveGroup
	if len(groups) > 1 {
		all, err := searchAll(sockets.Query{})
		find = func(key Key) (sockets.Group, error) { return liveAmong(all, key), err }
	}
	summaries := make([]Summary, 0, len(groups))
	for _, g := range groups {
		status, err := g.read(reading{find, (*Group).countWords})
		if err == nil && !status.Attached && status.NetNSInode != 0 && len(groups) > 1 {
			// It has sockets, and may have got another program since the search.
			status, err = g.read(reading{liveGroup, (*Group).countWords})
		}
		status.Key = g.key
		summaries = append(summaries, Summary{status, err})
	}
	return summaries
}

// countWords is countFlows without a look at when flows began.
func (g *Group) countWords(status *Status, now uint32) error {
	table, err := g.state.table()
	if err != nil {
		return err
	}
	defer table.Close()
	var incarnations [maps.Slots]uint32
	for slot := range incarnations {
		incarnations[slot] = g.state.listeners.Incarnation(uint32(slot))
	}
	var flows [maps.Slots]int
	for w := range table.Words(now, g.state.config.Limits()) {
		status.Tracked++
		if w.State() == maps.Established {
			status.Established++
		}
		if slot := w.Slot(); w.SameIncarnation(incarnations[slot]) {
			flows[slot]++
		}
	}
	for i := range status.Listeners {
		l := &status.Listeners[i]
		l.Flows = flows[l.Slot]
	}
	return nil
}
