package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/testnet"
)

const (
	prometheusAddr = "127.0.0.1:9090"
	nodeAddr       = "127.0.0.1:9100"
	monitoring     = "../../docs/monitoring/"
)

// A real Prometheus asks a real agent, by the configuration of docs/monitoring: what it
// has is what was sent, counters do not fall when a slot gets another listener, and each
// query of the dashboard has an answer.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	m := newMonitored(t)
	r := m.rpsel
	defer r.explain()
	servers := testnet.StartGroup(t, m.ns, 3, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	testnet.StartGroup(t, m.ns, 2, testnet.ServerOptions{Network: "tcp4", Addr: "127.0.0.1:8443", ReusePort: true})
	r.agent(`settle = "0s"`, "[[service]]", `proto = "tcp"`, "port = 8443", `settle = "0s"`)
	before := r.awaitOthers(servers.PID(), 3)
	m.start()

	const flows = 300
	clients := testnet.NewClients(t, m.ns, flows, "127.0.0.1:1194")
	clients.Ask()
	clients.Ask()
	testnet.NewTCPClients(t, m.ns, 40, "127.0.0.1:8443").Ask()
	m.awaitValue(`rpsel_group_runs_total{job="rpsel",port="1194",outcome="new"}`, flows)
	m.awaitValue(`rpsel_group_runs_total{job="rpsel",port="1194",outcome="hit"}`, flows)
	m.awaitValue(`sum(rpsel_listener_runs_total{job="rpsel",port="1194"})`, 2*flows)
	m.awaitValue(`sum(rpsel_group_flows{job="rpsel",port="1194"})`, flows)
	m.awaitValue(`sum(rpsel_listener_flows{job="rpsel",port="1194"})`, flows)
	m.awaitValue(`sum(rpsel_listener_state{job="rpsel",port="1194",state="active"})`, 3)
	m.awaitValue(`sum(rpsel_listener_connections{job="rpsel",port="8443"})`, 0)
	m.awaitValue(`sum(rpsel_agent_registrations_total{job="rpsel"})`, 5)

	// The agent tells what the command does.
	var said status
	r.await("status", func(s status) bool { said = s; return len(s.Groups) == 1 })
	for _, outcome := range []string{"hit", "new", "rehomed", "untracked", "fallback", "migrated"} {
		m.awaitValue(fmt.Sprintf(`rpsel_group_runs_total{job="rpsel",port="1194",outcome=%q}`, outcome), float64(said.Groups[0].Counters[outcome]))
	}
	for _, c := range []struct{ counter, name string }{{"parse_error", "parse_errors"}, {"table_full", "table_full"}, {"evicted", "evicted_flows"}} {
		m.awaitValue(fmt.Sprintf(`rpsel_group_%s_total{job="rpsel",port="1194"}`, c.name), float64(said.Groups[0].Counters[c.counter]))
	}

	// Another listener takes the slot of one that left.
	servers.Close(0)
	m.awaitValue(`sum(rpsel_listener_state{job="rpsel",port="1194",state="dead"})`, 1)
	clients.Ask()
	servers.Add()
	r.awaitOthers(servers.PID(), 3, before...)
	clients.Ask()
	m.awaitValue(`sum(rpsel_group_runs_total{job="rpsel",port="1194"})`, 4*flows)
	m.awaitValue(`sum(rpsel_listener_runs_total{job="rpsel",port="1194"})`, 4*flows)
	m.awaitValue(`max(resets(rpsel_listener_runs_total{job="rpsel"}[1h]))`, 0)
	m.awaitValue(`max(resets(rpsel_group_runs_total{job="rpsel"}[1h]))`, 0)

	m.script() // health
	m.textfile()
	m.dashboard()
	m.rules()

	// The control: state that is made anew counts anew. The agent attaches its service again.
	if out, err := r.outside("detach").CombinedOutput(); err != nil {
		t.Fatalf("detach: %v\n%s", err, out)
	}
	r.awaitOthers(servers.PID(), 3)
	clients.Ask()
	m.awaitValue(`sum(rpsel_group_runs_total{job="rpsel",port="1194"})`, flows)
	m.awaitValue(`max(resets(rpsel_group_runs_total{job="rpsel",port="1194",outcome="hit"}[1h]))`, 1)
}

