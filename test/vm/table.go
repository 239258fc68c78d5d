package main

import (
	"fmt"
	"io"
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
	fmt.Fprintln(t, "KERNEL\tLINUX\tPACKAGES\tPASSED\tFAILED\tSKIPPED\tTIME\tRESULT\t")
	for _, r := range results {
		passed, failed, skipped := r.sum()
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%d\t%v\t%s\t\n",
			r.name, r.booted, len(r.names()), passed, failed, skipped, r.took.Round(time.Second), r.word())
	}
	t.Flush()
}

// names are those of the packages.
func (r *result) names() (names []string) {
	for _, o := range r.packages {
		names = append(names, o.name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (r *result) word() string {
	if r.ok() {
		return "ok"
	}
	return "FAILED"
}

// document writes what came out as a page of docs/.
func document(path string, on arch, results []*result, p plan, day time.Time) error {
	var s strings.Builder
	fmt.Fprintf(&s, `# Kernels, %s

Written by %smake vm%s on %s: the tests of this repository (set "%s") under kernels of Debian's, in machines with two
processors and 2 GiB, with a static init and nothing else. A test that fails or cannot run there, a panic, a hang and a complaint of
the kernel's make the result FAILED. Emulated processors run short tests: as many, of which some have fewer cases
(each mark at which commands are killed once, instead of in every command that comes to it; capabilities as one user, instead of two;
addresses of two kinds, instead of five; fewer listeners, and a flood of a tenth). An arm64 machine that is emulated on x86 has
x86's order of loads and stores, not its own weaker one.

`, on.name, "`", "`", day.Format(time.DateOnly), p.set)
	row := func(cells ...string) { fmt.Fprintf(&s, "| %s |\n", strings.Join(cells, " | ")) }
	rule := func(columns int) { fmt.Fprintf(&s, "%s|\n", strings.Repeat("|---", columns)) }

	row("kernel", "Linux", "Debian", "passed", "failed", "skipped", "time", "processor", "result")
	rule(9)
	for _, r := range results {
		passed, failed, skipped := r.sum()
		row(r.name, r.booted, r.suite, fmt.Sprint(passed), fmt.Sprint(failed), fmt.Sprint(skipped),
			r.took.Round(time.Second).String(), map[string]string{"kvm": "KVM", "tcg": "emulated"}[r.accel], r.word())
	}

	s.WriteString("\nTests that passed, by package:\n\n")
	columns := []string{"package"}
	for _, r := range results {
		columns = append(columns, r.name)
	}
	row(columns...)
	rule(len(columns))
	for _, pkg := range keys(results, (*result).names) {
		cells := []string{"`" + pkg + "`"}
		for _, r := range results {
			cell, passed, all := "–", 0, 0
			for _, o := range r.packages {
				if o.name == pkg {
					passed, all = passed+o.passed, all+o.passed+o.failed+o.skipped
					cell = fmt.Sprintf("%d of %d", passed, all)
				}
			}
			cells = append(cells, cell)
		}
		row(cells...)
	}

	s.WriteString("\nInstructions that the verifier looks at (1 000 000 is its limit):\n\n")
	columns[0] = "program"
	row(columns...)
	rule(len(columns))
	for _, key := range keys(results, func(r *result) (names []string) {
		for _, o := range r.packages {
			names = slices.AppendSeq(names, maps.Keys(o.noted))
		}
		return names
	}) {
		program, ok := strings.CutPrefix(key, "verified/")
		if !ok {
			continue
		}
		cells := []string{program}
		for _, r := range results {
			cell := "–"
			for _, o := range r.packages {
				if n, ok := o.noted[key]; ok {
					cell = n
				}
			}
			cells = append(cells, cell)
		}
		row(cells...)
	}

	s.WriteString("\nFailed:\n\n")
	for _, r := range results {
		for _, o := range r.packages {
			if !o.ok() {
				fmt.Fprintf(&s, "- %s, %q: %s\n", r.name, o.name, strings.TrimSpace(strings.Join(o.fails, ", ")+" "+o.problem))
			}
		}
		if r.problem != "" {
			first, _, _ := strings.Cut(r.problem, "\n")
			fmt.Fprintf(&s, "- %s: %s\n", r.name, first)
		}
	}
	if !slices.ContainsFunc(results, func(r *result) bool { return !r.ok() }) {
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
	return os.WriteFile(path, []byte(s.String()), 0o644)
}

// keys are all names that results have, sorted.
func keys(results []*result, of func(*result) []string) (all []string) {
	for _, r := range results {
		all = append(all, of(r)...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}
