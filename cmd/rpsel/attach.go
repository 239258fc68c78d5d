package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/internal/owner"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func newAttachCmd(e *env) *cobra.Command {
	a := attachment{env: e, settle: -1}
	var asJSON, noHeader bool
	cmd := &cobra.Command{
		Use:   "attach --port PORT",
		Short: "Make the groups on a port sticky",
		Long: `Make every reuseport group on a port sticky while its servers run: register their
sockets and attach the selection program. No flow moves, unless by --affinity. On a group that is
attached, register what is new.

With --policy newest, new flows go to the newest generation of processes, and the
older ones keep the flows they have: for an upgrade start the new version beside
the old one, and stop that when its flows are gone. Processes that join within 5
seconds of each other are one generation. It takes over when it has as many
listeners as the one before, or after 5 seconds. Who joins when the newest lacks a
listener that died takes its place. --generation new makes the next process to
join, by this command or after it, open another generation all the same.

The other policies choose among all active listeners, by their weights: hash by the
flow's hash; least draws two and takes the one with fewer flows; rr each in turn;
random at random; cpu one that ran on the CPU the packet came to, which is meant for
servers that are pinned to a CPU each. With TCP least counts open connections.
A change of the policy moves no flow.

With --affinity client all that comes from one address goes to one listener,
whatever the port, and with --client-prefix 24/56 all that comes from one network:
a carrier's NAT gives a client several addresses. With bytes:OFFSET,LENGTH it goes
by bytes of the payload, such as the id of a session, so that a client may change
its address; a datagram too short for them goes by its flow. That does not serve
QUIC, whose id the server chooses anew after the client's first packets. With none
each datagram goes to any listener, as DNS or syslog likes it, and nothing is
tracked. TCP knows none, which is the default, and client: connections are given
out when they are opened. What is not "flow" is not what the kernel goes by: then
the attach moves flows, with N listeners all but one in N, and so does the detach.

With --first openvpn a flow's first packet is looked into, for UDP and affinity flow.
One that opens a session is new beyond doubt: while the group settles, its flow goes
by the policy at once, to who has just joined as well. A data packet whose client
has been heard of from another port (a NAT that gave it another one), by its address
and peer-id, goes to the listener it had, unless those are also another listener's
client's. So an OpenVPN client floats as if there were one server.

When the table is full new flows give way to newer ones, established flows do not.
A flow is established by the client's next packet, at least a second after its
first, and with --confirm reply by the server's answer. That is for servers that
answer nobody who has not proved himself, such as OpenVPN with tls-crypt; where
everybody is answered, so is who forges his address. It takes a server outside of
the root cgroup, as "rpsel run" and systemd start them, and UDP with affinity flow
or client.

With --owner, processes of the servers' user may register their own sockets
through "rpsel agent", without a capability; "--owner none" takes that back.

All groups are checked before one is changed. If one then fails, those that were
attached before it are detached again.`,
		Example: `  rpsel attach --port 1194 --dry-run
  rpsel attach --port 1194
  rpsel attach --port 5300 --adopt
  rpsel attach --port 1194 --flows 1000000 --idle 10m
  rpsel attach --port 1194 --policy newest
  rpsel attach --port 1194 --policy least
  rpsel attach --port 1194 --generation new
  rpsel attach --port 5300 --affinity client --client-prefix 24/56
  rpsel attach --port 1194 --first openvpn
  rpsel attach --port 1194 --confirm reply
  rpsel attach --port 4433 --owner nobody`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.needPort(cmd); err != nil {
				return err
			}
			if a.options.ClientPrefix != (loader.ClientPrefix{}) && a.options.Affinity != loader.AffinityClient {
				return usageError("--client-prefix %s: it goes with --affinity client", a.options.ClientPrefix)
			}
			if err := a.options.CheckProto(a.protocol()); err != nil {
				return usageError("--%v", err)
			}
			switch {
			case a.settle == 0:
				a.options.Settle = -1
			case a.settle > 0:
				a.options.Settle = a.settle
			}
			jobs, err := a.plan()
			if err != nil {
				return err
			}
			if a.dryRun {
				return a.printPlan(jobs, asJSON)
			}
			list, err := a.attachAll(jobs)
			if err != nil {
				return err
			}
			a.findAgent(e)
			return a.printStatus(e, list, asJSON, noHeader)
		},
	}
	a.addServerFlags(cmd)
	flags := cmd.Flags()
	flags.BoolVar(&a.adopt, "adopt", false, "make groups of live sockets that have no SO_REUSEPORT")
	flags.BoolVar(&a.options.Partial, "partial", false, "leave out sockets that cannot be registered; flows may move")
	flags.BoolVar(&a.options.Replace, "replace", false, "take the place of another tool's program")
	flags.Var(numberValue{&a.options.Flows, loader.MinFlows, loader.MaxFlows}, "flows",
		fmt.Sprintf("`NUMBER` of flows the table holds, at 60 bytes each (default %d)", loader.DefaultFlows))
	flags.Var(durationValue{&a.options.Idle, time.Second, loader.MaxIdle}, "idle",
		fmt.Sprintf("forget an established flow after this `TIME` of silence (default %s)", tidy(loader.DefaultIdle)))
	flags.Var(durationValue{&a.options.IdleNew, time.Second, loader.MaxIdle}, "idle-new",
		fmt.Sprintf("forget a flow that is not established after this `TIME` of silence (default %s)", tidy(loader.DefaultIdleNew)))
	flags.Var((*affinityValue)(&a.options.Affinity), "affinity",
		"what counts as the same client: address and port, address, bytes of the payload, nothing (default flow, none for TCP)")
	flags.Var((*clientPrefixValue)(&a.options.ClientPrefix), "client-prefix",
		"with --affinity client: bits of IPv4 and IPv6 addresses that count (default 32/128)")
	flags.Var((*confirmValue)(&a.options.Confirm), "confirm",
		"what makes a new flow an established one: the client's next packet, or the server's answer (default client)")
	complete(cmd, "confirm", "client", "reply")
	complete(cmd, "affinity", "flow", "client", "bytes:", "none")
	flags.Var((*firstValue)(&a.options.First), "first",
		"the protocol by whose packets a flow's first one may say that it is new, or whose it is")
	complete(cmd, "first", string(loader.FirstOpenVPN))
	flags.Var((*policyValue)(&a.options.Policy), "policy",
		fmt.Sprintf("who gets new flows (default %s at the first attach)", loader.PolicyHash))
	flags.Var((*generationValue)(&a.options.NewGeneration), "generation", "of processes that join: by the rule above, or another one")
	complete(cmd, "policy", loader.Policies()...)
	complete(cmd, "generation", "auto", "new")
	flags.Var(durationValue{&a.settle, 0, loader.MaxIdle}, "settle",
		fmt.Sprintf("give a new listener no flows for this `TIME` after the attach (default %s)", tidy(loader.DefaultSettle)))
	flags.Var(ownerValue{&a.options.Owner}, "owner",
		"let this `USER`, whose the servers are, register sockets through the agent; \"none\": nobody (default: as it is)")
	flags.BoolVar(&a.dryRun, "dry-run", false, "only say what would be done")
	a.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	addNoHeaderFlag(cmd, &noHeader)
	addQuietFlag(cmd, e)
	addVerboseFlag(cmd, e, "list the members, and the verifier's log if the kernel refuses the program")
	return cmd
}

