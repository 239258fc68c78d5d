package e2e

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rpsel/rpsel/internal/layout1"
	"github.com/rpsel/rpsel/internal/testnet"
)

// pack makes the packages of a version from the sources in a directory.
func pack(t testing.TB, source, out, version, archs string) {
	t.Helper()
	// The file modes of a package are not those that a umask leaves.
	cmd := exec.Command("sh", "-c", `umask 077; exec go run . "$@"`, "sh", "-version", version, "-time", "1700000000", "-arch", archs, "-out", out)
	cmd.Dir = filepath.Join(source, "packaging")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, said)
	}
}

func read(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Packages of two versions.
func TestPackages(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pack(t, "../..", dir+"/0.1.0", "v0.1.0", runtime.GOARCH)
	pack(t, "../..", dir+"/0.2.0", "v0.2.0", "amd64,arm64")
	for name, test := range map[string]func(t *testing.T, packages string){"files": testFiles, "deb": testDeb, "rpm": testRPM} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, dir)
		})
	}
}

// What is built at two places is the same, complete, and for each architecture.
func testFiles(t *testing.T, packages string) {
	dir := t.TempDir()
	elsewhere := filepath.Join(dir, "elsewhere")
	if err := os.Mkdir(elsewhere, 0o755); err != nil {
		t.Fatal(err)
	}
	sources := strings.Fields("go.mod go.sum LICENSE README.md ARCHITECTURE.md CHANGELOG.md agent bpf cmd docs internal loader maps packaging sockets")
	cp := exec.Command("cp", append(append([]string{"-r"}, sources...), elsewhere)...)
	cp.Dir = "../.."
	if out, err := cp.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	here, there := packages+"/0.2.0", dir+"/there"
	pack(t, elsewhere, there, "v0.2.0", "amd64,arm64")
	sums := read(t, here+"/SHA256SUMS")
	if again := read(t, there+"/SHA256SUMS"); again != sums {
		t.Errorf("other bytes at another place:\n%s\n%s", sums, again)
	}
	check := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	check.Dir = here
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for arch, want := range map[string]struct {
		machine elf.Machine
		rpm     string
	}{"amd64": {elf.EM_X86_64, "x86_64"}, "arm64": {elf.EM_AARCH64, "aarch64"}} {
		binary := here + "/rpsel_0.2.0_linux_" + arch
		for _, name := range []string{"rpsel_0.2.0_" + arch + ".deb", "rpsel-0.2.0-1." + want.rpm + ".rpm", filepath.Base(binary), filepath.Base(binary) + ".cdx.json"} {
			if !strings.Contains(sums, "  "+name+"\n") {
				t.Errorf("no %s in\n%s", name, sums)
			}
		}
		file, err := elf.Open(binary)
		if err != nil {
			t.Fatal(err)
		}
		dynamic := slices.ContainsFunc(file.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
		if file.Machine != want.machine || dynamic || file.Section(".symtab") != nil {
			t.Errorf("%s: %s, dynamic %v, symbols %v", arch, file.Machine, dynamic, file.Section(".symtab") != nil)
		}
		file.Close()

		var bom struct {
			BomFormat  string
			Components []struct{ Name, Version, Purl string }
		}
		if err := json.Unmarshal([]byte(read(t, binary+".cdx.json")), &bom); err != nil {
			t.Fatal(err)
		}
		modules, err := exec.Command("go", "version", "-m", binary).Output()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(modules)) {
			if f := strings.Fields(line); f[0] == "dep" && !slices.ContainsFunc(bom.Components, func(c struct{ Name, Version, Purl string }) bool {
				return c.Name == f[1] && c.Version == f[2] && c.Purl == "pkg:golang/"+f[1]+"@"+f[2]
			}) {
				t.Errorf("%s: no component %s %s", arch, f[1], f[2])
			}
		}
		if bom.BomFormat != "CycloneDX" {
			t.Errorf("format %q", bom.BomFormat)
		}
	}
}

// shop is a systemd with package managers and two ports with clients: the agent has one,
// the other was attached by an rpsel of layout 1.
type shop struct {
	*rpsel
	clients []*testnet.Clients
	before  [][]string
}

const (
	agentPort  = 1194
	layoutPort = 1195
)

