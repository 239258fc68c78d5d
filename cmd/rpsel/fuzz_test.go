package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/internal/testnet"
)

// unfit are commands that do more than a test in this process may: they run another
// program, stay, write files, or make namespaces of their own.
var unfit = []string{"run", "reap", "agent", "demo", demoInside, demoListener, "events", "manual"}

// newFitCmd is rpsel, of which what is unfit does nothing once its command line is read, and
// nor does a status that would stay. What has no namespace or bpffs takes the flags for them.
func newFitCmd(e *env) *cobra.Command {
	root := newRootCmd(e)
	root.PersistentFlags().String("netns", "", "")
	root.PersistentFlags().String("bpffs", "", "")
	for _, cmd := range root.Commands() {
		act := cmd.RunE
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			watch := cmd.Flags().Lookup("watch")
			if slices.Contains(unfit, cmd.Name()) || watch != nil && watch.Changed {
				return nil
			}
			return act(cmd, args)
		}
	}
	return root
}

// P9: whatever the command line, it ends with a code of exit.go, and what fails says so in one
// line. The arguments are separated by line feeds; all is about a namespace and a bpffs
// with nothing in them.
func FuzzArgs(f *testing.F) {
	for _, args := range []string{
		"", "help", "-h", "help attach", "status", "status -N all -j", "status -j -H", "attach --port 1194", "attach --port 0",
		"attach -p 1194 --affinity bytes:0,4 --flows 64 --idle 1s --policy least", "attach -p 1 --affinity bytes:9999,4", "attach -p 1 --client-prefix 0/0",
		"attach -p 1 --idle 99999999h", "attach -p 1 --owner 4294967295", "attach -p 1 --owner -1", "detach --port 65536", "detach -p 1194 --dry-run",
		"drain --pid 1 --wait --timeout 1ms", "drain --slot -1", "drain --slot 4096 -p 1", "resume --pid 99999999999999999999", "weight 0 --slot 1", "weight 65536 --pid 1",
		"flush --all --client 10.0.0.0/33", "flush --client fe80::1%lo/64", "flows --client 10.0.0.1 --count -H", "flows --state busy", "why", "why 10.0.0.1:0",
		"why [2001:db8::1]:40001 -j", "why [::ffff:10.0.0.1]:1", "why 10.0.0.1 10.0.0.2", "why %", "upgrade --flows 63 -p 1", "upgrade --dry-run",
		"check --port x", "check -j", "version -j", "completion bash", "completion fisch", "completion", "statsu", "--port", "--netns", "-jjj", "--json=maybe", "status --addr ::1%lo",
		"-\x00", "status \x1b[2J", "help \xff", "attach --bpffs /dev/null -p 1", "status --proto=sctp", "-- status", "weight -- -1",
		"status -w", "status --watch=1ms", "agent --config x", "events -j", "run -p 1 -- true", "demo -j",
	} {
		f.Add(strings.ReplaceAll(args, " ", "\n"))
	}
	testnet.Privileged(f)
	ns, fs := testnet.New(f), testnet.BPFFS(f)
	f.Fuzz(func(t *testing.T, line string) {
		args := strings.Split(line, "\n")
		// Twice, for a flag before them takes what comes next as its value.
		about := []string{"--netns=" + ns.Path(), "--bpffs=" + fs}
		if end := slices.Index(args, "--"); end >= 0 {
			args = slices.Insert(args, end, append(about, about...)...)
		} else {
			args = append(args, append(about, about...)...)
		}
		var out, talk bytes.Buffer
		code := 0
		err := ns.Do(func() error {
			e := &env{out: plain{&out}, err: plain{&talk}}
			code = execute(newFitCmd(e), args, e)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		switch said := talk.String(); {
		case code < exitDone || code > exitTimeout:
			t.Errorf("%q: exit code %d", args, code)
		case code == exitDone:
		case strings.Count(said, "\n") != 1 || !strings.HasSuffix(said, "\n"):
			t.Errorf("%q: exit code %d, said %q, want one line", args, code, said)
		case strings.ContainsFunc(said, func(r rune) bool { return r < ' ' && r != '\n' || r == 0x7f }):
			t.Errorf("%q: said %q, which a terminal would obey", args, said)
		}
	})
}

// What a process may call itself does nothing to the terminal.
func TestPlain(t *testing.T) {
	for text, want := range map[string]string{
		"4711  openvpn\tactive\n": "4711  openvpn\tactive\n",
		"\x1b[2Jevil\r\x7f":       "?[2Jevil??",
		"\u009b31m ü █ \u00a0":    "??31m ü █ \u00a0",
		"":                        "",
	} {
		var out bytes.Buffer
		if n, err := (plain{&out}).Write([]byte(text)); err != nil || n != len(text) || out.String() != want {
			t.Errorf("%q: wrote %q, %d, %v, want %q", text, out.String(), n, err, want)
		}
	}
}