// awaitOthers returns the listeners of the port when its group is attached, a process
// has so many active ones, nobody else has a slot, and one at least is in the slot of another one of
// before, if there are any.
func (r *rpsel) awaitOthers(pid, n int, before ...listener) (now []listener) {
	r.t.Helper()
	r.await(fmt.Sprintf("%d listeners", n), func(s status) bool {
		if len(s.Groups) != 1 || !s.Groups[0].Attached || s.Groups[0].SettlingSeconds > 0 || len(s.Groups[0].Listeners) != n {
			return false
		}
		now = s.Groups[0].Listeners
		replaced := func(l listener) bool {
			return slices.ContainsFunc(before, func(b listener) bool { return b.Slot == l.Slot && b.Cookie != l.Cookie })
		}
		strange := func(l listener) bool { return l.PID != pid || l.State != "active" }
		return !slices.ContainsFunc(now, strange) && (before == nil || slices.ContainsFunc(now, replaced))
	})
	return now
}

// monitored is a namespace with rpsel, Prometheus and node_exporter.
type monitored struct {
	*rpsel
	readme string
	page   *testnet.Page
	dir    string // of Prometheus, and of textfiles
	client http.Client
}

func newMonitored(t *testing.T) *monitored {
	t.Helper()
	for _, program := range []string{"prometheus", "promtool", "prometheus-node-exporter", "curl"} {
		need(t, program)
	}
	readme, err := os.ReadFile(monitoring + "README.md")
	if err != nil {
		t.Fatal(err)
	}
	m := &monitored{rpsel: newRpsel(t, testnet.New(t), 1194), readme: string(readme), page: testnet.OpenPage(t, "monitoring/README.md"), dir: t.TempDir()}
	m.client = http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, addr string) (conn net.Conn, err error) {
			err = m.ns.Do(func() (err error) { conn, err = net.Dial(network, addr); return err })
			return conn, err
		},
	}}
	return m
}

// snippet is a block of the README in a language, with these words in it.
func (m *monitored) snippet(language, words string) string {
	m.t.Helper()
	for _, block := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(m.readme, -1) {
		if strings.Contains(block[1], words) {
			return block[1]
		}
	}
	m.t.Fatalf("docs/monitoring/README.md has no %s with %q", language, words)
	return ""
}

