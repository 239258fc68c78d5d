package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/daemon"
)

func newAgentCmd(e *env) *cobra.Command {
	var s scope
	var file, dir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Keep ports sticky while servers come and go",
		Long: `Keep ports sticky while servers come and go, until SIGTERM or SIGINT: attach the
services of the configuration, and keep those and whatever else is attached, in
every network namespace. A new listener is registered as it binds; a group whose
last socket had closed is attached again when a server comes back; the state of
a network namespace that is gone is removed.

Traffic does not need the agent: when it ends, or is killed, everything goes on
as it is, and the next one catches up. There is one agent per BPF file system.

The agent serves /metrics for Prometheus, and /healthz: 200 if it does its work,
else 503 and why, in a line. Where a port is taken it works on, says so and tries
again. Only this machine is let in, unless its configuration says otherwise.

The configuration is a list of services. All keys but the port may be left out;
they are named after the flags of "rpsel attach":

  metrics = "` + config.DefaultMetrics + `"  # or "unix:/PATH", or "off"

  [[service]]
  port  = 1194
  proto = "udp"        # udp or tcp
  addr  = "0.0.0.0"    # one address, instead of every
  netns = "all"        # name, path, pid or all, instead of the agent's own
  idle  = "5m"         # and policy, affinity, client-prefix, first, confirm,
                       # flows, idle-new, settle, adopt, partial, replace, owner
  force = true         # pin programs for BPFProgram= of systemd

SIGHUP makes the agent read it again; with a wrong one all stays as it was. What
is attached stays so when its service is removed; what "rpsel detach" takes off
while it has a service is attached again. "rpsel check --config" looks for
mistakes.

Listeners are reported by programs on a cgroup2 directory. Where another tool's
program there leaves no place for them, there is no cgroup2, or processes are
outside of the agent's cgroup namespace, the agent asks for new sockets four times
a second instead; "rpsel status" says so, and why.`,
		Example: `  rpsel agent
  rpsel agent --config services.toml -v`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			reload := make(chan os.Signal, 1)
			signal.Notify(reload, unix.SIGHUP)
			defer signal.Stop(reload)
			name, _ := ownVersion()
			return configError(daemon.Run(ctx, daemon.Options{
				FS: s.fs(), Config: file, Optional: !cmd.Flags().Changed("config"), Cgroup: dir,
				Version: name, Log: e.logger(asJSON), Reload: reload,
			}))
		},
	}
	flags := cmd.Flags()
	addConfigFlag(cmd, &file, "`FILE` with the services (default "+config.Default+", if there is one)")
	file = config.Default
	flags.Var(textValue{&dir, "use a directory"}, "cgroup", "watch the processes of the cgroup `DIR` only (default: all that can be seen)")
	completePath(cmd, "cgroup", cobra.ShellCompDirectiveFilterDirs)
	s.addBPFFSFlag(cmd)
	flags.BoolVarP(&asJSON, "json", "j", false, "log JSON; errors too")
	flags.BoolVarP(&e.quiet, "quiet", "q", false, "log warnings and errors only")
	addVerboseFlag(cmd, e, "log more")
	return cmd
}

func addConfigFlag(cmd *cobra.Command, file *string, usage string) {
	cmd.Flags().Var(textValue{file, "use a file"}, "config", usage)
	completePath(cmd, "config", cobra.ShellCompDirectiveDefault)
}

// logger logs on standard error.
func (e *env) logger(asJSON bool) *slog.Logger {
	o := slog.HandlerOptions{Level: slog.LevelInfo}
	switch {
	case e.quiet:
		o.Level = slog.LevelWarn
	case e.verbose:
		o.Level = slog.LevelDebug
	}
	if asJSON {
		return slog.New(slog.NewJSONHandler(e.err, &o))
	}
	return slog.New(slog.NewTextHandler(e.err, &o))
}

// configError gives the errors of the configuration their exit codes.
func configError(err error) error {
	switch {
	case errors.Is(err, config.ErrInvalid):
		return &codedError{exitUsage, err}
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, cgroup.ErrNotCgroup2):
		return &codedError{exitNotFound, err}
	}
	return err
}
