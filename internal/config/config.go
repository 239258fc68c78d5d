// Package config reads the agent's file: which services are to be kept sticky,
// and how. The keys of a service are the names of the flags of "rpsel attach".
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/rpsel/rpsel/internal/owner"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// Default is where the file usually is.
const Default = "/etc/rpsel/rpsel.toml"

// AllNetNS is what a service's netns may say instead of a namespace.
const AllNetNS = "all"

// DefaultMetrics is where the agent serves its metrics if the file does not say:
// beyond the ports of other exporters, for this machine alone.
const DefaultMetrics = "127.0.0.1:10194"

// UnixMetrics comes before the path of a unix socket for metrics.
const UnixMetrics = "unix:"

// ErrInvalid: the file says something that cannot be. The message names the
// file, the line, the key and what is allowed.
var ErrInvalid = errors.New("invalid configuration")

// File is what the file says.
type File struct {
	// Metrics is an address and port, UnixMetrics and a path, or "": metrics are
	// not served.
	Metrics string
	// Services are in the order in which they count.
	Services []Service
}

// Service is a port that is to be sticky.
type Service struct {
	// Line is where the service begins in its file.
	Line int
	// Proto and Port are what its servers bind.
	Proto sockets.Proto
	Port  uint16
	// Addr is the exact local address; invalid means every address.
	Addr netip.Addr
	// NetNS is a name, a path or a pid (sockets.OpenNetNS), AllNetNS, or ""
	// for the agent's own namespace.
	NetNS string
	// Options are for loader.Attach.
	Options loader.Options
	// Adopt makes groups of sockets that have no SO_REUSEPORT.
	Adopt bool
	// Force pins the programs that force SO_REUSEPORT on binds.
	Force bool
}

// String names a service as people do, such as "udp 0.0.0.0:1194".
func (s Service) String() string {
	addr := "*"
	if s.Addr.IsValid() {
		addr = s.Addr.String()
		if s.Addr.Is6() {
			addr = "[" + addr + "]"
		}
	}
	name := fmt.Sprintf("%s %s:%d", s.Proto, addr, s.Port)
	if s.NetNS != "" {
		name += " netns " + s.NetNS
	}
	return name
}

// longest is how long a file may be: no device without end.
const longest = 1 << 20

// Load reads a file. The order of the services is the file's: the first that
// fits a socket is the one that counts.
//
// Errors: ErrInvalid, fs.ErrNotExist, fs.ErrPermission.
func Load(path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, longest+1))
	if err != nil {
		return File{}, err
	}
	if len(data) > longest {
		return File{}, &invalid{path + ": longer than 1 MiB: no configuration"}
	}
	file, err := parse(data)
	if at, ok := errors.AsType[*lineError](err); ok {
		return File{}, &invalid{fmt.Sprintf("%s:%d: %s", path, at.line, at.text)}
	}
	return file, err
}

// invalid is ErrInvalid with nothing but the message.
type invalid struct{ text string }

func (e *invalid) Error() string { return e.text }
func (e *invalid) Unwrap() error { return ErrInvalid }

// lineError is a mistake in a line.
type lineError struct {
	line int
	text string
}

func (e *lineError) Error() string { return fmt.Sprintf("line %d: %s", e.line, e.text) }

// entry is a [[service]] as it is written. nil is not given.
type entry struct {
	Port         *int64  `toml:"port"`
	Proto        *string `toml:"proto"`
	Addr         *string `toml:"addr"`
	NetNS        *string `toml:"netns"`
	Flows        *int64  `toml:"flows"`
	Idle         *string `toml:"idle"`
	IdleNew      *string `toml:"idle-new"`
	Settle       *string `toml:"settle"`
	Adopt        bool    `toml:"adopt"`
	Partial      bool    `toml:"partial"`
	Replace      bool    `toml:"replace"`
	Policy       *string `toml:"policy"`
	Affinity     *string `toml:"affinity"`
	ClientPrefix *string `toml:"client-prefix"`
	First        *string `toml:"first"`
	Confirm      *string `toml:"confirm"`
	Owner        *string `toml:"owner"`
	Force        bool    `toml:"force"`
}

