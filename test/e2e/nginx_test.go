package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

const nginxWorkers = 4

// startNginx starts an nginx whose workers answer with their process's number.
func startNginx(t testing.TB, ns *testnet.NetNS) *daemon {
	t.Helper()
	dir := t.TempDir()
	text := fmt.Sprintf(`
daemon off;
worker_processes %d;
pid %[2]s/pid;
error_log stderr notice;
events {}
http {
	access_log off;
	client_body_temp_path %[2]s/1;
	proxy_temp_path %[2]s/2;
	fastcgi_temp_path %[2]s/3;
	uwsgi_temp_path %[2]s/4;
	scgi_temp_path %[2]s/5;
	server {
		listen %[3]s reuseport;
		return 200 $pid;
	}
}
`, nginxWorkers, dir, webAddr)
	config := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, ns, "nginx", need(t, "nginx"), "-c", config, "-p", dir)
	t.Cleanup(func() { // a master that is killed leaves its workers behind
		d.cmd.Process.Signal(unix.SIGTERM)
		select {
		case <-d.ended:
		case <-time.After(time.Minute):
		}
	})
	awaitServer(t, ns, webAddr)
	return d
}

// workers are the last processes that nginx has started, in that order.
func (d *daemon) workers() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var pids []string
	for _, m := range regexp.MustCompile(`start worker process (\d+)`).FindAllStringSubmatch(d.log.String(), -1) {
		pids = append(pids, m[1])
	}
	return pids[max(0, len(pids)-nginxWorkers):]
}

// ask opens so many connections, one after the other, and counts who answered.
func ask(t testing.TB, ns *testnet.NetNS, n int) map[string]int {
	t.Helper()
	answers := map[string]int{}
	if err := ns.Do(func() error {
		for range n {
			body, err := request(webAddr)
			if err != nil {
				return err
			}
			answers[body]++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return answers
}

// All workers of nginx have the listeners of all, and its master too, which keeps
// them over a reload: nothing is lost there, with or without rpsel. But a worker
// can be drained, and weighted, by the slot of its listener, which is the worker's
// number; its next incarnation has the same.
func TestNginx(t *testing.T) {
	t.Parallel()
	ns := testnet.New(t)
	nginx := startNginx(t, ns)
	r := newRpsel(t, ns, int(webAddr.Port()))
	r.proto = "tcp"
	defer r.explain()
	reloadNginx(t, ns, nginx, "plain Linux")
	r.attach()
	const connections = 400

	all := ask(t, ns, connections)
	for _, worker := range nginx.workers() {
		if n := all[worker]; n < connections/nginxWorkers*2/5 || n > connections*2/5 {
			t.Errorf("worker %s answers %d of %d: not a spread", worker, n, connections)
		}
	}
	for slot, worker := range nginx.workers() {
		r.alter("drain", slot)
		some := ask(t, ns, connections/4)
		if some[worker] != 0 || len(some) != nginxWorkers-1 {
			t.Errorf("slot %d drained: worker %s answers %d, of the workers %v", slot, worker, some[worker], some)
		}
		r.alter("resume", slot)
	}

	drain := r.outside("drain", "--pid", nginx.workers()[0])
	out, _ := drain.CombinedOutput()
	if want := fmt.Sprintf("it has %d listeners together with pid %d", nginxWorkers, nginx.cmd.Process.Pid); drain.ProcessState.ExitCode() != usage || !strings.Contains(string(out), want) {
		t.Errorf("%s: exit code %d, want %d and %q\n%s", drain, drain.ProcessState.ExitCode(), usage, want, out)
	}

	r.alter("drain", 1)
	r.alter("weight", 0, "4")
	if all = ask(t, ns, connections); all[nginx.workers()[0]] < connections/2 || all[nginx.workers()[1]] != 0 {
		t.Errorf("worker 0 has weight 4, worker 1 drains, of workers %v: %v", nginx.workers(), all)
	}

	reloadNginx(t, ns, nginx, "rpsel")
	if after := ask(t, ns, connections); after[nginx.workers()[0]] < connections/2 || after[nginx.workers()[1]] != 0 {
		t.Errorf("after reloads, of workers %v: %v", nginx.workers(), after)
	}
}

// reloadNginx reloads it under load, and fails the test if that loses a connection.
func reloadNginx(t testing.TB, ns *testnet.NetNS, nginx *daemon, what string) {
	t.Helper()
	clients := startLoad(t, ns, 16, webAddr)
	for range reloads {
		clients.awaitAnswers(t, 16)
		old := nginx.workers()
		nginx.signal(t, unix.SIGHUP)
		for _, worker := range old {
			nginx.await(t, fmt.Sprintf("worker process %s exited with code 0", worker))
		}
	}
	clients.end()
	t.Log(clients.row(fmt.Sprint("nginx, ", what, ", ", reloads, " reloads")))
	if _, lost := clients.count(); lost > 0 {
		t.Errorf("%s: nginx lost %d connections", what, lost)
	}
}

// alter runs a command that changes the listener in a slot.
func (r *rpsel) alter(verb string, slot int, args ...string) {
	r.t.Helper()
	cmd := r.outside(verb, append([]string{"--slot", strconv.Itoa(slot)}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		r.t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}
