package e2e

import (
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	// window is how many seconds after the crash clients are watched.
	window = 40
	// quiet is how many seconds a client that lost its server without a word
	// needs to give up (keepalive 2 10), and some.
	quiet = 15
	// settleTime is enough for every client to send a packet, by which rpsel
	// knows its flow (keepalive 2 10).
	settleTime = "5s"
	settle     = `settle = "` + settleTime + `"`
)

// Of three servers the first is killed. Without rpsel the kernel sends packets
// of healthy servers' clients to a server that does not know them.
func TestOpenVPNCrashWithoutRpsel(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	r := newRpsel(t, v.servers, vpnPort)
	first := v.startServer(1, r.run()...)
	v.startServer(2, r.run()...)
	v.startServer(3, r.run()...)
	clients := v.connectUntil(12, 3, 2)

	from := v.round()
	first.kill()
	v.finish(from + window - 1)
	victims, lost := 0, 0
	for _, c := range append(on(clients, 2), on(clients, 3)...) {
		if n := v.lost(c.name, from, from+window); n > 0 {
			victims++
			lost += n
		}
	}
	healthy := len(clients) - len(on(clients, 1))
	t.Logf("%d of %d clients of healthy servers lost %d probes", victims, healthy, lost)
	// The last server moves to the place of the first, and loses all its flows.
	if want := len(on(clients, 3)); victims < want {
		t.Errorf("%d clients of healthy servers lost probes, want at least the %d of server 3", victims, want)
	}
}

// With the agent the same crash hurts only the clients of the server that died,
// and its restart nobody. Nothing but the agent attaches or registers.
func TestOpenVPNCrash(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	r := newRpsel(t, v.servers, vpnPort)
	defer r.explain()
	first := v.startServer(1, r.share()...)
	v.startServer(2, r.share()...)
	v.startServer(3, r.share()...)
	clients := v.connectUntil(12, 3, 2)
	own := on(clients, 1)
	others := append(on(clients, 2), on(clients, 3)...)

	from := v.round()
	r.agent(settle)
	crash := v.round() + 3 // until then every client has sent some packets
	v.finish(crash - 1)
	v.lostNone("while the agent attached", clients, from, crash)

	first.kill()
	back := v.awaitBack(own, crash)
	again := v.startServer(1, r.share()...)
	r.awaitActive(again.cmd.Process.Pid)
	r.awaitSettled()
	v.connectUntil(0, 1, 1)

	end := max(crash+window, v.round()+quiet)
	v.finish(end)
	v.lostNone("after a crash and a restart", others, crash, end)
	v.lostNone("once it was back", own, back, end)
}

// SIGUSR1 makes a server close its socket and bind another, in the same process.
// Its own clients connect anew; the others notice nothing.
func TestOpenVPNReload(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	v.options[1] = "persist-key\npersist-tun"
	r := newRpsel(t, v.servers, vpnPort)
	defer r.explain()
	r.agent(settle)
	first := v.startServer(1, r.share()...)
	v.startServer(2, r.share()...)
	v.startServer(3, r.share()...)
	before := r.awaitActive(first.cmd.Process.Pid)
	r.awaitSettled()
	clients := v.connectUntil(12, 3, 2)

	from := v.round()
	first.signal(t, unix.SIGUSR1)
	r.awaitActive(first.cmd.Process.Pid, before)
	back := v.awaitBack(on(clients, 1), from)
	v.connectUntil(0, 1, 1) // it has new clients as well

	end := max(back, v.round()) + 3
	v.finish(end)
	v.lostNone("after a reload", append(on(clients, 2), on(clients, 3)...), from, end)
	v.lostNone("once they were back", on(clients, 1), back, end)
}

