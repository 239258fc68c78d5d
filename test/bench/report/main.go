// Command report makes of what the benchmarks print, which it reads from standard
// input, a table on standard output, and in a directory results.json and pictures.
// The table of targets goes into a page, between two marks.
//
//	go test ./test/bench -run ^$ -bench . | go run ./test/bench/report docs/bench docs/performance.md
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: report DIRECTORY PAGE < what the benchmarks print")
		os.Exit(2)
	}
	if err := run(os.Stdin, os.Stdout, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

// results is what results.json holds.
type results struct {
	Schema     int         `json:"schema"`
	Machine    machine     `json:"machine"`
	Benchmarks []benchmark `json:"benchmarks"`
}

// machine is where the benchmarks ran.
type machine struct {
	Date   string  `json:"date"`
	Kernel string  `json:"kernel"`
	CPU    string  `json:"cpu"`
	CPUs   int     `json:"cpus"`
	Memory int     `json:"memory_mib"`
	Load   float64 `json:"load_average"` // over the last five minutes
	Go     string  `json:"go"`
}

// benchmark is one line that a benchmark printed.
type benchmark struct {
	Name    string             `json:"name"`
	Rounds  int                `json:"rounds"`
	Metrics map[string]float64 `json:"metrics"` // by name and unit
}

func run(in io.Reader, out io.Writer, dir, page string) error {
	r := results{Schema: 1, Machine: here()}
	if err := r.read(in, os.Stderr); err != nil {
		return err
	}
	if len(r.Benchmarks) == 0 {
		return fmt.Errorf("the benchmarks printed no result")
	}
	if err := r.print(out); err != nil {
		return err
	}
	written, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.json"), append(written, '\n'), 0o644); err != nil {
		return err
	}
	if err := r.draw(dir); err != nil {
		return err
	}
	return r.writeTargets(page)
}

func here() machine {
	m := machine{Date: time.Now().UTC().Format(time.DateOnly), CPUs: runtime.NumCPU(), Go: runtime.Version()}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = strings.TrimSpace(unix.ByteSliceToString(name.Release[:]) + " " + unix.ByteSliceToString(name.Machine[:]))
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.Memory = int(info.Totalram * uint64(info.Unit) >> 20)
		m.Load = float64(int(float64(info.Loads[1])/(1<<16)*10)) / 10
	}
	return m
}

// read takes the results out of the output of go test. A line that says that
// something failed is an error; what is none of the two is passed on.
func (r *results) read(in io.Reader, rest io.Writer) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if cpu, ok := strings.CutPrefix(line, "cpu: "); ok {
			r.Machine.CPU = cpu
			continue
		}
		if strings.HasPrefix(line, "--- FAIL") || strings.HasPrefix(line, "FAIL") {
			return fmt.Errorf("a benchmark failed: %s", line)
		}
		b, ok := parse(line)
		if !ok {
			fmt.Fprintln(rest, line)
			continue
		}
		fmt.Fprintln(rest, b.Name, "done")
		r.Benchmarks = append(r.Benchmarks, b)
	}
	return lines.Err()
}

// parse reads a line as "BenchmarkName-2  300  12.5 ns/op  3 other-unit".
func parse(line string) (b benchmark, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 4 || len(fields)%2 != 0 || !strings.HasPrefix(fields[0], "Benchmark") {
		return b, false
	}
	b = benchmark{Name: strings.TrimPrefix(fields[0], "Benchmark"), Metrics: map[string]float64{}}
	if at := strings.LastIndexByte(b.Name, '-'); at > 0 {
		b.Name = b.Name[:at] // the number of CPUs
	}
	var err error
	if b.Rounds, err = strconv.Atoi(fields[1]); err != nil {
		return b, false
	}
	for i := 2; i < len(fields); i += 2 {
		value, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return b, false
		}
		b.Metrics[fields[i+1]] = value
	}
	return b, true
}

// of is a metric of a benchmark, and whether it was measured.
func (r *results) of(name, metric string) (float64, bool) {
	for _, b := range r.Benchmarks {
		if b.Name == name {
			value, ok := b.Metrics[metric]
			return value, ok
		}
	}
	return 0, false
}

// print prints a row for each thing measured, what runs of a program took with
// their median, and how often the selection by hash alone would fit into it.
func (r *results) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "BENCHMARK\tWHAT\tLEAST\tMEDIAN\tHASH-ONLY")
	for _, b := range r.Benchmarks {
		names := make([]string, 0, len(b.Metrics))
		for name := range b.Metrics {
			if !strings.HasSuffix(name, "/median-ns") {
				names = append(names, name)
			}
		}
		slices.SortFunc(names, natural)
		for _, name := range names {
			what, isRun := strings.CutSuffix(name, "/ns")
			if !isRun {
				fmt.Fprintf(w, "%s\t%s\t%.4g\t\t\n", b.Name, name, b.Metrics[name])
				continue
			}
			times := ""
			_, like, _ := strings.Cut(name, "/") // of as many listeners
			if hash := cmp.Or(b.Metrics["hash-only/"+like], b.Metrics["hash-only/ns"]); hash > 0 && what != "empty" && !strings.HasPrefix(what, "access/") {
				times = fmt.Sprintf("%.1fx", b.Metrics[name]/hash)
			}
			fmt.Fprintf(w, "%s\t%s\t%.0f ns\t%.0f ns\t%s\n", b.Name, what, b.Metrics[name], b.Metrics[what+"/median-ns"], times)
		}
	}
	return w.Flush()
}

// natural orders names whose parts may be numbers.
func natural(a, b string) int {
	x, y := strings.Split(a, "/"), strings.Split(b, "/")
	for i := range min(len(x), len(y)) {
		n, notA := strconv.Atoi(x[i])
		m, notB := strconv.Atoi(y[i])
		order := cmp.Compare(n, m)
		if notA != nil || notB != nil {
			order = cmp.Compare(x[i], y[i])
		}
		if order != 0 {
			return order
		}
	}
	return cmp.Compare(len(x), len(y))
}

const (
	beginMark = "<!-- begin: make bench writes this -->\n"
	endMark   = "<!-- end -->\n"
)

// writeTargets puts the targets, and where they were measured, into the page.
func (r *results) writeTargets(page string) error {
	text, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(text, []byte(beginMark))
	_, after, end := bytes.Cut(rest, []byte(endMark))
	if !ok || !end {
		return fmt.Errorf("%s has not the marks between which the targets go", page)
	}
	m := r.Machine
	table := fmt.Sprintf("Measured on %s: Linux %s, %d CPUs (%s), %d MiB, at a load average of %.0f.\n\n%s\n", m.Date, m.Kernel, m.CPUs, m.CPU, m.Memory, m.Load, r.targets())
	return os.WriteFile(page, slices.Concat(before, []byte(beginMark+table+endMark), after), 0o644)
}
