package loader

import "time"

// LosePatience makes locks give up at once, until the returned function is
// called.
func LosePatience() (restore func()) {
	patience := lockPatience
	lockPatience = time.Nanosecond
	return func() { lockPatience = patience }
}
