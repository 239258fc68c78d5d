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
	"slices"
	"strings"
	"syscall"
	"time"

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
	set := flags.String("set", "all", "which tests: all, or ci, which takes a few minutes")
	only := flags.String("package", "", "the tests of these `PACKAGES` only, as in \"loader ./sockets\"")
	pattern := flags.String("run", "", "only tests that match this regular expression")
	mirror := flags.String("mirror", "", "`URL` of a mirror of Debian, if not among this machine's package sources")
	docs := flags.String("docs", "", "write the results as a table to this `FILE`")
	usable := flags.Bool("usable", false, "only say, by the exit code, whether this machine itself can run privileged tests")
	verbose := flags.Bool("v", false, "print all that the tests say")
	silence := flags.Duration("silence", 10*time.Minute, "a machine that says nothing for so long hangs")
	longest := flags.Duration("patience", 15*time.Minute, "a mirror that takes longer for a kernel is given up")
	flags.Parse(args)
	if *usable {
		if err := testnet.Usable(); err != nil {
			return fmt.Errorf("privileged tests run in a machine of their own, since this one has none of: %w", err)
		}
		return nil
	}
	chosen, err := choose(*names)
	if err != nil {
		return err
	}
	plan, err := newPlan(ctx, *set, *only, *pattern)
	if err != nil {
		return err
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
	var kernels []kernel
	for _, r := range chosen {
		fmt.Printf("vm: kernel %s (%s)\n", r.name, r.suite)
		within, cancel := patience(ctx, *longest)
		k, err := r.fetch(within, cache, *mirror)
		cancel()
		if errors.Is(err, errNoMirror) && *set == "ci" && os.Getenv("CI") != "true" {
			fmt.Println("vm: left out:", err)
			return nil
		}
		if err != nil {
			return err
		}
		kernels = append(kernels, k)
	}
	fmt.Println("vm: compile the tests")
	b, err := build(ctx, dir, plan.packages(chosen))
	if err != nil {
		return err
	}
	var results []*result
	for _, k := range kernels {
		c := &collector{result: result{release: k.release}, verbose: *verbose, done: func(o *outcome) {
			fmt.Printf("vm: %-6s %s\n", k.name, o)
			if !o.ok() && !*verbose {
				fmt.Print(strings.Join(o.said, ""))
			}
		}}
		began := time.Now()
		m, err := boot(ctx, b, k, dir, source, plan.order(k.release, b.tests, accelerators()[0] == "tcg"), *silence, c.on)
		r := c.ended(err, m.complaint())
		r.took, r.accel = time.Since(began), m.accel
		if r.problem != "" {
			fmt.Printf("vm: %-6s %s\n", k.name, r.problem)
		}
		results = append(results, r)
		if ctx.Err() != nil {
			break
		}
	}
	summary(os.Stdout, results)
	if *docs != "" && *only == "" && *pattern == "" {
		if err := document(*docs, results, plan, time.Now()); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(results, func(r *result) bool { return !r.ok() }) {
		return errors.New("failed")
	}
	return nil
}

// choose finds releases by name.
func choose(names string) (chosen []release, err error) {
	for _, name := range strings.Fields(strings.ReplaceAll(names, ",", " ")) {
		i := slices.IndexFunc(releases, func(r release) bool { return r.name == name || r.suite == name })
		if i < 0 {
			var known []string
			for _, r := range releases {
				known = append(known, r.name)
			}
			return nil, fmt.Errorf("kernel %q: use one of %s", name, strings.Join(known, ", "))
		}
		chosen = append(chosen, releases[i])
	}
	if chosen == nil {
		for _, r := range releases {
			if !r.ahead {
				chosen = append(chosen, r)
			}
		}
	}
	return chosen, nil
}

// environment of the tests. A test that has nothing to skip for has CI.
var environment = []string{
	"CI=true", "HOME=/root", "PATH=/bin:/sbin:/usr/bin:/usr/sbin", "TMPDIR=/tmp", "USER=root", "TERM=dumb",
	testnet.EnvBuilt + "=" + guest.Built,
}
