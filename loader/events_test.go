package loader_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// watcher collects a group's events.
type watcher struct {
	t      *testing.T
	end    func() error
	mu     sync.Mutex
	events []loader.Event
}

// watch reads a group's events until the test ends. A reader that gets stuck does
// so with its first events, until the channel is closed.
func watch(t *testing.T, g *loader.Group, stuck <-chan struct{}) *watcher {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	w := &watcher{t: t}
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- g.Watch(ctx, func() { close(ready) }, func(events []loader.Event) error {
			if stuck != nil {
				<-stuck
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			w.events = append(w.events, events...)
			return nil
		})
	}()
	w.end = sync.OnceValue(func() error {
		stop()
		return <-done
	})
	t.Cleanup(func() {
		if err := w.end(); err != nil {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	return w
}

// await waits until the events since the last await are n at least, and returns
// them.
func (w *watcher) await(n int) []loader.Event {
	w.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		w.mu.Lock()
		events := w.events
		if len(events) >= n {
			w.events = nil
		}
		w.mu.Unlock()
		if len(events) >= n {
			return events
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%d events, want %d: %v", len(events), n, kinds(events))
		}
	}
}

// kinds counts events.
func kinds(events []loader.Event) map[loader.EventKind]int {
	n := map[loader.EventKind]int{}
	for _, e := range events {
		n[e.Kind]++
	}
	return n
}

// byClient gives the slot that each client's event of a kind names.
func byClient(events []loader.Event, kind loader.EventKind) map[int]int {
	slots := map[int]int{}
	for _, e := range events {
		if e.Kind == kind {
			slots[int(e.Client.Port())] = e.Slot
		}
	}
	return slots
}

// answered is byClient as the answers of the servers s0, s1… in slots 0, 1… have it.
func answered(port func(client int) int, answers []string, which func(string) bool) map[int]int {
	slots := map[int]int{}
	for i, name := range answers {
		var slot int
		fmt.Sscanf(name, "s%d", &slot)
		if which(name) {
			slots[port(i)] = slot
		}
	}
	return slots
}

func anyServer(string) bool { return true }

// Each thing that happens to a flow or a listener is told, once, with the slot of
// the server that answered, whatever the policy and the affinity. Expired flows are,
// by the timer of the kernel or without.
func TestWatch(t *testing.T) {
	for _, c := range []struct {
		name    string
		options loader.Options
		noTimer bool
	}{
		{name: "timer"},
		{name: "no timer", noTimer: true},
		{name: "least", options: loader.Options{Policy: loader.PolicyLeast}},
		{name: "rr", options: loader.Options{Policy: loader.PolicyRR}},
		{name: "newest", options: loader.Options{Policy: loader.PolicyNewest}},
		{name: "affinity client", options: loader.Options{Affinity: loader.AffinityClient}},
		{name: "affinity bytes", options: loader.Options{Affinity: tooShort}},
	} {
		t.Run(c.name, func(t *testing.T) {
			old, young := 50, 100 // flows
			if c.options.Affinity == loader.AffinityClient {
				old, young = 1, 1
			}
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: "udp6", Addr: "[::]:1194", ReusePort: true})
			c.options.Flows, c.options.Settle, c.options.IdleNew = 1000, -1, time.Hour
			restore := func() {}
			if c.noTimer {
				restore = loader.NoTimer()
			}
			g := attach(t, fs, ns, c.options)
			restore()
			t.Parallel()
			testnet.NewClients(t, ns, 50, "[::1]:1194").Ask() // before anybody reads
			w := watch(t, g, nil)

			clients := testnet.NewClients(t, ns, 100, "127.0.0.1:1194")
			port := clients.Port
			if young == 1 {
				port = func(int) int { return 0 }
			}
			answers := clients.Ask()
			events := w.await(young)
			if diff := cmp.Diff(answered(port, answers, anyServer), byClient(events, loader.EventNew)); diff != "" || len(events) != young {
				t.Errorf("%v: %s", kinds(events), diff)
			}
			events = nil
			for got := 0; got < young; got = len(byClient(events, loader.EventEstablished)) {
				clients.Ask()
				events = append(events, w.await(0)...)
			}
			// The flows of before are not heard of again.
			g.ExpireAfter(1, 3600)
			for got := 0; got < old; got = kinds(events)[loader.EventExpire] {
				clients.Ask()
				events = append(events, w.await(0)...)
			}
			if diff := cmp.Diff(map[loader.EventKind]int{loader.EventEstablished: young, loader.EventExpire: old}, kinds(events)); diff != "" {
				t.Error(diff)
			}
			g.ExpireAfter(3600, 3600)

			dead := 1
			if young == 1 {
				fmt.Sscanf(answers[0], "s%d", &dead) // it has the only one
			}
			servers.Close(dead)
			orphan := func(name string) bool { return name == fmt.Sprint("s", dead) }
			orphans := answered(port, answers, orphan)
			answers = clients.Ask()
			events = w.await(1 + len(orphans))
			got := byClient(events, loader.EventRehome)
			for i, name := range answers {
				if _, ok := orphans[port(i)]; ok && fmt.Sprint("s", got[port(i)]) != name {
					t.Errorf("port %d: rehomed to slot %d, %s answers", port(i), got[port(i)], name)
				}
			}
			if len(got) != len(orphans) || events[0].Kind != loader.EventLeave || events[0].Slot != dead || events[0].PID == 0 || len(events) != 1+len(orphans) {
				t.Errorf("%d orphans, first %+v, %v", len(orphans), events[0], kinds(events))
			}
			if i := slices.IndexFunc(events, func(e loader.Event) bool { return e.Kind == loader.EventRehome && e.From != dead }); i >= 0 {
				t.Errorf("rehomed: %+v", events[i])
			}

			servers.Add()
			attach(t, fs, ns, loader.Options{})
			drained := (dead + 1) % 3
			if err := g.Drain(drained); err != nil {
				t.Fatal(err)
			}
			told := w.await(2)
			if err := g.Resume(drained); err != nil {
				t.Fatal(err)
			}
			told = append(told, w.await(1)...)
			if diff := cmp.Diff(map[loader.EventKind]int{loader.EventJoin: 1, loader.EventDrain: 1, loader.EventResume: 1}, kinds(told)); diff != "" {
				t.Errorf("%s: %+v", diff, told)
			}

			if err := g.Watch(context.Background(), nil, nil); !errors.Is(err, loader.ErrWatched) {
				t.Errorf("a second reader: %v", err)
			}
			if err := w.end(); err != nil {
				t.Error(err)
			}
			testnet.NewClients(t, ns, 50, "[::1]:1194").Ask()
			again := watch(t, g, nil)
			if _, err := g.Flush(nil); err != nil { // which is not told of
				t.Fatal(err)
			}
			testnet.NewClients(t, ns, 1, "[::1]:1194").Ask()
			if events := again.await(1); len(events) != 1 || events[0].Kind != loader.EventNew {
				t.Errorf("what happened while nobody read is told: %+v", events)
			}
			again.await(0)
			if _, err := fs.Detach(g.Key()); err != nil {
				t.Fatal(err)
			}
			if err := again.end(); err != nil && !errors.Is(err, loader.ErrNotAttached) {
				t.Errorf("detached: %v", err)
			}
			again.end = func() error { return nil }
		})
	}
}

