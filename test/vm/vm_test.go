package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/test/vm/guest"
)

func TestMain(m *testing.M) { testnet.Main(m) }

func TestClosure(t *testing.T) {
	const dep = `kernel/a/udp_diag.ko.xz: kernel/a/inet_diag.ko.xz
kernel/a/inet_diag.ko.xz:
kernel/b/nf-tables.ko: kernel/b/top.ko kernel/b/libcrc32c.ko kernel/b/bottom.ko
kernel/b/top.ko: kernel/b/bottom.ko
`
	got := closure([]byte(dep), []string{"udp_diag", "no_such", "nf_tables", "inet_diag"})
	want := []string{
		"kernel/a/inet_diag.ko.xz", "kernel/a/udp_diag.ko.xz",
		"kernel/b/bottom.ko", "kernel/b/libcrc32c.ko", "kernel/b/top.ko", "kernel/b/nf-tables.ko",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("-want +got\n", diff)
	}
}

func TestChoose(t *testing.T) {
	names := func(list string) string {
		chosen, err := chooseReleases(list)
		if err != nil {
			return err.Error()
		}
		var names []string
		for _, r := range chosen {
			names = append(names, r.name)
		}
		return strings.Join(names, " ")
	}
	for list, want := range map[string]string{
		"":            "5.10 6.1 6.12 newest",
		"6.12,trixie": "6.12 6.12",
		"sid 6.1":     "newest 6.1",
		"4.19":        `kernel "4.19": use one of 5.10, 6.1, 6.12, newest, experimental`,
	} {
		if got := names(list); got != want {
			t.Errorf("%q: %s, want %s", list, got, want)
		}
	}
}

// Every architecture's own packages are asked for, and what they need.
func TestFetchArches(t *testing.T) {
	dir := t.TempDir()
	programs := maps.Clone(fakes)
	programs["apt-cache"] = `for a in amd64 arm64; do echo "  linux-image-6.1.0-1-cloud-$a"; done`
	programs["apt-get"] = `case "$*" in
install*) echo "Reading package lists..."; echo "Inst libc6 (2.41 Debian:13.7/stable [amd64]) []"; echo "Inst dash (0.5.12-12 Debian:13.7/stable [amd64])" ;;
download*) shift 2; grep -o 'APT::Architecture ".*"' $APT_CONFIG >>$MIRROR/asked; echo "$*" >>$MIRROR/asked; echo >some.deb ;;
esac`
	for name, text := range programs {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755))
	}
	t.Setenv("MIRROR", dir)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	s := store{filepath.Join(dir, "cache"), "http://mirror/debian", time.Hour}
	var want strings.Builder
	roots := map[string]bool{}
	for _, a := range arches {
		kernels, err := s.kernels(context.Background(), []release{{name: "6.1", suite: "bookworm"}}, a)
		must(t, err)
		if len(kernels) != 1 || kernels[0].name != "6.1" {
			t.Errorf("%s: %v", a.name, kernels)
		}
		for _, k := range kernels {
			for _, path := range []string{k.image, k.modules, k.programs} {
				_, err := os.Stat(path)
				must(t, err)
			}
			roots[k.image], roots[k.programs] = true, true
		}
		fmt.Fprintf(&want, "APT::Architecture \"%[1]s\"\nlibc6 dash\nAPT::Architecture \"%[1]s\"\nlinux-image-6.1.0-1-cloud-%[1]s\n", a.name)
	}
	if len(roots) != 4 {
		t.Error("architectures share files:", roots)
	}
	asked, err := os.ReadFile(filepath.Join(dir, "asked"))
	must(t, err)
	if diff := cmp.Diff(want.String(), string(asked)); diff != "" {
		t.Error("-want +got\n", diff)
	}
}