// start starts both by what the README says.
func (m *monitored) start() {
	m.t.Helper()
	if file := m.snippet("toml", "metrics ="); !strings.Contains(file, strconv.Quote(config.DefaultMetrics)) {
		m.t.Errorf("the README has the agent at %s", file)
	}
	startDaemon(m.t, m.ns, "node_exporter", need(m.t, "prometheus-node-exporter"), "--web.listen-address="+nodeAddr,
		"--collector.disable-defaults", "--collector.textfile", "--collector.textfile.directory="+m.dir)
	text := "global: {scrape_interval: 500ms, evaluation_interval: 1s}\n" + strings.Replace(m.snippet("yaml", "job_name"), "scrape_configs:\n",
		fmt.Sprintf("scrape_configs:\n  - {job_name: node, static_configs: [{targets: [%q]}]}\n", nodeAddr), 1)
	file := filepath.Join(m.dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
	m.copyRules()
	d := startDaemon(m.t, m.ns, "prometheus", need(m.t, "prometheus"), "--config.file="+file, "--storage.tsdb.path="+filepath.Join(m.dir, "data"),
		"--web.listen-address="+prometheusAddr)
	d.await(m.t, "Server is ready to receive web requests")
}

// copyRules puts the alerts beside the configuration.
func (m *monitored) copyRules() {
	m.t.Helper()
	for _, name := range []string{"rpsel.rules.yml", "rpsel.rules.test.yml"} {
		text, err := os.ReadFile(monitoring + name)
		if err == nil {
			err = os.WriteFile(filepath.Join(m.dir, name), text, 0o644)
		}
		if err != nil {
			m.t.Fatal(err)
		}
	}
}

// get asks for a page in the namespace.
func (m *monitored) get(url string) []byte {
	m.t.Helper()
	answer, err := m.client.Get(url)
	if err != nil {
		m.t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		m.t.Fatalf("%s: %s, %v\n%s", url, answer.Status, err, text)
	}
	return text
}

// query asks Prometheus for the values of now.
func (m *monitored) query(expr string) (values []float64) {
	m.t.Helper()
	text := m.get("http://" + prometheusAddr + "/api/v1/query?query=" + url.QueryEscape(expr))
	var answer struct {
		Data struct {
			Result []struct{ Value [2]any }
		}
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		m.t.Fatalf("%s: %v\n%s", expr, err, text)
	}
	for _, r := range answer.Data.Result {
		value, err := strconv.ParseFloat(fmt.Sprint(r.Value[1]), 64)
		if err != nil {
			m.t.Fatalf("%s: %v", expr, err)
		}
		values = append(values, value)
	}
	return values
}

// until asks again until the answer has a property.
func (m *monitored) until(expr, what string, property func([]float64) bool) {
	m.t.Helper()
	var values []float64
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if values = m.query(expr); property(values) {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("%s: waited in vain for %s, it is %v", expr, what, values)
		}
	}
}

// awaitValue waits for the one value of an expression.
func (m *monitored) awaitValue(expr string, want float64) {
	m.t.Helper()
	m.until(expr, fmt.Sprint(want), func(values []float64) bool { return len(values) == 1 && values[0] == want })
}

// script runs the README's next script.
func (m *monitored) script() {
	m.t.Helper()
	(&docs{m.rpsel, m.dir}).run(m.page.Next(), "TEXTFILES="+m.dir)
}

// textfile has node_exporter tell what "rpsel metrics" says.
func (m *monitored) textfile() {
	m.t.Helper()
	m.script()
	m.awaitValue(`rpsel_group_flow_capacity{job="node",port="1194"}`, 262144)
	m.awaitValue(`sum(rpsel_group_runs_total{job="node",port="1194"}) - sum(rpsel_group_runs_total{job="rpsel",port="1194"})`, 0)
	m.awaitValue(`node_textfile_scrape_error`, 0)
	printed, err := os.ReadFile(filepath.Join(m.dir, "rpsel.prom"))
	if err != nil {
		m.t.Fatal(err)
	}
	m.checkMetrics(string(printed))
	m.checkMetrics(string(m.get("http://" + config.DefaultMetrics + "/metrics")))
}

