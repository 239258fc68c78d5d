package kubernetes

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/rpsel/rpsel/internal/testnet"
)

// The commands of the page for the machine, on a server in a pod, and on one in a
// user namespace.
func TestFromTheMachine(t *testing.T) {
	testnet.Privileged(t)
	page := testnet.OpenPage(t, "containers.md")
	// What is attached is to be seen in the end.
	script := strings.Replace(page.Next(), "rpsel detach", `rpsel status -H -N game | grep " active "`+"\nrpsel detach", 1)
	n := newNode(t)
	for _, test := range []struct {
		name  string
		serve func(*testing.T, *testnet.NetNS) *testnet.Server
	}{
		{"pod", func(t *testing.T, ns *testnet.NetNS) *testnet.Server {
			return startPod(t, n, ns, load(t, "sidecar.yaml"), "server").serve("a")
		}},
		{"user namespace", func(t *testing.T, ns *testnet.NetNS) *testnet.Server {
			return testnet.StartServer(t, ns, testnet.ServerOptions{
				Network: "udp4", Addr: fmt.Sprintf("0.0.0.0:%d", port), ReusePort: true,
				Wrap: []string{"unshare", "--user", "--map-root-user"},
			})
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := test.serve(t, testnet.New(t))
			said := testnet.New(t).Script(t, n.bpffs, script, "pid="+strconv.Itoa(server.PID()))
			if strings.Count(said, " active ") < 3 {
				t.Errorf("it said\n%s", said)
			}
		})
	}
}

// In a user namespace attach says why it cannot work.
func TestInUserNamespace(t *testing.T) {
	testnet.Privileged(t)
	cmd := exec.Command("unshare", "--user", "--map-root-user", "--net", testnet.Build(t), "attach", "--port", strconv.Itoa(port))
	out, _ := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != 4 || !strings.Contains(string(out), "capabilities only inside a user namespace") {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// What the page has kubectl exec do in the sidecar.
func TestInSidecar(t *testing.T) {
	testnet.Privileged(t)
	p := startPod(t, newNode(t), testnet.New(t), load(t, "sidecar.yaml"), "server")
	p.start(p.rpsel(t))
	p.serve("a")
	p.serve("b")
	p.awaitListeners(2)
	text, err := os.ReadFile("../../docs/containers.md")
	must(t, err)
	lines := regexp.MustCompile("(?m)^kubectl exec deploy/server -c rpsel -- /rpsel (.*)$").FindAllStringSubmatch(string(text), -1)
	if len(lines) != 4 {
		t.Fatalf("the page has %d commands, the test knows 4", len(lines))
	}
	for _, l := range lines {
		t.Log(p.exec(strings.Fields(l[1])...))
	}
	p.awaitListeners(2) // drained, and resumed
}
