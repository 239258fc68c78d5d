package chaos

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/rpsel/rpsel/internal/testnet"
)

// listener is a socket of the group, as its operator knows it.
type listener struct {
	name   string // what it answers with
	server *testnet.Server
	index  int // of the socket in its process

	alive      bool
	registered bool
	draining   bool
	weight     int
	generation int  // as status says; of processes
	doubt      bool // a command that was killed may have changed it, or not
}

// flow is what an outside observer knows of one.
type flow struct {
	owner   *listener // who must answer; nil: that is open
	tracked bool      // has sent a packet since the program picks
	origin  origin    // without an owner: how that came about
	history []string
}

type origin int

const (
	unknown origin = iota
	fresh          // new to rpsel, whatever its hash
	orphan         // its listener died
)

// model says who may answer each flow. It knows the commands that were given,
// the listeners that were started and killed, and the answers so far; nothing
// of maps, hashes and slots.
type model struct {
	listeners []*listener // all there ever were
	flows     [flows]flow
	step      int

	sticky       bool // our program picks
	attachedOnce bool // and the group has not been detached since
	newest       bool // new flows go to the newest generation
	turning      bool // it waits for another one to be complete
	changed      bool // listeners joined, drained, resumed or were weighed since the attach
	weighed      bool // weights were given since the attach
	mended       bool // somebody has died since the attach

	// Who got the flows whose owner was open, since the last step.
	spread map[origin]map[*listener]int
}

func newModel() *model {
	m := &model{}
	m.forget()
	m.next()
	return m
}

// next begins another step.
func (m *model) next() {
	m.step++
	m.spread = map[origin]map[*listener]int{fresh: {}, orphan: {}}
}

func (m *model) alive() []*listener {
	return m.where(func(l *listener) bool { return true })
}

// where lists the living listeners with a property.
func (m *model) where(property func(*listener) bool) []*listener {
	var list []*listener
	for _, l := range m.listeners {
		if l.alive && property(l) {
			list = append(list, l)
		}
	}
	return list
}

func (m *model) active() []*listener {
	return m.where(func(l *listener) bool { return l.registered && !l.draining && !l.doubt })
}

// first lists the active listeners that get new flows: all, or those of the
// newest generation that has one.
func (m *model) first() []*listener {
	active := m.active()
	if !m.newest {
		return active
	}
	newest := 0
	for _, l := range active {
		newest = max(newest, l.generation)
	}
	return slices.DeleteFunc(active, func(l *listener) bool { return l.generation < newest })
}

// turnable adds to the first those that are while the newest generation is not
// complete, which may change while we look.
func (m *model) turnable() []*listener {
	first := m.first()
	if !m.turning || len(first) == 0 {
		return first
	}
	before := 0
	for _, l := range m.active() {
		if l.generation < first[0].generation {
			before = max(before, l.generation)
		}
	}
	for _, l := range m.active() {
		if l.generation == before {
			first = append(first, l)
		}
	}
	return first
}

func (m *model) draining() []*listener {
	return m.where(func(l *listener) bool { return l.registered && l.draining && !l.doubt })
}

func (m *model) unregistered() []*listener {
	return m.where(func(l *listener) bool { return !l.registered })
}

func (m *model) doubtful() []*listener {
	return m.where(func(l *listener) bool { return l.doubt })
}

func (f *flow) note(format string, args ...any) {
	const long = 24
	if len(f.history) == long {
		f.history = slices.Delete(f.history, 1, 2)
	}
	f.history = append(f.history, fmt.Sprintf(format, args...))
}

// release makes a flow's owner an open question.
func (m *model) release(f *flow, o origin, why string) {
	if f.owner != nil || len(f.history) == 0 || o == fresh {
		f.note("%d: %s", m.step, why)
	}
	f.owner, f.tracked, f.origin = nil, false, o
}

// forget releases all flows: the kernel's hash serves them, and has changed.
func (m *model) forget() {
	for i := range m.flows {
		m.release(&m.flows[i], unknown, "the kernel's hash changes")
	}
}

