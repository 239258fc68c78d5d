package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/rpsel/rpsel/test/vm/guest"
)

// result is what came out of a kernel.
type result struct {
	kernel
	booted   string // what uname says, with "5.10.0-32-cloud-amd64"
	accel    string
	took     time.Duration
	packages []*outcome
	problem  string // why it is a failure although no test has failed
}

// outcome is what came out of the tests of a package.
type outcome struct {
	name                    string
	passed, failed, skipped int // top-level tests
	took                    time.Duration
	problem                 string            // beyond failed tests
	fails                   []string          // the failed tests
	said                    []string          // what failed tests said, and skipped ones
	noted                   map[string]string // what tests noted by testing.T.Attr
}

func (r *result) ok() bool {
	return r.problem == "" && !slices.ContainsFunc(r.packages, func(o *outcome) bool { return !o.ok() })
}

func (r *result) sum() (passed, failed, skipped int) {
	for _, o := range r.packages {
		passed, failed, skipped = passed+o.passed, failed+o.failed, skipped+o.skipped
	}
	return
}

func (o *outcome) ok() bool { return o.problem == "" && o.failed == 0 }

func (o *outcome) String() string {
	s := fmt.Sprintf("%-18s %3d passed %3d failed %3d skipped %8s", o.name, o.passed, o.failed, o.skipped, o.took.Round(time.Second))
	if o.problem != "" {
		s += "  " + o.problem
	}
	return s
}

// collector makes outcomes of events.
type collector struct {
	result
	verbose bool
	now     *outcome
	convert io.WriteCloser // what the run says goes in here
	parsed  chan struct{}
	done    func(*outcome) // is told of each package
}

func (c *collector) on(e guest.Event) {
	switch {
	case e.Kernel != "":
		c.booted = e.Kernel
	case e.Run != "":
		c.begin(e.Run)
	case e.Output != nil && c.now != nil:
		c.convert.Write(e.Output)
		if c.verbose {
			os.Stdout.Write(bytes.ReplaceAll(e.Output, []byte{marker}, nil))
		}
	case e.End != nil && c.now != nil:
		c.end(*e.End)
	}
}

// marker is what -test.v=test2json puts before lines for the parser.
const marker = 'V' - '@' // control-V

// begin starts the go command's own parser of test output.
func (c *collector) begin(name string) {
	c.now = &outcome{name: name, noted: map[string]string{}}
	c.parsed = make(chan struct{})
	cmd := exec.Command("go", "tool", "test2json", "-p", name)
	in, err := cmd.StdinPipe()
	if err != nil {
		panic(err) // no descriptors
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		panic(err)
	}
	c.convert = in
	if err := cmd.Start(); err != nil {
		c.now.problem = err.Error()
		in.Close()
		close(c.parsed)
		return
	}
	go func(o *outcome) {
		defer close(c.parsed)
		o.parse(out)
		cmd.Wait()
	}(c.now)
}

func (c *collector) end(e guest.End) {
	c.convert.Close()
	<-c.parsed
	o := c.now
	c.now = nil
	o.took = e.Took
	switch {
	case e.How != "":
		o.problem = "ended by signal: " + e.How
	case e.Code != 0 && o.failed == 0 && o.problem == "":
		o.problem = fmt.Sprintf("exit code %d", e.Code)
	case o.passed+o.failed+o.skipped == 0 && o.problem == "":
		o.problem = "no test was run"
	}
	c.packages = append(c.packages, o)
	c.done(o)
}

// ended is called when the machine is no more.
func (c *collector) ended(err error, complaint string) *result {
	if c.now != nil {
		c.now.problem = "the machine ended"
		c.end(guest.End{})
	}
	switch {
	case err != nil:
		c.problem = err.Error()
	case complaint != "":
		c.problem = "the kernel complained: " + complaint
	}
	return &c.result
}

// parse reads test2json's events.
func (o *outcome) parse(r io.Reader) {
	said := map[string][]string{}
	unfinished := map[string]bool{}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<24)
	for s.Scan() {
		var e struct{ Action, Test, Output, Key, Value string }
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			continue
		}
		top, _, sub := strings.Cut(e.Test, "/")
		switch e.Action {
		case "attr":
			o.noted[e.Key] = e.Value
		case "output":
			said[top] = append(said[top], e.Output)
		case "run":
			unfinished[top] = true
		case "pass", "fail", "skip":
			if sub || top == "" {
				continue
			}
			delete(unfinished, top)
			switch e.Action {
			case "pass":
				o.passed++
				delete(said, top)
			case "fail":
				o.failed++
				o.fails = append(o.fails, top)
			case "skip":
				o.skipped++
			}
		}
	}
	// A panic takes the tests with it that had not ended.
	if len(unfinished) > 0 && o.failed == 0 {
		o.failed = len(unfinished)
		o.fails = slices.Sorted(maps.Keys(unfinished))
	}
	names := make([]string, 0, len(said))
	for name := range said {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if name != "" || o.failed > 0 || o.passed == 0 {
			o.said = append(o.said, said[name]...)
		}
	}
}