// ownerValue is a flag that takes a user, or none. nil means that the flag was
// not given.
type ownerValue struct{ uid **uint32 }

func (o ownerValue) Set(text string) error {
	uid, err := owner.Parse(text)
	if err != nil {
		return err
	}
	*o.uid = &uid
	return nil
}

func (o ownerValue) String() string {
	switch {
	case o.uid == nil || *o.uid == nil:
		return ""
	case **o.uid == loader.NoOwner:
		return owner.None
	default:
		return owner.Name(**o.uid)
	}
}
func (o ownerValue) Type() string { return "user" }

// tidy writes a duration without zero units: 5m, not 5m0s.
func tidy(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	return text
}

// attachment is one run of attach.
type attachment struct {
	scope
	env           *env
	options       loader.Options
	settle        time.Duration // -1: not given
	adopt, dryRun bool
}

// job is a group, or a lone socket that becomes one.
type job struct {
	group sockets.Group
	adopt bool
	plan  loader.Plan // of a group
}

// plan finds what is on the port and checks all of it.
func (a *attachment) plan() ([]job, error) {
	groups, err := a.find()
	if err != nil {
		return nil, err
	}
	a.warnOwners(groups)
	jobs := make([]job, 0, len(groups))
	for _, g := range groups {
		j, err := a.planOne(g)
		if err != nil {
			return nil, err
		}
		for i, m := range g.Members {
			a.env.explain("%s: member %d of %d in the kernel's order: %s", a.groupName(g.Key), i+1, len(g.Members), socketName(m))
		}
		for _, u := range j.plan.Skipped {
			a.env.warn("%s: left out: %v", a.groupName(g.Key), u.Reason)
		}
		if a.dryRun { // else the status at the end says so
			for _, warning := range g.Mixed() {
				a.env.warn("%s: %s", a.groupName(g.Key), warning)
			}
		}
		jobs = append(jobs, j)
	}
	return jobs, nil
}

