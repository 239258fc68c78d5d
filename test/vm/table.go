package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// summary is for people who wait for it.
func summary(w io.Writer, results []*result) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "KERNEL\tLINUX\tPASSED\tFAILED\tSKIPPED\tTIME\tRESULT\t")
	for _, r := range results {
		passed, failed, skipped := r.sum()
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%v\t%s\t\n",
			r.name, r.booted, passed, failed, skipped, r.took.Round(time.Second), r.word())
	}
	t.Flush()
}

func (r *result) word() string {
	if r.ok() {
		return "ok"
	}
	return "FAILED"
}

// document is a page of docs/, and a file beside it that has what the page says.
type document struct {
	path, kept string
	columns    []column
}

// column is what a page has of a kernel.
type column struct {
	Kernel, Linux, Debian string
	Emulated              bool
	Packages              map[string]ran
	Verified              map[string]string // program to instructions
}

// ran is what came out of the tests of a package when they were run last.
type ran struct {
	occasion
	Few                              bool // they were not all of its tests
	Seconds, Passed, Failed, Skipped int
	Failures                         []string `json:",omitempty"`
}

// occasion is when, of what and where tests were run. What a page says of tests run before
// it was kept has neither Commit nor Host.
type occasion struct {
	Day    string
	Commit string `json:",omitempty"` // the last that changed more than these pages; with + if the tree was changed since
	Host   string `json:",omitempty"` // the version of QEMU, and the processor under it
}

func newOccasion(ctx context.Context, on arch) occasion {
	// A tree without git, or another user's, has nothing to tell.
	git := func(args ...string) string {
		said, _ := command(ctx, nil, "git", append(args, "--", ".", ":!docs/kernels-*")...)
		return strings.TrimSpace(said)
	}
	o := occasion{Day: time.Now().Format(time.DateOnly), Commit: cmp.Or(git("log", "-1", "--format=%h"), "unknown"), Host: "QEMU"}
	if git("status", "--porcelain") != "" {
		o.Commit += "+"
	}
	if said, err := command(ctx, nil, on.qemu, "--version"); err == nil {
		if _, version, ok := strings.Cut(said, "version "); ok {
			o.Host += " " + strings.Fields(version + " ?")[0]
		}
	}
	cpu, _ := os.ReadFile("/proc/cpuinfo") // arm64's has no name for it
	if m := regexp.MustCompile(`(?m)^model name\s*: (.+)$`).FindSubmatch(cpu); m != nil {
		o.Host += " on " + string(m[1])
	}
	return o
}

func (r ran) plus(o ran) ran {
	r.Seconds, r.Passed, r.Failed, r.Skipped = r.Seconds+o.Seconds, r.Passed+o.Passed, r.Failed+o.Failed, r.Skipped+o.Skipped
	r.Failures = slices.Concat(r.Failures, o.Failures)
	return r
}

// column is what there is to say of the packages that were to be run.
func (r *result) column(p plan, when occasion) column {
	c := column{r.name, r.booted, r.suite, r.accel == "tcg", map[string]ran{}, map[string]string{}}
	// Who had a hand in what befell the machine is not known.
	befell, _, _ := strings.Cut(r.problem, "\n")
	add := func(name string, now ran, problems ...string) {
		now.occasion, now.Few = when, !r.old && p.tests[name] != ""
		for _, problem := range append(problems, befell) {
			if problem != "" {
				now.Failures = append(now.Failures, problem)
			}
		}
		if had, ok := c.Packages[name]; ok {
			now = had.plus(now)
		}
		c.Packages[name] = now
	}
	for _, o := range r.packages {
		add(o.name, ran{Seconds: int(o.took.Seconds()), Passed: o.passed, Failed: o.failed, Skipped: o.skipped, Failures: o.fails}, o.problem)
		for key, n := range o.noted {
			if program, ok := strings.CutPrefix(key, "verified/"); ok {
				c.Verified[program] = n
			}
		}
	}
	for _, name := range p.packages([]release{r.release}) {
		if _, ok := c.Packages[name]; !ok {
			add(name, ran{}, "it was not run")
		}
	}
	return c
}

// openDocument reads what a page says.
func openDocument(path string) (*document, error) {
	d := &document{path: path, kept: strings.TrimSuffix(path, ".md") + ".json"}
	text, err := os.ReadFile(d.kept)
	if errors.Is(err, os.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &d.columns); err != nil {
		return nil, fmt.Errorf("%s: %w: remove it, and run all kernels again", d.kept, err)
	}
	return d, nil
}

// add writes what came out of a kernel, beside what the page says of others and of the
// same kernel's other packages.
func (d *document) add(r *result, p plan, when occasion) error {
	now := r.column(p, when)
	i := slices.IndexFunc(d.columns, func(c column) bool { return c.Kernel == now.Kernel })
	switch {
	case i < 0:
		d.columns = append(d.columns, now)
	case p.whole, now.Linux != "" && d.columns[i].Linux != now.Linux, d.columns[i].Emulated != now.Emulated:
		d.columns[i] = now
	default:
		maps.Copy(d.columns[i].Packages, now.Packages)
		maps.Copy(d.columns[i].Verified, now.Verified)
	}
	place := func(c column) int {
		return slices.IndexFunc(releases, func(r release) bool { return r.name == c.Kernel })
	}
	slices.SortFunc(d.columns, func(a, b column) int { return place(a) - place(b) })
	text, err := json.MarshalIndent(d.columns, "", "\t")
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(d.kept, append(text, '\n'), 0o644),
		os.WriteFile(d.path, []byte(page(r.arch, d.columns)), 0o644))
}

