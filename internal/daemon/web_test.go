package daemon

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// get asks on a unix socket; code 0: nobody answers.
func get(t testing.TB, socket, path string) (code int, body string) {
	t.Helper()
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) },
	}}
	answer, err := client.Get("http://agent" + path)
	if err != nil {
		return 0, ""
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(text)
}

// metricsAt is the first line of a file.
func metricsAt(socket string) string { return fmt.Sprintf("metrics = %q\n", "unix:"+socket) }

// The agent serves its metrics where its file says, from one reload to the next, and
// what it has done is among them.
func TestMetrics(t *testing.T) {
	ns, fs, dir := testnet.New(t), testnet.BPFFS(t), t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	options := testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true}
	servers := testnet.StartGroup(t, ns, 2, options)
	services := service(ns, 1194, `settle = "0s"`)
	// A killed agent left this one behind.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: one, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	a := start(t, fs, metricsAt(one)+services)
	key := keyOf(ns, loader.UDP, addr)
	a.awaitListeners(key, 2)
	servers.Add()
	a.awaitListeners(key, 3)
	group := fmt.Sprintf(`addr="127.0.0.1",device="",netns="%d",port="1194",proto="udp"`, ns.Cookie())
	for _, line := range []string{
		`rpsel_agent_attaches_total{kind="new"} 1`, `rpsel_agent_attaches_total{kind="again"} 0`,
		`rpsel_agent_registrations_total 3`, `rpsel_agent_failures 0`,
		`rpsel_agent_polling 0`, `rpsel_agent_services 1`, `rpsel_agent_config_last_reload_successful 1`,
		`rpsel_group_up{` + group + `,uid="0",v6only=""} 1`,
		`rpsel_listener_state{` + group + `,slot="2",state="active",uid="0",v6only=""} 1`,
		`rpsel_listener_state{` + group + `,slot="2",state="dead",uid="0",v6only=""} 0`,
	} {
		await(t, line, func() bool {
			code, body := get(t, one, "/metrics")
			return code == http.StatusOK && strings.Contains(body, "\n"+line+"\n")
		})
	}
	if code, _ := get(t, one, "/"); code != http.StatusNotFound {
		t.Errorf("another path: %d", code)
	}

	reload := func(text, said string) {
		t.Helper()
		before := strings.Count(a.said(), said)
		a.write(text)
		a.reload <- unix.SIGHUP
		await(t, said, func() bool { return strings.Count(a.said(), said) > before })
	}
	reload(metricsAt("wrong"), "the configuration stays as it was")
	await(t, "that to be told", func() bool {
		_, body := get(t, one, "/metrics")
		return strings.Contains(body, "\nrpsel_agent_config_last_reload_successful 0\n")
	})
	reload(metricsAt(two)+services, "configuration read")
	await(t, "metrics elsewhere", func() bool { code, _ := get(t, two, "/metrics"); return code == http.StatusOK })
	if code, _ := get(t, one, "/metrics"); code != 0 {
		t.Errorf("the former place answers %d", code)
	}
	reload("metrics = \"off\"\n"+services, "configuration read")
	await(t, "no metrics", func() bool { code, _ := get(t, two, "/metrics"); return code == 0 })
}

// The place is taken: the agent says so and does its work, and serves there once it
// is free.
func TestMetricsPlaceTaken(t *testing.T) {
	ns, fs, place := testnet.New(t), testnet.BPFFS(t), filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", place)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
	a := start(t, fs, metricsAt(place)+service(ns, 1194, `settle = "0s"`))
	a.awaitListeners(keyOf(ns, loader.UDP, addr), 1)
	a.awaitSaid("metrics are not served: listen unix " + place + ": bind: address already in use: give another place, or ")
	l.Close()
	await(t, "metrics", func() bool { code, _ := get(t, place, "/metrics"); return code == http.StatusOK })
	await(t, "the failure to be over", func() bool {
		_, body := get(t, place, "/metrics")
		return strings.Contains(body, "\nrpsel_agent_failures 0\n") && !strings.Contains(body, "\nrpsel_agent_errors_total 0\n")
	})
}

