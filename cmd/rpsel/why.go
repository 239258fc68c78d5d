package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func newWhyCmd(e *env) *cobra.Command {
	var s scope
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "why CLIENT",
		Short: "Say which listener a client has, and why",
		Long: `Say which listener a client has, since when, by which rule, and where plain
Linux would send it, which only affinity flow with confirm client can tell. CLIENT
is an address, or an address and a port.

The rules are:
  kernel   first seen while the group settled: left where the kernel's hash had it
  table    a new flow: given out by the pick table (policy hash)
  newest   a new flow: given to the newest generation of its time (policy newest)
  first    its first packet said that it is new, while the group settled: given
           out by the policy at once (--first openvpn)
  float    it followed a flow of the same address and peer-id (--first openvpn)
  rehomed  the listener it had died: given to another one
  earlier  first seen before the policy was changed, or the group last told to
           settle: which of the others is not known

A group whose state cannot be used does not hide the others: it is said on standard
error. If there are no others it is an error.`,
		Example: `  rpsel why 127.0.0.1
  rpsel why 127.0.0.1:40001 --port 1194 -j`,
		Args: oneArg("CLIENT"),
		RunE: func(_ *cobra.Command, args []string) error {
			addr, port, err := parseClient(args[0])
			if err != nil {
				return usageError("CLIENT %q: %v", args[0], err)
			}
			groups, err := s.openReadable(e)
			if err != nil {
				return err
			}
			defer closeAll(groups)
			answers, err := explainClient(groups, addr, port)
			if err != nil {
				return err
			}
			if len(answers) == 0 {
				return unknownClient(args[0], groups)
			}
			if asJSON {
				return writeJSON(e.out, struct {
					Schema int          `json:"schema"`
					Flows  []answerJSON `json:"flows"`
				}{schema, answersJSON(answers)})
			}
			for _, a := range answers {
				if err := writeAnswer(e, a); err != nil {
					return err
				}
			}
			return nil
		},
	}
	s.addGroupFlags(cmd)
	cmd.ValidArgsFunction = firstOnly(s.completeClient())
	s.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	return cmd
}

// unknownClient says that a client has no flow, and where none can have one.
func unknownClient(client string, groups []*loader.Group) error {
	list, err := statuses(groups)
	if err != nil {
		return err
	}
	tracks := func(s loader.Status) bool { return s.Affinity != loader.AffinityNone }
	if len(list) > 0 && !slices.ContainsFunc(list, tracks) {
		return notFound(`%s: nothing is tracked with affinity none: whatever opens or sends next is given out anew, "rpsel attach --affinity client" keeps a client together`, client)
	}
	return notFound(`%s: no tracked flow of this client: "rpsel flows" lists them`, client)
}

// parseClient takes ADDR, ADDR:PORT or [ADDR]:PORT. Port 0 is every port.
func parseClient(text string) (netip.Addr, uint16, error) {
	if addr, err := netip.ParseAddr(text); err == nil && addr.Zone() == "" {
		return addr.Unmap(), 0, nil
	}
	client, err := netip.ParseAddrPort(text)
	if err != nil || client.Port() == 0 || client.Addr().Zone() != "" {
		return netip.Addr{}, 0, errors.New("use an address, or an address and a port, such as 10.0.0.1, 10.0.0.1:40001 or [2001:db8::1]:40001")
	}
	return client.Addr().Unmap(), client.Port(), nil
}

// answer is what there is to say about one flow.
type answer struct {
	loader.Flow
	proto    loader.Proto
	pid      int // 0: unknown
	listener loader.Listener
	rule     string
	plain    sockets.Socket // where plain Linux would send it
	plainOK  bool           // there is such a place
	// plainUnknown: nobody knows where.
	plainUnknown bool
	// plainSlot is where that is registered, -1 if nowhere.
	plainSlot int
}

// The rules by which a flow has its listener.
const (
	ruleKernel  = "kernel"
	ruleTable   = "table"
	ruleFirst   = "first"
	ruleFloat   = "float"
	ruleRehomed = "rehomed"
	ruleEarlier = "earlier"
)

// ruleOf is the rule by which a flow of a group with this policy has its listener:
// but for these, and the pick table of policy hash, the policy itself.
func ruleOf(f loader.Flow, policy string) string {
	switch {
	case f.Rehomed:
		return ruleRehomed
	case f.First:
		return ruleFirst
	case f.Floated:
		return ruleFloat
	case f.Earlier:
		return ruleEarlier
	case f.Settling:
		return ruleKernel
	case policy == loader.PolicyHash.String():
		return ruleTable
	default:
		return policy
	}
}

