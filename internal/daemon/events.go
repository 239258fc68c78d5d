package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// watch lets the kernel tell of new listeners. Where it cannot, the agent polls
// and says why.
func (k *keeper) watch(ctx context.Context) {
	k.tried = time.Now()
	w, err := watch.Open(k.Cgroup)
	if err == nil {
		err = w.SetPorts(k.ports)
	}
	if err != nil {
		if w != nil {
			w.Close()
		}
		k.unwatch(err)
		return
	}
	if k.why != "" {
		k.Log.Info("the kernel tells of new listeners again: polling ends")
	}
	k.watcher, k.missed, k.why = w, 0, ""
	k.polling.Stop()
	k.ended = make(chan error, 1)
	k.fails(watchSubject, nil)
	k.fails("info", k.claim.say(k.info()))
	go func(ended chan<- error) {
		if err := w.Run(ctx, k.inbox.put); err != nil {
			ended <- err
		}
	}(k.ended)
}

// watchSubject is the subject of what makes it poll.
const watchSubject = "watch"

// unwatch goes over to polling because of an error, or ends the agent's
// watching (nil).
func (k *keeper) unwatch(because error) {
	if k.watcher != nil {
		k.fails("watch close", k.watcher.Close())
		k.watcher = nil
	}
	if because == nil {
		return
	}
	k.why = because.Error()
	k.polling.Reset(k.pace.poll)
	k.fails(watchSubject, fmt.Errorf("polling for new listeners every %v: %w", k.pace.poll, because))
	k.fails("info", k.claim.say(k.info()))
}

func (k *keeper) info() Info {
	refused := slices.Concat(slices.Collect(maps.Values(k.refused))...)
	slices.Sort(refused)
	return Info{PID: pid, Mode: k.mode(), Reason: k.why, Refused: append([]string{}, refused...)}
}

// arrived keeps the groups of listeners that have just come.
func (k *keeper) arrived(events []watch.Event) {
	events = slices.DeleteFunc(events, func(e watch.Event) bool { return !k.wanted(e) })
	groups, err := find(events)
	k.fails("find", err)
	for _, g := range groups {
		k.keep(g)
	}
}

// wanted tells whether a listener may be of a group that is kept. Where it is
// is not known of every one: all namespaces are searched for that.
func (k *keeper) wanted(e watch.Event) bool {
	if e.NetNS == 0 {
		return true
	}
	key := loader.Key{NetNS: e.NetNS, Proto: e.Proto, Addr: e.Addr}
	for other := range k.groups {
		if other.NetNS == key.NetNS && other.Proto == key.Proto && other.Addr == key.Addr {
			return true
		}
	}
	return k.service(key) != nil
}

// fewProcesses is up to how many it is cheaper to look into each than into all.
const fewProcesses = 8

// find finds the groups of listeners that were reported. Members that other
// processes hold may be unseen ones in the answer.
func find(events []watch.Event) (groups []sockets.Group, err error) {
	queries := map[sockets.Query]bool{}
	missing := map[uint64]watch.Event{}
	for _, e := range events {
		queries[sockets.Query{NetNS: e.NetNS, Proto: e.Proto, Port: e.Addr.Port(), PID: e.PID}] = true
		missing[e.Cookie] = e
	}
	asked, byGroup := map[sockets.Query]bool{}, map[uint64]int{}
	look := func(q sockets.Query) {
		if asked[q] || len(missing) == 0 {
			return
		}
		asked[q] = true
		some, findErr := sockets.Find(q)
		err = errors.Join(err, findErr)
		for _, g := range some {
			news := false
			for _, m := range g.Members {
				// The cookie of an MPTCP listener is not the one that was reported.
				_, reported := missing[m.Cookie]
				news = news || reported || m.MPTCP
				if len(m.Holders) > 0 {
					delete(missing, m.Cookie)
				}
			}
			at, known := byGroup[g.Kernel]
			switch {
			case known:
				groups[at] = merge(groups[at], g)
			case news:
				if g.Kernel != 0 {
					byGroup[g.Kernel] = len(groups)
				}
				groups = append(groups, g)
			}
		}
	}
	if len(queries) <= fewProcesses {
		for q := range queries {
			if q.PID != 0 {
				look(q)
			}
		}
	}
	// In another pid namespace the pids are not those that were reported. Most
	// of what is not found now was closed meanwhile.
	for _, e := range events {
		if _, ok := missing[e.Cookie]; ok {
			look(sockets.Query{NetNS: e.NetNS, Proto: e.Proto, Port: e.Addr.Port()})
		}
	}
	return groups, err
}

// merge adds to a group what another look at it has seen.
func merge(g, other sockets.Group) sockets.Group {
	for _, m := range other.Members {
		i := slices.IndexFunc(g.Members, func(had sockets.Socket) bool { return had.Cookie == m.Cookie })
		switch {
		case i < 0:
			g.Members = append(g.Members, m)
		case len(g.Members[i].Holders) == 0:
			g.Members[i] = m
		}
	}
	return g
}

// inbox takes the reports on new listeners, and remembers for a moment which
// sockets were reported: nothing can have sent to those before. Its methods may
// be called concurrently.
type inbox struct {
	wake  chan struct{} // there is something to take
	young time.Duration // how long a socket counts as new

	mu      sync.Mutex
	pending []watch.Event
	at      map[uint64]time.Time // of the report, by cookie
}

func newInbox(young time.Duration) *inbox {
	return &inbox{young: young, wake: make(chan struct{}, 1), at: map[uint64]time.Time{}}
}

func (i *inbox) put(events []watch.Event) {
	for _, e := range events {
		i.note(e.Cookie)
	}
	i.mu.Lock()
	i.pending = append(i.pending, events...)
	i.mu.Unlock()
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

// note remembers that sockets have just come.
func (i *inbox) note(cookies ...uint64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, c := range cookies {
		if _, ok := i.at[c]; !ok {
			i.at[c] = time.Now()
		}
	}
}

func (i *inbox) take() []watch.Event {
	i.mu.Lock()
	defer i.mu.Unlock()
	events := i.pending
	i.pending = nil
	return events
}

// born tells whether all members of a group have only just come.
func (i *inbox) born(live sockets.Group) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return !slices.ContainsFunc(live.Members, func(m sockets.Socket) bool {
		at, ok := i.at[m.Cookie]
		return !ok || time.Since(at) >= i.young
	})
}

// forget drops what is no news any more.
func (i *inbox) forget() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for c, at := range i.at {
		if time.Since(at) > i.young {
			delete(i.at, c)
		}
	}
}
