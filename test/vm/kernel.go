package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// release is a kernel of Debian's that tests run under.
type release struct {
	name  string            // as in make vm KERNEL=…
	suite string            // of Debian, where its package is
	old   bool              // it lacks what rpsel needs: what is tested is that rpsel says so
	ahead bool              // not released: only when asked for
	args  map[string]string // more for the kernel's command line, in an emulated machine of an architecture
}

var releases = []release{
	{name: "5.10", suite: "bullseye", old: true},
	{name: "6.1", suite: "bookworm"},
	{name: "6.12", suite: "trixie"},
	{name: "newest", suite: "sid", args: noStorage},
	{name: "experimental", suite: "experimental", ahead: true, args: noStorage},
}

// noStorage mends what the lack of cmpxchg16b (see arches) does to Linux 7.2: it
// allocates the storage of sockets by kmalloc_nolock (mm/slub.c), which needs
// that, or else a cache that is debugged.
var noStorage = map[string]string{"amd64": "slub_debug=Z,kmalloc-*"}

// kernel is one that was fetched.
type kernel struct {
	release
	arch     arch
	image    string // the file to boot
	modules  string // the directory with kernel/ and modules.dep
	programs string // the directory with those of its machine
}

// claim keeps others out of the cache until what it returns is closed.
func claim(cache string) (io.Closer, error) {
	dir, err := os.Open(cache)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		if err == unix.EWOULDBLOCK {
			return nil, fmt.Errorf("%s is in use by another make vm or make test: wait until that has ended", cache)
		}
		return nil, &fs.PathError{Op: "flock", Path: cache, Err: err}
	}
	return dir, nil
}

// store is where packages of Debian's are: a cache, and a mirror, which is one
// of the machine's own sources unless the caller names one.
type store struct {
	cache, mirror string
	patience      time.Duration // the mirror may take so long for a kernel, or for the programs
}

// kernels takes those that were chosen, and programs for them, from the cache,
// or else from the mirror.
func (s store) kernels(ctx context.Context, chosen []release, on arch) (kernels []kernel, err error) {
	programs, err := s.programs(ctx, on)
	if err != nil {
		return nil, err
	}
	for _, r := range chosen {
		fmt.Printf("vm: kernel %s (%s, %s)\n", r.name, r.suite, on.name)
		k, err := s.kernel(ctx, r, on)
		if err != nil {
			return nil, err
		}
		k.programs = programs
		kernels = append(kernels, k)
	}
	return kernels, nil
}

func (s store) kernel(ctx context.Context, r release, on arch) (kernel, error) {
	dir := filepath.Join(s.cache, on.name, r.suite)
	if k, err := r.find(dir, on); err == nil {
		return k, nil
	}
	fetched, err := s.fetch(ctx, dir, r.suite, on, kernelPackages)
	if err != nil {
		return kernel{}, fmt.Errorf("kernel %s, %w", r.name, err)
	}
	lib, err := modulesIn(fetched)
	if err != nil {
		return kernel{}, err
	}
	// The package's script would do that, in the machine's own directories.
	if _, err := command(ctx, nil, "depmod", "-b", strings.TrimSuffix(lib, filepath.Join("lib/modules", filepath.Base(lib))), filepath.Base(lib)); err != nil {
		return kernel{}, err
	}
	if err := os.Rename(fetched, filepath.Join(dir, "root")); err != nil {
		return kernel{}, err
	}
	return r.find(dir, on)
}

// programsSuite is the one whose programs all machines have.
const programsSuite = "trixie"

// programs are the packages with what tests start, besides rpsel: sh, cat, cp, grep,
// sleep, true, mount, unshare and perl. Some tests want them because they are
// linked dynamically.
var programs = []string{"base-files", "dash", "coreutils", "mount", "util-linux", "grep", "perl-base"}

// programs returns a directory with those, and what they need.
func (s store) programs(ctx context.Context, on arch) (root string, err error) {
	dir := filepath.Join(s.cache, on.name, "programs")
	root = filepath.Join(dir, "root")
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	fetched, err := s.fetch(ctx, dir, programsSuite, on, programPackages)
	if err != nil {
		return "", fmt.Errorf("programs, %w", err)
	}
	return root, os.Rename(fetched, root)
}

