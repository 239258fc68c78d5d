package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// textLine is one of a screen.
type textLine struct {
	text   string
	colour colour
}

type colour string // parameters of SGR (ECMA-48 8.3.117)

const (
	ordinary colour = ""
	bold     colour = "1"
	dim      colour = "2"
	red      colour = "31"
	yellow   colour = "33"
)

// view is how "status --watch" is drawn.
type view struct {
	every  time.Duration
	width  int // of the terminal; 0: as wide as it gets
	header bool
	blocks bool // bars of block elements (U+2581 to U+258F), else of ASCII
}

const (
	shortestBar, longestBar = 6, 40 // narrower is none
	plainBar, plainHistory  = 20, 40
)

// draw draws the groups, each with a bar per listener and its short history.
func (v view) draw(s *scope, at time.Time, list []loader.Status, h history) []textLine {
	head := at.Format(time.DateTime)
	if v.width > 0 {
		head += fmt.Sprintf("  every %v, Ctrl-C ends", v.every)
	}
	lines := []textLine{{head, dim}}
	if len(list) == 0 {
		what := s.String()
		if what != "" {
			what += ": "
		}
		return append(lines, textLine{what + "nothing is attached", ordinary})
	}
	for i, status := range list {
		if i > 0 {
			lines = append(lines, textLine{})
		}
		lines = append(lines, textLine{s.title(status), bold})
		lines = append(lines, v.listeners(status, h[status.Key])...)
		lines = append(lines, v.past(status, h[status.Key])...)
	}
	return lines
}

// listeners draws the table of a group's listeners.
func (v view) listeners(status loader.Status, p *past) []textLine {
	t := statusTable(status, "PACKETS/S", func(l loader.Listener) string {
		speed, known := p.speed[l.Cookie]
		if !known {
			return "-"
		}
		return rate(speed)
	})
	shared, of := shares(status, p)
	var total float64
	for _, n := range shared {
		total += n
	}
	t.columns = append(t.columns, column{"SHARE", true}, column{of, false})
	for i := range t.rows {
		cell := "-"
		if i < len(shared) && total > 0 {
			cell = fmt.Sprintf("%.0f %%", 100*shared[i]/total)
		}
		t.rows[i] = append(t.rows[i], cell, "")
	}
	length := plainBar
	if v.width > 0 {
		length = min(longestBar, v.width-widest(t)-utf8.RuneCountInString("  "))
	}
	if length >= shortestBar && total > 0 {
		for i, n := range shared {
			t.rows[i][len(t.columns)-1] = v.bar(n/total, length)
		}
	}
	lines := v.table(t)
	first := len(lines) - len(t.rows)
	for i, l := range status.Listeners {
		switch l.State {
		case "dead":
			lines[first+i].colour = red
		case "draining":
			lines[first+i].colour = yellow
		}
	}
	for i := range status.Unregistered {
		lines[first+len(status.Listeners)+i].colour = yellow
	}
	return lines
}

// shares is what the bars show, of each listener, and its name.
func shares(status loader.Status, p *past) (each []float64, of string) {
	value := func(l loader.Listener) float64 { return p.speed[l.Cookie] }
	of = "OF PACKETS"
	switch {
	case status.Key.Proto == sockets.TCP && !slices.ContainsFunc(status.Listeners, func(l loader.Listener) bool { return l.Connections < 0 }):
		value, of = func(l loader.Listener) float64 { return float64(l.Connections) }, "OF CONNS"
	case status.Affinity != loader.AffinityNone:
		value, of = func(l loader.Listener) float64 { return float64(l.Flows) }, "OF FLOWS"
	}
	for _, l := range status.Listeners {
		each = append(each, value(l))
	}
	return each, of
}

// past draws how fast packets and new flows came, look by look.
func (v view) past(status loader.Status, p *past) []textLine {
	if len(p.packetsEach) == 0 {
		return nil
	}
	t := table{indent: "  ", columns: []column{{"HISTORY", false}, {"NOW", true}, {"MAX", true}, {"", false}}}
	row := func(name string, values []float64) {
		t.add(name, rate(values[len(values)-1]), rate(slices.Max(values)), "")
	}
	rows := []struct {
		name   string
		values []float64
	}{{"packets/s", p.packetsEach}, {"new/s", p.newEach}}
	if status.Affinity == loader.AffinityNone {
		rows = rows[:1] // no flow is known
	}
	for _, r := range rows {
		row(r.name, r.values)
	}
	length := plainHistory
	if v.width > 0 {
		length = max(v.width-widest(t)-utf8.RuneCountInString("  "), 0)
	}
	length = min(length, len(p.packetsEach))
	for i, r := range rows {
		shown := r.values[len(r.values)-length:]
		t.rows[i][3] = v.sparkline(shown)
		if length > 0 {
			t.rows[i][2] = rate(slices.Max(shown))
		}
	}
	t.columns[3].title = "LAST " + (time.Duration(length) * v.every).String()
	return v.table(t)
}

// table draws a table; its rows are the last lines.
func (v view) table(t table) (lines []textLine) {
	var text strings.Builder
	_ = t.write(&text, v.header) // a Builder returns no error
	for each := range strings.Lines(text.String()) {
		lines = append(lines, textLine{text: strings.TrimSuffix(each, "\n")})
	}
	if v.header {
		lines[0].colour = dim
	}
	return lines
}

// widest is how long the longest line of a table is.
func widest(t table) (width int) {
	var text strings.Builder
	_ = t.write(&text, true)
	for each := range strings.Lines(text.String()) {
		width = max(width, utf8.RuneCountInString(each)-1)
	}
	return width
}

// bar draws a share of a whole that is so long. None but a share of nothing has no bar.
func (v view) bar(share float64, length int) string {
	if !v.blocks {
		n := int(share*float64(length) + 0.5)
		if n == 0 && share > 0 {
			n = 1
		}
		return strings.Repeat("#", n)
	}
	eighths := int(share*float64(length)*8 + 0.5)
	if eighths == 0 && share > 0 {
		eighths = 1
	}
	text := strings.Repeat("█", eighths/8)
	if rest := eighths % 8; rest > 0 {
		text += string(rune('█' + 8 - rest)) // U+2588 is full, U+258F an eighth
	}
	return text
}

// sparkline draws a character for each value, the greatest as high as it gets. Only
// zero is as low as that.
func (v view) sparkline(values []float64) string {
	levels := []rune("_.-:=+*#")
	if v.blocks {
		levels = []rune("▁▂▃▄▅▆▇█")
	}
	var text strings.Builder
	top := 0.0
	if len(values) > 0 {
		top = slices.Max(values)
	}
	for _, value := range values {
		level := 0
		if value > 0 {
			level = 1 + int(value/top*float64(len(levels)-2)+0.5)
		}
		text.WriteRune(levels[level])
	}
	return text.String()
}

// notesOf draws what should not be overlooked.
func notesOf(notes []string) (lines []textLine) {
	if len(notes) > 0 {
		lines = append(lines, textLine{})
	}
	for _, note := range notes {
		lines = append(lines, textLine{note, yellow})
	}
	return lines
}

// fit cuts lines to a screen, and says if there are more of them.
func fit(lines []textLine, width, height int) []textLine {
	if len(lines) > height {
		more := len(lines) - height + 1
		lines = append(slices.Clone(lines[:height-1]), textLine{"... " + strconv.Itoa(more) + " more lines in a higher window", dim})
	}
	for i, l := range lines {
		if shown := []rune(l.text); len(shown) > width {
			lines[i].text = string(shown[:width])
		}
	}
	return lines
}
