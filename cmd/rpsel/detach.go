package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rpsel/rpsel/loader"
)

func newDetachCmd(e *env) *cobra.Command {
	var s scope
	var dryRun, asJSON bool
	cmd := &cobra.Command{
		Use:   "detach --port PORT",
		Short: "Give a port back to the kernel's hash",
		Long: `Take rpsel's program off every group on the port and remove the state. Flows go
back to where the kernel's hash sends them; --dry-run counts those that would
then have another listener (with affinity flow and confirm client; else it cannot
tell). With -N all it does so in every network namespace, and removes what is left
of those that are gone.`,
		Example: `  rpsel detach --port 1194 --dry-run
  rpsel detach --port 1194`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.needPort(cmd); err != nil {
				return err
			}
			netns, err := s.cookieOrAll()
			if err != nil {
				return err
			}
			if !dryRun && netns != 0 {
				if err := s.fs().Sweep(netns); err != nil {
					return err
				}
			}
			keys, err := s.keys(netns)
			if err != nil {
				return err
			}
			if len(keys) == 0 {
				e.say("%s: nothing is attached", &s)
			}
			if dryRun {
				return forecast(e, &s, keys, asJSON)
			}
			return detach(e, &s, keys, asJSON)
		},
	}
	s.addGroupFlags(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say how many flows would move")
	s.addBPFFSFlag(cmd)
	addJSONFlag(cmd, &asJSON)
	addQuietFlag(cmd, e)
	return cmd
}

func detach(e *env, s *scope, keys []loader.Key, asJSON bool) error {
	type detachedJSON struct {
		groupJSON
		Program   bool `json:"program"`
		Listeners int  `json:"listeners"`
		Flows     int  `json:"flows"`
	}
	answer := struct {
		Schema int            `json:"schema"`
		Groups []detachedJSON `json:"groups"`
	}{schema, []detachedJSON{}}
	text := ""
	for _, k := range keys {
		inode := s.inodeOf(k)
		d, err := s.fs().Detach(k)
		if errors.Is(err, loader.ErrNotAttached) {
			e.say("%s: detached already", s.groupName(k))
			continue
		}
		if err != nil {
			if text != "" {
				e.say("%s", strings.TrimSuffix(text, "\n"))
			}
			return err
		}
		answer.Groups = append(answer.Groups, detachedJSON{s.groupJSON(k, inode), d.Program, d.Listeners, d.Flows})
		program := "no program was attached any more"
		if d.Program {
			program = "program taken off"
		}
		text += fmt.Sprintf("%s: %s, %s and %s forgotten\n", s.groupName(k), program, plural(d.Listeners, "listener"), plural(d.Flows, "flow"))
	}
	if asJSON {
		return writeJSON(e.out, answer)
	}
	_, err := fmt.Fprint(e.out, text)
	return err
}

func forecast(e *env, s *scope, keys []loader.Key, asJSON bool) error {
	type forecastJSON struct {
		groupJSON
		Flows int  `json:"flows"`
		Move  *int `json:"move"` // null: unknown
	}
	answer := struct {
		Schema int            `json:"schema"`
		Groups []forecastJSON `json:"groups"`
	}{schema, []forecastJSON{}}
	text := ""
	for _, k := range keys {
		g, err := s.fs().Open(k)
		if err != nil {
			return err
		}
		f, err := g.DetachForecast()
		g.Close()
		if err != nil {
			return err
		}
		answer.Groups = append(answer.Groups, forecastJSON{s.groupJSON(k, s.inodeOf(k)), f.Flows, nullIfNegative(f.Move)})
		if f.Move < 0 {
			text += fmt.Sprintf("%s: how many of %s would move cannot be told: %v\n", s.groupName(k), plural(f.Flows, "flow"), loader.ErrHashUnknown)
			continue
		}
		text += fmt.Sprintf("%s: %d of %s would move\n", s.groupName(k), f.Move, plural(f.Flows, "flow"))
	}
	if asJSON {
		return writeJSON(e.out, answer)
	}
	_, err := fmt.Fprint(e.out, text)
	return err
}
