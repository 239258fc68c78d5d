// Package stress has tests that run the selection program on traffic with a
// flow table far too small, on all CPUs at once, while listeners die and slots
// are used again.
//
// RPSEL_SOAK=10m makes each of them run as long.
package stress