// fakes are apt and what unpacks, as scripts. $MIRROR is the test's directory.
var fakes = map[string]string{
	"apt-get": `case "$*" in
update*) echo >>$MIRROR/updates ;;
download*) . $MIRROR/download ;;
esac`,
	"apt-cache": `echo "  linux-image-6.1.0-1-cloud-amd64"`,
	"dpkg-deb":  `mkdir -p $3/boot $3/lib/modules/6.1.0-1; echo >$3/boot/vmlinuz-6.1.0-1`,
	"depmod":    `:`,
}

// A kernel that the mirror has no more, or does not deliver, is asked for again,
// or is an error that says what to do; what an earlier fetch left does not count.
func TestFetch(t *testing.T) {
	defer func(d time.Duration) { pause = d }(pause)
	pause = 0
	const got = "echo >linux-image.deb\n"
	for _, test := range []struct {
		name, download string
		updates        int
		want           string // of the error
	}{
		{"at once", got, 1, ""},
		{"gone from the mirror since", "[ $(wc -l <$MIRROR/updates) -gt 1 ] || { echo '404 Not Found'; exit 100; }\n" + got, 2, ""},
		{"gone", "echo '404 Not Found'; exit 100", 3, "kernel 6.1, from bookworm of http://mirror/debian: apt-get: exit status 100\n404 Not Found\n"},
		{"slow", "cancel; exec sleep 100", 1, "kernel 6.1, from bookworm of http://mirror/debian: apt-get: too slow\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			programs := maps.Clone(fakes)
			programs["cancel"] = "echo >$MIRROR/fifo"
			for name, text := range programs {
				must(t, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755))
			}
			must(t, os.WriteFile(filepath.Join(dir, "download"), []byte(test.download), 0o644))
			must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
			t.Setenv("MIRROR", dir)
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			cache := filepath.Join(dir, "cache")
			must(t, os.MkdirAll(filepath.Join(cache, "amd64/bookworm/apt/root/lib/modules/5.0"), 0o755)) // of a fetch that was killed

			ctx, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			if test.name == "slow" {
				go func() {
					os.ReadFile(filepath.Join(dir, "fifo"))
					cancel(errors.New("too slow"))
				}()
			}
			r := release{name: "6.1", suite: "bookworm"}
			s := store{cache, "http://mirror/debian", time.Hour}
			k, err := s.kernel(ctx, r, arches[0])
			said := ""
			if err != nil {
				said = err.Error()
			} else if base := filepath.Base(k.modules); base != "6.1.0-1" {
				t.Errorf("fetched %s", base)
			}
			if said != test.want {
				t.Errorf("said %q\nwant %q", said, test.want)
			}
			updates, err := os.ReadFile(filepath.Join(dir, "updates"))
			must(t, err)
			if len(updates) != test.updates {
				t.Errorf("%d times an update, want %d", len(updates), test.updates)
			}
			if test.want != "" {
				return
			}
			if _, err := s.kernel(ctx, r, arches[0]); err != nil {
				t.Error(err)
			}
			if again, err := os.ReadFile(filepath.Join(dir, "updates")); err != nil || len(again) != test.updates {
				t.Errorf("what is in the cache is fetched again: %v", err)
			}
		})
	}
}

