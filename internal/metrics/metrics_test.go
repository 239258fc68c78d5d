package metrics

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func TestMain(m *testing.M) { testnet.Main(m) }

// groups are one of each kind, which differ in one part of their name each. Their
// device exists nowhere: the namespace may be the test's own, as in a machine's first.
func groups() []loader.Summary {
	key := loader.Key{NetNS: 7, Proto: sockets.UDP, Addr: netip.MustParseAddrPort("[::]:1194")}
	tcp, v6only, device, uid := key, key, key, key
	tcp.Proto, v6only.V6Only, device.Device, uid.UID = sockets.TCP, true, 1e9, 5
	listener := loader.Listener{
		Slot: 2, PID: 4711, Command: "secret", State: "draining", Weight: 3, Generation: 4, Flows: 5, Connections: 6,
		Hit: 1, New: 1, Rehomed: 1, Untracked: 1, Migrated: 1, Bytes: 1, RxQueue: 8, Drops: 9,
		Total: loader.Served{Hit: 11, New: 12, Rehomed: 13, Untracked: 14, Migrated: 15, Bytes: 16},
	}
	var list []loader.Summary
	for _, k := range []loader.Key{key, tcp, v6only, device, uid} {
		list = append(list, loader.Summary{Status: loader.Status{
			Key: k, NetNSInode: 1, Attached: true, Policy: "least", Affinity: loader.AffinityBytes(8, 4), Tracked: 30, Established: 20, Capacity: 100,
			Settling: 2 * time.Second, Generation: 4, Confirm: loader.ConfirmClient,
			Counters:     loader.Counters{Runs: 21, Hit: 1, New: 2, Rehomed: 3, Untracked: 4, Fallback: 5, Migrated: 6, ParseError: 7, TableFull: 8, Evicted: 9},
			Listeners:    []loader.Listener{listener, {Slot: 3, State: "dead", Connections: -1, RxQueue: -1, Drops: -1}},
			Unregistered: make([]loader.Unregistered, 2),
		}})
	}
	return list
}

// collector collects groups and an agent.
func collector(list []loader.Summary, err error) *Collector {
	return New("1.2.3", func() ([]loader.Summary, error) { return list, err }, func() Agent {
		return Agent{Polling: true, Services: 2, Failures: 1, Errors: 3, Attached: 4, Reattached: 5, Registered: 6, Missed: 7, Swept: time.UnixMilli(1500)}
	})
}