// fetch unpacks packages of a suite to a directory below dir. Who has made of it
// what is wanted renames it to dir/root: what has that name is whole.
func (s store) fetch(ctx context.Context, dir, suite string, on arch, list func(context.Context, *apt) ([]string, error)) (fetched string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.patience, fmt.Errorf("it has not come within %v: name another mirror of Debian, as in make vm MIRROR=URL", s.patience))
	defer cancel()
	// What an interrupted fetch left is of no use.
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	a, err := newApt(ctx, filepath.Join(dir, "apt"), suite, on, s.mirror)
	if err != nil {
		return "", err
	}
	files, err := a.download(ctx, list)
	if err != nil {
		return "", fmt.Errorf("from %s of %s: %w", suite, a.mirror, err)
	}
	fetched = filepath.Join(dir, "apt", "root")
	for _, file := range files {
		if _, err := command(ctx, nil, "dpkg-deb", "-x", file, fetched); err != nil {
			return "", err
		}
		if err := os.Remove(file); err != nil {
			return "", err
		}
	}
	return fetched, nil
}

// find looks for a kernel that was fetched before.
func (r release) find(dir string, on arch) (kernel, error) {
	root := filepath.Join(dir, "root")
	lib, err := modulesIn(root)
	if err != nil {
		return kernel{}, err
	}
	for _, pattern := range []string{filepath.Join(root, "boot/vmlinuz-*"), filepath.Join(lib, "vmlinuz*")} {
		if found, _ := filepath.Glob(pattern); len(found) == 1 {
			return kernel{release: r, arch: on, image: found[0], modules: lib}, nil
		}
	}
	return kernel{}, fmt.Errorf("%s: no kernel image: %w", root, fs.ErrNotExist)
}

func modulesIn(root string) (string, error) {
	for _, dir := range []string{"lib/modules/*", "usr/lib/modules/*"} {
		if found, _ := filepath.Glob(filepath.Join(root, dir)); len(found) == 1 {
			return found[0], nil
		}
	}
	return "", fmt.Errorf("%s: no kernel modules: %w", root, fs.ErrNotExist)
}

// apt fetches packages of one suite and architecture, checks their signatures,
// and leaves the machine's own configuration alone.
type apt struct {
	dir    string
	arch   arch
	mirror string
	env    []string
}

const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

