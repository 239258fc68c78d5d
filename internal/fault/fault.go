// Package fault marks the steps of changes to kernel state at which a process
// may be killed. In a build with the tag faults, which tests make, it is; in
// any other build the marks are nothing.
package fault

// The environment of a build with the tag: a file to which the steps are written
// that were passed, each with its place in the source, and at which step to end,
// counted from 1. Processes with the same file count together.
const (
	Log    = "RPSEL_KILL_LOG"
	KillAt = "RPSEL_KILL_AT"
)