// Health is whether the agent can do its work: with no group, and with one that is
// empty, it can; with one that it cannot open it cannot, and says which, until it can.
func TestHealth(t *testing.T) {
	ns, fs, place := testnet.New(t), testnet.BPFFS(t), filepath.Join(t.TempDir(), "socket")
	services := metricsAt(place) + service(ns, 1194, `settle = "0s"`)
	a := start(t, fs, services)
	health := func(code int, line string) {
		t.Helper()
		await(t, fmt.Sprintf("health %d %s", code, line), func() bool {
			c, body := get(t, place, "/healthz")
			return c == code && strings.Contains(body, line) && strings.Count(body, "\n") == 1
		})
	}
	health(http.StatusOK, "ok\n")
	server := testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: addr, ReusePort: true})
	key := keyOf(ns, loader.UDP, addr)
	a.awaitListeners(key, 1)
	health(http.StatusOK, "ok\n")
	server.Kill()
	await(t, "its end", func() bool {
		s, _ := status(t, a.fs, key)
		return len(s.Listeners) == 1 && s.Listeners[0].State == "dead"
	})
	a.awaitSaid(`msg="listeners left"`)
	health(http.StatusOK, "ok\n")

	setLayout := func(n uint32) { writeConfig(t, fs, ns, 8, binary.NativeEndian.AppendUint32(nil, n)) }
	a.stop()
	setLayout(3)
	a = start(t, fs, services)
	health(http.StatusServiceUnavailable, key.String()+": state of a newer rpsel")
	_, body := get(t, place, "/metrics")
	if !strings.Contains(body, "\nrpsel_group_up{") || strings.Contains(body, "\nrpsel_group_attached{") {
		t.Errorf("metrics of a group that cannot be opened:\n%s", body)
	}
	setLayout(2)
	health(http.StatusOK, "ok\n")
}

// Where it polls the agent does its work, and says how.
func TestHealthPolling(t *testing.T) {
	place := filepath.Join(t.TempDir(), "socket")
	above := newCgroup(t, "")
	below := newCgroup(t, above)
	occupy(t, above, 0) // by a program that is to be alone
	start(t, testnet.BPFFS(t), metricsAt(place), func(o *Options) { o.Cgroup = below })
	if code, body := get(t, place, "/healthz"); code != http.StatusOK || !strings.HasPrefix(body, "ok, polling: ") {
		t.Errorf("%d %s", code, body)
	}
	if _, body := get(t, place, "/metrics"); !strings.Contains(body, "\nrpsel_agent_polling 1\n") || !strings.Contains(body, "\nrpsel_agent_failures 0\n") {
		t.Errorf("metrics:\n%s", body)
	}
}

// A loop that does not come round is not healthy, nor is what failed a moment ago.
func TestHealthReport(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		report  report
		line    string
		healthy bool
	}{
		{report{at: now}, "ok", true},
		{report{at: now, note: "polling: x"}, "ok, polling: x", true},
		{report{at: now, ill: []string{"a", "b"}}, "a; b", false},
		{report{at: now.Add(-stuckTime)}, "ok", true},
		{report{at: now.Add(-stuckTime - time.Second)}, "stuck: nothing was done for 31s", false},
	} {
		if line, healthy := c.report.health(now); line != c.line || healthy != c.healthy {
			t.Errorf("%+v: %q, %v", c.report, line, healthy)
		}
	}
	for subject, want := range map[string]bool{"keys": true, "sweep": true, "open 1 udp x": true, "keep udp x": false, "metrics": false, "register 7": false} {
		if grave(subject) != want {
			t.Errorf("%q: grave %v", subject, !want)
		}
	}
}

// The place of a socket that somebody uses, and a file, are left alone.
func TestListen(t *testing.T) {
	dir := t.TempDir()
	used, file := filepath.Join(dir, "used"), filepath.Join(dir, "file")
	l, err := listen("unix:" + used)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Stat(used); err != nil || info.Mode().Perm() != socketMode {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{used, file, filepath.Join(dir, "no", "dir")} {
		if l, err := listen("unix:" + path); err == nil {
			l.Close()
			t.Errorf("%s: taken", path)
		}
	}
}