// allowed says what each key takes. It is the list of keys, too.
var allowed = map[string]string{
	"port":          "use a number from 1 to 65535",
	"proto":         `use "udp" or "tcp"`,
	"addr":          `use an IPv4 or IPv6 address, such as "0.0.0.0" or "::"`,
	"netns":         `use a name in /run/netns, a path, a pid or "all", in quotes`,
	"flows":         fmt.Sprintf("use a number from %d to %d", loader.MinFlows, loader.MaxFlows),
	"idle":          fmt.Sprintf(`use a duration from 1s to %v, such as "90s" or "5m"`, loader.MaxIdle),
	"idle-new":      fmt.Sprintf(`use a duration from 1s to %v, such as "90s" or "5m"`, loader.MaxIdle),
	"settle":        fmt.Sprintf(`use a duration from 0s to %v, such as "90s" or "5m"`, loader.MaxIdle),
	"adopt":         "use true or false",
	"partial":       "use true or false",
	"replace":       "use true or false",
	"policy":        "use " + quoted(loader.Policies()),
	"affinity":      fmt.Sprintf(`use "flow", "client", "bytes:OFFSET,LENGTH" (up to %d and 1 to %d) or "none"; of TCP "client" or "none"`, loader.MaxAffinityOffset, loader.MaxAffinityLength),
	"client-prefix": `use two numbers of bits, such as "24/56", with affinity = "client"`,
	"first":         `use "openvpn", with UDP and affinity = "flow"`,
	"confirm":       `use "client" or "reply", and "reply" with proto = "udp" and affinity = "flow" or "client"`,
	"owner":         `use a user's name or number, or "none"`,
	"force":         "use true or false",
}

// Key is a key of a service, and what it takes.
type Key struct{ Name, Allowed string }

// Keys are all of them, sorted.
func Keys() []Key {
	keys := make([]Key, 0, len(allowed))
	for _, name := range slices.Sorted(maps.Keys(allowed)) {
		keys = append(keys, Key{name, allowed[name]})
	}
	return keys
}

// quoted lists what may be written.
func quoted(names []string) string {
	last := len(names) - 1
	return `"` + strings.Join(names[:last], `", "`) + `" or "` + names[last] + `"`
}

const (
	noTable      = "service: write [[service]], and its keys below it"
	wrongMetrics = `metrics: use an address and port, such as "` + DefaultMetrics + `", "` + UnixMetrics + `/PATH" or "off"`
)

func parse(data []byte) (File, error) {
	var file struct {
		Metrics *string `toml:"metrics"`
		Service []entry `toml:"service"`
	}
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&file)
	if unknown, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		return File{}, unknownKey(&unknown.Errors[0])
	}
	if wrong, ok := errors.AsType[*toml.DecodeError](err); ok {
		return File{}, decodeError(wrong)
	}
	if err != nil {
		return File{}, err
	}
	metricsLine, places, err := locate(data)
	if err != nil {
		return File{}, err
	}
	metrics, ok := metricsOf(file.Metrics)
	if !ok {
		return File{}, &lineError{metricsLine, wrongMetrics}
	}
	services := make([]Service, 0, len(file.Service))
	for i, e := range file.Service {
		s, err := e.service(places[i])
		if err != nil {
			return File{}, err
		}
		same := func(o Service) bool {
			return o.Proto == s.Proto && o.Port == s.Port && o.Addr == s.Addr && o.NetNS == s.NetNS
		}
		if j := slices.IndexFunc(services, same); j >= 0 {
			return File{}, &lineError{s.Line, fmt.Sprintf("service: %s is the service of line %d already: remove one", s, services[j].Line)}
		}
		services = append(services, s)
	}
	return File{metrics, services}, nil
}

// metricsOf is where metrics are served; text is nil if the file does not say.
func metricsOf(text *string) (where string, ok bool) {
	if text == nil {
		return DefaultMetrics, true
	}
	if *text == "off" {
		return "", true
	}
	if path, unix := strings.CutPrefix(*text, UnixMetrics); unix {
		return *text, filepath.IsAbs(path)
	}
	addr, err := netip.ParseAddrPort(*text)
	return *text, err == nil && addr.Port() != 0
}

func unknownKey(e *toml.DecodeError) error {
	line, _ := e.Position()
	key := e.Key()
	if key[0] != "service" || len(key) == 1 {
		return &lineError{line, fmt.Sprintf("%s: unknown: the file consists of [[service]] tables, and metrics before them", key[0])}
	}
	names := slices.Sorted(maps.Keys(allowed))
	return &lineError{line, fmt.Sprintf("%s: unknown key: use %s", strings.Join(key[1:], "."), strings.Join(names, ", "))}
}

// decodeError is about syntax, or a value of the wrong type.
func decodeError(e *toml.DecodeError) error {
	line, _ := e.Position()
	key := e.Key()
	switch {
	case len(key) == 0:
		return &lineError{line, "no TOML: " + strings.TrimPrefix(e.Error(), "toml: ")}
	case len(key) >= 2 && key[0] == "service" && allowed[key[1]] != "":
		return &lineError{line, key[1] + ": " + allowed[key[1]]}
	case key[0] == "service":
		return &lineError{line, noTable}
	case key[0] == "metrics":
		return &lineError{line, wrongMetrics}
	}
	return &lineError{line, strings.Join(key, ".") + ": " + strings.TrimPrefix(e.Error(), "toml: ")}
}

