package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// The exit codes.
const (
	exitDone        = 0 // done, also with nothing to do or an empty list
	exitFailed      = 1 // failed
	exitUsage       = 2 // wrong command line
	exitNotFound    = 3 // no such group, listener, flow or namespace
	exitPermission  = 4 // a capability is missing
	exitUnsupported = 5 // not with this kernel or socket
	exitTimeout     = 6 // --wait took longer than --timeout
)

// exitStatuses says what the codes mean, for people.
var exitStatuses = []struct {
	code    int
	meaning string
}{
	{exitDone, "done"},
	{exitFailed, "failed"},
	{exitUsage, "wrong command line"},
	{exitNotFound, "no such group or listener"},
	{exitPermission, "permission denied"},
	{exitUnsupported, "not supported by this kernel or socket"},
	{exitTimeout, "timed out"},
}

// exitCodes maps the errors of the packages below. The first match counts: a
// socket that was refused because a capability is missing lacks permission.
var exitCodes = []struct {
	code   int
	causes []error
}{
	{exitPermission, []error{sockets.ErrPermission}},
	{exitNotFound, []error{
		loader.ErrNotAttached, loader.ErrNoListener, sockets.ErrNoNetNS, sockets.ErrGone,
	}},
	{exitUnsupported, []error{
		sockets.ErrUnsupported, loader.ErrNoBPFFS, loader.ErrForeignProgram, loader.ErrUnregistrable, loader.ErrOwner,
		sockets.ErrMPTCP, sockets.ErrTunnel, sockets.ErrInUse, sockets.ErrConnected, sockets.ErrNoReuseport,
		sockets.ErrUnseen, sockets.ErrOtherGroup, sockets.ErrOtherUID,
	}},
}

// exitCode finds the code for an error that is not nil.
func exitCode(err error) int {
	var coded *codedError
	if errors.As(err, &coded) {
		return coded.code
	}
	for _, c := range exitCodes {
		for _, cause := range c.causes {
			if errors.Is(err, cause) {
				return c.code
			}
		}
	}
	return exitFailed
}

// codedError is an error whose exit code its cause does not tell.
type codedError struct {
	code int
	err  error // nil: the command has said it all
}

func (e *codedError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *codedError) Unwrap() error { return e.err }

// usageError is a mistake on the command line. Its text names the flag or
// argument, what was given and what is allowed.
func usageError(format string, args ...any) error {
	return &codedError{exitUsage, fmt.Errorf(format, args...)}
}

// notFound is for groups, listeners and flows that were named and are not
// there.
func notFound(format string, args ...any) error {
	return &codedError{exitNotFound, fmt.Errorf(format, args...)}
}

// errorText is one line, unless -v asks for the verifier's log.
func errorText(err error, verbose bool) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	var verifier *ebpf.VerifierError
	if verbose && errors.As(err, &verifier) {
		text += fmt.Sprintf("\n%+v", verifier)
	}
	return text
}
