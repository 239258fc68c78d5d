package main

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// complete lets the shell complete the values of a flag.
func complete(cmd *cobra.Command, flag string, values ...string) {
	completeBy(cmd, flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

func completeBy(cmd *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err) // the flag is not there, or completed twice
	}
}

// completePath is for a flag that takes a file, or a directory.
func completePath(cmd *cobra.Command, flag string, kind cobra.ShellCompDirective) {
	completeBy(cmd, flag, cobra.FixedCompletions(nil, kind))
}

// completeNothing keeps the shell from offering files for what nothing completes.
func completeNothing(root *cobra.Command) {
	for _, cmd := range root.Commands() {
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if _, has := cmd.GetFlagCompletionFunc(f.Name); !has {
				completeBy(cmd, f.Name, cobra.NoFileCompletions)
			}
		})
		if cmd.ValidArgsFunction == nil && cmd.ValidArgs == nil {
			cmd.ValidArgsFunction = cobra.NoFileCompletions
		}
	}
}

// candidate is a word that may be meant, and what it is.
type candidate struct{ word, about string }

// completeFrom completes by a list of what there is. Nobody reads an error while he types:
// who may not look is offered nothing.
func completeFrom(list func(prefix string) ([]candidate, error)) cobra.CompletionFunc {
	return func(_ *cobra.Command, _ []string, prefix string) (words []cobra.Completion, _ cobra.ShellCompDirective) {
		found, err := list(prefix)
		if err != nil {
			found = nil
		}
		about := map[string][]string{}
		for _, c := range found {
			if strings.HasPrefix(c.word, prefix) && !slices.Contains(about[c.word], c.about) {
				about[c.word] = append(about[c.word], c.about)
			}
		}
		for _, c := range found {
			if list, ok := about[c.word]; ok {
				words = append(words, cobra.CompletionWithDesc(c.word, oneLine(strings.Join(list, ", "))))
				delete(about, c.word)
			}
		}
		return words, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

// firstOnly is for a command with one argument.
func firstOnly(f cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return f(cmd, args, prefix)
	}
}

// oneLine takes out what would make another candidate of a process's name.
func oneLine(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, text)
}

// attachedKeys are the scope's groups that have state, whatever their port.
func (s *scope) attachedKeys() ([]loader.Key, error) {
	netns, err := s.cookieOrAll()
	if err != nil {
		return nil, err
	}
	return s.fs().Keys(netns)
}

// servingKeys are the groups and lone sockets of the scope's namespace that serve.
func (s *scope) servingKeys() (keys []loader.Key, err error) {
	netns, err := s.cookie()
	if err != nil {
		return nil, err
	}
	groups, err := sockets.Find(sockets.Query{NetNS: netns})
	for _, g := range groups {
		if !g.Connected() {
			keys = append(keys, g.Key)
		}
	}
	return keys, err
}

// meant tells whether a port is one of a protocol, as the command line stands.
func (s *scope) meant(p sockets.Proto) bool { return p == cmp.Or(s.proto, sockets.UDP) }

// completeKeys completes --port and --addr by some keys, of the protocols that are meant.
func (s *scope) completeKeys(cmd *cobra.Command, list func() ([]loader.Key, error), meant func(sockets.Proto) bool) {
	each := func(word func(loader.Key) string, port uint16) cobra.CompletionFunc {
		return completeFrom(func(string) (found []candidate, err error) {
			keys, err := list()
			slices.SortFunc(keys, func(a, b loader.Key) int {
				return cmp.Or(cmp.Compare(a.Addr.Port(), b.Addr.Port()), a.Addr.Compare(b.Addr))
			})
			for _, k := range keys {
				if meant(k.Proto) && (port == 0 || port == k.Addr.Port()) {
					found = append(found, candidate{word(k), s.groupName(k)})
				}
			}
			return found, err
		})
	}
	completeBy(cmd, "port", each(func(k loader.Key) string { return strconv.Itoa(int(k.Addr.Port())) }, 0))
	completeBy(cmd, "addr", func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return each(func(k loader.Key) string { return k.Addr.Addr().String() }, s.port)(cmd, args, prefix)
	})
}

const runNetNS = "/run/netns"

// completeNetNS completes by the names that "ip netns" lists, by files where a path has
// begun, and by "all" where the command takes that.
func completeNetNS(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if strings.Contains(prefix, "/") {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return completeFrom(func(string) (found []candidate, err error) {
		if cmd.Flags().Lookup("netns").Usage == allNetNSUsage {
			found = append(found, candidate{allNetNS, "every network namespace"})
		}
		names, _ := os.ReadDir(runNetNS) // none is no reason to leave out "all"
		for _, n := range names {
			found = append(found, candidate{n.Name(), "network namespace"})
		}
		return found, nil
	})(cmd, args, prefix)
}

// listeners are those of the groups that a command line has chosen so far.
func (s *scope) listeners(each func(loader.Key, loader.Listener)) error {
	list, err := s.look()
	if err != nil {
		return err
	}
	for _, status := range list {
		for _, l := range status.Listeners {
			each(status.Key, l)
		}
	}
	return nil
}

// completeSlot completes --slot by the listeners there are, and, where that makes sense,
// by those there were.
func (s *scope) completeSlot(cmd *cobra.Command, dead bool) {
	completeBy(cmd, "slot", completeFrom(func(string) (found []candidate, err error) {
		err = s.listeners(func(_ loader.Key, l loader.Listener) {
			if l.State == "dead" && !dead {
				return
			}
			found = append(found, candidate{strconv.Itoa(l.Slot), fmt.Sprintf("%s (pid %d), %s", l.Command, l.PID, l.State)})
		})
		return found, err
	}))
}

// completePID completes --pid by the processes that have a listener.
func (s *scope) completePID(cmd *cobra.Command) {
	completeBy(cmd, "pid", completeFrom(func(string) (found []candidate, err error) {
		err = s.listeners(func(k loader.Key, l loader.Listener) {
			if l.State == "dead" {
				return
			}
			for _, pid := range append([]int{l.PID}, l.Holders...) {
				found = append(found, candidate{strconv.Itoa(pid), fmt.Sprintf("%s, %s slot %d", l.Command, s.groupName(k), l.Slot)})
			}
		})
		return found, err
	}))
}

// A table may have millions of flows. Nobody chooses among so many clients, and
// nobody waits for them.
const (
	clientsLookedAt = 100_000
	clientsOffered  = 500
)

// completeClient completes by the addresses that flows come from.
func (s *scope) completeClient() cobra.CompletionFunc {
	return completeFrom(func(prefix string) (found []candidate, err error) {
		groups, err := s.openUsable()
		if err != nil {
			return nil, err
		}
		defer closeAll(groups)
		looked, seen := 0, map[netip.Addr]bool{}
		for _, g := range groups {
			for f, err := range g.Flows() {
				if err != nil {
					return nil, err
				}
				addr := f.Client.Addr()
				if looked++; looked > clientsLookedAt || len(found) == clientsOffered {
					return found, nil
				}
				if !seen[addr] && strings.HasPrefix(addr.String(), prefix) {
					seen[addr] = true
					found = append(found, candidate{addr.String(), "client of " + s.groupName(g.Key())})
				}
			}
		}
		slices.SortFunc(found, func(a, b candidate) int { return strings.Compare(a.word, b.word) })
		return found, nil
	})
}

// completeDevice completes by the network interfaces there are.
func completeDevice(string) (found []candidate, err error) {
	devices, err := net.Interfaces()
	for _, d := range devices {
		found = append(found, candidate{d.Name, d.Flags.String()})
	}
	return found, err
}
