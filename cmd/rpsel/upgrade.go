package main

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/loader"
)

func newUpgradeCmd(e *env) *cobra.Command {
	var s scope
	var o loader.UpgradeOptions
	var partial, asJSON bool
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Move running groups to this rpsel's program",
		Long: `Put this rpsel's program, and its layout of the state, in the place of those that
groups were attached with: of all groups of this network namespace, or of those on
a port. No packet is without a program, and no tracked flow moves. With --flows the
flow table gets another size; flows that begin while it is copied are tracked from
their next packet on.

All groups are checked before one is changed, and if one cannot be upgraded none
is. With --partial the others are, and the command fails all the same.`,
		Example: `  rpsel upgrade --dry-run
  rpsel upgrade
  rpsel upgrade --port 1194 --flows 1000000`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			netns, err := s.cookieOrAll()
			if err != nil {
				return err
			}
			keys, err := s.keys(netns)
			if err != nil {
				return err
			}
			if len(keys) == 0 && (s.port != 0 || s.addr.IsValid()) {
				return notFound(`%s: nothing is attached: "rpsel attach" makes a port sticky, "rpsel status" lists those that are`, &s)
			}
			if len(keys) == 0 {
				e.say(`nothing is attached: "rpsel attach" makes a port sticky`)
			}
			return upgrade(e, &s, keys, o, partial, asJSON)
		},
	}
	s.addGroupFlags(cmd)
	flags := cmd.Flags()
	flags.Lookup("netns").Usage = allNetNSUsage
	flags.Var(numberValue{&o.Flows, loader.MinFlows, loader.MaxFlows}, "flows", "`NUMBER` of flows the table is to hold (default: as many as before)")
	flags.BoolVar(&o.DryRun, "dry-run", false, "only say what would be done")
	flags.BoolVar(&partial, "partial", false, "leave out groups that cannot be upgraded")
	s.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	addQuietFlag(cmd, e)
	addVerboseFlag(cmd, e, "say which maps are made anew")
	return cmd
}

type upgradedJSON struct {
	groupJSON
	UpToDate     bool     `json:"up_to_date"`
	Program      bool     `json:"program"`
	FromLayout   int      `json:"from_layout"`
	Layout       int      `json:"layout"`
	FromCapacity int      `json:"from_capacity"`
	Capacity     int      `json:"capacity"`
	Flows        int      `json:"flows"`
	Made         []string `json:"made"`
}

func upgrade(e *env, s *scope, keys []loader.Key, o loader.UpgradeOptions, partial, asJSON bool) error {
	answer := struct {
		Schema int            `json:"schema"`
		Groups []upgradedJSON `json:"groups"`
	}{schema, []upgradedJSON{}}
	text := ""
	check := o
	check.DryRun = true
	var checked []loader.Upgraded
	var left error // why groups are left out
	leave := func(err error) bool {
		if partial && left == nil {
			left = err
		} else if partial {
			left = fmt.Errorf("%w; %w", left, err)
		}
		return partial
	}
	for _, k := range keys {
		u, err := s.fs().Upgrade(k, check)
		if errors.Is(err, loader.ErrNotAttached) {
			continue // detached since it was listed
		}
		if err != nil {
			if leave(err) {
				continue
			}
			return err
		}
		checked = append(checked, u)
	}
	for _, u := range checked {
		name, inode := s.groupName(u.Key), s.inodeOf(u.Key)
		if !o.DryRun { // also what is up to date, after which there may be something to clear up
			var err error
			if u, err = s.fs().Upgrade(u.Key, o); err != nil {
				if leave(err) {
					continue
				}
				if text != "" {
					e.say("%s", strings.TrimSuffix(text, "\n"))
				}
				return err
			}
		}
		made := append([]string{}, u.Made...)
		answer.Groups = append(answer.Groups, upgradedJSON{
			s.groupJSON(u.Key, inode), u.UpToDate, u.Program,
			u.FromLayout, u.Layout, u.FromCapacity, u.Capacity, u.Flows, made,
		})
		if u.UpToDate {
			e.say("%s: up to date", name)
			continue
		}
		if len(made) > 0 {
			e.explain("%s: made anew: %s", name, strings.Join(made, ", "))
		}
		text += name + ": " + describeUpgrade(u, o.DryRun) + "\n"
	}
	if asJSON && left != nil {
		return left // an error has no answer beside it
	}
	if asJSON {
		return writeJSON(e.out, answer)
	}
	_, err := fmt.Fprint(e.out, text)
	return cmp.Or(left, err)
}

// describeUpgrade says what was done, or would be.
func describeUpgrade(u loader.Upgraded, dryRun bool) string {
	verb := "upgraded"
	if dryRun {
		verb = "would upgrade"
	}
	what := "the program"
	if !u.Program {
		what = "the state, its program is not attached"
	}
	if u.FromLayout != u.Layout {
		what += fmt.Sprintf(", layout %d to %d", u.FromLayout, u.Layout)
	}
	if u.FromCapacity != u.Capacity {
		what += fmt.Sprintf(", room for %d flows to %d", u.FromCapacity, u.Capacity)
	}
	return fmt.Sprintf("%s %s, %s kept", verb, what, plural(u.Flows, "flow"))
}
