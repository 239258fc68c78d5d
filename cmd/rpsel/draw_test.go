package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// text is lines one below the other, colours before them.
func text(lines []textLine) string {
	var b strings.Builder
	for _, l := range lines {
		if l.colour != ordinary {
			fmt.Fprintf(&b, "[%s]", l.colour)
		}
		fmt.Fprintln(&b, l.text)
	}
	return b.String()
}

func TestDraw(t *testing.T) {
	start := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	status := example()
	status.Listeners = append(status.Listeners, loader.Listener{Slot: 2, Cookie: 804, PID: 4703, Command: "openvpn", State: "dead", Weight: 1, RxQueue: -1, Drops: -1})
	status.Counters.Runs, status.Counters.New = 52223, 1020
	h := history{}
	h.add(start, []loader.Status{status})
	first := (view{every: 2 * time.Second, width: 100, header: true, blocks: true}).draw(&scope{}, start, []loader.Status{status}, h)
	want := `
[2]2026-11-21 12:00:00  every 2s, Ctrl-C ends
[1]udp 0.0.0.0:1194  policy hash  affinity flow  flows 4400/262144  rehomed 310  fallback 0
[2]  SLOT   PID  COMMAND  STATE         WEIGHT  FLOWS  NEW/S  PACKETS/S  RXQ  DROPS  SHARE  OF FLOWS
     0  4711  openvpn  active             1   4090     12          -    0      0   93 %
[33]     1  4702  openvpn  draining           0    310      0          -    0      0    7 %
[31]     2  4703  openvpn  dead               1      0      0          -    -      -    0 %
[33]     -  4800  openvpn  unregistered       -      -      -          -    0      0      -
`
	if diff := cmp.Diff(strings.TrimPrefix(want, "\n"), text(first)); diff != "" {
		t.Errorf("the first look: -want +got:\n%s", diff)
	}

	// Four seconds, and 1000 packets of it before the last two: half of them new flows.
	for range 2 {
		start = start.Add(2 * time.Second)
		status.Listeners = append([]loader.Listener{}, status.Listeners...)
		status.Listeners[0].Hit += 100
		status.Counters.Runs += 100
		if start.Second() == 2 {
			status.Listeners[0].Hit += 900
			status.Counters.Runs += 900
			status.Counters.New += 500
		}
		h.add(start, []loader.Status{status})
	}
	for _, c := range []struct {
		name string
		view view
		want string
	}{
		{"wide", view{width: 120, blocks: true, header: true}, `
[2]2026-11-21 12:00:04  every 2s, Ctrl-C ends
[1]udp 0.0.0.0:1194  policy hash  affinity flow  flows 4400/262144  rehomed 310  fallback 0
[2]  SLOT   PID  COMMAND  STATE         WEIGHT  FLOWS  NEW/S  PACKETS/S  RXQ  DROPS  SHARE  OF FLOWS
     0  4711  openvpn  active             1   4090     12         50    0      0   93 %  ███████████████████▌
[33]     1  4702  openvpn  draining           0    310      0          0    0      0    7 %  █▌
[31]     2  4703  openvpn  dead               1      0      0          0    -      -    0 %
[33]     -  4800  openvpn  unregistered       -      -      -          -    0      0      -
[2]  HISTORY    NOW  MAX  LAST 4s
  packets/s   50  500  █▃
  new/s        0  250  █▁
`},
		{"no terminal", view{}, `
[2]2026-11-21 12:00:04
[1]udp 0.0.0.0:1194  policy hash  affinity flow  flows 4400/262144  rehomed 310  fallback 0
  0  4711  openvpn  active        1  4090  12  50  0  0  93 %  ###################
[33]  1  4702  openvpn  draining      0   310   0   0  0  0   7 %  #
[31]  2  4703  openvpn  dead          1     0   0   0  -  -   0 %
[33]  -  4800  openvpn  unregistered  -     -   -   -  0  0     -
  packets/s  50  500  #-
  new/s       0  250  #_
`},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.view.every = 2 * time.Second
			got := text(c.view.draw(&scope{}, start, []loader.Status{status}, h))
			if diff := cmp.Diff(strings.TrimPrefix(c.want, "\n"), got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}

	// Whatever the width, nothing is wider, and only bars and history shrink.
	for width := 60; width < 160; width++ {
		v := view{every: time.Second, width: width, blocks: true, header: true}
		for _, l := range v.draw(&scope{}, start, []loader.Status{status}, h) {
			if n := utf8.RuneCountInString(l.text); n > max(width, 97) {
				t.Fatalf("width %d: %d characters in %q", width, n, l.text)
			}
		}
	}
}

// Where no flows are known the bars are of packets, or of connections.
func TestDrawShares(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name   string
		change func(*loader.Status)
		want   string
	}{
		{"flows", func(*loader.Status) {}, "OF FLOWS"},
		{"none", func(s *loader.Status) { s.Affinity = loader.AffinityNone }, "OF PACKETS"},
		{"connections", func(s *loader.Status) { s.Key.Proto, s.Affinity = sockets.TCP, loader.AffinityNone }, "OF CONNS"},
		{"not counted", func(s *loader.Status) {
			s.Key.Proto, s.Affinity, s.Listeners[0].Connections = sockets.TCP, loader.AffinityNone, -1
		}, "OF PACKETS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status := example()
			c.change(&status)
			h := history{}
			h.add(at, []loader.Status{status})
			status.Listeners[0].Hit++
			status.Counters.Runs++
			h.add(at.Add(time.Second), []loader.Status{status})
			got := text(view{header: true}.draw(&scope{}, at, []loader.Status{status}, h))
			if !strings.Contains(got, c.want+"\n") || strings.Contains(got, "new/s") != (status.Affinity != loader.AffinityNone) {
				t.Errorf("want %q:\n%s", c.want, got)
			}
			if c.name == "none" && !strings.Contains(got, " 100 %  "+strings.Repeat("#", plainBar)+"\n") {
				t.Errorf("the listener with all packets has no whole bar:\n%s", got)
			}
		})
	}
}