// find lists the groups and lone sockets on the port. Connected sockets serve
// one peer each, and are not counted if there is anything else.
func (s *scope) find() ([]sockets.Group, error) {
	netns, err := s.cookie()
	if err != nil {
		return nil, err
	}
	groups, err := sockets.Find(sockets.Query{NetNS: netns, Proto: s.protocol(), Port: s.port, Addr: s.addr})
	if err != nil {
		return nil, err
	}
	if len(groups) == 0 {
		look := "ss -lunp"
		if s.protocol() == sockets.TCP {
			look = "ss -ltnp"
		}
		if s.netns != "" {
			look += " in that namespace"
		}
		return nil, notFound("%s: no visible process has a socket there: %s lists what listens", s, look)
	}
	serving := slices.DeleteFunc(slices.Clone(groups), sockets.Group.Connected)
	if len(serving) > 0 {
		groups = serving
	}
	return groups, nil
}

// warnOwners tells of sockets that can never be in one group, and of servers
// whose next one cannot.
func (a *attachment) warnOwners(groups []sockets.Group) {
	var owners []uint32
	for _, g := range groups {
		for _, warning := range g.Renounced() {
			a.env.warn("%s: %s", a.groupName(g.Key), warning)
		}
		if !slices.Contains(owners, g.UID) {
			owners = append(owners, g.UID)
		}
	}
	if len(owners) > 1 {
		a.env.warn("%s: %s", &a.scope, sockets.DescribeOwners(owners))
	}
}

func (a *attachment) planOne(g sockets.Group) (job, error) {
	j := job{group: g}
	if g.Kernel == 0 {
		err := g.Members[0].Check()
		j.adopt = a.adopt && errors.Is(err, sockets.ErrNoReuseport)
		if j.adopt {
			return j, a.options.CheckOwner(g.Key)
		}
		return j, fmt.Errorf("%s: %w", a.groupName(g.Key), err)
	}
	err := withMember(g, func(conn *sockets.Conn) (err error) {
		j.plan, err = a.fs().Plan(conn, a.options)
		return err
	})
	return j, err
}

// withMember lends f a socket of the group, for no longer than it runs: kept
// open, it would outlive its server.
func withMember(g sockets.Group, f func(*sockets.Conn) error) error {
	conn, err := sockets.TakeMember(g)
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(conn)
}

// attachAll does the jobs and returns how the groups stand then. If one fails,
// it takes back what it made.
func (a *attachment) attachAll(jobs []job) (list []loader.Status, err error) {
	var undo []func() error
	defer func() {
		if err == nil || len(undo) == 0 {
			return
		}
		slices.Reverse(undo)
		for _, f := range undo {
			if undoErr := f(); undoErr != nil {
				a.env.warn("take back: %v", undoErr)
			}
		}
		a.env.say("%s: what this command had attached before is detached again", &a.scope)
	}()
	for _, j := range jobs {
		var back []func() error
		status, err := a.attachOne(j, &back)
		undo = append(undo, back...)
		if err != nil {
			return nil, err
		}
		list = append(list, status)
	}
	return list, nil
}