// Two runs at once would write the same files.
func TestClaim(t *testing.T) {
	cache := t.TempDir()
	dir, err := os.Open(cache)
	must(t, err)
	defer dir.Close()
	must(t, unix.Flock(int(dir.Fd()), unix.LOCK_EX))
	if _, err := claim(cache); err == nil || !strings.Contains(err.Error(), "in use by another") {
		t.Errorf("claimed with %v", err)
	}
	must(t, unix.Flock(int(dir.Fd()), unix.LOCK_UN))
	claimed, err := claim(cache)
	must(t, err)
	defer claimed.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("another claim ends with %v", err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Every directory comes before what is in it, and nothing twice. Of packages
// comes what programs need.
func TestArchive(t *testing.T) {
	var b bytes.Buffer
	a := newArchive(&b)
	a.text("/a/b/one", "1")
	a.text("a/b/one", "2")
	a.dir("a", "c")
	root := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(root, "usr/bin"), 0o755))
	must(t, os.MkdirAll(filepath.Join(root, "usr/share/doc"), 0o755))
	for _, name := range []string{"usr/bin/dash", "usr/share/doc/dash", "usr/.hidden"} {
		must(t, os.WriteFile(filepath.Join(root, name), nil, 0o755))
	}
	must(t, os.Symlink("dash", filepath.Join(root, "usr/bin/sh")))
	a.tree(root, "")
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	var got []string
	err := cpio.ForEachRecord(cpio.Newc.Reader(bytes.NewReader(b.Bytes())), func(r cpio.Record) error {
		name := r.Name
		if r.Mode&cpio.S_IFMT == cpio.S_IFLNK {
			target, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
			must(t, err)
			name += " -> " + string(target)
		}
		got = append(got, name)
		return nil
	})
	want := []string{"a", "a/b", "a/b/one", "c", "usr", "usr/bin", "usr/bin/dash", "usr/bin/sh -> dash"}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
	a.file("/proc/self/mem", "cannot be read")
	if a.close() == nil {
		t.Error("a file that cannot be read is no error")
	}
}

// What tests print makes the outcome; so does what they cannot print any more.
func TestOutcome(t *testing.T) {
	const m = "\x16"
	pass := m + "=== RUN   TestA\n" + m + "=== ATTR  TestA verified/x 12\n" + m + "--- PASS: TestA (0.00s)\n" +
		m + "=== RUN   TestA2\n" + m + "=== RUN   TestA2/sub\n" + m + "--- PASS: TestA2/sub (0.00s)\n" + m + "=== NAME  TestA2\n" + m + "--- PASS: TestA2 (0.00s)\n"
	for _, test := range []struct {
		name, said              string
		end                     guest.End
		passed, failed, skipped int
		problem                 string
	}{
		{"pass", pass + m + "PASS\n", guest.End{}, 2, 0, 0, ""},
		{"fail", pass + m + "=== RUN   TestB\n    b_test.go:1: why\n" + m + "--- FAIL: TestB (0.00s)\n" + m + "FAIL\n", guest.End{Code: 1}, 2, 1, 0, ""},
		{"skip", pass + m + "=== RUN   TestB\n" + m + "--- SKIP: TestB (0.00s)\n" + m + "PASS\n", guest.End{}, 2, 0, 1, ""},
		{"panic", pass + m + "=== RUN   TestB\npanic: no\n", guest.End{Code: 2}, 2, 1, 0, ""},
		{"killed", pass + m + "=== RUN   TestB\n", guest.End{Code: -1, How: "killed"}, 2, 1, 0, "ended by signal: killed"},
		{"exit code alone", pass + m + "PASS\n", guest.End{Code: 1}, 2, 0, 0, "exit code 1"},
		{"nothing", "testing: warning: no tests to run\nPASS\n", guest.End{}, 0, 0, 0, "no test was run"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := collector{done: func(*outcome) {}}
			c.on(guest.Event{Run: "loader"})
			for _, part := range strings.SplitAfter(test.said, "e") { // comes in any pieces
				c.on(guest.Event{Output: []byte(part)})
			}
			c.on(guest.Event{End: &test.end})
			o := c.packages[0]
			got := []any{o.passed, o.failed, o.skipped, o.problem, o.noted["verified/x"]}
			verified := "12"
			if test.passed == 0 {
				verified = ""
			}
			if diff := cmp.Diff([]any{test.passed, test.failed, test.skipped, test.problem, verified}, got); diff != "" {
				t.Error("-want +got\n", diff)
			}
			if ok := test.failed == 0 && test.problem == ""; o.ok() != ok {
				t.Errorf("ok is %v", o.ok())
			}
			if said := strings.Join(o.said, ""); test.name == "fail" && !strings.Contains(said, "why") {
				t.Errorf("does not say why: %q", said)
			}
		})
	}
}

