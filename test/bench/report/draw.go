package main

import (
	"fmt"
	"image/color"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// picture is a plot of what runs of programs take.
type picture struct {
	file, title, x string
	benchmark      string
	lines          []line
}

// line is one of them: the metric is the prefix, a number on the x axis and "/ns".
// Without a number it is the same everywhere.
type line struct {
	name, prefix string
	color        color.Color
}

// The same thing has the same colour in all pictures.
var (
	blue   = color.RGBA{0x00, 0x72, 0xb2, 0xff} // rpsel
	orange = color.RGBA{0xd5, 0x5e, 0x00, 0xff} // LRU_HASH
	green  = color.RGBA{0x00, 0x9e, 0x73, 0xff}
	grey   = color.RGBA{0x80, 0x80, 0x80, 0xff} // the least there can be
)

var pictures = []picture{
	{"hit.svg", "A packet of a known flow", "flows in the table", flowCount, []line{
		{"LRU_HASH", "hit/lru/", orange}, {"rpsel", "hit/rpsel/", blue}, {"one access to memory", "access/", green}, {"selection by hash alone", "hash-only", grey},
	}},
	{"new.svg", "A packet for which a listener is picked", "flows in the table", flowCount, []line{
		{"new flow, rpsel", "new/rpsel/", blue}, {"new flow, LRU_HASH", "new/lru/", orange}, {"its listener is gone, rpsel", "rehome/rpsel/", green}, {"selection by hash alone", "hash-only", grey},
	}},
	{"cpus.svg", "A packet of a known flow, all CPUs at once", "flows in the table", flowCount, []line{
		{"LRU_HASH", "hit-on-all-cpus/lru/", orange}, {"rpsel", "hit-on-all-cpus/rpsel/", blue}, {"rpsel, one CPU", "hit/rpsel/", green},
	}},
	{"listeners.svg", "A group of many listeners, a thousand flows", "listeners", "Listeners", []line{
		{"new flow", "new/listeners/", green}, {"known flow", "hit/listeners/", blue}, {"selection by hash alone", "hash-only/listeners/", grey},
	}},
}

// draw draws what was measured.
func (r *results) draw(dir string) error {
	for _, p := range pictures {
		at := slices.IndexFunc(r.Benchmarks, func(b benchmark) bool { return b.Name == p.benchmark })
		if at < 0 {
			continue
		}
		if err := p.draw(filepath.Join(dir, p.file), r.Benchmarks[at].Metrics); err != nil {
			return fmt.Errorf("%s: %w", p.file, err)
		}
	}
	return nil
}

func (p picture) draw(file string, metrics map[string]float64) error {
	canvas := plot.New()
	canvas.Title.Text = p.title
	canvas.X.Label.Text, canvas.Y.Label.Text = p.x, "ns, net of an empty program"
	canvas.X.Scale = plot.LogScale{}
	canvas.Y.Min = 0
	canvas.Legend.Top, canvas.Legend.Left = true, true
	var ticks []plot.Tick
	for _, point := range pointsOf(p.lines[0].prefix, metrics) {
		ticks = append(ticks, plot.Tick{Value: point.X, Label: short(point.X)})
	}
	if len(ticks) < 2 {
		return nil // a dot is no picture
	}
	for _, l := range p.lines {
		points := pointsOf(l.prefix, metrics)
		if len(points) == 0 {
			for _, t := range ticks {
				points = append(points, plotter.XY{X: t.Value, Y: metrics[l.prefix+"/ns"]})
			}
		}
		drawn, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		drawn.Color, dots.Color = l.color, l.color
		drawn.Width = vg.Points(1.5)
		canvas.Add(drawn, dots)
		canvas.Legend.Add(l.name, drawn)
		for _, point := range points {
			canvas.Y.Max = max(canvas.Y.Max, point.Y*1.25) // room for the legend
		}
	}
	canvas.Add(plotter.NewGrid())
	canvas.X.Tick.Marker = plot.ConstantTicks(ticks)
	return canvas.Save(6*vg.Inch, 4*vg.Inch, file)
}

// pointsOf are the metrics that begin so, by their number.
func pointsOf(prefix string, metrics map[string]float64) (points plotter.XYs) {
	for name, value := range metrics {
		number, ok := strings.CutPrefix(name, prefix)
		if !ok {
			continue
		}
		if number, ok = strings.CutSuffix(number, "/ns"); !ok {
			continue
		}
		if x, err := strconv.ParseFloat(number, 64); err == nil {
			points = append(points, plotter.XY{X: x, Y: value})
		}
	}
	slices.SortFunc(points, func(a, b plotter.XY) int { return int(a.X - b.X) })
	return points
}

// short writes a number as people do.
func short(n float64) string {
	switch {
	case n >= 1e6:
		return fmt.Sprintf("%g million", n/1e6)
	case n >= 1e4:
		return fmt.Sprintf("%g thousand", n/1e3)
	default:
		return fmt.Sprintf("%g", n)
	}
}
