package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/loader"
)

func newFlushCmd(e *env) *cobra.Command {
	var s scope
	var filter flowFilter
	var all, asJSON bool
	cmd := &cobra.Command{
		Use:   "flush --port PORT {--client PREFIX | --slot SLOT | --all}",
		Short: "Forget flows, so that they are picked anew",
		Long: `Forget tracked flows. The next packet of such a flow is that of a new one: it may
go to another listener.`,
		Example: `  rpsel flush --port 1194 --client 127.0.0.1
  rpsel flush --port 1194 --slot 0
  rpsel flush --port 1194 --all`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.needPort(cmd); err != nil {
				return err
			}
			given := 0
			for _, name := range []string{"client", "slot", "all"} {
				if cmd.Flags().Changed(name) {
					given++
				}
			}
			if given != 1 || cmd.Flags().Changed("all") && !all {
				return usageError("%s needs exactly one of --client PREFIX, --slot SLOT and --all", cmd.CommandPath())
			}
			groups, err := s.open()
			if err != nil {
				return err
			}
			defer closeAll(groups)
			if filter.slot >= 0 {
				list, err := statuses(groups)
				if err != nil {
					return err
				}
				if err := needSlot(filter.slot, list); err != nil {
					return err
				}
			}
			return flush(e, &s, groups, filter, asJSON)
		},
	}
	s.addGroupFlags(cmd)
	filter.addFlags(cmd, &s)
	cmd.Flags().BoolVar(&all, "all", false, "all flows")
	s.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	return cmd
}

func flush(e *env, s *scope, groups []*loader.Group, filter flowFilter, asJSON bool) error {
	type flushedJSON struct {
		groupJSON
		Flushed int `json:"flushed"`
	}
	answer := struct {
		Schema int           `json:"schema"`
		Groups []flushedJSON `json:"groups"`
	}{schema, []flushedJSON{}}
	text := ""
	for _, g := range groups {
		n, err := g.Flush(func(f loader.Flow) bool { return filter.match(f, nil) })
		if err != nil {
			return err
		}
		status, err := g.Status()
		if err != nil {
			return err
		}
		answer.Groups = append(answer.Groups, flushedJSON{s.groupJSON(g.Key(), status.NetNSInode), n})
		text += fmt.Sprintf("%s: %s forgotten\n", s.groupName(g.Key()), plural(n, "flow"))
	}
	if asJSON {
		return writeJSON(e.out, answer)
	}
	_, err := fmt.Fprint(e.out, text)
	return err
}
