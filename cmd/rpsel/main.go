// Command rpsel makes SO_REUSEPORT ports sticky.
//
// What it prints on standard output is the answer, what it prints on standard
// error is talk. The exit codes are those of exit.go.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"
)

func main() {
	os.Exit(run(os.Args[1:], &env{out: os.Stdout, err: os.Stderr}))
}

// env is what the commands have of the world around them.
type env struct {
	out, err       io.Writer
	quiet, verbose bool // -q, -v
}

// say talks to the person at the terminal.
func (e *env) say(format string, args ...any) {
	if !e.quiet {
		fmt.Fprintf(e.err, format+"\n", args...)
	}
}

// warn is say for what should not be overlooked.
func (e *env) warn(format string, args ...any) {
	e.say("warning: "+format, args...)
}

// explain is say for those who want to know more.
func (e *env) explain(format string, args ...any) {
	if e.verbose {
		e.say(format, args...)
	}
}

// plain writes what a terminal shows, and nothing that it obeys: the name of a process, or
// an argument, may be of somebody else than who reads it.
type plain struct{ w io.Writer }

func (p plain) Write(text []byte) (int, error) {
	if _, err := p.w.Write(harmless(text)); err != nil {
		return 0, err
	}
	return len(text), nil
}

// harmless is text with a question mark for each byte that a terminal obeys.
func harmless(text []byte) []byte {
	shown := text
	for i, b := range text {
		if b >= ' ' && b < 0x7f {
			continue // nearly all there is
		}
		// U+0080 to U+009F are control characters of two bytes.
		c1 := b == 0xc2 && i+1 < len(text) && text[i+1]&0xe0 == 0x80
		if c1 || b < ' ' && b != '\n' && b != '\t' || b == 0x7f {
			if &shown[0] == &text[0] {
				shown = bytes.Clone(text)
			}
			shown[i] = '?'
			if c1 {
				shown[i+1] = '?'
			}
		}
	}
	return shown
}

// run executes one command line and returns the exit code.
func run(args []string, e *env) int {
	e.out, e.err = plain{e.out}, plain{e.err}
	return execute(newRootCmd(e), args, e)
}

func execute(root *cobra.Command, args []string, e *env) int {
	root.SetArgs(args)
	cmd, err := root.ExecuteC()
	if err == nil {
		return exitDone
	}
	code, message := exitCode(err), errorText(err, e.verbose)
	switch {
	case message == "": // said already
	case wantsJSON(cmd, args):
		type fault struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		}
		writeJSON(e.err, struct {
			Schema int   `json:"schema"`
			Error  fault `json:"error"`
		}{schema, fault{code, message}})
	default:
		fmt.Fprintf(e.err, "rpsel: %s\n", message)
	}
	return code
}

// wantsJSON tells whether cmd was asked for JSON. If its flags were not read to
// the end, because one of them is wrong, the arguments tell.
func wantsJSON(cmd *cobra.Command, args []string) bool {
	if cmd == nil || cmd.Flags().Lookup("json") == nil {
		return false
	}
	if on, err := cmd.Flags().GetBool("json"); err == nil && on {
		return true
	}
	if end := slices.Index(args, "--"); end >= 0 {
		args = args[:end]
	}
	return slices.Contains(args, "-j") || slices.Contains(args, "--json")
}

// schema is the version of all JSON output. Fields are only ever added.
const schema = 1

// writeJSON writes one line.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
