package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

const about = `rpsel makes a SO_REUSEPORT port sticky: a packet of a flow goes to the listener
that has the flow, whatever listeners join, leave or restart. Only the flows of a
lost listener ever move. The servers need not know.`

func newRootCmd(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "rpsel",
		Short: "Make SO_REUSEPORT ports sticky",
		Long: about + `

Exit codes: 0 done, 1 failed, 2 wrong command line, 3 no such group or listener,
4 permission denied, 5 not supported by this kernel or socket, 6 timed out.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			hint := `"rpsel help" lists them`
			if close := cmd.SuggestionsFor(args[0]); len(close) > 0 {
				hint = "did you mean " + strings.Join(close, " or ") + "?"
			}
			return usageError("unknown command %q: %s", args[0], hint)
		},
		PersistentPreRunE:          func(cmd *cobra.Command, _ []string) error { return checkExclusive(cmd) },
		RunE:                       func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors:              true,
		SilenceUsage:               true,
		SuggestionsMinimumDistance: 2,
		CompletionOptions:          cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetOut(e.out)
	root.SetErr(e.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError(`%s: see "%s --help"`, tidyFlagError(err), cmd.CommandPath())
	})
	root.AddCommand(
		newAttachCmd(e), newDetachCmd(e), newRunCmd(e), newReapCmd(e), newAgentCmd(e),
		newDrainCmd(e), newResumeCmd(e), newWeightCmd(e), newFlushCmd(e), newUpgradeCmd(e),
		newStatusCmd(e), newFlowsCmd(e), newWhyCmd(e), newEventsCmd(e), newMetricsCmd(e),
		newCheckCmd(e), newDemoCmd(e), newDemoInsideCmd(e), newDemoListenerCmd(e), newVersionCmd(e), newCompletionCmd(e), newManualCmd(e),
	)
	completeNothing(root)
	root.SetHelpCommand(newHelpCmd())
	root.SetUsageTemplate(usageTemplate)
	return root
}

// usageTemplate is the flag library's, without what says nothing.
const usageTemplate = `Usage:
  {{if .HasAvailableSubCommands}}{{.CommandPath}} COMMAND{{else}}{{.UseLine}}{{end}}
{{- if .HasExample}}

Examples:
{{.Example}}
{{- end}}
{{- if .HasAvailableSubCommands}}

Commands:
{{- range .Commands}}{{if or .IsAvailableCommand (eq .Name "help")}}
  {{rpad .Name .NamePadding}} {{.Short}}
{{- end}}{{end}}

"rpsel help COMMAND" explains one.
{{- else if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}
{{- end}}
`

// exclusive lists flags of which one makes the other useless.
var exclusive = [][2]string{{"json", "no-header"}, {"count", "no-header"}, {"quiet", "verbose"}}

func checkExclusive(cmd *cobra.Command) error {
	for _, pair := range exclusive {
		if cmd.Flags().Changed(pair[0]) && cmd.Flags().Changed(pair[1]) {
			return usageError("--%s and --%s: use one of them", pair[0], pair[1])
		}
	}
	return nil
}

func newHelpCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Explain a command",
		Example: `  rpsel help
  rpsel help attach`,
		ValidArgsFunction: firstOnly(func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return completeFrom(func(string) (found []candidate, _ error) {
				for _, c := range cmd.Root().Commands() {
					if c.IsAvailableCommand() {
						found = append(found, candidate{c.Name(), c.Short})
					}
				}
				return found, nil
			})(cmd, args, prefix)
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 && about == cmd.Root() {
				return usageError(`help %s: no such command: "rpsel help" lists them`, strings.Join(args, " "))
			}
			about.InitDefaultHelpFlag()
			return about.Help()
		},
	}
}

// noArgs refuses arguments that are not flags.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError("%s takes no argument, got %q", cmd.CommandPath(), args[0])
	}
	return nil
}

// oneArg asks for exactly one argument, which name describes.
func oneArg(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usageError("%s takes one %s, got %d arguments", cmd.CommandPath(), name, len(args))
		}
		return nil
	}
}

// plural writes a number with its noun.
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
