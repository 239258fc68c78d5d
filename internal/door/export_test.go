package door

import "time"

// MaxClients is how many clients of one owner are served at once.
const MaxClients = maxClients

// SetPatience makes doors less patient until the test ends.
func SetPatience(t interface{ Cleanup(func()) }, d time.Duration) {
	before := patience
	patience = d
	t.Cleanup(func() { patience = before })
}
