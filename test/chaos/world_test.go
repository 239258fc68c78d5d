package chaos

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
)

func TestMain(m *testing.M) { testnet.Main(m) }

// world is the group, its clients, and what is known of both.
type world struct {
	t     testing.TB
	rng   *rand.Rand
	rpsel string // the command
	ns    *testnet.NetNS
	bpffs string
	*model
	*traffic
	servers int  // that were ever started
	weights bool // weights are given, until the next attach to plain Linux
	agent   *keeper
	took    map[string]time.Duration // the last time, by command
	said    []string
	done    map[string]int // steps, by what they did
}

func newWorld(t testing.TB, seed uint64) *world {
	t.Helper()
	testnet.Privileged(t)
	w := &world{
		t: t, rng: rand.New(rand.NewPCG(seed, 0)), rpsel: testnet.Build(t),
		ns: testnet.New(t), bpffs: testnet.BPFFS(t), model: newModel(), done: map[string]int{}, took: map[string]time.Duration{},
	}
	w.traffic = newTraffic(t, w.ns, 10000+w.rng.IntN(50000))
	w.readdress(byte(1 + w.rng.IntN(250)))
	t.Cleanup(w.cleanAgent)
	return w
}

// say keeps what happened last.
func (w *world) say(format string, args ...any) {
	const long = 60
	if len(w.said) == long {
		w.said = slices.Delete(w.said, 0, 1)
	}
	w.said = append(w.said, fmt.Sprintf("%5d  %s", w.step, fmt.Sprintf(format, args...)))
}

// command is a command line about the group.
func (w *world) command(verb string, args ...string) *exec.Cmd {
	args = slices.Concat([]string{verb, "--bpffs", w.bpffs, "-N", w.ns.Path(), "--port", strconv.Itoa(int(server.Port()))}, args)
	return exec.Command(w.rpsel, args...)
}

// run runs a command, which must exit with this code, and returns its answer.
func (w *world) run(code int, verb string, args ...string) (string, error) {
	cmd := w.command(verb, args...)
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	began := time.Now()
	err := cmd.Run()
	w.took[verb] = time.Since(began)
	line := strings.TrimSpace(verb + " " + strings.Join(args, " "))
	w.say("rpsel %s: %v: %s", line, cmd.ProcessState, strings.TrimSpace(talk.String()))
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		return "", err
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		return "", fmt.Errorf("rpsel %s: %v, want exit code %d: %s", line, cmd.ProcessState, code, talk.String())
	}
	return out.String(), nil
}

// instant draws a time at which a command is still at work.
func (w *world) instant(verb string) time.Duration {
	return time.Duration(w.rng.Int64N(int64(max(w.took[verb], 10*time.Millisecond))))
}

// runKilled kills a command at some instant, and reports whether it was in time.
func (w *world) runKilled(verb string, args ...string) (killed bool, err error) {
	cmd := w.command(verb, args...)
	var talk bytes.Buffer
	cmd.Stderr = &talk
	if err := cmd.Start(); err != nil {
		return false, err
	}
	timer := time.AfterFunc(w.instant(verb), func() { cmd.Process.Kill() })
	err = cmd.Wait()
	timer.Stop()
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	killed = status.Signaled() && status.Signal() == unix.SIGKILL
	w.say("rpsel %s %s: %v", verb, strings.Join(args, " "), cmd.ProcessState)
	if err != nil && !killed {
		return false, fmt.Errorf("rpsel %s %s: %w: %s", verb, strings.Join(args, " "), err, talk.String())
	}
	return killed, nil
}

// start starts a process with some listeners.
func (w *world) start(sockets int) {
	name := fmt.Sprintf("p%d-", w.servers)
	w.servers++
	s := testnet.StartGroup(w.t, w.ns, sockets, testnet.ServerOptions{
		Network: "udp4", Addr: server.String(), Name: name, ReusePort: true,
		Sockopts: []testnet.Sockopt{{Level: unix.SOL_SOCKET, Name: unix.SO_RCVBUFFORCE, Value: 8 << 20}},
	})
	for i, name := range s.Names {
		w.bound(&listener{name: name, server: s, index: i})
	}
	w.say("start %s, pid %d", strings.Join(s.Names, " "), s.PID())
}

// processes lists the living processes.
func (w *world) processes() []*testnet.Server {
	var list []*testnet.Server
	for _, l := range w.alive() {
		if !slices.Contains(list, l.server) {
			list = append(list, l.server)
		}
	}
	return list
}

// of lists the living listeners of processes.
func (w *world) of(servers ...*testnet.Server) []*listener {
	return w.where(func(l *listener) bool { return slices.Contains(servers, l.server) })
}

// kill kills processes, all before anybody can do something about it.
func (w *world) kill(servers ...*testnet.Server) {
	dead := w.of(servers...)
	for _, s := range servers {
		s.Kill()
	}
	w.say("kill %s", names(dead))
	w.died(dead...)
}

// check asks and compares.
func (w *world) check(which []int) error {
	if len(w.alive()) == 0 {
		return nil // who should answer
	}
	// The agent may be at the sockets of servers that were killed, and keep one
	// alive until it is done.
	w.closing = w.agent != nil
	answers, err := w.ask(which)
	w.closing = false
	if err != nil {
		return err
	}
	wrong := 0
	for at, i := range which {
		answerErr := w.answered(i, answers[at])
		if answerErr == nil {
			continue
		}
		if wrong++; wrong <= 3 {
			err = errors.Join(err, fmt.Errorf("flow %d, %s: %w\n\thistory: %s", i, w.name(i), answerErr, strings.Join(w.flows[i].history, "; ")))
		}
	}
	if wrong > 0 {
		return fmt.Errorf("%d of %d flows are wrong:\n%w", wrong, len(which), err)
	}
	return w.evenly()
}

