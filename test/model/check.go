package model

import (
	"fmt"
	"strings"
)

// finding is a violation and the steps that led to it.
type finding struct {
	wrong string
	trace []string
}

func (f *finding) String() string {
	return strings.Join(f.trace, "\n") + "\n=> " + f.wrong
}

// check enumerates the world's states, depth first, each once. It returns the
// first violation, if there is one, and the number of states seen.
func check(w *world, p protocol) (*finding, int) {
	m := &machine{world: w, protocol: p}
	seen := make(map[state]struct{})
	var trace []string
	var visit func(s state) *finding
	visit = func(s state) *finding {
		if _, ok := seen[s]; ok {
			return nil
		}
		seen[s] = struct{}{}
		ended := true
		for i := range s.actors {
			if s.actors[i].pc == stepEnd {
				continue
			}
			ended = false
			var bad *finding
			m.step(s, i, func(next state) {
				if bad != nil {
					return
				}
				for k := range next.actors {
					// Others' steps widen what a packet under way may do.
					if a := &next.actors[k]; a.pc != stepEnd && a.flow != 0 {
						a.had |= next.in(a.flow)
						a.may |= next.owners(a.flow)
						if a.may&anybody != 0 {
							a.may = anybody
						}
					}
				}
				trace = append(trace, fmt.Sprintf("actor %d, flow %d: %-24v %s", i, s.actors[i].flow, s.actors[i].pc, table(&next, w.places)))
				if m.wrong != "" {
					bad = &finding{m.wrong, append([]string(nil), trace...)}
				} else {
					bad = visit(next)
				}
				trace = trace[:len(trace)-1]
			})
			if bad != nil {
				return bad
			}
		}
		if ended {
			if wrong := w.atEnd(&s); wrong != "" {
				return &finding{wrong, append([]string(nil), trace...)}
			}
		}
		return nil
	}
	first := w.start
	for i := range first.actors {
		if a := &first.actors[i]; a.pc == stepClock {
			a.had, a.may = first.in(a.flow), first.owners(a.flow)
		}
	}
	return visit(first), len(seen)
}

// atEnd says what is wrong when everybody has finished.
func (w *world) atEnd(s *state) string {
	var entries [4]int
	for _, e := range s.entries[:w.places] {
		if e.word.state == busy {
			return "a place stays busy"
		}
		if e.word.tracks() {
			if w.tag[e.identity] != e.word.tag {
				return fmt.Sprintf("an entry has the identity of flow %d and the word of another", e.identity)
			}
			if int8(s.second)-int8(e.word.second) <= idleNew {
				entries[e.identity]++
			}
		}
	}
	var given [4]listener
	for flow, n := range entries {
		if n > 1 {
			return fmt.Sprintf("flow %d has %d entries", flow, n)
		}
	}
	for _, a := range s.actors {
		if !w.agree || a.flow == 0 {
			continue
		}
		if given[a.flow] != (listener{}) && given[a.flow] != a.selected {
			return fmt.Sprintf("packets of flow %d went to %v and %v", a.flow, given[a.flow], a.selected)
		}
		given[a.flow] = a.selected
	}
	return ""
}

func table(s *state, places uint8) string {
	var b strings.Builder
	for _, e := range s.entries[:places] {
		name := [...]string{"-", "busy", "new", "est"}[e.word.state]
		if e.word == revoked {
			name = "revoked"
		}
		fmt.Fprintf(&b, " [%d %s %v %d]", e.identity, name, e.word.listener(), e.word.second)
	}
	return b.String()
}
