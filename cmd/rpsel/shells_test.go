package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// Twenty shells give commands about the same groups at once. They take turns:
// each gets an answer that is right at that time and none is told that the state
// is locked; nothing is left half done, and the flows of a group that nobody
// detaches stay where they are all the while.
func TestTwentyShells(t *testing.T) {
	const (
		patience  = 10 * time.Second // with a lock that another command has
		shells    = 20
		listeners = 4 // of each group
	)
	commands := 5 // of each
	if testing.Short() {
		commands = 2
	}
	path := buildCommand(t, "rpsel")
	for _, c := range []struct {
		name   string
		groups int
		detach bool // the last group
		agent  bool
	}{
		{"one group", 1, false, false},
		{"one group, detached and attached", 1, true, false},
		{"several groups", 3, true, false},
		{"several groups and the agent", 3, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns, bpffs := testnet.New(t), testnet.BPFFS(t)
			where := func(verb string, args ...string) *exec.Cmd {
				return exec.Command(path, append([]string{verb, "--bpffs", bpffs, "-N", ns.Path(), "--port", "1194"}, args...)...)
			}
			var addrs []string
			var clients []*testnet.Clients
			for i := range c.groups {
				addr := fmt.Sprint("127.0.0.", i+1)
				testnet.StartGroup(t, ns, listeners, testnet.ServerOptions{Network: "udp4", Addr: addr + ":1194", ReusePort: true})
				addrs = append(addrs, addr)
				clients = append(clients, testnet.NewClients(t, ns, 200, addr+":1194"))
			}
			if out, err := where("attach", "--settle", "0").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if c.agent {
				a := startRealAgent(t, path, bpffs, "")
				defer func() {
					a.Process.Signal(os.Interrupt)
					if err := a.Wait(); err != nil || strings.Contains(a.said(), "level=ERROR") {
						t.Errorf("the agent: %v: %s", err, a.said())
					}
				}()
			}
			// The flows of these groups must stay.
			steady := slices.Clone(clients)
			if c.detach {
				steady = steady[:len(steady)-1]
			}
			var before [][]string
			for _, flows := range steady {
				before = append(before, flows.Ask())
			}

			seed := rand.Uint64N(1e9)
			t.Log("seed", seed)
			var shell sync.WaitGroup
			t.Cleanup(shell.Wait) // if the test ends early
			for i := range shells {
				rng := rand.New(rand.NewPCG(seed, uint64(i)))
				shell.Go(func() {
					for range commands {
						group := rng.IntN(c.groups)
						detach := c.detach && group == c.groups-1
						line := shellCommand(rng, detach)
						if i == 0 {
							// It loads a program while it has the lock, which takes
							// longer than all the rest: once at a time is enough.
							line = shellLine{args: []string{"upgrade", "-j"}}
							if detach {
								line.codes = []int{exitNotFound}
							}
						}
						args := append(line.args[1:], "--addr", addrs[group])
						for again := true; again; {
							cmd, began := where(line.args[0], args...), time.Now()
							err := line.check(cmd)
							// On a machine so slow that the others take longer than a command
							// waits, it does as it is told.
							again = err != nil && strings.Contains(err.Error(), loader.ErrLocked.Error()) && time.Since(began) >= patience
							if err != nil && !again {
								t.Error(err)
							}
						}
					}
				})
			}
			done := make(chan struct{})
			go func() {
				shell.Wait()
				close(done)
			}()
			for asking := true; asking; {
				select {
				case <-done:
					asking = false
				default:
				}
				for i, flows := range clients {
					answers := flows.Ask()
					if testnet.Shares(answers)[""] != 0 {
						t.Fatalf("group %d: flows without an answer: %v", i, testnet.Shares(answers))
					}
					if i < len(steady) && testnet.Moved(before[i], answers) != 0 {
						t.Fatalf("group %d: %d flows moved", i, testnet.Moved(before[i], answers))
					}
				}
			}

			// What is done once more, by one alone, comes out as it always does.
			if out, err := where("attach", "--settle", "0").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for i, addr := range addrs {
				for slot := range listeners {
					for _, line := range [][]string{{"resume"}, {"weight", "1"}} {
						args := append(line[1:], "--addr", addr, "--slot", strconv.Itoa(slot))
						if out, err := where(line[0], args...).CombinedOutput(); err != nil {
							t.Errorf("%s: %v: %s", line[0], err, out)
						}
					}
				}
				if shares := testnet.Shares(testnet.NewClients(t, ns, 200, addr+":1194").Ask()); len(shares) != listeners || shares[""] != 0 {
					t.Errorf("group %d: new flows go to %v", i, shares)
				}
			}
			if aside, err := filepath.Glob(filepath.Join(bpffs, "rpsel", "*", "tmp_*")); err != nil || len(aside) > 0 {
				t.Errorf("left behind: %v, %v", aside, err)
			}
		})
	}
}

// shellLine is a command and what it may answer.
type shellLine struct {
	args  []string
	codes []int
}

// shellCommand draws a command. One that detaches goes together with others
// that may find nothing then, which is exit code 3.
func shellCommand(rng *rand.Rand, detach bool) shellLine {
	slot := strconv.Itoa(rng.IntN(4))
	lines := []shellLine{
		{args: []string{"attach", "--settle", "0"}},
		{args: []string{"attach", "--settle", "0", "-j"}},
		{args: []string{"drain", "--slot", slot, "-j"}},
		{args: []string{"resume", "--slot", slot, "-j"}},
		{args: []string{"weight", strconv.Itoa(1 + rng.IntN(4)), "--slot", slot, "-j"}},
		{args: []string{"status", "-j"}},
		{args: []string{"flows", "--count"}},
		{args: []string{"flush", "--client", "192.0.2.0/24", "-j"}},
	}
	if detach {
		for i := range lines[2:] {
			lines[2+i].codes = []int{exitNotFound}
		}
		lines = append(lines,
			shellLine{args: []string{"flush", "--all", "-j"}, codes: []int{exitNotFound}},
			shellLine{args: []string{"detach"}},
			shellLine{args: []string{"detach", "-j"}},
		)
	}
	return lines[rng.IntN(len(lines))]
}

// check runs the command and looks at its answer.
func (l shellLine) check(cmd *exec.Cmd) error {
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	err := cmd.Run()
	code := cmd.ProcessState.ExitCode()
	wrong := func(why string) error {
		return fmt.Errorf("%s: %s: %v, stdout %q, stderr %q", strings.Join(l.args, " "), why, err, out.String(), talk.String())
	}
	asJSON := l.args[len(l.args)-1] == "-j"
	switch {
	case code != exitDone && !slices.Contains(l.codes, code):
		return wrong("exit code")
	case code != exitDone && out.Len() > 0:
		return wrong("an answer in spite of an error")
	case code != exitDone && asJSON && !json.Valid(talk.Bytes()):
		return wrong("no JSON error")
	case code != exitDone && !asJSON && (!strings.HasPrefix(talk.String(), "rpsel: ") || strings.Count(talk.String(), "\n") != 1):
		return wrong("not one line")
	case code != exitDone:
		return nil
	case asJSON && (!json.Valid(out.Bytes()) || bytes.Count(out.Bytes(), []byte("\n")) != 1):
		return wrong("no JSON")
	case l.args[0] == "flows":
		if _, err := strconv.Atoi(strings.TrimSpace(out.String())); err != nil {
			return wrong("no number")
		}
	}
	return nil
}
