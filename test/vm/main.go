// Command vm runs the tests of this repository under other kernels: those of
// Debian's releases, each in a machine of qemu's with nothing in it but the
// tests, compiled statically, and an init of ours.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/test/vm/guest"
)

const module = "github.com/rpsel/rpsel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("vm", flag.ExitOnError)
	names := flags.String("kernels", "", "`LIST` of kernels, as in \"6.1 6.12\"; all that are supported if empty")
	archName := flags.String("arch", runtime.GOARCH, "amd64 or arm64, which is emulated on the other")
	set := flags.String("set", "all", "which tests: all, or ci, which takes a few minutes")
	only := flags.String("package", "", "the tests of these `PACKAGES` only, as in \"loader ./sockets\"")
	pattern := flags.String("run", "", "only tests that match this regular expression")
	mirror := flags.String("mirror", "", "`URL` of a mirror of Debian, if not among this machine's package sources")
	docs := flags.String("docs", "", "write the results to this page, `FILE`, beside what it says of other kernels and packages")
	usable := flags.Bool("usable", false, "only say, by the exit code, whether this machine itself can run privileged tests")
	verbose := flags.Bool("v", false, "print all that the tests say")
	silence := flags.Duration("silence", 10*time.Minute, "a machine that says nothing for so long hangs")
	longest := flags.Duration("patience", 15*time.Minute, "a mirror that takes longer for a kernel is given up")
	flags.Parse(args)
	if flags.NArg() > 0 {
		return fmt.Errorf("%q: quote lists, as in -kernels \"6.1 6.12\"", flags.Arg(0))
	}
	if *usable {
		if err := testnet.Usable(); err != nil {
			return fmt.Errorf("privileged tests run in a machine of their own, since this one has none of: %w", err)
		}
		return nil
	}
	chosen, err := chooseReleases(*names)
	if err != nil {
		return err
	}
	on, err := chooseArch(*archName)
	if err != nil {
		return err
	}
	plan, err := newPlan(ctx, *set, *only, *pattern)
	if err != nil {
		return err
	}
	var written *document
	var now occasion
	if *docs != "" && *pattern == "" {
		if written, err = openDocument(*docs); err != nil {
			return err
		}
		now = newOccasion(ctx, on)
	}
	source, err := os.Getwd()
	if err != nil {
		return err
	}
	cache := filepath.Join(source, "test/vm/.cache")
	dir := filepath.Join(cache, "work")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	claimed, err := claim(cache)
	if err != nil {
		return err
	}
	defer claimed.Close()
	kernels, err := store{cache, *mirror, *longest}.kernels(ctx, chosen, on)
	if errors.Is(err, errNoMirror) && *set == "ci" && os.Getenv("CI") != "true" {
		fmt.Println("vm: left out:", err)
		return nil
	}
	if err != nil {
		return err
	}
	fmt.Println("vm: compile the tests for", on.name)
	ready, err := build(ctx, filepath.Join(dir, on.name), on, plan.packages(chosen))
	if err != nil {
		return err
	}
	results := make([]*result, len(kernels))
	atOnce := make(chan struct{}, room())
	var running sync.WaitGroup
	var writing sync.Mutex
	var unwritten error
	for i, k := range kernels {
		atOnce <- struct{}{}
		running.Go(func() {
			defer func() { <-atOnce }()
			results[i] = test(ctx, ready, k, dir, source, plan, *silence, *verbose)
			if written != nil && ctx.Err() == nil {
				writing.Lock()
				defer writing.Unlock()
				unwritten = errors.Join(unwritten, written.add(results[i], plan, now))
			}
		})
	}
	running.Wait()
	summary(os.Stdout, results)
	if unwritten != nil {
		return unwritten
	}
	if slices.ContainsFunc(results, func(r *result) bool { return !r.ok() }) {
		return errors.New("failed")
	}
	return nil
}

// room is how many machines run at a time. Each is at one test most of the time, which is
// mostly one processor's work, and has its memory to itself; half as much is for the rest.
func room() int {
	var host unix.Sysinfo_t
	if err := unix.Sysinfo(&host); err != nil {
		return 1
	}
	total := uint64(host.Totalram) * uint64(host.Unit) >> 20
	return max(min(runtime.NumCPU(), int(total/(memory*3/2))), 1)
}

// test runs the tests under one kernel.
func test(ctx context.Context, b built, k kernel, dir, source string, p plan, silence time.Duration, verbose bool) *result {
	c := &collector{result: result{kernel: k}, verbose: verbose, done: func(o *outcome) {
		said := ""
		if !o.ok() && !verbose {
			said = strings.Join(o.said, "")
		}
		fmt.Printf("vm: %-6s %s\n%s", k.name, o, said)
	}}
	order := func(emulated bool) guest.Order { return p.order(k.release, b.tests, emulated) }
	began := time.Now()
	m, err := boot(ctx, b, k, dir, source, order, silence, c.on)
	r := c.ended(err, m.complaint())
	r.took, r.accel = time.Since(began), m.accel
	if r.problem != "" {
		fmt.Printf("vm: %-6s %s\n", k.name, r.problem)
	}
	return r
}

// chooseReleases finds releases by the names that they have, or are all that
// are released.
func chooseReleases(names string) ([]release, error) {
	if strings.TrimSpace(names) == "" {
		return slices.DeleteFunc(slices.Clone(releases), func(r release) bool { return r.ahead }), nil
	}
	var chosen []release
	for _, name := range strings.Fields(strings.ReplaceAll(names, ",", " ")) {
		i := slices.IndexFunc(releases, func(r release) bool { return r.name == name || r.suite == name })
		if i < 0 {
			var all []string
			for _, r := range releases {
				all = append(all, r.name)
			}
			return nil, fmt.Errorf("kernel %q: use one of %s", name, strings.Join(all, ", "))
		}
		chosen = append(chosen, releases[i])
	}
	return chosen, nil
}

func chooseArch(name string) (arch, error) {
	i := slices.IndexFunc(arches, func(a arch) bool { return a.name == name })
	if i < 0 {
		return arch{}, fmt.Errorf("architecture %q: use amd64 or arm64", name)
	}
	return arches[i], nil
}

// environment of the tests. A test that has nothing to skip for has CI.
var environment = []string{
	"CI=true", "HOME=/root", "PATH=/bin:/sbin:/usr/bin:/usr/sbin", "TMPDIR=/tmp", "USER=root", "TERM=dumb",
	testnet.EnvBuilt + "=" + guest.Built,
}