// bound: a listener came.
func (m *model) bound(l *listener) {
	l.alive, l.weight = true, 1
	m.listeners = append(m.listeners, l)
	if !m.sticky {
		m.forget()
	}
}

// died: exactly the flows of these are free to move (P2). The last of a group
// takes the program with it.
func (m *model) died(dead ...*listener) {
	for _, l := range dead {
		l.alive, l.registered = false, false
	}
	m.listeners = slices.DeleteFunc(m.listeners, func(l *listener) bool { return !l.alive })
	if len(m.alive()) == 0 {
		m.sticky = false
	}
	if !m.sticky {
		m.forget()
		return
	}
	m.mended = true
	for i := range m.flows {
		f := &m.flows[i]
		if f.owner != nil && !f.owner.alive {
			m.release(f, orphan, f.owner.name+" died")
		}
	}
}

// attached: no flow moves (P0); those who came since take none (P3).
func (m *model) attached() {
	if !m.sticky {
		m.sticky, m.attachedOnce, m.changed, m.weighed, m.mended, m.turning = true, true, false, false, false, false
	} else if len(m.unregistered()) > 0 {
		m.reshare()
	}
	for _, l := range m.alive() {
		l.registered = true
		l.doubt = false
	}
}

// detached: it is plain Linux again.
func (m *model) detached() {
	m.sticky, m.attachedOnce, m.newest, m.turning = false, false, false, false
	for _, l := range m.alive() {
		l.registered, l.draining, l.doubt, l.weight = false, false, false, 1
	}
	m.forget()
}

// reshare: the shares of new flows change. A flow that has been silent since the
// attach is new, for all anybody can tell.
func (m *model) reshare() {
	m.changed = true
	for i := range m.flows {
		f := &m.flows[i]
		if f.owner != nil && !f.tracked {
			m.release(f, unknown, "silent since the attach, and shares change")
		}
	}
}

func (m *model) drained(draining bool, ls ...*listener) {
	m.reshare()
	for _, l := range ls {
		l.draining = draining
		l.doubt = false
	}
}

func (m *model) weightSet(weight int, ls ...*listener) {
	m.reshare()
	m.weighed = true
	for _, l := range ls {
		l.weight = weight
		l.doubt = false
	}
}

// flushed: these flows are new.
func (m *model) flushed(which []int) {
	for _, i := range which {
		m.release(&m.flows[i], fresh, "flushed")
	}
}

// eligible lists who may answer a flow without an owner, and names the promise.
func (m *model) eligible() (who []*listener, promise string) {
	doubt := m.doubtful()
	switch {
	case !m.sticky:
		return m.alive(), "plain Linux: anybody"
	case len(doubt) > 0 && len(m.active()) > 0:
		return append(m.active(), doubt...), "P3, P4: active ones only, or who a killed command made one"
	case len(m.active()) > 0:
		return m.turnable(), "P3, P4: active ones only, of the newest generation if that counts"
	case len(m.draining()) > 0:
		return append(m.draining(), doubt...), "P4: draining ones, since nobody is active"
	default:
		return m.alive(), "P7: the kernel's choice, since nobody is registered"
	}
}

// answered compares an answer with what must be, and learns from it.
func (m *model) answered(which int, name string) error {
	f := &m.flows[which]
	var l *listener
	if i := slices.IndexFunc(m.listeners, func(l *listener) bool { return l.name == name }); i >= 0 {
		l = m.listeners[i]
	}
	who, promise := m.eligible()
	switch {
	case name == "":
		return errors.New("nobody answered")
	case l == nil:
		return fmt.Errorf("%s answered, which is dead", name)
	case f.owner == l:
		f.tracked = m.sticky
		return nil
	case f.owner != nil && m.sticky:
		return fmt.Errorf("%s answered, but %s has the flow and is alive (P1, P0)", name, f.owner.name)
	case f.owner != nil:
		return fmt.Errorf("%s answered, %s did before, and nobody came or went (plain Linux)", name, f.owner.name)
	case !slices.Contains(who, l):
		return fmt.Errorf("%s answered; %s: %s", name, promise, names(who))
	}
	f.note("%d: %s", m.step, name)
	registered := func(l *listener) bool { return l.registered }
	if m.sticky && !l.registered && (!l.doubt || len(m.where(registered)) == 0) {
		return nil // by the kernel's choice: not tracked
	}
	f.owner, f.tracked = l, m.sticky
	if m.sticky && f.origin != unknown && len(m.active()) > 0 && len(m.doubtful()) == 0 && !m.turning {
		m.spread[f.origin][l]++
	}
	f.origin = unknown
	return nil
}

