package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
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

// column is what the documents have of a kernel: what came out of its last run.
type column struct {
	Kernel, Linux, Debian, Day, Set string
	Seconds                         int
	Emulated                        bool
	Packages                        map[string]counts
	Verified                        map[string]string // program to instructions
	Failed                          []string
}

// counts are of tests.
type counts struct{ Passed, Failed, Skipped int }

func (c counts) plus(o counts) counts {
	return counts{c.Passed + o.Passed, c.Failed + o.Failed, c.Skipped + o.Skipped}
}

func (r *result) column(set string, day time.Time) column {
	c := column{
		Kernel: r.name, Linux: r.booted, Debian: r.suite, Day: day.Format(time.DateOnly), Set: set,
		Seconds: int(r.took.Seconds()), Emulated: r.accel == "tcg",
		Packages: map[string]counts{}, Verified: map[string]string{},
	}
	for _, o := range r.packages {
		c.Packages[o.name] = c.Packages[o.name].plus(counts{o.passed, o.failed, o.skipped})
		for key, n := range o.noted {
			if program, ok := strings.CutPrefix(key, "verified/"); ok {
				c.Verified[program] = n
			}
		}
		if !o.ok() {
			c.Failed = append(c.Failed, fmt.Sprintf("%q: %s", o.name, strings.TrimSpace(strings.Join(o.fails, ", ")+" "+o.problem)))
		}
	}
	if r.problem != "" {
		first, _, _ := strings.Cut(r.problem, "\n")
		c.Failed = append(c.Failed, first)
	}
	return c
}

// document writes what came out to a page of docs/, beside what it says of other
// kernels. What it says is kept in a file beside it.
func document(path string, on arch, results []*result, set string, day time.Time) error {
	kept := strings.TrimSuffix(path, ".md") + ".json"
	var had, columns []column
	text, err := os.ReadFile(kept)
	if err == nil {
		err = json.Unmarshal(text, &had)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w: remove it, and run all kernels again", kept, err)
	}
	for _, r := range results {
		had = slices.DeleteFunc(had, func(c column) bool { return c.Kernel == r.name })
		had = append(had, r.column(set, day))
	}
	for _, r := range releases { // in their order
		if i := slices.IndexFunc(had, func(c column) bool { return c.Kernel == r.name }); i >= 0 {
			columns = append(columns, had[i])
		}
	}
	if text, err = json.MarshalIndent(columns, "", "\t"); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(kept, append(text, '\n'), 0o644),
		os.WriteFile(path, []byte(page(on, columns)), 0o644))
}

// page is for people who want to know.
func page(on arch, columns []column) string {
	var s strings.Builder
	fmt.Fprintf(&s, `# Kernels, %s

Written by %[2]smake vm%[2]s: the tests of this repository under kernels of Debian's, in machines with two processors and
2 GiB, with a static init and nothing else; of each kernel the last run, of all tests or of the set "ci". A test that fails or cannot
run there, a panic, a hang and a complaint of the kernel's make the result FAILED. Emulated processors run short tests: as many, of
which some have fewer cases (each mark at which commands are killed once, instead of in every command that comes to it; capabilities
as one user, instead of two; addresses of two kinds, instead of five; fewer listeners, and a flood of a tenth). An arm64 machine that is
emulated on x86 has x86's order of loads and stores, not its own weaker one.

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

	table("kernel")
	row("Linux", func(c column) string { return c.Linux })
	row("Debian", func(c column) string { return c.Debian })
	row("day", func(c column) string { return c.Day })
	row("tests", func(c column) string { return c.Set })
	row("processor", func(c column) string {
		if c.Emulated {
			return "emulated"
		}
		return "KVM"
	})
	row("time", func(c column) string { return (time.Duration(c.Seconds) * time.Second).String() })
	row("passed, failed, skipped", func(c column) string {
		var all counts
		for _, n := range c.Packages {
			all = all.plus(n)
		}
		return fmt.Sprintf("%d, %d, %d", all.Passed, all.Failed, all.Skipped)
	})
	row("result", func(c column) string {
		if c.Failed != nil {
			return "FAILED"
		}
		return "ok"
	})

	s.WriteString("\nTests that passed, by package:\n\n")
	table("package")
	for _, pkg := range names(columns, func(c column) iter.Seq[string] { return maps.Keys(c.Packages) }) {
		row("`"+pkg+"`", func(c column) string {
			n, ok := c.Packages[pkg]
			if !ok {
				return "–"
			}
			return fmt.Sprintf("%d of %d", n.Passed, n.Passed+n.Failed+n.Skipped)
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
		for _, what := range c.Failed {
			fmt.Fprintf(&s, "- %s, %s\n", c.Kernel, what)
			failed = true
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
		"needs, and leaves nothing behind (`cmd/rpsel` TestOldKernel).\n")
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