// sample draws flows, and among those whose owner is open some more.
func (w *world) sample() []int {
	open := w.choose(150, func(f *flow) bool { return f.owner == nil && f.origin != unknown })
	any := w.choose(150, func(*flow) bool { return true })
	which := append(open, any...)
	slices.Sort(which)
	return slices.Compact(which)
}

// choose draws up to n flows with a property.
func (w *world) choose(n int, property func(*flow) bool) []int {
	var list []int
	for i := range w.flows {
		if property(&w.flows[i]) {
			list = append(list, i)
		}
	}
	w.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list[:min(n, len(list))]
}

var everyFlow = func() []int {
	list := make([]int, flows)
	for i := range list {
		list[i] = i
	}
	return list
}()

// during does something that must not matter to flows: those of listeners but
// these, which close, keep sending, and keep their listener all the while.
func (w *world) during(f func() error, except ...*listener) error {
	w.closing = len(except) > 0 || w.agent != nil
	defer func() { w.closing = false }()
	steady := w.choose(64, func(f *flow) bool { return f.owner != nil && f.tracked && !slices.Contains(except, f.owner) })
	owners := make([]*listener, len(steady))
	for at, i := range steady {
		owners[at] = w.flows[i].owner
	}
	stop, sent := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				sent <- nil
				return
			default:
			}
			answers, err := w.ask(steady)
			for at, i := range steady {
				if err == nil && answers[at] != owners[at].name {
					err = fmt.Errorf("meanwhile %q answered flow %d, %s, which %s has (P1, P6)", answers[at], i, w.name(i), owners[at].name)
				}
			}
			if err != nil {
				sent <- err
				return
			}
		}
	}()
	err := f()
	close(stop)
	return errors.Join(err, <-sent)
}

// status is what "rpsel status --json" says, as far as it is of interest.
type status struct {
	Groups []struct {
		Attached  bool
		Settling  int `json:"settling_seconds"`
		Turning   int `json:"turning_seconds"`
		Flows     struct{ Tracked int }
		Listeners []struct {
			Slot, PID, Weight, Flows, Generation int
			State                                string
		}
		Unregistered []json.RawMessage
	}
}

func (w *world) status() (s status, err error) {
	out, err := w.run(0, "status", "--json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// learnGenerations asks who is of which generation, where that counts: nobody
// else knows how much time has passed between two joins.
func (w *world) learnGenerations() error {
	if !w.newest || !w.sticky {
		return nil
	}
	s, err := w.status()
	if err != nil {
		return err
	}
	w.turning = s.Groups[0].Turning > 0
	for _, l := range s.Groups[0].Listeners {
		if l.State == "dead" {
			continue
		}
		for _, ours := range w.where(func(ours *listener) bool { return ours.server.PID() == l.PID }) {
			ours.generation = l.Generation
		}
	}
	return nil
}

// checkStatus compares what status says with who answers whom, after all flows
// have been asked.
func (w *world) checkStatus() error {
	if !w.sticky || len(w.active())+len(w.draining()) == 0 {
		return nil
	}
	s, err := w.status()
	if err != nil {
		return err
	}
	type process struct{ sockets, active, flows int }
	got, want := map[int]process{}, map[int]process{}
	for _, l := range s.Groups[0].Listeners {
		if l.State != "dead" {
			p := got[l.PID]
			p.sockets++
			p.flows += l.Flows
			if l.State == "active" {
				p.active++
			}
			got[l.PID] = p
		}
	}
	for _, l := range w.where(func(l *listener) bool { return l.registered }) {
		p := want[l.server.PID()]
		p.sockets++
		if !l.draining {
			p.active++
		}
		for i := range w.flows {
			if w.flows[i].owner == l {
				p.flows++
			}
		}
		want[l.server.PID()] = p
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || s.Groups[0].Flows.Tracked != flows {
		return fmt.Errorf("status says, by pid, {sockets active flows} %v, %d tracked; the answers say %v, %d", got, s.Groups[0].Flows.Tracked, want, flows)
	}
	return nil
}

// explain says all that may help to find out why.
func (w *world) explain(err error) string {
	var s strings.Builder
	fmt.Fprintf(&s, "step %d: %v\n\nthe last steps:\n%s\n\nthe model: %s", w.step, err, strings.Join(w.said, "\n"), w.describe())
	out, statusErr := w.command("status", "-v").CombinedOutput()
	fmt.Fprintf(&s, "\nrpsel status: %v\n%s", statusErr, out)
	if w.agent != nil {
		fmt.Fprintf(&s, "\nthe agent:\n%s", w.agent.log.String())
	}
	for i := range w.flows {
		if f := &w.flows[i]; strings.Contains(err.Error(), fmt.Sprintf("flow %d,", i)) {
			out, err := w.command("why", w.name(i)).CombinedOutput()
			fmt.Fprintf(&s, "\nflow %d, %s: %s\nrpsel why: %v\n%s", i, w.name(i), strings.Join(f.history, "; "), err, out)
		}
	}
	return s.String()
}
