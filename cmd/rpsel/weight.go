package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/loader"
)

func newWeightCmd(e *env) *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "weight --port PORT {--pid PID | --slot SLOT} WEIGHT",
		Short: "Set a listener's share of new flows",
		Long: `Set a listener's share of new flows, relative to the weights of the others, which
are 1 at first. No existing flow moves. For no new flows at all, drain it.`,
		Example: `  rpsel weight --port 1194 --slot 0 4`,
		Args:    oneArg("weight"),
		RunE: func(cmd *cobra.Command, args []string) error {
			weight, err := parseNumber(args[0], 1, loader.MaxWeight)
			if err != nil {
				return usageError("weight %q: %v; to end new flows use rpsel drain", args[0], err)
			}
			groups, listeners, err := t.find(cmd)
			if err != nil {
				return err
			}
			defer closeAll(groups)
			for _, l := range listeners {
				if err := l.group.SetWeight(l.Slot, weight); err != nil {
					return err
				}
				e.say("%s: %s", l.name(&t.scope), already(l.Weight == weight, fmt.Sprint("weight ", weight)))
			}
			if asJSON {
				return writeAltered(e, &t.scope, groups, listeners)
			}
			return nil
		},
	}
	t.addFlags(cmd)
	addJSONFlag(cmd, &asJSON)
	addQuietFlag(cmd, e)
	return cmd
}
