package loader

import (
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
