package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rpsel/rpsel/internal/daemon"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// scope is what a command is about: which groups, where their state is.
type scope struct {
	port  uint16        // 0: not given
	proto sockets.Proto // 0: not given
	addr  netip.Addr    // invalid: not given
	netns string        // "": the caller's
	bpffs string        // "": the usual one

	agent   *daemon.Info     // nil: none was found
	damaged []loader.Summary // groups whose state could not be used
}

// fs is where the state is.
func (s *scope) fs() loader.FS { return loader.FS(s.bpffs) }

// findAgent looks for the agent that keeps the scope's state. That it cannot be
// told is no reason to fail.
func (s *scope) findAgent(e *env) {
	found, err := daemon.Running(s.bpffs)
	if err != nil {
		e.explain("whether an agent runs cannot be told: %v", err)
	}
	s.agent = found
}

// addPortFlag adds --port alone.
func (s *scope) addPortFlag(cmd *cobra.Command, usage string) {
	cmd.Flags().VarP((*portValue)(&s.port), "port", "p", usage)
}

// addGroupFlags adds the flags that choose groups that are attached.
func (s *scope) addGroupFlags(cmd *cobra.Command) {
	s.addScopeFlags(cmd)
	s.completeKeys(cmd, s.attachedKeys, s.meant)
}

// addServerFlags adds the same flags, for commands about what is not attached yet.
func (s *scope) addServerFlags(cmd *cobra.Command) {
	s.addScopeFlags(cmd)
	s.completeKeys(cmd, s.servingKeys, s.meant)
}

func (s *scope) addScopeFlags(cmd *cobra.Command) {
	s.addPortFlag(cmd, "local `PORT` of the groups")
	cmd.Flags().Var((*protoValue)(&s.proto), "proto", "protocol: udp or tcp (default udp, if there is a --port)")
	cmd.Flags().Var((*addrValue)(&s.addr), "addr", "exact local `ADDRESS` of the groups, if there are several")
	s.addNetNSFlag(cmd)
	complete(cmd, "proto", "udp", "tcp")
}

func (s *scope) addNetNSFlag(cmd *cobra.Command) {
	cmd.Flags().VarP(textValue{&s.netns, "use a name in /run/netns, a path or a pid"}, "netns", "N", "network namespace: `NAME`, path or pid (default: this one)")
	completeBy(cmd, "netns", completeNetNS)
}

func (s *scope) addBPFFSFlag(cmd *cobra.Command) {
	cmd.Flags().Var(textValue{&s.bpffs, "use a directory"}, "bpffs", "`DIR` where the BPF file system is (default "+string(loader.DefaultFS)+")")
	completePath(cmd, "bpffs", cobra.ShellCompDirectiveFilterDirs)
}

// addQuietFlag adds -q, for commands that talk.
func addQuietFlag(cmd *cobra.Command, e *env) {
	cmd.Flags().BoolVarP(&e.quiet, "quiet", "q", false, "print nothing but the answer and errors")
}

// addVerboseFlag adds -v, for commands with more to say.
func addVerboseFlag(cmd *cobra.Command, e *env, usage string) {
	cmd.Flags().BoolVarP(&e.verbose, "verbose", "v", false, usage)
}

func addJSONFlag(cmd *cobra.Command, on *bool) {
	cmd.Flags().BoolVarP(on, "json", "j", false, "print JSON; errors too")
}

func addNoHeaderFlag(cmd *cobra.Command, on *bool) {
	cmd.Flags().BoolVarP(on, "no-header", "H", false, "print no column titles")
}

// needPort is for commands that do not act on every port there is.
func (s *scope) needPort(cmd *cobra.Command) error {
	if s.port == 0 {
		return usageError("%s needs --port: use a number from 1 to 65535", cmd.CommandPath())
	}
	return nil
}

// tidyFlagError gives the flag library's errors the form of our own: the flag,
// the value, what is allowed.
func tidyFlagError(err error) string {
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		cause := errors.Unwrap(invalid)
		var syntax *strconv.NumError // of the library's own flags, all of them switches
		if errors.As(cause, &syntax) {
			cause = errors.New("use true or false")
		}
		return fmt.Sprintf("--%s %q: %v", invalid.GetFlag().Name, invalid.GetValue(), cause)
	}
	var required *pflag.ValueRequiredError
	if errors.As(err, &required) {
		return fmt.Sprintf("--%s needs a value", required.GetFlag().Name)
	}
	return err.Error()
}

// portValue is a flag that takes a port.
type portValue uint16

func (p *portValue) Set(text string) error {
	n, err := parseNumber(text, 1, 65535)
	if err != nil {
		return err
	}
	*p = portValue(n)
	return nil
}

func (p *portValue) String() string {
	if *p == 0 {
		return ""
	}
	return strconv.Itoa(int(*p))
}
func (p *portValue) Type() string { return "port" }

// numberValue is a flag that takes a number within bounds. A value below them
// means that the flag was not given.
type numberValue struct {
	value    *int
	min, max int
}

func (n numberValue) Set(text string) error {
	value, err := parseNumber(text, n.min, n.max)
	if err != nil {
		return err
	}
	*n.value = value
	return nil
}

func (n numberValue) String() string {
	if n.value == nil || *n.value < n.min {
		return ""
	}
	return strconv.Itoa(*n.value)
}
func (n numberValue) Type() string { return "number" }

// parseNumber takes decimal digits and nothing else.
func parseNumber(text string, low, high int) (int, error) {
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil || n < uint64(low) || n > uint64(high) {
		return 0, fmt.Errorf("use a number from %d to %d", low, high)
	}
	return int(n), nil
}