// In a table that is too small, who gives way is told, with the listener he had, and
// so is whom an answer confirms, who gives way no more. The control is confirm client.
func TestWatchFull(t *testing.T) {
	const asking, silent = 30, 300
	for _, confirm := range []loader.Confirm{loader.ConfirmReply, loader.ConfirmClient} {
		t.Run(string(confirm), func(t *testing.T) {
			o := udpServer
			if confirm == loader.ConfirmReply {
				o.Cgroup = inCgroup(t)
			}
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			testnet.StartGroup(t, ns, 3, o)
			g := attach(t, fs, ns, loader.Options{Flows: 64, Settle: -1, Confirm: confirm})
			w := watch(t, g, nil)
			clients := testnet.NewClients(t, ns, asking, fleetAddr)
			confirmed := map[int]int{}
			if answers := clients.Ask(); confirm == loader.ConfirmReply {
				confirmed = answered(clients.Port, answers, anyServer)
			}
			testnet.NewClients(t, ns, silent, fleetAddr).Send(testnet.Silence)
			await(t, fs, g.Key(), "all packets", func(g *loader.Group) bool { return status(t, g).Counters.Runs == asking+silent })

			c := status(t, g).Counters
			events := w.await(int(c.New+c.Evicted) + len(confirmed))
			began, evicted := byClient(events, loader.EventNew), byClient(events, loader.EventEvict)
			want := map[loader.EventKind]int{loader.EventNew: int(c.New), loader.EventEvict: int(c.Evicted)}
			if len(confirmed) > 0 {
				want[loader.EventEstablished] = len(confirmed)
			}
			if diff := cmp.Diff(want, kinds(events)); diff != "" || len(began) != int(c.New) || len(evicted) != int(c.Evicted) || c.Evicted < silent/2 {
				t.Errorf("%+v: %s", c, diff)
			}
			if diff := cmp.Diff(confirmed, byClient(events, loader.EventEstablished)); diff != "" {
				t.Error(diff)
			}
			left := map[int]int{}
			for f, err := range g.Flows() {
				if err != nil {
					t.Fatal(err)
				}
				left[int(f.Client.Port())] = f.Slot
			}
			for port, slot := range evicted {
				if _, is := confirmed[port]; began[port] != slot || is {
					t.Errorf("port %d: told to begin with slot %d, to give way with %d; confirmed %v", port, began[port], slot, is)
				}
				delete(began, port)
			}
			if diff := cmp.Diff(began, left); diff != "" {
				t.Errorf("who began, and did not give way: %s", diff)
			}
		})
	}
}

// What finds the ring full is counted, and the counters of the program agree: told
// and dropped events are as many as happened.
func TestWatchDropped(t *testing.T) {
	defer loader.SmallRing()()
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 3, udpServer)
	g := attach(t, fs, ns, loader.Options{Flows: 64, Settle: -1})
	stuck := make(chan struct{})
	w := watch(t, g, stuck)
	testnet.NewClients(t, ns, 1000, fleetAddr).Ask()
	close(stuck)
	if err := w.end(); err != nil {
		t.Fatal(err)
	}
	n, dropped := kinds(w.events), 0
	for _, e := range w.events {
		dropped += e.Dropped
	}
	c := status(t, g).Counters
	happened := int(c.New + c.Evicted)
	if told := n[loader.EventNew] + n[loader.EventEvict]; told+dropped != happened || told == 0 || dropped < happened/2 {
		t.Errorf("%d events and %d dropped, %d happened: %v", told, dropped, happened, n)
	}
}
