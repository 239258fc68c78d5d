// Package fault marks the steps of changes to kernel state at which a process
// may be killed. In a build with the tag faults, which tests make, it is; in
// any other build the marks are nothing.
package fault

// The environment of a build with the tag: at which step to end, counted from
// 1, and a file to which the steps are written that were passed.
const (
	KillAt = "RPSEL_KILL_AT"
	Log    = "RPSEL_KILL_LOG"
)