// place is where a service and its keys are in the file.
type place struct {
	line int
	keys map[string]int
}

// locate finds the lines of the key metrics, and of the services and their keys, of
// a file that has been decoded: what the decoder takes may still be out of bounds.
// There is one way to write a service.
func locate(data []byte) (metrics int, places []place, err error) {
	var p unstable.Parser
	p.Reset(data)
	for p.NextExpression() {
		e := p.Expression()
		key := e.Key()
		key.Next()
		line := p.Shape(key.Node().Raw).Start.Line
		switch {
		case e.Kind == unstable.ArrayTable:
			places = append(places, place{line, map[string]int{}})
		case e.Kind == unstable.KeyValue && len(places) > 0:
			places[len(places)-1].keys[string(key.Node().Data)] = line
		case e.Kind == unstable.KeyValue && string(key.Node().Data) == "metrics":
			metrics = line
		default:
			return 0, nil, &lineError{line, noTable}
		}
	}
	return metrics, places, p.Error()
}

// service checks an entry.
func (e entry) service(at place) (s Service, err error) {
	// wrong notes the first mistake.
	wrong := func(key string) {
		line := at.line
		if own, ok := at.keys[key]; ok {
			line = own
		}
		if err == nil {
			err = &lineError{line, key + ": " + allowed[key]}
		}
	}
	s = Service{Line: at.line, Proto: sockets.UDP, Adopt: e.Adopt, Force: e.Force}
	s.Options.Partial, s.Options.Replace = e.Partial, e.Replace
	if e.Port == nil || *e.Port < 1 || *e.Port > 65535 {
		wrong("port")
	} else {
		s.Port = uint16(*e.Port)
	}
	if e.Proto != nil && s.Proto.UnmarshalText([]byte(*e.Proto)) != nil {
		wrong("proto")
	}
	if e.Addr != nil {
		addr, parseErr := netip.ParseAddr(*e.Addr)
		if parseErr != nil || addr.Zone() != "" {
			wrong("addr")
		}
		s.Addr = addr
	}
	if e.NetNS != nil {
		if s.NetNS = *e.NetNS; s.NetNS == "" {
			wrong("netns")
		}
	}
	if e.Flows != nil {
		if *e.Flows < loader.MinFlows || *e.Flows > loader.MaxFlows {
			wrong("flows")
		}
		s.Options.Flows = int(*e.Flows)
	}
	if e.Policy != nil && s.Options.Policy.UnmarshalText([]byte(*e.Policy)) != nil {
		wrong("policy")
	}
	if e.Affinity != nil && (s.Options.Affinity.UnmarshalText([]byte(*e.Affinity)) != nil ||
		s.Options.CheckProto(s.Proto) != nil) {
		wrong("affinity")
	}
	if e.ClientPrefix != nil && (s.Options.ClientPrefix.UnmarshalText([]byte(*e.ClientPrefix)) != nil ||
		s.Options.Affinity != loader.AffinityClient) {
		wrong("client-prefix")
	}
	if e.First != nil && (s.Options.First.UnmarshalText([]byte(*e.First)) != nil ||
		s.Options.CheckProto(s.Proto) != nil) {
		wrong("first")
	}
	if e.Confirm != nil && (s.Options.Confirm.UnmarshalText([]byte(*e.Confirm)) != nil ||
		s.Options.CheckProto(s.Proto) != nil) {
		wrong("confirm")
	}
	if e.Owner != nil {
		uid, parseErr := owner.Parse(*e.Owner)
		if parseErr != nil {
			wrong("owner")
		}
		s.Options.Owner = &uid
	}
	for _, d := range []struct {
		key   string
		text  *string
		least time.Duration
		value *time.Duration
	}{
		{"idle", e.Idle, time.Second, &s.Options.Idle},
		{"idle-new", e.IdleNew, time.Second, &s.Options.IdleNew},
		{"settle", e.Settle, 0, &s.Options.Settle},
	} {
		if d.text == nil {
			continue
		}
		value, parseErr := time.ParseDuration(*d.text)
		if parseErr != nil || value < d.least || value > loader.MaxIdle {
			wrong(d.key)
		}
		*d.value = value
		if value == 0 {
			*d.value = -1 // none, where zero is the default
		}
	}
	return s, err
}