// checkMetrics asks promtool.
func (m *monitored) checkMetrics(text string) {
	m.t.Helper()
	cmd := exec.Command("promtool", "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		m.t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// dashboard runs every query of the dashboard.
func (m *monitored) dashboard() {
	m.t.Helper()
	variables := strings.NewReplacer("$__rate_interval", "1m", "$instance", ".*", "$port", ".*")
	for _, p := range readDashboard(m.t).Panels {
		for _, target := range p.Targets {
			m.until(variables.Replace(target.Expr), "data of "+p.Title, func(values []float64) bool { return len(values) > 0 })
		}
	}
}

// rules has Prometheus and promtool try the alerts.
func (m *monitored) rules() {
	m.t.Helper()
	promtool := func(args ...string) error {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = m.dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", cmd, err, out)
		}
		return nil
	}
	for _, args := range [][]string{{"check", "config", "prometheus.yml"}, {"check", "rules", "rpsel.rules.yml"}, {"test", "rules", "rpsel.rules.test.yml"}} {
		if err := promtool(args...); err != nil {
			m.t.Error(err)
		}
	}
	var loaded struct {
		Data struct {
			Groups []struct {
				Rules []struct {
					Name, Health, LastError string
					Annotations             map[string]string
				}
			}
		}
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if err := json.Unmarshal(m.get("http://"+prometheusAddr+"/api/v1/rules"), &loaded); err != nil {
			m.t.Fatal(err)
		}
		rules, ill := 0, ""
		for _, g := range loaded.Data.Groups {
			for _, r := range g.Rules {
				rules++
				if r.Health != "ok" {
					ill = r.Name + ": " + r.Health + " " + r.LastError
				}
				if r.Annotations["runbook"] == "" || strings.Contains(r.Annotations["runbook"], "\n") {
					m.t.Fatalf("%s: the runbook is %q", r.Name, r.Annotations["runbook"])
				}
			}
		}
		if rules > 0 && ill == "" {
			break
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("%d rules, %s", rules, ill)
		}
	}

	// The control: the tests of the alerts notice one that comes later.
	file := filepath.Join(m.dir, "rpsel.rules.yml")
	text, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, []byte(strings.Replace(string(text), ">= 0.9", ">= 0.91", 1)), 0o644)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	if promtool("test", "rules", "rpsel.rules.test.yml") == nil {
		m.t.Error("the tests of the alerts pass whatever these are")
	}
}

// dashboard is what the test knows of Grafana's JSON model.
type dashboard struct {
	Title         string
	UID           string
	SchemaVersion int
	Templating    struct{ List []struct{ Name, Type string } }
	Panels        []struct {
		ID          int
		Type, Title string
		GridPos     struct{ X, Y, W, H int }
		Datasource  *struct{ Type, UID string }
		Targets     []struct {
			RefID, Expr string
			Datasource  *struct{ Type, UID string }
		}
	}
}

func readDashboard(t testing.TB) (d dashboard) {
	t.Helper()
	text, err := os.ReadFile(monitoring + "rpsel.json")
	if err == nil {
		err = json.Unmarshal(text, &d)
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// The dashboard is one of Grafana 10: panels of kinds that it has, beside each other, each
// of which asks the data source that is chosen, with variables that there are.
func TestDashboard(t *testing.T) {
	d := readDashboard(t)
	if d.Title == "" || d.UID == "" || d.SchemaVersion < 38 {
		t.Errorf("%q, %q, schema %d", d.Title, d.UID, d.SchemaVersion)
	}
	known := map[string]bool{"__rate_interval": true}
	for _, v := range d.Templating.List {
		known[v.Name] = true
	}
	ids, taken := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" || p.GridPos.W < 1 || p.GridPos.H < 1 || p.GridPos.X < 0 || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %d %q at %+v", p.ID, p.Title, p.GridPos)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("%s covers %s", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if !slices.Contains([]string{"stat", "timeseries", "state-timeline"}, p.Type) || p.Datasource == nil || p.Datasource.UID != "${datasource}" || len(p.Targets) == 0 {
			t.Errorf("%s: type %s, data source %+v, %d queries", p.Title, p.Type, p.Datasource, len(p.Targets))
		}
		refs := map[string]bool{}
		for _, target := range p.Targets {
			if target.RefID == "" || refs[target.RefID] || target.Datasource == nil || *target.Datasource != *p.Datasource {
				t.Errorf("%s: %+v", p.Title, target)
			}
			refs[target.RefID] = true
			for _, v := range regexp.MustCompile(`\$\{?(\w+)`).FindAllStringSubmatch(target.Expr, -1) {
				if !known[v[1]] {
					t.Errorf("%s: no variable %s", p.Title, v[1])
				}
			}
		}
	}
	if len(d.Panels) == 0 || !known["datasource"] {
		t.Error("no panels, or no data source")
	}
}