func TestBar(t *testing.T) {
	for _, c := range []struct {
		share         float64
		blocks, ascii string
	}{
		{0, "", ""},
		{0.0001, "▏", "#"},
		{0.5, "████", "####"},
		{0.55, "████▍", "####"},
		{0.98, "███████▉", "########"},
		{1, "████████", "########"},
	} {
		if got := (view{blocks: true}).bar(c.share, 8); got != c.blocks {
			t.Errorf("%v: %q, want %q", c.share, got, c.blocks)
		}
		if got := (view{}).bar(c.share, 8); got != c.ascii {
			t.Errorf("%v: %q, want %q", c.share, got, c.ascii)
		}
	}
}

func TestSparkline(t *testing.T) {
	for _, c := range []struct {
		values        []float64
		blocks, ascii string
	}{
		{nil, "", ""},
		{[]float64{0, 0}, "▁▁", "__"},
		{[]float64{0, 0.001, 500, 1000}, "▁▂▅█", "_.=#"},
		{[]float64{7}, "█", "#"},
	} {
		if got := (view{blocks: true}).sparkline(c.values); got != c.blocks {
			t.Errorf("%v: %q, want %q", c.values, got, c.blocks)
		}
		if got := (view{}).sparkline(c.values); got != c.ascii {
			t.Errorf("%v: %q, want %q", c.values, got, c.ascii)
		}
	}
}

func TestFit(t *testing.T) {
	lines := func() []textLine { return []textLine{{"äbcd", bold}, {"ef", ordinary}, {"gh", red}} }
	for _, c := range []struct {
		width, height int
		want          string
	}{
		{10, 3, "[1]äbcd\nef\n[31]gh\n"},
		{2, 5, "[1]äb\nef\n[31]gh\n"},
		{80, 2, "[1]äbcd\n[2]... 2 more lines in a higher window\n"},
		{5, 1, "[2]... 3\n"},
	} {
		if got := text(fit(lines(), c.width, c.height)); got != c.want {
			t.Errorf("%d by %d: %q, want %q", c.width, c.height, got, c.want)
		}
	}
}

// A group that went and came back begins anew, and so do counters that are lower than
// they were; a listener that came since the last look is known at once.
func TestHistory(t *testing.T) {
	at := time.Now()
	status := loader.Status{Key: loader.Key{Proto: loader.UDP, Addr: netip.MustParseAddrPort("0.0.0.0:1194")}}
	h := history{}
	look := func(runs uint64, listeners ...loader.Listener) *past {
		at = at.Add(10 * time.Second)
		status.Counters.Runs, status.Listeners = runs, listeners
		h.add(at, []loader.Status{status})
		return h[status.Key]
	}
	look(1000, loader.Listener{Cookie: 1, Hit: 1000})
	p := look(1500, loader.Listener{Cookie: 1, Hit: 1200}, loader.Listener{Cookie: 2, Hit: 300})
	if want := map[uint64]float64{1: 20, 2: 30}; !cmp.Equal(p.speed, want) || !cmp.Equal(p.packetsEach, []float64{50}) {
		t.Errorf("%v, %v, want %v and 50", p.speed, p.packetsEach, want)
	}
	if p = look(100); !cmp.Equal(p.packetsEach, []float64{50, 10}) || len(p.speed) != 0 {
		t.Errorf("counters began anew: %v, %v, want 50 and 10", p.packetsEach, p.speed)
	}
	h.add(at, nil)
	if p = look(200); len(h) != 1 || len(p.packetsEach) != 0 {
		t.Errorf("the group went and came back: %v of %d groups, want none of one", p.packetsEach, len(h))
	}
	for range longestHistory + 5 {
		p = look(200)
	}
	if len(p.packetsEach) != longestHistory {
		t.Errorf("%d looks are kept, want %d", len(p.packetsEach), longestHistory)
	}
}

func TestSpeaksUTF8(t *testing.T) {
	for _, c := range []struct {
		all, ctype, lang string
		want             bool
	}{
		{"", "", "", true},
		{"", "", "C", false},
		{"", "", "C.UTF-8", true},
		{"", "de_DE.utf8", "C", true},
		{"POSIX", "de_DE.utf8", "C.UTF-8", false},
		{"", "", "de_DE@euro", false},
	} {
		of := map[string]string{"LC_ALL": c.all, "LC_CTYPE": c.ctype, "LANG": c.lang}
		if got := speaksUTF8(func(name string) string { return of[name] }); got != c.want {
			t.Errorf("%v: %v, want %v", of, got, c.want)
		}
	}
}