// A machine that does not come to its end is a failure that says why, with what
// its kernel said last. Its qemu is a script here.
func TestMachineEnds(t *testing.T) {
	event := func(e guest.Event) string {
		line, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("echo '%s'\n", line)
	}
	up := event(guest.Event{Kernel: "6.1.0"}) + event(guest.Event{Run: "loader"})
	for _, test := range []struct{ name, script, want string }{
		{"done", "echo 'SeaBIOS'\n" + up + event(guest.Event{Done: true}), ""},
		{"panic", up + "echo 'Kernel panic - not syncing: Out of memory' > console", "it ended before its time; the end of its console:\nKernel panic - not syncing: Out of memory"},
		{"hang", up + "exec sleep 100", "nothing came for 1s, so it was killed; the end of its console:\n"},
		{"never up", "echo 'double fault' > console", "the machine has not started: it ended before its time; the end of its console:\ndouble fault"},
		{"cannot start", "echo 'no such machine' >&2; exit 1", "the machine has not started: qemu: exit status 1 no such machine; the end of its console:\n"},
		{"init in trouble", up + event(guest.Event{Broken: "load /x.ko: exec format error"}) + event(guest.Event{Done: true}), "load /x.ko: exec format error"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir, on := t.TempDir(), arches[0]
			script := "#!/bin/sh\ncd " + dir + "\n: > console\n" + test.script
			if err := os.WriteFile(filepath.Join(dir, on.qemu), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			m := machine{kernel: kernel{arch: on}, console: filepath.Join(dir, "console"), accel: "tcg", silence: time.Minute}
			c := collector{done: func(*outcome) {}}
			err := m.run(context.Background(), func(e guest.Event) {
				if test.name == "hang" {
					m.silence = time.Second // from the next event on
				}
				c.on(e)
			})
			got := ""
			if err != nil {
				got = err.Error()
			}
			if got != test.want {
				t.Errorf("ended with %q\nwant       %q", got, test.want)
			}
			if up := !strings.HasPrefix(test.want, "the machine has not"); errors.Is(err, errSilent) == up {
				t.Errorf("up is %v: %v", up, err)
			}
			r := c.ended(err, m.complaint())
			if r.ok() {
				t.Error("a run without its end is no failure")
			}
		})
	}
}

// A bug that the kernel finds is a failure although no test noticed.
func TestComplaint(t *testing.T) {
	for text, want := range map[string]string{
		"[    0.0] ..MP-BIOS bug: 8254 timer not connected\n[    1.0] mtrr: your CPUs had inconsistent MTRRs\n":                    "",
		"[    9.1] ------------[ cut here ]------------\r\n[    9.2] WARNING: CPU: 1 PID: 77 at net/core/sock_reuseport.c:1 x\r\n": "[    9.2] WARNING: CPU: 1 PID: 77 at net/core/sock_reuseport.c:1 x",
		"[    9.1] BUG: kernel NULL pointer dereference\n":                                                                         "[    9.1] BUG: kernel NULL pointer dereference",
	} {
		path := filepath.Join(t.TempDir(), "console")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		m := machine{console: path}
		if got := m.complaint(); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
		if r := (&collector{}).ended(nil, m.complaint()); r.ok() != (want == "") {
			t.Errorf("%q: ok is %v", text, r.ok())
		}
	}
}

