// Package door is where processes without privileges hand their sockets to the
// agent: what is said on the wire, and the agent's side of it. Package agent is
// the other side.
//
// Each owner has a unix socket of its own in the agent's run directory, of type
// SOCK_SEQPACKET. A connection carries one request with one descriptor, and one
// answer.
package door

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// Network is the sockets' network, as package net calls it.
const Network = "unixpacket"

// Pattern matches the names of the sockets in a run directory.
const Pattern = "owner-*.sock"

// Path names the socket of an owner.
func Path(dir string, uid uint32) string {
	return filepath.Join(dir, strings.Replace(Pattern, "*", fmt.Sprint(uid), 1))
}

// version changes when an older peer would misunderstand.
const version = 1

// Op is what a request asks for.
type Op uint8

// The requests.
const (
	Register Op = 1
	Drain    Op = 2
	Resume   Op = 3
)

func (o Op) String() string {
	switch o {
	case Register:
		return "register"
	case Drain:
		return "drain"
	case Resume:
		return "resume"
	default:
		return fmt.Sprintf("request %d", uint8(o))
	}
}

var magic = []byte("rpsl")

const (
	requestSize = 8
	// answerSize is an answer's without text.
	answerSize = 12
	maxText    = 1024
	// MaxAnswer is how long an answer may be.
	MaxAnswer = answerSize + maxText
)

// Request is what a client says. The descriptor comes beside it (SCM_RIGHTS).
//
//	0      4         5    6          8
//	| rpsl | version | op | reserved |
type Request struct {
	Op Op
}

// Marshal is the inverse of ParseRequest.
func (r Request) Marshal() []byte {
	return append(bytes.Clone(magic), version, uint8(r.Op), 0, 0)
}

// ParseRequest reads a request. Its errors are meant for the client.
func ParseRequest(message []byte) (Request, error) {
	if len(message) != requestSize || !bytes.HasPrefix(message, magic) {
		return Request{}, errors.New("not a request to the rpsel agent")
	}
	if message[4] != version {
		return Request{}, fmt.Errorf("request of version %d, this agent speaks %d: use the library of the same release", message[4], version)
	}
	r := Request{Op: Op(message[5])}
	if r.Op < Register || r.Op > Resume || message[6] != 0 || message[7] != 0 {
		return Request{}, fmt.Errorf("%s: this agent does not know that", r.Op)
	}
	return r, nil
}

// Answer is what the agent says.
//
//	0      4         5      6          8      12
//	| rpsl | version | done | reserved | slot | text…
type Answer struct {
	Done bool
	Slot uint32 // of a socket that was registered
	Text string // why not, one line
}

// Marshal is the inverse of ParseAnswer. A long text is cut.
func (a Answer) Marshal() []byte {
	done := byte(0)
	if a.Done {
		done = 1
	}
	message := append(bytes.Clone(magic), version, done, 0, 0)
	message = binary.LittleEndian.AppendUint32(message, a.Slot)
	text := strings.Join(strings.Fields(a.Text), " ")
	return append(message, strings.ToValidUTF8(text[:min(len(text), maxText)], "")...)
}

// ParseAnswer reads an answer.
func ParseAnswer(message []byte) (Answer, error) {
	if len(message) < answerSize || len(message) > MaxAnswer || !bytes.HasPrefix(message, magic) || message[5] > 1 {
		return Answer{}, errors.New("the answer is not an rpsel agent's")
	}
	if message[4] != version {
		return Answer{}, fmt.Errorf("the agent speaks version %d, this library %d: use those of the same release", message[4], version)
	}
	return Answer{
		Done: message[5] == 1,
		Slot: binary.LittleEndian.Uint32(message[8:]),
		Text: string(message[answerSize:]),
	}, nil
}