// doubtless is a bound in nats: a count this far off what it is drawn from comes
// once in e^30, which is 10^13. So a test of ten minutes, with a hundred
// thousand counts, gives a false alarm once in a hundred million times.
const doubtless = 30

// evenly compares how the flows without an owner were spread with what may be.
//
// New flows go by the pick table, of which each has its share to some percent
// (mending draws at random). Mending does not mind the weights, only dealing
// does: who has died may have given out its share evenly.
//
// The flows of a dead listener go by the entries of the table it had when they
// came. As long as it has been dying alone, those are dealt evenly. Otherwise,
// some of them are with listeners that joined since: then what can be said is
// that nobody gets a multiple.
func (m *model) evenly() error {
	active := m.first()
	total := 0
	for _, l := range active {
		total += l.weight
	}
	for o, got := range m.spread {
		sum := 0
		for _, n := range got {
			sum += n
		}
		for _, l := range active {
			due := float64(l.weight) / float64(total)
			low, high := 0.75*due, 1.3*due
			switch {
			case o == fresh && m.weighed && m.mended:
				low, high = 0.4*due, 3*due
			case o == orphan && m.weighed:
				continue
			case o == orphan && m.changed:
				low, high = 0, 4*due
			case o == orphan:
				low, high = 0.5*due, 1.7*due
			}
			if surprise(got[l], sum, low, high) > doubtless {
				return fmt.Errorf("of %d %s flows %s got %d, where %.0f to %.0f are due (P2, P3): %s", sum,
					map[origin]string{fresh: "new", orphan: "orphaned"}[o], l.name, got[l], low*float64(sum), high*float64(sum), counts(got))
			}
		}
	}
	return nil
}

// surprise is by Chernoff's bound the logarithm of how improbable it is, at
// least, that k of n come out where each has a chance from low to high.
func surprise(k, n int, low, high float64) float64 {
	if n == 0 {
		return 0
	}
	q := float64(k) / float64(n)
	p := min(max(q, low), high)
	if p >= 1 || p == q {
		return 0
	}
	divergence := 0.0
	if q > 0 {
		divergence += q * math.Log(q/p)
	}
	if q < 1 {
		divergence += (1 - q) * math.Log((1-q)/(1-p))
	}
	return float64(n) * divergence
}

func names(ls []*listener) string {
	var list []string
	for _, l := range ls {
		list = append(list, l.name)
	}
	return strings.Join(list, " ")
}

func counts(got map[*listener]int) string {
	var list []string
	for l, n := range got {
		list = append(list, fmt.Sprintf("%s %d", l.name, n))
	}
	slices.Sort(list)
	return strings.Join(list, ", ")
}

// describe tells what the model believes.
func (m *model) describe() string {
	var s strings.Builder
	fmt.Fprintf(&s, "sticky %v, newest %v, turning %v, changed %v, weighed %v\n", m.sticky, m.newest, m.turning, m.changed, m.weighed)
	for _, l := range m.listeners {
		n := 0
		for i := range m.flows {
			if m.flows[i].owner == l {
				n++
			}
		}
		fmt.Fprintf(&s, "  %-8s pid %d registered %v draining %v weight %d generation %d doubt %v flows %d\n",
			l.name, l.server.PID(), l.registered, l.draining, l.weight, l.generation, l.doubt, n)
	}
	return s.String()
}