func newApt(ctx context.Context, dir, suite string, on arch, mirror string) (*apt, error) {
	if mirror == "" {
		var err error
		if mirror, err = ownMirror(ctx); err != nil {
			return nil, err
		}
	}
	for _, sub := range []string{"lists/partial", "cache/archives/partial", "debs"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	// An empty status: no package counts as installed.
	config := fmt.Sprintf(`
Dir::State %[1]q;
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s/cache";
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferencesparts "-";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
APT::Sandbox::User "root";
APT::Architecture %[2]q;
APT::Architectures { %[2]q; };
`, dir, on.name)
	source := fmt.Sprintf("deb [target=Packages signed-by=%s] %s %s main\n", keyring, mirror, suite)
	for name, text := range map[string]string{"apt.conf": config, "sources.list": source, "status": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	return &apt{dir, on, mirror, append(os.Environ(), "LC_ALL=C", "APT_CONFIG="+filepath.Join(dir, "apt.conf"))}, nil
}

var errNoMirror = errors.New("none of this machine's package sources is a mirror of Debian: name one, as in make vm MIRROR=URL")

// ownMirror is the mirror of Debian that this machine has its packages from.
func ownMirror(ctx context.Context) (string, error) {
	// Whose archive it is could be told only after an apt-get update.
	out, err := command(ctx, nil, "apt-get", "indextargets", "--no-release-info", "--format", "$(COMPONENT) $(REPO_URI)", "Identifier: Packages")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if uri, ok := strings.CutPrefix(strings.TrimSpace(line), "main "); ok && strings.Contains(uri, "/debian/") {
			return uri, nil
		}
	}
	return "", errNoMirror
}

// kernelPackages are those of the newest kernel that is made for virtual
// machines. Since Linux 7 the image and the modules have packages of their own.
func kernelPackages(ctx context.Context, a *apt) (packages []string, err error) {
	meta := "linux-image-cloud-" + a.arch.name
	wanted := regexp.MustCompile(`^linux-(image|binary|modules)-[0-9].*-cloud-` + a.arch.name + `$`)
	out, err := command(ctx, a.env, "apt-cache", "depends", "--recurse", "--important", meta)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(out) {
		if name := strings.TrimSpace(line); wanted.MatchString(name) && !slices.Contains(packages, name) {
			packages = append(packages, name)
		}
	}
	if len(packages) == 0 {
		return nil, fmt.Errorf("%s depends on no kernel", meta)
	}
	return packages, nil
}

// programPackages are those of programs, and what apt would install with them.
func programPackages(ctx context.Context, a *apt) (packages []string, err error) {
	out, err := command(ctx, a.env, "apt-get", append([]string{"install", "--simulate", "--no-install-recommends"}, programs...)...)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(out) {
		// As in "Inst dash (0.5.12-12 Debian:13.7/stable [arm64])".
		if words := strings.Fields(line); len(words) > 1 && words[0] == "Inst" {
			packages = append(packages, words[1])
		}
	}
	return packages, nil
}

// attempts at a download, and what is waited between them: a mirror that is
// being updated lists what it has no more, or not yet.
const attempts = 3

var pause = 10 * time.Second

// download returns the files of the packages that list finds.
func (a *apt) download(ctx context.Context, list func(context.Context, *apt) ([]string, error)) (files []string, err error) {
	for n := range attempts {
		if n > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
		if files, err = a.tryDownload(ctx, list); err == nil || ctx.Err() != nil {
			break
		}
	}
	return files, err
}

func (a *apt) tryDownload(ctx context.Context, list func(context.Context, *apt) ([]string, error)) ([]string, error) {
	if _, err := command(ctx, a.env, "apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any"); err != nil {
		return nil, err
	}
	packages, err := list(ctx, a)
	if err != nil {
		return nil, err
	}
	debs, err := os.MkdirTemp(a.dir, "debs-")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"download", "-q"}, packages...)...)
	cmd.Dir, cmd.Env = debs, a.env
	if _, err := output(ctx, cmd); err != nil {
		return nil, err
	}
	return filepath.Glob(filepath.Join(debs, "*.deb"))
}

// command runs a program and returns its output, or an error with all that it
// said.
func command(ctx context.Context, env []string, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = env
	return output(ctx, cmd)
}

func output(ctx context.Context, cmd *exec.Cmd) (string, error) {
	cmd.WaitDelay = 5 * time.Second // what it started may have its output open
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("%s: %w\n%s%s", filepath.Base(cmd.Path), err, out.Bytes(), said.Bytes())
	}
	return out.String(), nil
}

// closure puts modules in the order to load them, with those that they need.
// modules.dep has a line for each: its file, a colon, and the files of all that
// it needs, to be loaded from the last to the first. What no file is named
// after is left out: it is built in, or this kernel does not have it.
func closure(dep []byte, names []string) []string {
	type module struct {
		file  string
		needs []string
	}
	modules := map[string]module{}
	for s := bufio.NewScanner(bytes.NewReader(dep)); s.Scan(); {
		file, needs, _ := strings.Cut(s.Text(), ":")
		name, _, _ := strings.Cut(filepath.Base(file), ".")
		modules[strings.ReplaceAll(name, "-", "_")] = module{file, strings.Fields(needs)}
	}
	var files []string
	for _, name := range names {
		m, ok := modules[name]
		if !ok {
			continue
		}
		slices.Reverse(m.needs)
		for _, file := range append(m.needs, m.file) {
			if !slices.Contains(files, file) {
				files = append(files, file)
			}
		}
	}
	return files
}
