package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rpsel.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoad(t *testing.T) {
	file, err := Load(write(t, `# all of it
[[service]]
port = 1194

[[service]]
port     = 8443
proto    = "tcp"
addr     = "2001:db8::1"
netns    = "all"
flows    = 1_000
idle     = "5m"
idle-new = "30s"
settle   = "0s"
adopt    = true
partial  = true
replace  = true
policy   = "newest"
owner    = "nobody"
force    = true
affinity = "client"
client-prefix = "24/56"

[[service]]
port     = 53
affinity = "bytes:00,4"

[[service]]
port     = 443
first    = "openvpn"

[[service]]
port     = 1195
confirm  = "reply"
`))
	if err != nil {
		t.Fatal(err)
	}
	nobody := uint32(65534)
	want := []Service{
		{Line: 2, Proto: sockets.UDP, Port: 1194},
		{
			Line: 5, Proto: sockets.TCP, Port: 8443, Addr: netip.MustParseAddr("2001:db8::1"), NetNS: AllNetNS, Adopt: true, Force: true,
			Options: loader.Options{Flows: 1000, Idle: 5 * time.Minute, IdleNew: 30 * time.Second, Settle: -1, Partial: true, Replace: true, Policy: loader.PolicyNewest, Owner: &nobody,
				Affinity: loader.AffinityClient, ClientPrefix: loader.ClientPrefix{V4: 24, V6: 56}},
		},
		{Line: 23, Proto: sockets.UDP, Port: 53, Options: loader.Options{Affinity: loader.AffinityBytes(0, 4)}},
		{Line: 27, Proto: sockets.UDP, Port: 443, Options: loader.Options{First: loader.FirstOpenVPN}},
		{Line: 31, Proto: sockets.UDP, Port: 1195, Options: loader.Options{Confirm: loader.ConfirmReply}},
	}
	got := file.Services
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if file.Metrics != DefaultMetrics {
		t.Errorf("metrics at %q", file.Metrics)
	}
	if name := got[1].String(); name != "tcp [2001:db8::1]:8443 netns all" {
		t.Errorf("named %s", name)
	}
	if got, err := Load(write(t, "")); err != nil || len(got.Services) != 0 || got.Metrics != DefaultMetrics {
		t.Errorf("an empty file: %v, %v", got, err)
	}
	for text, want := range map[string]string{"off": "", "127.0.0.1:9100": "127.0.0.1:9100", "[::]:9100": "[::]:9100", "unix:/run/m.sock": "unix:/run/m.sock"} {
		got, err := Load(write(t, fmt.Sprintf("metrics = %q\n[[service]]\nport = 1\n", text)))
		if err != nil || got.Metrics != want || len(got.Services) != 1 || got.Services[0].Line != 2 {
			t.Errorf("metrics = %q: %+v, %v", text, got, err)
		}
	}
	if _, err := Load("/dev/zero"); !errors.Is(err, ErrInvalid) {
		t.Errorf("/dev/zero: %v, want %v", err, ErrInvalid)
	}
	if _, err := Load("/no/such/file"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// Every mistake gets one line that names the file, the line, the key and what
// is allowed.
func TestLoadInvalid(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"[[service]]\n", "1: port: use a number from 1 to 65535"},
		{"\n[[service]]\nport = 0\n", "3: port: use a number from 1 to 65535"},
		{"[[service]]\nport = 65536", "2: port: use a number from 1 to 65535"},
		{"[[service]]\nport = -1", "2: port: use a number from 1 to 65535"},
		{"[[service]]\nport = 99999999999999999999", "2: port: use a number from 1 to 65535"},
		{"[[service]]\nport = \"1194\"", "2: port: use a number from 1 to 65535"},
		{"[[service]]\nport = 1.5", "2: port: use a number from 1 to 65535"},
		{"[[service]]\nport = [1, 2]", "2: port: use a number from 1 to 65535"},
		{"[[service]]\nproto = \"tcp\"\naddr = \"::\"", "1: port: use a number from 1 to 65535"},
		{"[[service]]\nport = 1\nproto = \"sctp\"", `3: proto: use "udp" or "tcp"`},
		{"[[service]]\nport = 1\nproto = 17", `3: proto: use "udp" or "tcp"`},
		{"[[service]]\nport = 1\naddr = \"localhost\"", "3: addr: use an IPv4 or IPv6 address"},
		{"[[service]]\nport = 1\naddr = \"fe80::1%lo\"", "3: addr: use an IPv4 or IPv6 address"},
		{"[[service]]\nport = 1\naddr = \"\"", "3: addr: use an IPv4 or IPv6 address"},
		{"[[service]]\nport = 1\nnetns = \"\"", "3: netns: use a name in /run/netns"},
		{"[[service]]\nport = 1\nnetns = 4711", "3: netns: use a name in /run/netns"},
		{"[[service]]\nport = 1\nflows = 63", "3: flows: use a number from 64 to 16777216"},
		{"[[service]]\nport = 1\nflows = 16777217", "3: flows: use a number from 64 to 16777216"},
		{"[[service]]\nport = 1\nidle = \"500ms\"", `3: idle: use a duration from 1s to 720h0m0s, such as "90s" or "5m"`},
		{"[[service]]\nport = 1\nidle = 300", "3: idle: use a duration"},
		{"[[service]]\nport = 1\nidle-new = \"soon\"", "3: idle-new: use a duration"},
		{"[[service]]\nport = 1\nsettle = \"-1s\"", "3: settle: use a duration from 0s"},
		{"[[service]]\nport = 1\npolicy = \"most\"", `3: policy: use "hash", "newest", "least", "rr", "random" or "cpu"`},
		{"[[service]]\nport = 1\naffinity = \"bytes\"", `3: affinity: use "flow", "client", "bytes:OFFSET,LENGTH" (up to 1024 and 1 to 20) or "none"`},
		{"[[service]]\nport = 1\nproto = \"tcp\"\naffinity = \"bytes:0,4\"", `4: affinity: use `},
		{"[[service]]\nport = 1\naffinity = \"client\"\nclient-prefix = 24", `4: client-prefix: use two numbers of bits, such as "24/56", with affinity = "client"`},
		{"[[service]]\nport = 1\nclient-prefix = \"24/56\"", `3: client-prefix: use two numbers`},
		{"[[service]]\nport = 1\nfirst = \"quic\"", `3: first: use "openvpn", with UDP and affinity = "flow"`},
		{"[[service]]\nport = 1\nproto = \"tcp\"\nfirst = \"openvpn\"", `4: first: use `},
		{"[[service]]\nport = 1\naffinity = \"client\"\nfirst = \"openvpn\"", `4: first: use `},
		{"[[service]]\nport = 1\nconfirm = \"maybe\"", `3: confirm: use "client" or "reply", and "reply" with proto = "udp"`},
		{"[[service]]\nport = 1\nproto = \"tcp\"\nconfirm = \"reply\"", "4: confirm: use "},
		{"[[service]]\nport = 1\naffinity = \"none\"\nconfirm = \"reply\"", "4: confirm: use "},
		{"[[service]]\nport = 1\nowner = \"no such user\"", "3: owner: use a user's name or number, or \"none\""},
		{"[[service]]\nport = 1\nforce = 1", "3: force: use true or false"},
		{"[[service]]\nport = 1\nadopt = 1", "3: adopt: use true or false"},
		{"[[service]]\nport = 1\nadopt = \"yes\"", "3: adopt: use true or false"},
		{"[[service]]\nport = 1\nsetle = \"1s\"", "3: setle: unknown key: use addr, adopt, "},
		{"[[service]]\nport = 1\nidle.new = \"1s\"", "3: idle: use a duration"},
		{"[[service]]\nport = 1\n[service.extra]\nx = 1", "3: extra: unknown key"},
		{"[[services]]\nport = 1", "1: services: unknown: the file consists of [[service]] tables"},
		{"\nmetrics = \"localhost:9100\"", `2: metrics: use an address and port, such as "127.0.0.1:10194", "unix:/PATH" or "off"`},
		{"metrics = \"127.0.0.1\"", "1: metrics: use an address"},
		{"metrics = \"127.0.0.1:0\"", "1: metrics: use an address"},
		{"metrics = \"127.0.0.1:65536\"", "1: metrics: use an address"},
		{"metrics = \"unix:run/m.sock\"", "1: metrics: use an address"},
		{"metrics = \"\"", "1: metrics: use an address"},
		{"metrics = 9100", "1: metrics: use an address"},
		{"metrics.port = 9100", "1: metrics: "},
		{"[metrics]\nport = 9100", "1: "},
		{"[[service]]\nport = 1\nmetrics = \"off\"", "3: metrics: unknown key: use addr"},
		{"port = 1194", "1: port: unknown: the file consists of [[service]] tables"},
		{"[service]\nport = 1194", "1: service: write [[service]], and its keys below it"},
		{"service = 1", "1: service: write [[service]], and its keys below it"},
		{"service = [{port = 0}]", "1: service: write [[service]], and its keys below it"},
		{"[[service]]\nport = 1\nport = 2", "3: port: "},
		{"[[service]]\nport =\n", "2: no TOML: "},
		{"[[service\nport = 1\n", "1: no TOML: "},
		{"[[service]]\nport = 1\n\n[[service]]\nport = 1\nproto = \"udp\"", "4: service: udp *:1 is the service of line 1 already: remove one"},
	} {
		t.Run(c.text, func(t *testing.T) {
			path := write(t, c.text)
			file, err := Load(path)
			if !errors.Is(err, ErrInvalid) || file.Services != nil {
				t.Fatalf("%v, %v", file, err)
			}
			if said := err.Error(); !strings.HasPrefix(said, path+":"+c.want) || strings.Contains(said, "\n") {
				t.Errorf("said %q, want %q", said, c.want)
			}
		})
	}
}

// No file makes it panic, nor gives an error without its line.
func FuzzParse(f *testing.F) {
	f.Add([]byte("[[service]]\nport = 1\nidle = \"1s\"\n"))
	f.Add([]byte("metrics = \"off\"\n[[service]]\nport = 1\n"))
	f.Add([]byte("service = [{port = 1}, {port = 2}]"))
	f.Add([]byte("[[service]]\n[service.x]\n[[service]]\nport.a = 1"))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := parse(data)
		if at, ok := errors.AsType[*lineError](err); err != nil && (!ok || at.line < 1) {
			t.Errorf("no line: %v", err)
		}
		for _, s := range file.Services {
			if s.Port == 0 || s.Line < 1 {
				t.Errorf("took %+v", s)
			}
		}
	})
}