func text(t *testing.T, c *Collector) string {
	t.Helper()
	var out bytes.Buffer
	if err := WriteText(&out, c); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// Every count is told as what it is, and groups that differ in any part of their name
// are not taken for one.
func TestText(t *testing.T) {
	out := text(t, collector(groups(), nil))
	const group = `{addr="::",device="",netns="7",`
	for _, line := range []string{
		`rpsel_build_info{goversion="go`,
		`rpsel_agent_polling 1`, `rpsel_agent_services 2`, `rpsel_agent_failures 1`, `rpsel_agent_errors_total 3`,
		`rpsel_agent_attaches_total{kind="new"} 4`, `rpsel_agent_attaches_total{kind="again"} 5`, `rpsel_agent_registrations_total 6`,
		`rpsel_agent_missed_events_total 7`, `rpsel_agent_config_last_reload_successful 1`, `rpsel_agent_last_sweep_timestamp_seconds 1.5`,
		`rpsel_group_up` + group + `port="1194",proto="udp",uid="0",v6only=""} 1`,
		`rpsel_group_up` + group + `port="1194",proto="tcp",uid="0",v6only=""} 1`,
		`rpsel_group_up` + group + `port="1194",proto="udp",uid="0",v6only="true"} 1`,
		`rpsel_group_up` + group + `port="1194",proto="udp",uid="5",v6only=""} 1`,
		`rpsel_group_up{addr="::",device="if1000000000",netns="7",port="1194",proto="udp",uid="0",v6only=""} 1`,
		`rpsel_group_attached` + group + `port="1194",proto="udp",uid="0",v6only=""} 1`,
		`rpsel_group_info{addr="::",affinity="bytes:8,4",client_prefix="",confirm="client",device="",first="",netns="7",policy="least",port="1194",proto="udp",uid="0",v6only=""} 1`,
		`rpsel_group_flows` + group + `port="1194",proto="udp",state="new",uid="0",v6only=""} 10`,
		`rpsel_group_flows` + group + `port="1194",proto="udp",state="established",uid="0",v6only=""} 20`,
		`rpsel_group_flow_capacity` + group + `port="1194",proto="udp",uid="0",v6only=""} 100`,
		`rpsel_group_settling_seconds` + group + `port="1194",proto="udp",uid="0",v6only=""} 2`,
		`rpsel_group_unregistered_sockets` + group + `port="1194",proto="udp",uid="0",v6only=""} 2`,
		`rpsel_group_parse_errors_total` + group + `port="1194",proto="udp",uid="0",v6only=""} 7`,
		`rpsel_group_table_full_total` + group + `port="1194",proto="udp",uid="0",v6only=""} 8`,
		`rpsel_group_evicted_flows_total` + group + `port="1194",proto="udp",uid="0",v6only=""} 9`,
		`rpsel_listener_weight` + group + `port="1194",proto="udp",slot="2",uid="0",v6only=""} 3`,
		`rpsel_listener_generation` + group + `port="1194",proto="udp",slot="2",uid="0",v6only=""} 4`,
		`rpsel_listener_flows` + group + `port="1194",proto="udp",slot="2",uid="0",v6only=""} 5`,
		`rpsel_listener_connections` + group + `port="1194",proto="tcp",slot="2",uid="0",v6only=""} 6`,
		`rpsel_listener_receive_queue_bytes` + group + `port="1194",proto="udp",slot="2",uid="0",v6only=""} 8`,
		`rpsel_listener_accept_queue_connections` + group + `port="1194",proto="tcp",slot="2",uid="0",v6only=""} 8`,
		`rpsel_listener_socket_drops_total` + group + `port="1194",proto="udp",slot="2",uid="0",v6only=""} 9`,
		`rpsel_listener_bytes_total` + group + `port="1194",proto="udp",slot="2",uid="0",v6only=""} 16`,
		`rpsel_listener_state` + group + `port="1194",proto="udp",slot="2",state="draining",uid="0",v6only=""} 1`,
		`rpsel_listener_state` + group + `port="1194",proto="udp",slot="2",state="active",uid="0",v6only=""} 0`,
		`rpsel_listener_state` + group + `port="1194",proto="udp",slot="3",state="dead",uid="0",v6only=""} 1`,
	} {
		if !strings.Contains(out, "\n"+line) {
			t.Errorf("there is no %s", line)
		}
	}
	for i, outcome := range []string{"hit", "new", "rehomed", "untracked", "fallback", "migrated"} {
		line := fmt.Sprintf(`rpsel_group_runs_total%soutcome="%s",port="1194",proto="udp",uid="0",v6only=""} %d`, group, outcome, i+1)
		if !strings.Contains(out, "\n"+line+"\n") {
			t.Errorf("there is no %s", line)
		}
	}
	for i, outcome := range []string{"hit", "new", "rehomed", "untracked", "migrated"} {
		line := fmt.Sprintf(`rpsel_listener_runs_total%soutcome="%s",port="1194",proto="udp",slot="2",uid="0",v6only=""} %d`, group, outcome, i+11)
		if !strings.Contains(out, "\n"+line+"\n") {
			t.Errorf("there is no %s", line)
		}
	}
	for _, wrong := range []string{
		"4711", "secret", // a process
		`receive_queue_bytes` + group + `port="1194",proto="tcp"`, `connections` + group + `port="1194",proto="udp"`,
		`drops_total` + group + `port="1194",proto="udp",slot="3"`, `connections` + group + `port="1194",proto="tcp",slot="3"`, // unknown
	} {
		if strings.Contains(out, wrong) {
			t.Errorf("there is %s", wrong)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}

// A group that cannot be read does not hide the others. If nothing can be read, that
// is an error.
func TestUnreadable(t *testing.T) {
	list := groups()[:2]
	list[0] = loader.Summary{Status: loader.Status{Key: list[0].Key}, Err: errors.New("damaged")}
	out := text(t, collector(list, nil))
	for line, want := range map[string]bool{
		`,proto="udp",uid="0",v6only=""} 0` + "\n": true, `rpsel_group_attached{addr="::",device="",netns="7",port="1194",proto="tcp"`: true,
		`rpsel_group_attached{addr="::",device="",netns="7",port="1194",proto="udp"`: false,
	} {
		if strings.Contains(out, line) != want {
			t.Errorf("%q is there: %v\n%s", line, !want, out)
		}
	}
	var nothing bytes.Buffer
	if err := WriteText(&nothing, collector(nil, errors.New("no bpffs"))); err == nil || nothing.Len() != 0 {
		t.Errorf("without groups: %v, %s", err, nothing.String())
	}
}

// Whether a group is attached is not told where its sockets cannot be seen: no alert
// may come of that. Of one without a listener it is known.
func TestUnseen(t *testing.T) {
	for _, c := range []struct {
		inode uint64
		state string
		want  bool
	}{{0, "active", false}, {0, "draining", false}, {0, "dead", true}, {1, "active", true}} {
		list := groups()[:1]
		list[0].NetNSInode, list[0].Attached = c.inode, false
		list[0].Listeners = []loader.Listener{{State: c.state}}
		out := text(t, collector(list, nil))
		for _, name := range []string{"attached", "unregistered_sockets"} {
			if got := strings.Contains(out, "\nrpsel_group_"+name+"{"); got != c.want {
				t.Errorf("%+v: %s is there: %v", c, name, got)
			}
		}
	}
}

// docs/monitoring lists what there is.
func TestDocumented(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	if err := registry.Register(collector(groups(), nil)); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, f := range families {
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, l.GetName())
		}
		if slices.Contains(labels, "netns") {
			labels = slices.DeleteFunc(labels, func(l string) bool { return slices.Contains(groupLabels, l) })
			labels = append([]string{"*group*"}, labels...)
		}
		want = append(want, fmt.Sprintf("| `%s` | %s | %s | %s |", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp()))
	}
	readme, err := os.ReadFile("../../docs/monitoring/README.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := regexp.MustCompile("(?m)^\\| `rpsel_.*$").FindAllString(string(readme), -1)
	if diff := cmp.Diff(want, listed); diff != "" {
		t.Errorf("docs/monitoring/README.md is to have\n%s\n-want +there:\n%s", strings.Join(want, "\n"), diff)
	}
}