// A page has the last run of each package under each kernel, in the order of releases.
func TestDocument(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kernels.md")
	all, ci := map[string]string{"loader": "", "maps": ""}, map[string]string{"loader": "TestA"}
	accel, commit := "tcg", "abc"
	add := func(release int, booted, problem string, p plan, packages ...*outcome) {
		t.Helper()
		d, err := openDocument(path)
		must(t, err)
		r := &result{kernel: kernel{release: releases[release], arch: arches[0]}, booted: booted, accel: accel, problem: problem, packages: packages}
		must(t, d.add(r, p, occasion{Day: fmt.Sprint("2026-11-2", release), Commit: commit, Host: "QEMU 7.2 on a CPU"}))
	}
	has := func(when string, lines ...string) {
		t.Helper()
		text, err := os.ReadFile(path)
		must(t, err)
		for _, line := range lines {
			if !strings.Contains(string(text), line+"\n") {
				t.Errorf("%s: no %q in\n%s", when, line, text)
			}
		}
	}
	loader := func(failed int, fails ...string) *outcome {
		return &outcome{name: "loader", passed: 3, failed: failed, fails: fails, took: 90 * time.Second, noted: map[string]string{"verified/select": "12", "other": "13"}}
	}
	pkgMaps := &outcome{name: "maps", passed: 2}
	add(2, "6.12.1", "", plan{tests: ci}, loader(1, "TestA"), loader(0))
	add(1, "6.1.2", "", plan{tests: all}, loader(0), &outcome{name: "maps", passed: 1, skipped: 1})
	has("two", "# Kernels, amd64", "| kernel | 6.1 | 6.12 |", "| Linux | 6.1.2 | 6.12.1 |", "| run on | 2026-11-21 | 2026-11-22 |",
		"| for | 1m30s | 3m0s |", "| passed, failed, skipped | 4, 0, 1 | 6, 1, 0 |", "| result | ok | FAILED |", "| `loader` | 3 of 3 | 6 of 7, ci |",
		"| `maps` | 1 of 2 | – |", "| select | 12 | 12 |", `- 6.12, "loader": TestA`)
	commit = "abd+"
	add(2, "6.12.1", "", plan{tests: map[string]string{"maps": ""}}, pkgMaps)
	has("another package", "| by | QEMU 7.2 on a CPU | QEMU 7.2 on a CPU |", "| of commit | abc | abc, abd+ |", "| `loader` | 3 of 3 | 6 of 7, ci |", "| `maps` | 1 of 2 | 2 of 2 |")
	add(2, "6.12.1", "", plan{tests: all}, loader(0), pkgMaps)
	has("again", "| `loader` | 3 of 3 | 3 of 3 |", "| `maps` | 1 of 2 | 2 of 2 |", "| result | ok | ok |", "- nothing")
	add(2, "6.12.1", "the kernel complained\nof much", plan{tests: all}, loader(0))
	has("trouble", "| result | ok | FAILED |", `- 6.12, "loader": the kernel complained`, `- 6.12, "maps": it was not run; the kernel complained`)
	accel = "kvm"
	add(2, "6.12.1", "", plan{tests: ci}, loader(0))
	has("another processor", "| processor | emulated | KVM |", "| `maps` | 1 of 2 | – |", "| result | ok | ok |")
	add(2, "6.12.3", "", plan{tests: map[string]string{"maps": ""}}, pkgMaps)
	has("another build", "| Linux | 6.1.2 | 6.12.3 |", "| `loader` | 3 of 3 | – |", "| `maps` | 1 of 2 | 2 of 2 |")
	add(2, "", "it has not started", plan{tests: map[string]string{"maps": ""}})
	has("not started", "| Linux | 6.1.2 | 6.12.3 |", "| result | ok | FAILED |", `- 6.12, "maps": it was not run; it has not started`)
	add(2, "6.12.3", "", plan{tests: map[string]string{"loader": ""}, whole: true}, loader(0))
	has("whole", "| `loader` | 3 of 3 | 3 of 3 |", "| `maps` | 1 of 2 | – |", "| result | ok | ok |")
	must(t, os.WriteFile(strings.TrimSuffix(path, ".md")+".json", []byte("{"), 0o644))
	if _, err := openDocument(path); err == nil || !strings.Contains(err.Error(), ".json: ") {
		t.Errorf("what is kept is no JSON: %v", err)
	}
}
