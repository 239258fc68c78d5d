package main

import (
	"github.com/spf13/cobra"
)

func newCompletionCmd(e *env) *cobra.Command {
	shells := map[string]func(*cobra.Command) error{
		"bash": func(root *cobra.Command) error { return root.GenBashCompletionV2(e.out, true) },
		"fish": func(root *cobra.Command) error { return root.GenFishCompletion(e.out, true) },
		"zsh":  func(root *cobra.Command) error { return root.GenZshCompletion(e.out) },
	}
	return &cobra.Command{
		Use:   "completion {bash|fish|zsh}",
		Short: "Print a shell's completion script",
		Long: `Print the script by which a shell completes rpsel's commands and flags, and ports,
addresses, processes, slots and clients by what there is:
  bash  eval "$(rpsel completion bash)", or a file in /etc/bash_completion.d
  fish  a file in /etc/fish/completions
  zsh   a file _rpsel in a directory of $fpath

The packages of rpsel have installed all three.`,
		Example:   `  rpsel completion bash`,
		ValidArgs: []string{"bash", "fish", "zsh"},
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError("completion takes one shell: bash, fish or zsh")
			}
			if shells[args[0]] == nil {
				return usageError("completion %q: use bash, fish or zsh", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return shells[args[0]](cmd.Root()) },
	}
}
