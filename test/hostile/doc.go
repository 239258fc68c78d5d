// Package hostile sends packets that are not as they should be to groups of every
// affinity, among packets of flows that are tracked: fragments, headers in between,
// wrong lengths and checksums, trains; with tags and tunnels around them. None of those may
// come to another listener than its flow's, each run is counted once, and the kernel has
// nothing to complain of.
package hostile
