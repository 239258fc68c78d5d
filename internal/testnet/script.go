package testnet

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// Scripts lists the shell scripts of a page of the documentation, in the
// order in which they stand there.
func Scripts(t testing.TB, page string) (scripts []string) {
	t.Helper()
	text, err := os.ReadFile(page)
	must(t, err)
	for _, m := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		scripts = append(scripts, m[1])
	}
	return scripts
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
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s\n%v\n%s", script, err, out)
	}
	return string(out)
}