func openShop(t *testing.T, packages string) *shop {
	t.Helper()
	ns := testnet.New(t)
	tree := t.TempDir()
	if out, err := exec.Command("cp", "-r", packages, tree+"/packages").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, dir := range []string{"info", "parts", "triggers", "updates"} {
		if err := os.MkdirAll(tree+"/var/lib/dpkg/"+dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(tree+"/var/lib/dpkg/status", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(tree+"/var/lib/rpm", 0o755); err != nil {
		t.Fatal(err)
	}
	return &shop{rpsel: &rpsel{t: t, ns: ns, port: agentPort, box: boot(t, ns, tree)}}
}

// serve starts a server in the box, in a cgroup that goes with it.
func (s *shop) serve(port, n int) *testnet.Server {
	s.t.Helper()
	pid := strconv.Itoa(s.box.pid)
	cgroup := filepath.Join(s.box.cgroup, "servers")
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		s.t.Fatal(err)
	}
	return testnet.StartGroup(s.t, s.ns, n, testnet.ServerOptions{
		Network: "udp4", Addr: fmt.Sprint("127.0.0.1:", port), ReusePort: true, Cgroup: cgroup,
		Wrap: []string{"nsenter", "--target", pid, "--pid", "--", "setpriv", "--pdeathsig", "KILL"},
	})
}

// run runs a command line in the box.
func (s *shop) run(argv ...string) string {
	s.t.Helper()
	return s.box.run(s.t, append([]string{"env", "-i", "PATH=/usr/sbin:/usr/bin", "DEBIAN_FRONTEND=noninteractive"}, argv...)...)
}

func (*shop) deb(version string) string {
	return fmt.Sprintf("/packages/%s/rpsel_%[1]s_%s.deb", version, runtime.GOARCH)
}

func (*shop) rpm(version string) string {
	arch := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	return fmt.Sprintf("/packages/%s/rpsel-%[1]s-1.%s.rpm", version, arch)
}

// meet begins to talk to a port.
func (s *shop) meet(port int) {
	s.t.Helper()
	clients := testnet.NewClients(s.t, s.ns, 300, fmt.Sprint("127.0.0.1:", port))
	s.clients = append(s.clients, clients)
	s.before = append(s.before, clients.Ask())
}

// moved is how many clients have another server now, or none.
func (s *shop) moved() (n int) {
	s.t.Helper()
	for i, c := range s.clients {
		now := c.Ask()
		n += testnet.Moved(s.before[i], now) + testnet.Shares(now)[""]
	}
	return n
}

// undisturbed runs a command line while clients talk: none moves, and none is left without an
// answer.
func (s *shop) undisturbed(argv ...string) string {
	s.t.Helper()
	cmd := s.box.command(append([]string{"env", "-i", "PATH=/usr/sbin:/usr/bin"}, argv...)...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for running := true; running; {
		select {
		case err := <-ended:
			running = false // and once more after that
			if err != nil {
				s.t.Errorf("%q: %v", argv, err)
			}
		default:
		}
		if n := s.moved(); n != 0 {
			s.t.Errorf("%q: %d clients have another server, or none", argv, n)
		}
	}
	s.t.Logf("%q says\n%s", argv, said.String())
	return said.String()
}

// awaitAgent returns when the group of the agent has so many active listeners and has
// settled.
func (s *shop) awaitAgent(listeners int) {
	s.t.Helper()
	s.await(fmt.Sprintf("%d listeners active", listeners), func(st status) bool {
		active := 0
		for _, g := range st.Groups {
			for _, l := range g.Listeners {
				if l.State == "active" && g.SettlingSeconds == 0 {
					active++
				}
			}
		}
		return active == listeners
	})
}

// is asks systemctl for a property of the agent's unit.
func (s *shop) is(property string) string {
	s.t.Helper()
	return s.run("systemctl", "show", "-P", property, "rpsel-agent.service")
}

// left are the files of a list that are there, directories of others left out.
func (s *shop) left(list string) (left []string) {
	s.t.Helper()
	for path := range strings.FieldsSeq(list) {
		if s.box.command("test", "!", "-e", path).Run() != nil &&
			(s.box.command("test", "!", "-d", path).Run() == nil || strings.Contains(path, "rpsel")) {
			left = append(left, path)
		}
	}
	return left
}

const services = "[[service]]\nport = 1194\nsettle = \"0s\"\n"

// A .deb is installed, upgraded, removed, purged and installed again under the eyes of
// clients of which none moves; of a detach they would. Their servers know nothing of it.
func testDeb(t *testing.T, packages string) {
	testnet.Privileged(t)
	need(t, "dpkg")
	s := openShop(t, packages)
	defer s.explain()

	s.run("dpkg", "--install", s.deb("0.1.0"))
	if state := s.is("ActiveState") + " " + s.is("UnitFileState"); state != "inactive disabled" {
		t.Errorf("the agent is %s after the installation", state)
	}
	if said := s.run("rpsel", "version"); !strings.HasPrefix(said, "rpsel v0.1.0\n") {
		t.Errorf("version: %s", said)
	}
	s.run("rpsel", "check", "--config", "/etc/rpsel/rpsel.toml")
	if said := s.run("systemd-analyze", "verify", "--man=no", "rpsel-agent.service"); said != "" {
		t.Errorf("systemd-analyze verify says\n%s", said)
	}
	files := s.run("dpkg", "--listfiles", "rpsel")

	s.run("sh", "-c", "printf '"+strings.ReplaceAll(services, "\n", `\n`)+"' >/etc/rpsel/rpsel.toml")
	server := s.serve(agentPort, 3)
	s.run("systemctl", "enable", "--quiet", "--now", "rpsel-agent.service")
	s.awaitAgent(3)
	s.meet(agentPort)
	server.Add()
	s.awaitAgent(4)

	// That the agent keeps this one from its own program is none of this test's business.
	s.serve(layoutPort, 3)
	layout1.Attach(t, fmt.Sprintf("/proc/%d/root/sys/fs/bpf", s.box.pid), s.ns, layoutPort, layout1.Options{Flows: 1000})
	s.meet(layoutPort)
	outdated := func() bool {
		return strings.Contains(s.run("rpsel", "upgrade", "--dry-run"), fmt.Sprint("127.0.0.1:", layoutPort, ": would upgrade"))
	}
	if !outdated() {
		t.Fatal("the group of layout 1 needs no upgrade")
	}

	agent := s.is("MainPID")
	s.undisturbed("dpkg", "--install", s.deb("0.2.0"))
	if said := s.run("rpsel", "version"); !strings.HasPrefix(said, "rpsel v0.2.0\n") {
		t.Errorf("version: %s", said)
	}
	if outdated() {
		t.Error("the group of layout 1 has its old program")
	}
	if now := s.is("MainPID"); now == agent || now == "0" || s.is("UnitFileState") != "enabled" {
		t.Errorf("the agent was process %s, is %s, %s", agent, now, s.is("UnitFileState"))
	}
	if kept := s.run("cat", "/etc/rpsel/rpsel.toml"); kept != strings.TrimSpace(services) {
		t.Errorf("the configuration was replaced:\n%s", kept)
	}
	server.Add()
	s.awaitAgent(5)

	if said := s.undisturbed("dpkg", "--remove", "rpsel"); !strings.Contains(said, "rpsel: ports that are sticky stay so") {
		t.Error("nobody was told that ports stay sticky")
	}
	if state := s.is("ActiveState") + " " + s.is("LoadState"); state != "inactive not-found" {
		t.Errorf("the agent is %s after the removal", state)
	}
	if left := s.left(files); !slices.Equal(left, []string{"/etc/rpsel", "/etc/rpsel/rpsel.toml"}) {
		t.Errorf("left after the removal: %v", left)
	}
	s.undisturbed("dpkg", "--purge", "rpsel")
	if left := append(s.left(files), s.left("/run/rpsel /etc/systemd/system/multi-user.target.wants/rpsel-agent.service")...); len(left) > 0 {
		t.Errorf("left after the purge: %v", left)
	}

	s.undisturbed("dpkg", "--install", s.deb("0.2.0"))
	s.awaitAgent(5)
	s.run("rpsel", "detach", "--port", strconv.Itoa(agentPort))
	if s.moved() == 0 {
		t.Error("after the detach nobody moved: nothing kept them")
	}
}

// An .rpm holds the same, and its scripts do the same. There is no purge.
func testRPM(t *testing.T, packages string) {
	testnet.Privileged(t)
	need(t, "rpm")
	s := openShop(t, packages)
	defer s.explain()

	// Debian's rpm has no packages that ours could need, and wants to be told so.
	rpm := []string{"rpm", "--force-debian", "--nodeps"}
	s.run(append(rpm, "--install", s.rpm("0.1.0"))...)
	s.run("rpm", "--verify", "--nodeps", "rpsel")
	if state := s.is("ActiveState") + " " + s.is("UnitFileState"); state != "inactive disabled" {
		t.Errorf("the agent is %s after the installation", state)
	}
	files := s.run("rpm", "--query", "--list", "rpsel")
	s.run("sh", "-c", "printf '"+strings.ReplaceAll(services, "\n", `\n`)+"' >/etc/rpsel/rpsel.toml")
	server := s.serve(agentPort, 3)
	s.run("systemctl", "enable", "--quiet", "--now", "rpsel-agent.service")
	s.awaitAgent(3)
	s.meet(agentPort)
	server.Add()
	s.awaitAgent(4)

	agent := s.is("MainPID")
	s.undisturbed(append(rpm, "--upgrade", s.rpm("0.2.0"))...)
	if said := s.run("rpsel", "version"); !strings.HasPrefix(said, "rpsel v0.2.0\n") {
		t.Errorf("version: %s", said)
	}
	if now := s.is("MainPID"); now == agent || now == "0" || s.is("UnitFileState") != "enabled" {
		t.Errorf("the agent was process %s, is %s, %s", agent, now, s.is("UnitFileState"))
	}
	if kept := s.run("cat", "/etc/rpsel/rpsel.toml"); kept != strings.TrimSpace(services) {
		t.Errorf("the configuration was replaced:\n%s", kept)
	}
	s.undisturbed(append(rpm, "--erase", "rpsel")...)
	if state := s.is("ActiveState") + " " + s.is("LoadState"); state != "inactive not-found" {
		t.Errorf("the agent is %s after the removal", state)
	}
	// What was changed is kept, as rpm keeps it.
	if left := s.left(files); !slices.Equal(left, []string{"/etc/rpsel"}) || s.left("/etc/rpsel/rpsel.toml.rpmsave") == nil {
		t.Errorf("left after the removal: %v", left)
	}
}