// explainRule says it to people.
func explainRule(rule string) string {
	switch rule {
	case ruleKernel:
		return "kernel's own order: first seen while the group settled, so left where it was"
	case ruleTable:
		return "pick table: a new flow after the group had settled"
	case ruleFirst:
		return "first packet: it said that the flow is new, so that the policy gave it out although the group settled"
	case ruleFloat:
		return "float: followed a flow of the same address and peer-id"
	case ruleRehomed:
		return "rehomed: the listener it had before died"
	case ruleEarlier:
		return "not known: first seen before the policy was changed, or the group last told to settle"
	case loader.PolicyNewest.String():
		return "newest generation of its time: a new flow under policy newest"
	default:
		return "policy " + rule + ": a new flow after the group had settled"
	}
}

func explainClient(groups []*loader.Group, addr netip.Addr, port uint16) ([]answer, error) {
	var answers []answer
	for _, g := range groups {
		one := []*loader.Group{g}
		var rows []answer
		filter := flowFilter{client: netip.PrefixFrom(addr, addr.BitLen()), slot: -1}
		err := eachFlow(one, filter, func(_ int, f loader.Flow, pid int, rule string) {
			rows = append(rows, answer{Flow: f, proto: g.Key().Proto, pid: pid, rule: rule, plainSlot: -1})
		})
		if err != nil {
			return nil, err
		}
		list, err := statuses(one)
		if err != nil {
			return nil, err
		}
		slices.SortFunc(rows, func(a, b answer) int { return a.Client.Compare(b.Client) })
		for _, row := range rows {
			// A client that is known by its address alone has port 0.
			if port != 0 && row.Client.Port() != 0 && row.Client.Port() != port {
				continue
			}
			a := row
			a.listener, _ = listenerIn(list[0], row.Slot)
			a.plain, a.plainOK, err = g.Where(row.Flow)
			if a.plainUnknown = errors.Is(err, loader.ErrHashUnknown); err != nil && !a.plainUnknown {
				return nil, err
			}
			for _, l := range list[0].Listeners {
				if a.plainOK && l.Cookie == a.plain.Cookie && l.State != "dead" {
					a.plainSlot = l.Slot
				}
			}
			answers = append(answers, a)
		}
	}
	return answers, nil
}

func writeAnswer(e *env, a answer) error {
	listener := fmt.Sprintf("slot %d, %s (pid %d), %s", a.Slot, a.listener.Command, a.listener.PID, a.listener.State)
	if a.Orphan {
		listener = fmt.Sprintf("none: that in slot %d died, the next packet gets another one", a.Slot)
	}
	plain := "nowhere: the group has no socket"
	if a.plainUnknown {
		plain = fmt.Sprintf("cannot be told: %v", loader.ErrHashUnknown)
	}
	if a.plainOK {
		plain = socketName(a.plain)
		if a.plainSlot >= 0 {
			plain = fmt.Sprintf("slot %d, %s", a.plainSlot, plain)
		} else {
			plain += ", not registered"
		}
	}
	_, err := fmt.Fprintf(e.out, "%s %s -> %s\n  listener     %s\n  since        %s ago; first packet %s ago, last %s ago; %s\n  rule         %s\n  plain Linux  %s\n",
		a.proto, a.Client, a.Local, listener, a.Since, a.Age, a.Idle, a.State, explainRule(a.rule), plain)
	return err
}

type answerJSON struct {
	Proto        string     `json:"proto"`
	Local        string     `json:"local"`
	Client       string     `json:"client"`
	Slot         int        `json:"slot"`
	PID          int        `json:"pid"`
	Command      string     `json:"command"`
	Orphan       bool       `json:"orphan"`
	State        string     `json:"state"`
	AgeSeconds   int        `json:"age_seconds"`
	IdleSeconds  int        `json:"idle_seconds"`
	SinceSeconds int        `json:"since_seconds"`
	Rule         string     `json:"rule"`
	Plain        *plainJSON `json:"plain_linux"` // null: nowhere, or not known
}

type plainJSON struct {
	Slot    *int   `json:"slot"` // null: not registered
	PID     int    `json:"pid"`
	Command string `json:"command"`
}

func answersJSON(answers []answer) []answerJSON {
	list := []answerJSON{}
	for _, a := range answers {
		j := answerJSON{
			Proto: a.proto.String(), Local: a.Local.String(), Client: a.Client.String(),
			Slot: a.Slot, PID: a.pid, Command: a.listener.Command, Orphan: a.Orphan, State: a.State.String(),
			AgeSeconds: int(a.Age / time.Second), IdleSeconds: int(a.Idle / time.Second), SinceSeconds: int(a.Since / time.Second),
			Rule: a.rule,
		}
		if a.plainOK {
			j.Plain = &plainJSON{Slot: nullIfNegative(a.plainSlot)}
			if len(a.plain.Holders) > 0 {
				j.Plain.PID, j.Plain.Command = a.plain.Holders[0].PID, a.plain.Holders[0].Command
			}
		}
		list = append(list, j)
	}
	return list
}
