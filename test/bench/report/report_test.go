package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const output = `goos: linux
cpu: A CPU
BenchmarkFlowCount-2   	      30	         0 ns/op	        40.0 hash-only/ns	        41.0 hash-only/median-ns	        90.0 hit/rpsel/1000/ns	       120.0 hit/rpsel/1000/median-ns	       200.0 hit/lru/1000/ns	       900.0 hit/lru/1000000/ns	       400.0 hit/rpsel/1000000/ns
BenchmarkFlows/list-2  	      30	       950 ms	       980 least-ms	      1200 processor-ms
PASS
`

func page(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(name, []byte("above\n"+beginMark+"old\n"+endMark+"below\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestReport(t *testing.T) {
	dir, page := t.TempDir(), page(t)
	var table bytes.Buffer
	if err := run(strings.NewReader(output), &table, dir, page); err != nil {
		t.Fatal(err)
	}
	if want := "hit/rpsel/1000     90 ns   120 ns  2.2x"; !strings.Contains(table.String(), want) {
		t.Errorf("the table has no %q:\n%s", want, &table)
	}
	var r results
	written, err := os.ReadFile(filepath.Join(dir, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(written, &r); err != nil {
		t.Fatal(err)
	}
	if got, ok := r.of("Flows/list", "ms"); !ok || got != 950 {
		t.Errorf("results.json has %v, %t for 950 ms", got, ok)
	}
	if _, err := os.Stat(filepath.Join(dir, "hit.svg")); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"above\n", "\nbelow\n", "A CPU", "| hit, 1 thousand flows | 2.5x hash-only | 90 ns, 2.2x | yes |", "| list 1 million flows | 1 s | 980 ms; processor time 1200 | yes |", "| count 1 million flows | 50 ms | - | not measured |"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the page has no %q:\n%s", want, text)
		}
	}
	if strings.Contains(string(text), "old") {
		t.Error("what stood between the marks is still there")
	}
}

func TestFailed(t *testing.T) {
	for _, in := range []string{output + "--- FAIL: BenchmarkAttach\n", "", "BenchmarkFlowCount-2 30 1 ns/op\nFAIL\tgithub.com/rpsel/rpsel/test/bench\t1s\n"} {
		dir, page := t.TempDir(), page(t)
		if err := run(strings.NewReader(in), io.Discard, dir, page); err == nil {
			t.Errorf("no error for %q", in)
		}
		if _, err := os.Stat(filepath.Join(dir, "results.json")); err == nil {
			t.Errorf("%q left results", in)
		}
	}
}
