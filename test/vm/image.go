package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/test/vm/guest"
)

// modules are those that tests need and Debian does not build in.
var modules = []string{
	"inet_diag", "udp_diag", "tcp_diag", "unix_diag", "netlink_diag", "veth", "tun", "dummy",
	"nf_tables", "nft_compat", "sch_fq", "sch_ingress", "cls_bpf",
	"8021q", "vxlan", "ip_gre", "ipip", "sit", "ip6_tunnel", // what is around packets, in test/hostile
	"xfrm_user", "esp4", "esp6", "authenc", "crypto_null",
}

// built is what is compiled once for all kernels of an architecture.
type built struct {
	dir   string // with init, the tests as NAME.test, and testnet.Builds
	tests map[string]string
}

// build compiles everything into dir, statically.
func build(ctx context.Context, dir string, on arch, packages []string) (built, error) {
	b := built{dir: dir, tests: map[string]string{}}
	goCommand := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+on.name)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", args[0], err, out)
		}
		return nil
	}
	const small = "-ldflags=-s -w"
	if err := goCommand("build", small, "-o", filepath.Join(dir, "init"), module+"/test/vm/init"); err != nil {
		return b, err
	}
	for name, args := range testnet.Builds {
		if err := goCommand(append([]string{"build", small, "-o", filepath.Join(dir, name)}, args...)...); err != nil {
			return b, err
		}
	}
	for _, pkg := range packages {
		b.tests[pkg] = strings.ReplaceAll(pkg, "/", "-") + ".test"
		if err := goCommand("test", "-C", pkg, "-c", small, "-o", filepath.Join(dir, b.tests[pkg]), "."); err != nil {
			return b, err
		}
	}
	return b, nil
}

// image writes the file system of a machine: what was built, the files of the
// repository, programs of Debian's, the modules of the kernel, and the order.
func (b built) image(ctx context.Context, to io.Writer, k kernel, source string, order guest.Order) error {
	a := newArchive(to)
	a.dir("proc", "sys", "dev", "run", "tmp", "root", "etc", "var/tmp", "home", "mnt")
	a.text("etc/passwd", "root:x:0:0::/root:/bin/sh\ndaemon:x:1:1::/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
	a.text("etc/group", "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nnogroup:x:65534:\n")
	a.text("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
	a.file(filepath.Join(b.dir, "init"), "init")
	for name := range testnet.Builds {
		a.file(filepath.Join(b.dir, name), filepath.Join(guest.Built, name))
	}
	for pkg, name := range b.tests {
		a.file(filepath.Join(b.dir, name), filepath.Join(guest.Source, pkg, name))
	}
	a.tree(source, guest.Source)
	a.tree(k.programs, "")
	order.Port, order.Modules = k.arch.events, a.modules(ctx, k)
	text, err := json.Marshal(order)
	if err != nil {
		return err
	}
	a.text(guest.OrderFile, string(text))
	return a.close()
}

// archive is a file system in the making. The first error makes it do nothing
// more, and is that of close.
type archive struct {
	out cpio.RecordWriter
	has map[string]bool
	err error
}

func newArchive(to io.Writer) *archive {
	return &archive{out: cpio.Newc.Writer(to), has: map[string]bool{".": true}}
}

func (a *archive) close() error {
	if a.err != nil {
		return a.err
	}
	return cpio.WriteTrailer(a.out)
}

// add writes a record, once, after the directories it is in.
func (a *archive) add(r cpio.Record) {
	r.Name = strings.TrimPrefix(r.Name, "/")
	if a.err != nil || a.has[r.Name] {
		return
	}
	a.has[r.Name] = true
	a.dir(filepath.Dir(r.Name))
	if a.err == nil {
		a.err = a.out.WriteRecord(cpio.MakeReproducible(r))
	}
}

func (a *archive) dir(names ...string) {
	for _, name := range names {
		a.add(cpio.Directory(name, 0o755))
	}
}

func (a *archive) text(name, text string) { a.add(cpio.StaticFile(name, text, 0o644)) }

// file adds a file of this machine, or where a link leads.
func (a *archive) file(path, name string) {
	if a.err != nil {
		return
	}
	stat, err := os.Stat(path)
	var text []byte
	if err == nil {
		text, err = os.ReadFile(path)
	}
	if err != nil {
		a.err = err
		return
	}
	a.add(cpio.StaticFile(name, string(text), uint64(stat.Mode().Perm())))
}

// tree adds the files and links of a directory, but for hidden ones, such as
// .git, and for what packages have for people.
func (a *archive) tree(dir, name string) {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := filepath.Join(name, strings.TrimPrefix(path, dir))
		switch hidden := path != dir && strings.HasPrefix(d.Name(), "."); {
		case d.IsDir() && (hidden || to == "/usr/share"):
			return fs.SkipDir
		case !hidden && d.Type().IsRegular():
			a.file(path, to)
		case !hidden && d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			a.add(cpio.Symlink(to, target))
		}
		return nil
	})
	a.err = errors.Join(a.err, err)
}

// modules adds the kernel's and returns their names in the order to load them.
func (a *archive) modules(ctx context.Context, k kernel) (names []string) {
	dep, err := os.ReadFile(filepath.Join(k.modules, "modules.dep"))
	if err != nil {
		a.err = errors.Join(a.err, err)
		return nil
	}
	for _, file := range closure(dep, modules) {
		path := filepath.Join(k.modules, file)
		name := filepath.Join("/modules", filepath.Base(file))
		if plain, ok := strings.CutSuffix(name, ".xz"); ok {
			text, err := command(ctx, nil, "xz", "-dc", path)
			if err != nil {
				a.err = errors.Join(a.err, err)
				return nil
			}
			name = plain
			a.text(name, text)
		} else {
			a.file(path, name)
		}
		names = append(names, name)
	}
	return names
}
