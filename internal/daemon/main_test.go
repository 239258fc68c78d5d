package daemon

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/internal/statedir"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

func TestMain(m *testing.M) { testnet.Main(m) }

// testAgent is an agent in this process.
type testAgent struct {
	t      testing.TB
	fs     loader.FS
	config string
	reload chan os.Signal
	stop   func() // and returns when it has ended

	mu  sync.Mutex
	log bytes.Buffer
}

// Write takes what the agent logs.
func (a *testAgent) Write(line []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.Write(line)
}

func (a *testAgent) said() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.String()
}

// start starts an agent that is ready when it returns.
func start(t testing.TB, fs, services string, change ...func(*Options)) *testAgent {
	t.Helper()
	a := &testAgent{t: t, fs: loader.FS(fs), config: filepath.Join(t.TempDir(), "rpsel.toml"), reload: make(chan os.Signal)}
	a.write(services)
	o := Options{FS: a.fs, Config: a.config, Reload: a.reload, Log: slog.New(slog.NewTextHandler(a, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	// Tests are impatient, and on machines that are busy.
	o.pace = usual
	o.pace.tick, o.pace.sweep, o.pace.retry = 100*time.Millisecond, 300*time.Millisecond, 500*time.Millisecond
	o.pace.young = time.Minute
	for _, f := range change {
		f(&o)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, o) }()
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	dir, err := agent.Dir(fs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.stop()
		os.RemoveAll(dir)
		if t.Failed() {
			t.Logf("the agent said:\n%s", a.said())
		}
	})
	a.awaitSaid("msg=ready")
	return a
}

// write writes the agent's file, without metrics unless the first line says where:
// other agents run beside this one.
func (a *testAgent) write(services string) {
	a.t.Helper()
	if !strings.HasPrefix(services, "metrics = ") {
		services = "metrics = \"off\"\n" + services
	}
	if err := os.WriteFile(a.config, []byte(services), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

func (a *testAgent) awaitSaid(what string) {
	a.t.Helper()
	await(a.t, "the agent to say "+what, func() bool { return strings.Contains(a.said(), what) })
}

// await waits for something that nothing tells of.
func await(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func service(ns *testnet.NetNS, port int, more ...string) string {
	return fmt.Sprintf("[[service]]\nport = %d\nnetns = %q\n%s\n", port, ns.Path(), strings.Join(more, "\n"))
}

func keyOf(ns *testnet.NetNS, proto loader.Proto, addr string) loader.Key {
	return loader.Key{NetNS: ns.Cookie(), Proto: proto, Addr: netip.MustParseAddrPort(addr)}
}

// status reads the state of a group; ok: it has some.
func status(t testing.TB, fs loader.FS, key loader.Key) (s loader.Status, ok bool) {
	t.Helper()
	g, err := fs.Open(key)
	if err != nil {
		return s, false
	}
	defer g.Close()
	if s, err = g.Status(); err != nil {
		t.Fatal(err)
	}
	return s, true
}

// awaitListeners waits until a group is attached, has settled and has exactly so
// many living listeners, all registered, and nobody is at work on it.
func (a *testAgent) awaitListeners(key loader.Key, n int) loader.Status {
	a.t.Helper()
	var s loader.Status
	await(a.t, fmt.Sprintf("%d listeners on %s", n, key), func() (ok bool) {
		s, ok = status(a.t, a.fs, key)
		alive := 0
		for _, l := range s.Listeners {
			if l.State != "dead" {
				alive++
			}
		}
		return ok && s.Attached && alive == n && len(s.Unregistered) == 0 && s.Settling == 0
	})
	// The last of them is active before it has its share.
	if err := statedir.FS(a.fs).AwaitUnlocked(key.NetNS, time.Minute); err != nil {
		a.t.Fatal(err)
	}
	return s
}

// find finds the sockets on a port of a namespace.
func findPort(t testing.TB, ns *testnet.NetNS, port uint16) []sockets.Group {
	t.Helper()
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: port})
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(groups, sockets.Group.Connected)
}
