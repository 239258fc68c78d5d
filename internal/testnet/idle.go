package testnet

import (
	"fmt"
	"os/exec"
	"testing"
)

// Idle starts processes that do nothing until the test ends. They are not
// this process's children, of which it would have a descriptor each.
func Idle(t testing.TB, n int) {
	t.Helper()
	const script = `exec 3<&0; i=0; while [ $i -lt "$1" ]; do cat <&3 & i=$((i+1)); done; echo started; wait`
	cmd := exec.Command("sh", "-c", script, "sh", fmt.Sprint(n))
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	if _, err := stdout.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
}
