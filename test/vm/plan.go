package main

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rpsel/rpsel/test/vm/guest"
)

type leaving struct{ pkg, test, why string }

// leftOut are the tests that no machine runs, and why: those that match a
// regular expression, or all of the package.
var leftOut = []leaving{
	{"test/e2e", "", "needs OpenVPN and systemd"},
	{"test/hosts", "", "needs ip(8) and a router's modules"},
	{"test/model", "", "runs no program in a kernel"},
	{"packaging", "", "runs no program in a kernel"},
	{"test/bench", "", "measures: emulation has another speed"},
	{"internal/api", "", "asks the go command"},
	{"test/vm", "", "would start machines in the machine"},
	{"agent", "^TestLight$", "asks the go command"},
	{"cmd/rpsel", "^TestManual$", "needs mandoc"},
	{"cmd/rpsel", "^TestScripts$/^completion$", "needs three shells"},
	{"test/kubernetes", "^TestFromTheMachine$", "needs ip(8)"},
}

// few are the tests of CI: one or two of everything that a kernel may do
// differently, with traffic. Each word is a regular expression of its own.
var few = map[string]string{
	"bpf": "TestVerifier|Fuzz",
	"loader": `^Test(TCP|House|Newest|UpgradeTCP|EveryRunIsCountedOnce)$ ` +
		`^Test(AttachMovesNothing|CloseAndJoin)$/(127.0.0.1|\[::\]):1194_from_127.*,_3$`,
	"sockets":        "^Test(FindGroups|FindHolders|Take|Adopt|NetNSes|FindMPTCP)$",
	"internal/watch": "^Test(Events|BesideOthers)$",
	"internal/force": "^Test(Dynamic|Reuseaddr|BindDevice)$",
	"cmd/rpsel":      "^TestScripts$/^(attach|drain)$",
	"test/hostile":   "^TestWays$",
}

// onOld are those for a kernel that is too old.
var onOld = map[string]string{"cmd/rpsel": "^TestOldKernel$"}

// plan is which tests are run.
type plan struct {
	tests map[string]string // package to regular expressions, "" for all
	whole bool              // all tests of all packages
}

func newPlan(ctx context.Context, set, only, pattern string) (plan, error) {
	p := plan{map[string]string{}, set == "all" && only == "" && pattern == ""}
	switch set {
	case "ci":
		p.tests = few
	case "all":
		all, err := withTests(ctx)
		if err != nil {
			return p, err
		}
		for _, pkg := range all {
			p.tests[pkg] = ""
		}
	default:
		return p, fmt.Errorf("set %q: use all or ci", set)
	}
	if only != "" {
		chosen := map[string]string{}
		for _, pkg := range strings.Fields(only) {
			pkg = filepath.Clean(pkg)
			chosen[pkg] = p.tests[pkg]
		}
		p.tests = chosen
	}
	if pattern != "" {
		for pkg := range p.tests {
			p.tests[pkg] = pattern
		}
	}
	return p, nil
}

// withTests are the packages that have tests and are not left out.
func withTests(ctx context.Context) (packages []string, err error) {
	for _, dir := range []string{".", "examples/quic", "packaging", "test/kubernetes"} { // modules
		out, err := command(ctx, nil, "go", "list", "-C", dir, "-f", "{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}", "./...")
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			pkg := strings.TrimPrefix(strings.TrimSpace(line), module+"/")
			if pkg != "" && !slices.ContainsFunc(leftOut, func(l leaving) bool { return l.pkg == pkg && l.test == "" }) {
				packages = append(packages, pkg)
			}
		}
	}
	return packages, nil
}

// of is what one kernel runs.
func (p plan) of(r release) map[string]string {
	if r.old {
		return onOld
	}
	return p.tests
}

// packages are those with a test that one of the kernels runs.
func (p plan) packages(releases []release) (packages []string) {
	for _, r := range releases {
		packages = slices.AppendSeq(packages, maps.Keys(p.of(r)))
	}
	slices.Sort(packages)
	return slices.Compact(packages)
}

// order is what the machine of a kernel does, with the tests under these names.
// Short tests are what an emulated machine can do in minutes.
func (p plan) order(r release, names map[string]string, short bool) guest.Order {
	o := guest.Order{Env: environment}
	for _, pkg := range p.packages([]release{r}) {
		var skip []string
		for _, l := range leftOut {
			if l.pkg == pkg {
				skip = append(skip, l.test)
			}
		}
		dir := filepath.Join(guest.Source, pkg)
		argv := []string{filepath.Join(dir, names[pkg]), "-test.v=test2json", "-test.timeout=3h"}
		if short {
			argv = append(argv, "-test.short")
		}
		if skip != nil {
			argv = append(argv, "-test.skip="+strings.Join(skip, "|"))
		}
		patterns := strings.Fields(p.of(r)[pkg])
		if len(patterns) == 0 {
			patterns = []string{"."}
		}
		for _, pattern := range patterns {
			o.Runs = append(o.Runs, guest.Run{Name: pkg, Dir: dir, Argv: append(slices.Clip(argv), "-test.run="+pattern)})
		}
	}
	return o
}
