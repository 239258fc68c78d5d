package testnet

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/rpsel/rpsel/docs"
)

var shellScript = regexp.MustCompile("(?ms)^```sh\n(.*?)^```$")

// Page is a page of the documentation. Its shell scripts are run by a test, as
// they stand and one after the other.
type Page struct {
	t       testing.TB
	name    string
	scripts []string
	next    int
}

// OpenPage reads a page of docs/. A test that ends well without having run all its
// scripts fails.
func OpenPage(t testing.TB, name string) *Page {
	t.Helper()
	text, err := docs.Pages.ReadFile(name)
	must(t, err)
	p := &Page{t: t, name: name}
	for _, m := range shellScript.FindAllStringSubmatch(string(text), -1) {
		p.scripts = append(p.scripts, m[1])
	}
	t.Cleanup(func() {
		if !t.Failed() && !t.Skipped() && p.next != len(p.scripts) {
			t.Errorf("%d of %d scripts of %s were run", p.next, len(p.scripts), name)
		}
	})
	return p
}

// Next returns the next script.
func (p *Page) Next() string {
	p.t.Helper()
	if p.next == len(p.scripts) {
		p.t.Fatalf("%s has no more than %d scripts", p.name, len(p.scripts))
	}
	p.next++
	return p.scripts[p.next-1]
}

// Script runs one in the namespace, as on a machine of its own: it finds rpsel,
// state is in the given bpffs, and what it leaves below /run is nobody else's. It
// returns what it says.
func (n *NetNS) Script(t testing.TB, bpffs, script string, env ...string) string {
	t.Helper()
	const enter = `mount -t tmpfs run /run; mount --bind "$BPFFS" /sys/fs/bpf; exec sh -euc "$SCRIPT"`
	cmd := n.Command("unshare", "--mount", "sh", "-euc", enter)
	cmd.Env = append(os.Environ(), append(env, "BPFFS="+bpffs, "SCRIPT="+script,
		"PATH="+filepath.Dir(Build(t))+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")...)
	cmd.WaitDelay = time.Second // a daemon has its standard error
	out, err := cmd.CombinedOutput()
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		t.Fatalf("%s\n%v\n%s", script, err, out)
	}
	return string(out)
}