// page is for people who want to know.
func page(on arch, columns []column) string {
	var s strings.Builder
	fmt.Fprintf(&s, `# Kernels, %s

Written by %[2]smake vm%[2]s: the tests of this repository under kernels of Debian's, in machines with two processors and
2 GiB, with a static init and nothing else; of each package the last run, of all its tests or (ci) of those few that CI runs. A test that
fails or cannot run there, a panic, a hang and a complaint of the kernel's make the result FAILED. Emulated processors run short
tests: as many, of which some have fewer cases (each mark at which commands are killed once, instead of in every command that comes
to it; capabilities as one user, instead of two; addresses of two kinds, instead of five; fewer listeners; twenty shells with two
commands each, instead of five; a flood of a tenth). An arm64 machine that is emulated on x86 has x86's order of loads and stores,
not its own weaker one.

`, on.name, "`")
	row := func(first string, cell func(column) string) {
		fmt.Fprintf(&s, "| %s |", first)
		for _, c := range columns {
			fmt.Fprintf(&s, " %s |", cell(c))
		}
		s.WriteString("\n")
	}
	table := func(what string) {
		row(what, func(c column) string { return c.Kernel })
		fmt.Fprintf(&s, "%s|\n", strings.Repeat("|---", 1+len(columns)))
	}
	sum := func(c column) (all ran) {
		for _, r := range c.Packages {
			all = all.plus(r)
		}
		return all
	}

	table("kernel")
	row("Linux", func(c column) string { return c.Linux })
	row("Debian", func(c column) string { return c.Debian })
	row("processor", func(c column) string {
		if c.Emulated {
			return "emulated"
		}
		return "KVM"
	})
	every := func(of func(ran) string) func(column) string {
		return func(c column) string {
			var all []string
			for _, r := range c.Packages {
				all = append(all, cmp.Or(of(r), "not kept"))
			}
			slices.Sort(all)
			return strings.Join(slices.Compact(all), ", ")
		}
	}
	row("run on", every(func(r ran) string { return r.Day }))
	row("by", every(func(r ran) string { return r.Host }))
	row("of commit", every(func(r ran) string { return r.Commit }))
	row("for", func(c column) string { return (time.Duration(sum(c).Seconds) * time.Second).String() })
	row("passed, failed, skipped", func(c column) string {
		all := sum(c)
		return fmt.Sprintf("%d, %d, %d", all.Passed, all.Failed, all.Skipped)
	})
	row("result", func(c column) string {
		if sum(c).Failures != nil {
			return "FAILED"
		}
		return "ok"
	})

	s.WriteString("\nTests that passed, by package:\n\n")
	table("package")
	for _, pkg := range names(columns, func(c column) iter.Seq[string] { return maps.Keys(c.Packages) }) {
		row("`"+pkg+"`", func(c column) string {
			r, ok := c.Packages[pkg]
			if !ok {
				return "–"
			}
			all := fmt.Sprintf("%d of %d", r.Passed, r.Passed+r.Failed+r.Skipped)
			if r.Few {
				all += ", ci"
			}
			return all
		})
	}

	s.WriteString("\nInstructions that the verifier looks at (1 000 000 is its limit):\n\n")
	table("program")
	for _, program := range names(columns, func(c column) iter.Seq[string] { return maps.Keys(c.Verified) }) {
		row(program, func(c column) string {
			if n, ok := c.Verified[program]; ok {
				return n
			}
			return "–"
		})
	}

	s.WriteString("\nFailed:\n\n")
	failed := false
	for _, c := range columns {
		for _, pkg := range slices.Sorted(maps.Keys(c.Packages)) {
			if failures := c.Packages[pkg].Failures; failures != nil {
				fmt.Fprintf(&s, "- %s, %q: %s\n", c.Kernel, pkg, strings.Join(failures, "; "))
				failed = true
			}
		}
	}
	if !failed {
		s.WriteString("- nothing\n")
	}

	s.WriteString("\nLeft out:\n\n")
	for _, l := range leftOut {
		what := "`" + l.pkg + "`"
		if l.test != "" {
			what += " " + l.test
		}
		fmt.Fprintf(&s, "- %s: %s\n", what, l.why)
	}
	s.WriteString("\nLinux 5.10 is too old. What is tested there is that each command ends with exit code 5, names Linux 5.14 as what it\n" +
		"needs, and leaves nothing behind (`cmd/rpsel` TestOldKernel, which is skipped under the others).\n")
	return s.String()
}

// names are all that columns have of something, sorted.
func names(columns []column, of func(column) iter.Seq[string]) (all []string) {
	for _, c := range columns {
		all = slices.AppendSeq(all, of(c))
	}
	slices.Sort(all)
	return slices.Compact(all)
}
