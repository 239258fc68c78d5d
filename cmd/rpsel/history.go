package main

import (
	"time"

	"github.com/rpsel/rpsel/loader"
)

// history is what is known of earlier looks, for the groups that are there.
type history map[loader.Key]*past

// past is a group's.
type past struct {
	at      time.Time
	runs    uint64
	fresh   uint64            // flows that began
	packets map[uint64]uint64 // by the cookie of the listener

	// Per second, between two looks: of the group, the latest last, and of each
	// listener between the last two. Nothing before the second look.
	packetsEach, newEach []float64
	speed                map[uint64]float64
}

// longestHistory is as many looks as the widest screen shows.
const longestHistory = 1000

// add notes how the groups stand, and forgets those that are gone.
func (h history) add(at time.Time, list []loader.Status) {
	there := map[loader.Key]bool{}
	for _, status := range list {
		there[status.Key] = true
		p := h[status.Key]
		if p == nil {
			p = &past{}
			h[status.Key] = p
		}
		p.add(at, status)
	}
	for key := range h {
		if !there[key] {
			delete(h, key)
		}
	}
}

func (p *past) add(at time.Time, status loader.Status) {
	packetsOf, speed := map[uint64]uint64{}, map[uint64]float64{}
	second := at.Sub(p.at).Seconds()
	for _, l := range status.Listeners {
		packetsOf[l.Cookie] = packets(l)
		speed[l.Cookie] = perSecond(p.packets[l.Cookie], packets(l), second)
	}
	if !p.at.IsZero() {
		p.speed = speed
		p.packetsEach = appendRecent(p.packetsEach, perSecond(p.runs, status.Counters.Runs, second))
		p.newEach = appendRecent(p.newEach, perSecond(p.fresh, status.Counters.New, second))
	}
	p.at, p.runs, p.fresh, p.packets = at, status.Counters.Runs, status.Counters.New, packetsOf
}

// perSecond is how fast a counter grows. One that is lower than it was began anew:
// the group was detached and attached.
func perSecond(before, now uint64, seconds float64) float64 {
	if now < before {
		before = 0
	}
	return float64(now-before) / seconds
}

func appendRecent(list []float64, v float64) []float64 {
	if len(list) == longestHistory {
		list = list[1:]
	}
	return append(list, v)
}
