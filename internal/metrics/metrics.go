// Package metrics tells Prometheus how the groups and the agent stand. One
// Collector serves "rpsel metrics" and the agent's /metrics.
//
// What is counted by slot is of all listeners that have been in it, so that a
// counter goes down only when a group loses its state, and then to zero. No label
// has more values than groups, slots, or a fixed list: never a process.
package metrics

import (
	"fmt"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// Agent is how an agent stands.
type Agent struct {
	// Polling tells that it asks the kernel for new listeners, instead of being told.
	Polling bool
	// Services is how many its file has, and ConfigStale tells that the file could
	// not be read again when that was asked for.
	Services    int
	ConfigStale bool
	// Failures is how many things fail now, and Errors how often something has.
	Failures int
	Errors   uint64
	// Attached, Reattached and Registered count what it has done, Missed the
	// events it was not told of for want of room.
	Attached, Reattached, Registered, Missed uint64
	// Swept is when it last looked at everything there is without an error.
	Swept time.Time
}

// Collector reads groups, and an agent, at each scrape. It keeps nothing.
type Collector struct {
	version string
	read    func() ([]loader.Summary, error)
	agent   func() Agent // nil: there is none
	descs   []*prometheus.Desc

	build family

	up, attached, options, flows, capacity, settling, turning, generation, unregistered family
	runs, parseErrors, tableFull, evicted                                               family

	state, weight, listenerGeneration, listenerFlows, connections family
	listenerRuns, bytes, receiveQueue, acceptQueue, drops         family

	polling, services, stale, failures, swept family
	errors, attaches, registrations, missed   family
}

// family is a metric with its labels yet to come.
type family struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

const (
	gauge   = prometheus.GaugeValue
	counter = prometheus.CounterValue
)

// Labels that name a group: all that tells one from another. The network namespace
// is known by its cookie, which a group has also when no member of it is left.
var groupLabels = []string{"netns", "proto", "addr", "port", "device", "v6only", "uid"}

// New makes a collector for what read returns at each scrape. agent is nil for a
// process that is none.
func New(version string, read func() ([]loader.Summary, error), agent func() Agent) *Collector {
	c := &Collector{version: version, read: read, agent: agent}
	of := func(kind prometheus.ValueType, name, help string, labels ...string) family {
		f := family{prometheus.NewDesc("rpsel_"+name, help, labels, nil), kind}
		c.descs = append(c.descs, f.desc)
		return f
	}
	group := func(kind prometheus.ValueType, name, help string, labels ...string) family {
		return of(kind, "group_"+name, help, append(append([]string{}, groupLabels...), labels...)...)
	}
	listener := func(kind prometheus.ValueType, name, help string, labels ...string) family {
		return of(kind, "listener_"+name, help, append(append(append([]string{}, groupLabels...), "slot"), labels...)...)
	}

	c.build = of(gauge, "build_info", "Always 1. The labels say which rpsel this is, and which Go it was built with.", "version", "goversion")

	c.up = group(gauge, "up", "1 if the state of the group could be read, 0 if not: then there is nothing else of it.")
	c.attached = group(gauge, "attached", "1 if the live group has rpsel's program, 0 if the kernel's own hash picks the listener, or no listener is left. Not there if that cannot be told from this pid namespace.")
	c.options = group(gauge, "info", "Always 1. The labels are the options of the group.", "policy", "affinity", "client_prefix", "first", "confirm")
	c.flows = group(gauge, "flows", "Flows in the table that have not expired. The states add up to what is tracked.", "state")
	c.capacity = group(gauge, "flow_capacity", "How many flows the table is made for.")
	c.settling = group(gauge, "settling_seconds", "How much longer flows that look new stay where the kernel's hash has them; 0 once the group has settled.")
	c.turning = group(gauge, "turning_seconds", "How much longer, at most, the newest generation waits for new flows; 0 if it does not.")
	c.generation = group(gauge, "generation", "The number of the newest generation of listeners.")
	c.unregistered = group(gauge, "unregistered_sockets", "Sockets in the live group that have no slot, so that the program cannot pick them. Not there if they cannot be seen from this pid namespace.")
	c.runs = group(counter, "runs_total", "Runs of the program, by what came of them; a train of datagrams joined by GRO is one run. With the outcome fallback the kernel's own hash picked.", "outcome")
	c.parseErrors = group(counter, "parse_errors_total", "Runs among the untracked whose packet could not be read.")
	c.tableFull = group(counter, "table_full_total", "Runs among the untracked whose flow found no room in the table.")
	c.evicted = group(counter, "evicted_flows_total", "Flows that gave way to newer ones in a full table.")

	c.state = listener(gauge, "state", "1 for the state that the listener in the slot is in, 0 for the others.", "state")
	c.weight = listener(gauge, "weight", "The listener's share of new flows, relative to the others'; 0 while it drains.")
	c.listenerGeneration = listener(gauge, "generation", "The generation that the listener belongs to.")
	c.listenerFlows = listener(gauge, "flows", "Flows that the listener has.")
	c.connections = listener(gauge, "connections", "TCP connections that the listener has open, where the kernel can count them.")
	c.listenerRuns = listener(counter, "runs_total", "Runs of the program that selected the slot, over all listeners that have been in it, by outcome.", "outcome")
	c.bytes = listener(counter, "bytes_total", "Bytes of transport headers and payloads in the runs that selected the slot.")
	c.receiveQueue = listener(gauge, "receive_queue_bytes", "Bytes that wait in the UDP socket, as the kernel counts them.")
	c.acceptQueue = listener(gauge, "accept_queue_connections", "TCP connections that wait to be accepted.")
	c.drops = listener(counter, "socket_drops_total", "Packets that the socket in the slot had no room for, or refused, since it was opened; the next socket in the slot begins at 0.")

	c.polling = of(gauge, "agent_polling", "1 if the agent asks the kernel for new listeners four times a second, 0 if the kernel tells it.")
	c.services = of(gauge, "agent_services", "Services in the agent's configuration.")
	c.stale = of(gauge, "agent_config_last_reload_successful", "1 if the agent works by its file as it was when it was last asked to read it, 0 if there was a mistake in that.")
	c.failures = of(gauge, "agent_failures", "Things that fail now, each of which the agent's log tells.")
	c.errors = of(counter, "agent_errors_total", "How often something failed, each new try counted.")
	c.attaches = of(counter, "agent_attaches_total", "Groups that the agent attached: new ones, and again those whose last socket had closed.", "kind")
	c.registrations = of(counter, "agent_registrations_total", "Listeners that the agent registered by itself.")
	c.missed = of(counter, "agent_missed_events_total", "Reports on new listeners that were dropped for want of room; the agent then looks for itself.")
	c.swept = of(gauge, "agent_last_sweep_timestamp_seconds", "When the agent last looked at all groups there are, and that without an error.")
	return c
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

// scrape is one time that metrics are read.
type scrape chan<- prometheus.Metric

func (s scrape) send(f family, value float64, labels ...string) {
	s <- prometheus.MustNewConstMetric(f.desc, f.kind, value, labels...)
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	s := scrape(ch)
	s.send(c.build, 1, c.version, runtime.Version())
	if c.agent != nil {
		c.collectAgent(s, c.agent())
	}
	summaries, err := c.read()
	if err != nil {
		s <- prometheus.NewInvalidMetric(c.up.desc, err)
		return
	}
	own := ownNetNS()
	for _, summary := range summaries {
		c.collectGroup(s, summary, labelsOf(summary.Key, own))
	}
}

func (c *Collector) collectAgent(s scrape, a Agent) {
	s.send(c.polling, number(a.Polling))
	s.send(c.services, float64(a.Services))
	s.send(c.stale, number(!a.ConfigStale))
	s.send(c.failures, float64(a.Failures))
	s.send(c.errors, float64(a.Errors))
	s.send(c.attaches, float64(a.Attached), "new")
	s.send(c.attaches, float64(a.Reattached), "again")
	s.send(c.registrations, float64(a.Registered))
	s.send(c.missed, float64(a.Missed))
	if !a.Swept.IsZero() {
		s.send(c.swept, float64(a.Swept.UnixMilli())/1000)
	}
}

func (c *Collector) collectGroup(s scrape, g loader.Summary, of []string) {
	send := func(f family, value float64, labels ...string) {
		s.send(f, value, append(of[:len(of):len(of)], labels...)...)
	}
	send(c.up, number(g.Err == nil))
	if g.Err != nil {
		return
	}
	if seen(g.Status) {
		send(c.attached, number(g.Attached))
		send(c.unregistered, float64(len(g.Unregistered)))
	}
	send(c.options, 1, g.Policy, string(g.Affinity), g.ClientPrefix.String(), string(g.First), string(g.Confirm))
	send(c.flows, float64(g.Tracked-g.Established), "new")
	send(c.flows, float64(g.Established), "established")
	send(c.capacity, float64(g.Capacity))
	send(c.settling, g.Settling.Seconds())
	send(c.turning, g.Turning.Seconds())
	send(c.generation, float64(g.Generation))
	n := g.Counters
	for _, o := range []struct {
		outcome string
		runs    uint64
	}{
		{"hit", n.Hit}, {"new", n.New}, {"rehomed", n.Rehomed}, {"untracked", n.Untracked},
		{"fallback", n.Fallback}, {"migrated", n.Migrated},
	} {
		send(c.runs, float64(o.runs), o.outcome)
	}
	send(c.parseErrors, float64(n.ParseError))
	send(c.tableFull, float64(n.TableFull))
	send(c.evicted, float64(n.Evicted))
	for _, l := range g.Listeners {
		c.collectListener(s, g.Key.Proto, l, append(of[:len(of):len(of)], strconv.Itoa(l.Slot)))
	}
}

// seen tells whether the sockets of a group could be looked at: where it has listeners
// and none was found, other pid namespaces have them.
func seen(s loader.Status) bool {
	return s.NetNSInode != 0 || !slices.ContainsFunc(s.Listeners, func(l loader.Listener) bool { return l.State != "dead" })
}

func (c *Collector) collectListener(s scrape, proto sockets.Proto, l loader.Listener, of []string) {
	send := func(f family, value float64, labels ...string) {
		s.send(f, value, append(of[:len(of):len(of)], labels...)...)
	}
	for _, state := range []string{"active", "draining", "dead"} {
		send(c.state, number(l.State == state), state)
	}
	send(c.weight, float64(l.Weight))
	send(c.listenerGeneration, float64(l.Generation))
	send(c.listenerFlows, float64(l.Flows))
	queue := c.receiveQueue
	if proto == sockets.TCP {
		queue = c.acceptQueue
		if l.Connections >= 0 {
			send(c.connections, float64(l.Connections))
		}
	}
	for _, o := range []struct {
		outcome string
		runs    uint64
	}{
		{"hit", l.Total.Hit}, {"new", l.Total.New}, {"rehomed", l.Total.Rehomed}, {"untracked", l.Total.Untracked},
		{"migrated", l.Total.Migrated},
	} {
		send(c.listenerRuns, float64(o.runs), o.outcome)
	}
	send(c.bytes, float64(l.Total.Bytes))
	if l.RxQueue >= 0 {
		send(queue, float64(l.RxQueue))
	}
	if l.Drops >= 0 {
		send(c.drops, float64(l.Drops))
	}
}

func number(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// labelsOf are the values of groupLabels.
func labelsOf(k loader.Key, own uint64) []string {
	v6only := ""
	if k.V6Only {
		v6only = "true"
	}
	return []string{
		strconv.FormatUint(k.NetNS, 10), k.Proto.String(), k.Addr.Addr().String(), strconv.Itoa(int(k.Addr.Port())),
		deviceName(k, own), v6only, strconv.FormatUint(uint64(k.UID), 10),
	}
}

// deviceName names the interface that a group is bound to: as it is called in this
// namespace, by its number in others.
func deviceName(k loader.Key, own uint64) string {
	if k.Device == 0 {
		return ""
	}
	if k.NetNS == own {
		if device, err := net.InterfaceByIndex(int(k.Device)); err == nil {
			return strings.ToValidUTF8(device.Name, "?")
		}
	}
	return fmt.Sprintf("if%d", k.Device)
}

// ownNetNS is 0 if it cannot be told: then devices have their numbers.
func ownNetNS() uint64 {
	ns, err := sockets.OpenNetNS("")
	if err != nil {
		return 0
	}
	defer ns.Close()
	return ns.Cookie()
}
