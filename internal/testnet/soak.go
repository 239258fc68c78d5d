package testnet

import (
	"os"
	"testing"
	"time"
)

// Soak is how long a test runs that may run for any time: RPSEL_SOAK, as in
// "10m", or else a short time.
func Soak(t testing.TB, short time.Duration) time.Duration {
	t.Helper()
	soak := os.Getenv("RPSEL_SOAK")
	if soak == "" {
		return short
	}
	d, err := time.ParseDuration(soak)
	if err != nil {
		t.Fatal("RPSEL_SOAK:", err)
	}
	return d
}
