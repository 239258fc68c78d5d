package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/rpsel/rpsel/loader"
)

// Each warning names the way out, and comes only when there is something to it.
func TestWarnings(t *testing.T) {
	// A proxy that gives each packet a port of its own.
	proxied := func() loader.Status {
		return loader.Status{
			Key: loader.Key{Proto: loader.UDP, Addr: netip.MustParseAddrPort("0.0.0.0:1194")}, Attached: true, Affinity: "flow",
			Age: time.Hour, Idle: 300 * time.Second, IdleNew: 30 * time.Second,
			Tracked: 3000, Established: 10, Capacity: 262144,
			Listeners: []loader.Listener{{State: "active", Joined: time.Hour, New: 9500, Hit: 500, Recent: 1000}},
		}
	}
	const hidden = "95 % of the packets are new flows"
	for _, c := range []struct {
		name   string
		change func(s *loader.Status)
		want   string // "": no warning
	}{
		{"a proxy", func(*loader.Status) {}, hidden},
		{"young", func(s *loader.Status) { s.Age = 59 * time.Second }, ""},
		{"settling", func(s *loader.Status) { s.Settling = time.Second }, ""},
		{"joined just now", func(s *loader.Status) { s.Listeners[0].Joined = 0 }, ""},
		{"dead", func(s *loader.Status) {
			s.Listeners = append(s.Listeners, loader.Listener{State: "active", Joined: time.Hour})
			s.Listeners[0].State = "dead"
		}, ""},
		{"quiet by now", func(s *loader.Status) { s.Listeners[0].Recent = 5 }, ""},
		{"few packets", func(s *loader.Status) { s.Listeners[0].New, s.Listeners[0].Hit = 950, 49 }, ""},
		{"two packets a flow", func(s *loader.Status) { s.Listeners[0].Hit = 9500 }, ""},
		{"better by now", func(s *loader.Status) { s.Established = 500 }, ""},
		{"another affinity", func(s *loader.Status) { s.Affinity = "client" }, ""},
		{"full", func(s *loader.Status) { s.Listeners, s.Tracked, s.Capacity = s.Listeners[:0], 900, 1000 },
			`the table runs full, 900 flows of 1000 (0 gave way to newer ones and 0 packets went untracked so far): "rpsel upgrade --port 1194 --flows 2000" makes room`},
		{"nearly full", func(s *loader.Status) { s.Listeners, s.Tracked, s.Capacity = s.Listeners[:0], 899, 1000 }, ""},
		{"full and as large as can be", func(s *loader.Status) {
			s.Listeners, s.Tracked, s.Capacity = s.Listeners[:0], loader.MaxFlows, loader.MaxFlows
		}, `--idle-new" with less than 30s`},
	} {
		s := proxied()
		c.change(&s)
		got := warnings(s)
		if c.want == "" && len(got) != 0 || c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want)) {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}
