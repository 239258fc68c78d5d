package main

import (
	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/internal/metrics"
	"github.com/rpsel/rpsel/loader"
)

func newMetricsCmd(e *env) *cobra.Command {
	var s scope
	cmd := &cobra.Command{
		Use:   "metrics",
		Short: "Print the groups and their listeners for Prometheus",
		Long: `Print how the sticky groups and their listeners stand, in Prometheus' text format,
for the textfile collector of its node_exporter. If it fails nothing is printed. Of
a group whose state cannot be used there is no more than rpsel_group_up, which is 0.
Where the agent runs it serves the same, and how it stands itself, over HTTP.

Groups are labelled by netns (the cookie of the network namespace), proto, addr,
port, device, v6only and uid, listeners also by slot. Counters go on when another
listener takes a slot, and begin anew when a group is detached and attached.`,
		Example: `  rpsel metrics
  rpsel metrics -N all`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			groups, err := s.openUsable()
			if err == nil && len(groups)+len(s.damaged) == 0 {
				err = s.missing()
			}
			if err != nil {
				return err
			}
			defer closeAll(groups)
			summaries := append(loader.Summarize(groups), s.damaged...)
			for _, summary := range summaries {
				if summary.Err != nil && !unusable(summary.Err) {
					return summary.Err
				}
				if summary.Err != nil {
					e.warn("%s", errorText(summary.Err, false))
				}
			}
			name, _ := ownVersion()
			read := func() ([]loader.Summary, error) { return summaries, nil }
			return metrics.WriteText(e.out, metrics.New(name, read, nil))
		},
	}
	s.addGroupFlags(cmd)
	cmd.Flags().Lookup("netns").Usage = allNetNSUsage
	s.addBPFFSFlag(cmd)
	return cmd
}