// A server is drained and then stopped. It tells its clients so, and they go to
// other servers at once; nobody else loses a probe.
func TestOpenVPNDrain(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	v.options[1] = "explicit-exit-notify 1"
	r := newRpsel(t, v.servers, vpnPort)
	defer r.explain()
	r.agent(settle)
	first := v.startServer(1, r.share()...)
	v.startServer(2, r.share()...)
	v.startServer(3, r.share()...)
	r.awaitActive(first.cmd.Process.Pid)
	r.awaitSettled()
	clients := v.connectUntil(12, 3, 2)

	from := v.round()
	drain := r.outside("drain", "--pid", strconv.Itoa(first.cmd.Process.Pid), "--wait", "--timeout", "2s")
	if out, _ := drain.CombinedOutput(); drain.ProcessState.ExitCode() != timedOut {
		t.Errorf("%s: exit code %d, want %d since its clients are there\n%s", drain, drain.ProcessState.ExitCode(), timedOut, out)
	}
	later := v.connect(4)
	if n := len(on(later, 1)); n > 0 {
		t.Errorf("%d new clients got the draining server", n)
	}
	stop := v.round()
	v.finish(stop)
	v.lostNone("while a server drained", clients, from, stop)

	first.signal(t, unix.SIGTERM)
	back := v.awaitBack(on(clients, 1), stop)
	end := back + 3
	v.finish(end)
	v.lostNone("after a server was stopped", slices.Concat(on(clients, 2), on(clients, 3), later), stop, end)
	v.lostNone("once they were back", on(clients, 1), back, end)
	for _, c := range on(clients, 1) {
		if server := v.at(c.name, end); server == 1 {
			t.Errorf("%s is answered by the server that was stopped", c.name)
		}
	}
}

// A server that gives up root after its start cannot bind again beside others:
// the socket would be another user's. Alone it can, and then the others cannot.
func TestOpenVPNUserNobody(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	v.options[1] = "persist-key\npersist-tun\nuser nobody\ngroup nogroup"
	r := newRpsel(t, v.servers, vpnPort)
	defer r.explain()
	agent := r.agent(settle)
	first := v.startServer(1, r.share()...)
	second := v.startServer(2, r.share()...)
	r.awaitActive(first.cmd.Process.Pid)
	r.awaitActive(second.cmd.Process.Pid)
	r.awaitSettled()
	agent.await(t, "has become uid 65534 since its socket was opened by uid 0")
	clients := v.connectUntil(6, 2, 1)

	from := v.round()
	first.signal(t, unix.SIGUSR1)
	if log := first.awaitEnd(t); !strings.Contains(log, "Address already in use") {
		t.Errorf("the server that became nobody ended with %q", log)
	}
	back := v.awaitBack(on(clients, 1), from)
	v.lostNone("after it ended", on(clients, 2), from, back)

	second.kill()
	alone := v.startServer(1, r.share()...)
	before := r.awaitActive(alone.cmd.Process.Pid)
	alone.signal(t, unix.SIGUSR1)
	r.awaitActive(alone.cmd.Process.Pid, before)
	agent.await(t, "sockets of different users (uid 0, 65534) share no group")
	if log := v.launchServer(2, r.share()...).awaitEnd(t); !strings.Contains(log, "Address already in use") {
		t.Errorf("a server of root beside one of nobody says %q, want that the address is in use", log)
	}
}

// A server without SO_REUSEPORT that is at work becomes one of two.
func TestOpenVPNSecondServer(t *testing.T) {
	t.Parallel()
	v := newVPN(t)
	r := newRpsel(t, v.servers, vpnPort)
	defer r.explain()
	v.startServer(1)
	old := v.connect(6)
	if log := v.launchServer(2, r.run()...).awaitEnd(t); !strings.Contains(log, "Address already in use") {
		t.Errorf("without rpsel attach a second server says %q, want that the address is in use", log)
	}

	from := v.round()
	r.attach("--adopt", "--settle", settleTime)
	second := v.startServer(2, r.run()...)
	r.awaitActive(second.cmd.Process.Pid)
	r.awaitSettled()
	v.connectUntil(4, 2, 2)

	end := v.round() + quiet
	v.finish(end)
	for _, c := range old {
		if n := v.lost(c.name, from, end); n > 0 {
			t.Errorf("%s lost %d probes of %d", c.name, n, end-from)
		}
	}
}
