// Package guest is what the host and the init of a test machine say to each
// other: one Order in the guest's file system, and Events on a serial port of
// their own, so that kernel messages cannot get in between.
package guest

import "time"

const (
	// OrderFile is where the init finds its Order, as JSON.
	OrderFile = "/order.json"
	// Source is where the files of the repository are.
	Source = "/rpsel"
	// Built is where the programs are that tests would build with the go
	// command.
	Built = "/built"
)

// Order is all that a machine does before it ends.
type Order struct {
	Port    string   // where it writes Events, one line of JSON each
	Modules []string // files of kernel modules, in the order to load them
	Env     []string // of the runs
	Runs    []Run
}

// Run is one program to run.
type Run struct {
	Name string // of the package whose tests it has
	Dir  string // its working directory
	Argv []string
}

// Event is one thing that happened. The last one of a machine that came to its
// end has Done.
type Event struct {
	Kernel string `json:",omitempty"` // its release: the machine is up
	Run    string `json:",omitempty"` // the run that the following are about
	Output []byte `json:",omitempty"`
	End    *End   `json:",omitempty"`
	Broken string `json:",omitempty"` // why the init cannot go on
	Done   bool   `json:",omitempty"`
}

// End is how a run ended.
type End struct {
	Code int    // the exit code
	How  string // what Code cannot say, such as a signal
	Took time.Duration
}