// durationValue is a flag that takes a duration within bounds. A value below
// them means that the flag was not given.
type durationValue struct {
	value    *time.Duration
	min, max time.Duration
}

func (d durationValue) Set(text string) error {
	value, err := time.ParseDuration(text)
	if err != nil || value < d.min || value > d.max {
		return fmt.Errorf("use a duration from %v to %v, such as 90s or 5m", d.min, d.max)
	}
	*d.value = value
	return nil
}

func (d durationValue) String() string {
	if d.value == nil || *d.value < d.min {
		return ""
	}
	return d.value.String()
}
func (d durationValue) Type() string { return "duration" }

// protoValue is a flag that takes a protocol.
type protoValue sockets.Proto

func (p *protoValue) Set(text string) error {
	if (*sockets.Proto)(p).UnmarshalText([]byte(text)) != nil {
		return errors.New("use udp or tcp")
	}
	return nil
}

func (p *protoValue) String() string {
	if *p == 0 {
		return ""
	}
	return sockets.Proto(*p).String()
}
func (p *protoValue) Type() string { return "udp|tcp" }

// policyValue is a flag that takes a policy.
type policyValue loader.Policy

func (p *policyValue) Set(text string) error { return (*loader.Policy)(p).UnmarshalText([]byte(text)) }
func (p *policyValue) String() string        { return loader.Policy(*p).String() }
func (p *policyValue) Type() string          { return strings.Join(loader.Policies(), "|") }

// stateValue is a flag that takes a state of tracked flows.
type stateValue maps.State

func (s *stateValue) Set(text string) error {
	for _, state := range []maps.State{maps.New, maps.Established} {
		if text == state.String() {
			*s = stateValue(state)
			return nil
		}
	}
	return errors.New("use new or established")
}

func (s *stateValue) String() string {
	if *s == 0 {
		return ""
	}
	return maps.State(*s).String()
}
func (s *stateValue) Type() string { return "new|established" }

// affinityValue is a flag that takes an affinity.
type affinityValue loader.Affinity

func (a *affinityValue) Set(text string) error {
	return (*loader.Affinity)(a).UnmarshalText([]byte(text))
}
func (a *affinityValue) String() string { return string(*a) }
func (a *affinityValue) Type() string   { return "flow|client|bytes:OFFSET,LENGTH|none" }

// confirmValue is a flag that takes a way of confirmation.
type confirmValue loader.Confirm

func (c *confirmValue) Set(text string) error {
	return (*loader.Confirm)(c).UnmarshalText([]byte(text))
}
func (c *confirmValue) String() string { return string(*c) }
func (c *confirmValue) Type() string   { return "client|reply" }

// clientPrefixValue is a flag that takes the numbers of bits of client addresses.
type clientPrefixValue loader.ClientPrefix

func (p *clientPrefixValue) Set(text string) error {
	return (*loader.ClientPrefix)(p).UnmarshalText([]byte(text))
}
func (p *clientPrefixValue) String() string { return loader.ClientPrefix(*p).String() }
func (p *clientPrefixValue) Type() string   { return "V4/V6" }

// firstValue is a flag that takes a protocol.
type firstValue loader.First

func (f *firstValue) Set(text string) error { return (*loader.First)(f).UnmarshalText([]byte(text)) }
func (f *firstValue) String() string        { return string(*f) }
func (f *firstValue) Type() string          { return "openvpn" }

// generationValue is a flag that takes auto or new, which is true.
type generationValue bool

func (g *generationValue) Set(text string) error {
	if text != "auto" && text != "new" {
		return errors.New("use auto or new")
	}
	*g = text == "new"
	return nil
}

func (g *generationValue) String() string {
	if *g {
		return "new"
	}
	return "auto"
}
func (g *generationValue) Type() string { return "auto|new" }

// addrValue is a flag that takes an IP address.
type addrValue netip.Addr

func (a *addrValue) Set(text string) error {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" {
		return errors.New("use an IPv4 or IPv6 address, such as :: or 0.0.0.0")
	}
	*a = addrValue(addr)
	return nil
}

func (a *addrValue) String() string {
	if !netip.Addr(*a).IsValid() {
		return ""
	}
	return netip.Addr(*a).String()
}
func (a *addrValue) Type() string { return "address" }

// prefixValue is a flag that takes an address or a prefix of some.
type prefixValue netip.Prefix

func (p *prefixValue) Set(text string) error {
	addr, err := netip.ParseAddr(text)
	prefix := netip.PrefixFrom(addr, addr.BitLen())
	if err != nil {
		prefix, err = netip.ParsePrefix(text)
	}
	if err != nil || addr.Zone() != "" {
		return errors.New("use an address or a prefix, such as 10.0.0.1, 10.0.0.0/8 or 2001:db8::/32")
	}
	*p = prefixValue(prefix.Masked())
	return nil
}

func (p *prefixValue) String() string {
	if !netip.Prefix(*p).IsValid() {
		return ""
	}
	return netip.Prefix(*p).String()
}
func (p *prefixValue) Type() string { return "prefix" }

// textValue is a flag that takes any text but an empty one.
type textValue struct {
	value *string
	hint  string
}

func (t textValue) Set(text string) error {
	if text == "" {
		return errors.New(t.hint)
	}
	*t.value = text
	return nil
}

func (t textValue) String() string {
	if t.value == nil {
		return ""
	}
	return *t.value
}
func (t textValue) Type() string { return "text" }
