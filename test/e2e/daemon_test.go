package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/testnet"
)

// logShown is how many bytes of a log a failed test shows.
const logShown = 4096

// daemon is a long-running process and what it wrote.
type daemon struct {
	name  string
	cmd   *exec.Cmd
	ended chan struct{} // closed when it is reaped

	mu   sync.Mutex
	log  bytes.Buffer
	news chan struct{} // closed and replaced when log grows
}

// startDaemon starts a process that is killed when the test ends. The end of
// its log is shown if the test fails.
func startDaemon(t testing.TB, ns *testnet.NetNS, name string, argv ...string) *daemon {
	t.Helper()
	return launch(t, ns, name, exec.Command(argv[0], argv[1:]...))
}

// launch is startDaemon for a command that was made otherwise.
func launch(t testing.TB, ns *testnet.NetNS, name string, cmd *exec.Cmd) *daemon {
	t.Helper()
	d := &daemon{
		name:  name,
		cmd:   cmd,
		ended: make(chan struct{}),
		news:  make(chan struct{}),
	}
	d.cmd.Stdout, d.cmd.Stderr = d, d
	d.cmd.WaitDelay = 5 * time.Second // a process of its own may keep the log open
	if err := ns.Start(d.cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.ended)
		d.cmd.Wait()
	}()
	t.Cleanup(func() {
		d.kill()
		if t.Failed() {
			log := d.log.Bytes()
			t.Logf("end of the log of %s:\n%s", name, log[max(0, len(log)-logShown):])
		}
	})
	return d
}

// Write takes a part of the log.
func (d *daemon) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.news)
	d.news = make(chan struct{})
	return d.log.Write(p)
}

// await returns when the log has a text. It fails the test if the daemon ends
// or two minutes pass before.
func (d *daemon) await(t testing.TB, text string) {
	t.Helper()
	deadline := time.After(2 * time.Minute)
	for {
		d.mu.Lock()
		has, news := strings.Contains(d.log.String(), text), d.news
		d.mu.Unlock()
		if has {
			return
		}
		select {
		case <-news:
		case <-d.ended:
			t.Fatalf("%s ended before it said %q", d.name, text)
		case <-deadline:
			t.Fatalf("%s did not say %q", d.name, text)
		}
	}
}

// awaitEnd returns the log when the daemon has ended by itself. It fails the
// test if that takes two minutes.
func (d *daemon) awaitEnd(t testing.TB) string {
	t.Helper()
	select {
	case <-d.ended:
	case <-time.After(2 * time.Minute):
		t.Fatalf("%s runs on", d.name)
	}
	return d.log.String()
}

func (d *daemon) signal(t testing.TB, signal os.Signal) {
	t.Helper()
	if err := d.cmd.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
}

// kill sends SIGKILL and returns when the process is gone.
func (d *daemon) kill() {
	d.cmd.Process.Kill()
	<-d.ended
}
