package loader

import (
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rpsel/rpsel/maps"
)

// LosePatience makes locks give up at once, until the returned function is
// called.
func LosePatience() (restore func()) {
	patience := lockPatience
	lockPatience = time.Nanosecond
	return func() { lockPatience = patience }
}

var Vacancy = vacancy

// SettleAfter makes a plan, runs change and settles by the plan. It returns the
// pick table as it is while the group settles.
func (g *Group) SettleAfter(conn syscall.Conn, change func()) (maps.Table, error) {
	p, err := makePlan(g.key, conn, g.state, Options{})
	if err != nil {
		return nil, err
	}
	change()
	err = g.settle(conn, p, Options{})
	settling, _ := g.state.picks.Load()
	return settling, err
}

// Freeze tells the program that a freeze began some seconds ago, or (negative)
// that there is none.
func (g *Group) Freeze(ago int) error {
	now, err := g.state.now()
	if err != nil {
		return err
	}
	frozen := &g.state.config.Values().Frozen
	if ago < 0 {
		atomic.StoreUint32(frozen, 0)
	} else {
		atomic.StoreUint32(frozen, (now-uint32(ago))&(1<<24-1)|1<<31)
	}
	return nil
}
