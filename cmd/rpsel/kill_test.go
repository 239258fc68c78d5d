package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/fault"
	"github.com/rpsel/rpsel/internal/layout1"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/sockets"
)

// P6: every command that changes a group is killed at each of its steps. The
// packets go where they went, the same command then succeeds, and nothing is
// left behind.
func TestKilledAtEveryStep(t *testing.T) {
	testnet.Privileged(t)
	rpsel := filepath.Join(t.TempDir(), "rpsel")
	if out, err := exec.Command("go", "build", "-tags", "faults", "-o", rpsel, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const upgraded = `"attached":true.*"tracked":200,`
	for _, c := range []struct {
		name   string
		before []string // commands, "add" and "close" of a listener, "start" of another process, "layout 1": attached by an older rpsel, "pick 2": new flows all go to slot 2
		killed string
		status string // what "status -j" prints in the end
		look   bool   // and right after the kill
		fresh  string // a server that gets new flows in the end
		wanted bool   // or does not
	}{
		{"attach", nil, "attach --settle 0", "", false, "s0", true},
		{"attach, a joiner", []string{"attach --settle 0", "add"}, "attach", "", false, "s3", true},
		{"attach, in a dead one's place", []string{"attach --settle 0", "close", "add"}, "attach", "", false, "s3", true},
		{"drain", []string{"attach --settle 0"}, "drain --slot 1", "", false, "s1", false},
		{"resume", []string{"attach --settle 0", "drain --slot 1"}, "resume --slot 1", "", false, "s1", true},
		{"weight", []string{"attach --settle 0"}, "weight --slot 1 5", "", false, "s1", true},
		{"attach, a new generation", []string{"attach --settle 0 --policy newest", "start 3"}, "attach --generation new", "", false, "t0", true},
		{"attach, one that waits", []string{"attach --policy newest", "start 1"}, "attach --generation new", "", false, "t0", false},
		{"attach, the last that is waited for", []string{"attach --settle 0 --policy newest", "start 2", "attach --generation new", "start 1"}, "attach", "", false, "s0", false},
		{"attach, in the gap of a generation", []string{"attach --settle 0 --policy newest", "start 3", "attach --generation new", "kill", "start 3"}, "attach", "", false, "s0", false},
		{"attach, another policy", []string{"attach --settle 0", "start 3", "attach --generation new"}, "attach --policy newest", "", false, "s0", false},
		{"attach, back to hash", []string{"attach --settle 0 --policy newest", "start 3", "attach --generation new"}, "attach --policy hash", "", false, "s0", true},
		{"detach", []string{"attach --settle 0"}, "detach", "", false, "s0", true},
		{"upgrade, layout", []string{"layout 1", "close", "pick 2"}, "upgrade", upgraded, false, "s2", true},
		{"upgrade, both", []string{"layout 1", "close", "pick 2"}, "upgrade --flows 2000", upgraded, false, "s2", true},
		{"upgrade, and a look", []string{"attach --settle 0", "close", "pick 2"}, "upgrade --flows 2000", upgraded, true, "s2", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			// once runs the command, to be killed at a step, or at none (0), and
			// returns the steps it took.
			once := func(at int) (steps []string) {
				ns, bpffs := testnet.New(t), testnet.BPFFS(t)
				log := filepath.Join(t.TempDir(), "steps")
				var printed []byte
				run := func(at int, line string) (err error) {
					args := strings.Fields(line)
					cmd := exec.Command(rpsel, slices.Concat(args[:1], []string{"--bpffs", bpffs, "-N", ns.Path(), "--port", "1194"}, args[1:])...)
					cmd.Env = append(os.Environ(), fmt.Sprint(fault.KillAt, "=", at), fault.Log+"="+log)
					if printed, err = cmd.CombinedOutput(); err != nil {
						return fmt.Errorf("%s: %w: %s", line, err, printed)
					}
					return nil
				}
				o := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true}
				servers := testnet.StartGroup(t, ns, 3, o)
				defer servers.Kill()
				var others []*testnet.Server
				defer func() {
					for _, s := range others {
						s.Kill()
					}
				}()
				clients := testnet.NewClients(t, ns, 200, "127.0.0.1:1194")
				for _, line := range c.before {
					clients.Ask()
					n, start := strings.CutPrefix(line, "start ")
					switch {
					case line == "add":
						servers.Add()
					case line == "close":
						servers.Close(0)
					case start:
						o.Name = string(rune('t' + len(others)))
						n, err := strconv.Atoi(n)
						if err != nil {
							t.Fatal(err)
						}
						others = append(others, testnet.StartGroup(t, ns, n, o))
					case line == "kill":
						others[len(others)-1].Kill()
					case line == "layout 1":
						layout1.Attach(t, bpffs, ns, 1194, layout1.Options{Flows: 1000})
					case line == "pick 2":
						key := sockets.Key{NetNS: ns.Cookie(), Proto: sockets.UDP, Addr: netip.MustParseAddrPort("127.0.0.1:1194")}
						layout1.PickOnly(t, bpffs, key, 2)
					default:
						if err := run(0, line); err != nil {
							t.Fatal(err)
						}
					}
				}
				before := clients.Ask()
				os.Remove(log)

				err := run(at, c.killed)
				text, logErr := os.ReadFile(log)
				if logErr != nil {
					t.Fatal(logErr)
				}
				steps = strings.Split(strings.TrimSpace(string(text)), "\n")
				var exit *exec.ExitError
				if at == 0 && err != nil || at > 0 && (!errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL) {
					t.Fatalf("killed at %d: %v", at, err)
				}
				when := fmt.Sprintf("killed at step %d, %q", at, steps[len(steps)-1])
				if moved := testnet.Moved(before, clients.Ask()); moved != 0 {
					t.Errorf("%s: %d flows moved", when, moved)
				}
				look := func(when string) {
					if err := run(0, "status -j"); err != nil || !regexp.MustCompile(c.status).Match(printed) {
						t.Errorf("%s: status %s, %v", when, printed, err)
					}
				}
				if c.look {
					look(when)
				}
				if err := run(0, c.killed); err != nil {
					t.Errorf("%s, and done again: %v", when, err)
				}
				after := clients.Ask()
				if moved := testnet.Moved(before, after); moved != 0 || testnet.Shares(after)[""] != 0 {
					t.Errorf("%s, and done again: %d flows moved, answers from %v", when, moved, testnet.Shares(after))
				}
				if c.status != "" {
					look(when + ", and done again")
				}
				shares := testnet.Shares(testnet.NewClients(t, ns, 200, "127.0.0.1:1194").Ask())
				if got := shares[c.fresh] > 0; got != c.wanted {
					t.Errorf("%s, and done again: %s gets new flows: %v, want %v", when, c.fresh, got, c.wanted)
				}
				aside, err := filepath.Glob(filepath.Join(bpffs, "rpsel", "*", "tmp_*"))
				if err != nil || len(aside) > 0 {
					t.Errorf("%s, and done again: left behind: %v, %v", when, aside, err)
				}
				return steps
			}
			steps := once(0)
			for at := range steps {
				once(at + 1)
			}
			t.Logf("%d steps: %s", len(steps), strings.Join(steps, ", "))
		})
	}
}

// A container is gone, and its network namespace with it: the state that is left
// can be removed all the same.
func TestDetachGoneNamespace(t *testing.T) {
	bpffs := testnet.BPFFS(t)
	t.Run("container", func(t *testing.T) {
		ns := testnet.New(t)
		testnet.StartServer(t, ns, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
		if code, _, talk := rpsel("attach", "--bpffs", bpffs, "-N", ns.Path(), "--port", "1194"); code != exitDone {
			t.Fatal(talk)
		}
	})
	code, out, talk := rpsel("detach", "--bpffs", bpffs, "-N", "all", "--port", "1194")
	if code != exitDone || !strings.Contains(out, "udp 127.0.0.1:1194") {
		t.Errorf("exit code %d, printed %q, said %q", code, out, talk)
	}
	if left, err := filepath.Glob(filepath.Join(bpffs, "rpsel*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