// attachOne does one job and adds to undo how to take it back.
func (a *attachment) attachOne(j job, undo *[]func() error) (status loader.Status, err error) {
	err = withMember(j.group, func(conn *sockets.Conn) error {
		if j.adopt {
			adoption, err := sockets.Adopt(conn)
			if err != nil {
				return err
			}
			*undo = append(*undo, func() error {
				return withMember(j.group, func(conn *sockets.Conn) error { return adoption.Undo(conn) })
			})
			a.env.say("%s: adopted %s, %s went astray meanwhile", a.groupName(j.group.Key), socketName(j.group.Members[0]), plural(int(adoption.Lost), "packet"))
		}
		g, err := a.fs().Attach(conn, a.options)
		if err != nil {
			return err
		}
		defer g.Close()
		if g.Fresh() {
			*undo = append(*undo, func() error {
				_, err := a.fs().Detach(g.Key())
				return err
			})
		}
		name := a.groupName(g.Key())
		switch joined := len(g.Joined()); {
		case g.Fresh():
			a.env.say("%s: attached, %s registered", name, plural(joined, "listener"))
			if affinity := a.options.Affinity; g.Key().Proto == loader.UDP && affinity != "" && affinity != loader.AffinityFlow && joined > 1 {
				a.env.say("%s: affinity %s is not what the kernel goes by: of the flows there were, some %d in %d have another listener now", name, affinity, joined-1, joined)
			}
		case joined > 0:
			a.env.say("%s: was attached, %s registered in addition", name, plural(joined, "listener"))
		default:
			a.env.say("%s: was attached, no new listener", name)
		}
		status, err = g.Status()
		return err
	})
	return status, err
}

// printPlan answers --dry-run.
func (a *attachment) printPlan(jobs []job, asJSON bool) error {
	type socketJSON struct {
		PID     int    `json:"pid"`
		Command string `json:"command"`
		Cookie  uint64 `json:"cookie"`
	}
	type planJSON struct {
		groupJSON
		Attached bool               `json:"attached"`
		Adopt    bool               `json:"adopt"`
		Register []socketJSON       `json:"register"`
		LeaveOut []unregisteredJSON `json:"leave_out"`
	}
	answer := struct {
		Schema int        `json:"schema"`
		Groups []planJSON `json:"groups"`
	}{schema, []planJSON{}}
	text := ""
	for _, j := range jobs {
		register := j.plan.Register
		verb := "would attach and register"
		switch {
		case j.adopt:
			register = j.group.Members
			verb = "would adopt, attach and register"
		case j.plan.Attached:
			verb = "is attached, would register"
		}
		p := planJSON{
			groupJSON: a.scope.groupJSON(j.group.Key, uint64(j.group.NetNSInode)),
			Attached:  j.plan.Attached, Adopt: j.adopt,
			Register: []socketJSON{}, LeaveOut: []unregisteredJSON{},
		}
		var names []string
		for _, m := range register {
			s := socketJSON{Cookie: m.Cookie}
			if len(m.Holders) > 0 {
				s.PID, s.Command = m.Holders[0].PID, m.Holders[0].Command
			}
			p.Register = append(p.Register, s)
			names = append(names, socketName(m))
		}
		for _, u := range j.plan.Skipped {
			p.LeaveOut = append(p.LeaveOut, newUnregisteredJSON(u))
		}
		answer.Groups = append(answer.Groups, p)
		text += fmt.Sprintf("%s: %s %s", a.groupName(j.group.Key), verb, plural(len(names), "listener"))
		if len(names) > 0 {
			text += ": " + strings.Join(names, ", ")
		}
		text += "\n"
	}
	if asJSON {
		return writeJSON(a.env.out, answer)
	}
	_, err := fmt.Fprint(a.env.out, text)
	return err
}
