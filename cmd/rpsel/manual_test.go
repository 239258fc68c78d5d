package main

import (
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/testnet"
)

// needProgram skips the test where a program is missing, or fails it in CI.
func needProgram(t testing.TB, name string) {
	t.Helper()
	_, err := exec.LookPath(name)
	if errors.Is(err, exec.ErrNotFound) {
		(&testnet.Unavailable{What: name, Err: err}).Skip(t)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The pages are as a reader of manuals expects them, and have all that the commands
// have.
func TestManual(t *testing.T) {
	needProgram(t, "mandoc")
	dir := t.TempDir()
	t.Setenv("SOURCE_DATE_EPOCH", "86400")
	if code := run([]string{"manual", dir}, &env{out: io.Discard, err: os.Stderr}); code != exitDone {
		t.Fatalf("exit code %d", code)
	}
	pages, err := filepath.Glob(dir + "/*")
	if err != nil {
		t.Fatal(err)
	}
	if said, err := exec.Command("mandoc", append([]string{"-T", "lint", "-W", "warning"}, pages...)...).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, said)
	}

	rendered := map[string]string{}
	for _, page := range pages {
		text, err := exec.Command("mandoc", "-T", "ascii", "-O", "width=200", page).Output()
		if err != nil {
			t.Fatal(err)
		}
		plain := regexp.MustCompile(`.\x08`).ReplaceAllString(string(text), "") // bold and underlined
		rendered[filepath.Base(page)] = plain
		if !strings.Contains(plain, "1970-01-02") {
			t.Errorf("%s: no date", page)
		}
	}
	has := func(page, pattern string) {
		t.Helper()
		if !regexp.MustCompile(pattern).MatchString(rendered[page]) {
			t.Errorf("%s: nothing matches %q", page, pattern)
		}
	}
	sections := regexp.MustCompile(`(?m)^[A-Z][A-Z ]+$`)

	root := newRootCmd(&env{})
	want := []string{"rpsel.8", "rpsel.toml.5"}
	for _, cmd := range root.Commands() {
		if cmd.Hidden || cmd.Name() == "help" {
			continue
		}
		page := "rpsel-" + cmd.Name() + ".8"
		want = append(want, page)
		has("rpsel.8", `(?m)^ +rpsel-`+cmd.Name()+`\(8\)$`)
		order := []string{"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "EXAMPLES", "SEE ALSO"}
		if cmd.Name() == "agent" {
			order = slices.Insert(order, 5, "ENVIRONMENT", "FILES")
		}
		if diff := cmp.Diff(order, sections.FindAllString(rendered[page], -1)); diff != "" {
			t.Errorf("%s: sections (-want +got):\n%s", page, diff)
		}
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) { has(page, `(?m)^ +(-\w, )?--`+f.Name+`( |\[=|$)`) })
		for line := range strings.Lines(cmd.Example) {
			has(page, `(?m)^ +`+regexp.QuoteMeta(strings.TrimSpace(line))+`$`)
		}
		for line := range strings.Lines(cmd.Long) {
			if strings.HasPrefix(line, "  ") {
				has(page, `(?m)^ +`+regexp.QuoteMeta(strings.TrimSpace(line))+`$`)
			}
		}
		for _, s := range exitStatuses {
			has(page, `(?m)^ +`+strconv.Itoa(s.code)+` `)
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(rendered))); diff != "" {
		t.Errorf("pages (-want +got):\n%s", diff)
	}
	has("rpsel-status.8", `(?m)^ +-w, --watch\[=INTERVAL\]$`)
	has("rpsel.toml.5", `(?m)^ +metrics = "`+regexp.QuoteMeta(config.DefaultMetrics)+`"$`)
	for _, key := range config.Keys() {
		has("rpsel.toml.5", `(?m)^ +`+key.Name+`( |$)`)
	}
	for _, s := range exitStatuses {
		if !strings.Contains(strings.Join(strings.Fields(root.Long), " "), strconv.Itoa(s.code)+" "+s.meaning) {
			t.Errorf("the help does not say what exit code %d is", s.code)
		}
	}
}

// Nothing of a text is a request to roff, and a paragraph stays one.
func TestManualText(t *testing.T) {
	p := &page{}
	p.text(".so it\n'is\\so\n\nthen -x\n  .literal\n  \\x\nmore")
	want := "\\&.so it 'is\\eso\n.PP\nthen \\-x\n.RS 4\n.EX\n\\&.literal\n\\ex\n.EE\n.RE\nmore\n"
	if diff := cmp.Diff(want, p.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
