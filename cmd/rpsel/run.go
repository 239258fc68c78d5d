package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/force"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// What a shell gives for a command that cannot be started.
const (
	exitNotExecutable   = 126
	exitCommandNotFound = 127
)

func newRunCmd(e *env) *cobra.Command {
	var s scope
	var where string
	var debug bool
	command := force.Command{Settings: force.Settings{Reuseport: force.On}}
	settings := &command.Settings
	cmd := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARGUMENT]...",
		Short: "Start a program with SO_REUSEPORT forced on what it binds",
		Long: `Start a program, of whatever language and linkage, with SO_REUSEPORT forced on
the UDP and TCP sockets that it and its children bind to a matching port. A bind
to port 0, where the kernel chooses the port, is never touched. Without --port,
--addr and --proto every bind to a specific port matches.

The program takes rpsel's place: same pid, parent, descriptors and environment,
so its signals and exit code are its own. If it cannot be found the exit code is
127, if it cannot be executed 126. A listener on a port that "rpsel attach" has
made sticky is registered as soon as it is bound (UDP) or listens (TCP). Where
that cannot be, "rpsel status" and --debug say why; a Go program's TCP listeners
need GODEBUG=multipathtcp=0 in its environment.

Signals that were ignored are handled as usual again, but for SIGHUP and SIGINT;
where a program relies on it, start it by sh -c 'trap "" PIPE; exec COMMAND'.

A bind for which an option cannot be set fails with EPERM. Members of a reuseport
group have one user: give all of them the same --user.

A process of rpsel stays beside the program until the last of its processes has
ended, and then removes the cgroup that they were in. With --cgroup no program is
started: what lives in that cgroup is covered while rpsel runs, for binds from
then on.`,
		Example: `  rpsel run --port 1194 -- openvpn --config two.conf
  rpsel run --port 53 --addr 192.0.2.1 --bind-device vrf-blue -- dnsd
  rpsel run --port 4433 --proto udp --user www-data -- ./quic-server
  rpsel run --port 1194 --cgroup /sys/fs/cgroup/system.slice/openvpn@one.service`,
		RunE: func(cmd *cobra.Command, args []string) error {
			settings.Port, settings.Addr, settings.Trace = s.port, s.addr, debug
			if where != "" {
				if len(args) > 0 {
					return usageError("run --cgroup takes no command, got %q: it covers what lives in the cgroup", args[0])
				}
				if command.User != "" {
					return usageError("run --cgroup takes no --user: it starts nothing")
				}
				return runError(watchCgroup(e, where, &s, *settings))
			}
			if len(args) == 0 {
				return usageError(`run needs a command: see "rpsel run --help"`)
			}
			command.Args, command.Stderr = args, debug
			command.Reaper = []string{"reap"}
			if debug {
				command.Reaper = append(command.Reaper, "--debug", settings.String())
			}
			if s.bpffs != "" {
				command.Reaper = append(command.Reaper, "--bpffs", s.bpffs)
			}
			return runError(command.Run())
		},
	}
	flags := cmd.Flags()
	flags.SetInterspersed(false) // the rest is the command's
	cmd.ValidArgsFunction = cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault)
	s.addPortFlag(cmd, "local `PORT` that matches (default: every specific port)")
	flags.Var((*addrValue)(&s.addr), "addr", "exact local `ADDRESS` that matches; 0.0.0.0 and :: are the wildcards only (default: every address)")
	flags.Var((*bothValue)(&settings.Proto), "proto", "protocol that matches: udp, tcp or both")
	flags.Var((*switchValue)(&settings.Reuseport), "reuseport", "set SO_REUSEPORT on or off, or leave it to the program")
	flags.Var((*switchValue)(&settings.Reuseaddr), "reuseaddr", "the same for SO_REUSEADDR; on and off need Linux 6.1")
	flags.Var(textValue{&settings.Device, "use the name of a network interface"}, "bind-device", "network `INTERFACE` to bind to (SO_BINDTODEVICE)")
	flags.Var(textValue{&command.User, "use a name or number"}, "user", "`USER` to run the program as, with its groups")
	flags.Var(textValue{&where, "use a directory"}, "cgroup", "start nothing, cover what lives in the cgroup `DIR`")
	flags.BoolVar(&debug, "debug", false, "say on standard error what is forced and registered")
	s.addBPFFSFlag(cmd)
	completePath(cmd, "cgroup", cobra.ShellCompDirectiveFilterDirs)
	completeBy(cmd, "bind-device", completeFrom(completeDevice))
	s.completeKeys(cmd, s.attachedKeys, func(p sockets.Proto) bool { return settings.Proto == 0 || settings.Proto == p })
	complete(cmd, "proto", "udp", "tcp", "both")
	complete(cmd, "reuseport", "on", "off", "leave")
	complete(cmd, "reuseaddr", "on", "off", "leave")
	return cmd
}

// newReapCmd is what "rpsel run" leaves in the background.
func newReapCmd(e *env) *cobra.Command {
	var s scope
	var forced string
	var detach bool
	cmd := &cobra.Command{
		Use:    "reap CGROUP",
		Short:  "Register listeners of a cgroup and remove it (for rpsel run)",
		Hidden: true,
		Args:   oneArg("cgroup"),
		RunE: func(_ *cobra.Command, args []string) error {
			if detach {
				return force.Detach()
			}
			return force.Reap(args[0], listenerHandler(e, s.fs(), forced))
		},
	}
	cmd.Flags().StringVar(&forced, "debug", "", "say on standard error what happens; `TEXT` is what is forced")
	cmd.Flags().BoolVar(&detach, force.DetachFlag[len("--"):], false, "start again in the background")
	s.addBPFFSFlag(cmd)
	return cmd
}

// watchCgroup is run --cgroup.
func watchCgroup(e *env, dir string, s *scope, settings force.Settings) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	forced := ""
	if settings.Trace {
		forced = settings.String()
	}
	return force.Watch(ctx, dir, settings, listenerHandler(e, s.fs(), forced))
}

// runError gives an error the exit code that its cause alone does not have.
func runError(err error) error {
	for _, c := range []struct {
		code   int
		causes []error
	}{
		{exitCommandNotFound, []error{force.ErrNotFound}},
		{exitNotExecutable, []error{force.ErrNotExecutable}},
		{exitNotFound, []error{force.ErrNoUser, force.ErrNoDevice, cgroup.ErrNotCgroup2, fs.ErrNotExist}},
		{exitUnsupported, []error{cgroup.ErrNoCgroup2, cgroup.ErrOutside, cgroup.ErrReadOnly, cgroup.ErrOccupied}},
	} {
		for _, cause := range c.causes {
			if errors.Is(err, cause) {
				return &codedError{c.code, err}
			}
		}
	}
	return err
}

// listenerHandler registers listeners, and says so if it is given what was
// forced on their binds.
func listenerHandler(e *env, fs loader.FS, forced string) force.Handler {
	say := func(event watch.Event, format string, args ...any) {
		if forced != "" {
			e.say("rpsel: %s: "+format, append([]any{event}, args...)...)
		}
	}
	return force.Handler{
		Start: func() {
			// The first search takes much longer than all others, and the first
			// listener may come soon.
			if keys, err := fs.Keys(0); err == nil && len(keys) > 0 {
				_, _ = sockets.Find(sockets.Query{Port: keys[0].Addr.Port(), PID: os.Getpid()})
			}
		},
		Listening: func(events []watch.Event) {
			registerAll(fs, events, func(event watch.Event, slot int, err error) {
				if err != nil {
					say(event, "not registered: %s", errorText(err, false))
				} else {
					say(event, "registered in slot %d", slot)
				}
			})
		},
		Binding: func(event watch.Event, err error) {
			if err != nil {
				say(event, "%v: bind refused", err)
			} else {
				say(event, "%s", forced)
			}
		},
	}
}

// registerAll registers the listeners that belong to an attached group, and
// reports on those.
func registerAll(fs loader.FS, events []watch.Event, report func(watch.Event, int, error)) {
	keys, err := fs.Keys(0)
	r := registrar{fs: fs, found: map[sockets.Query][]sockets.Group{}}
	came := map[loader.Key]*joiners{}
	for _, event := range events {
		attached := func(k loader.Key) bool {
			return k.Proto == event.Proto && k.Addr == event.Addr && (event.NetNS == 0 || k.NetNS == event.NetNS)
		}
		if err != nil {
			report(event, 0, err)
		} else if slices.ContainsFunc(keys, attached) {
			key, conn, err := r.borrow(event)
			if err != nil {
				report(event, 0, err)
				continue
			}
			// Kept open, it would keep a dead server's socket in the group.
			defer conn.Close()
			if came[key] == nil {
				came[key] = &joiners{}
			}
			came[key].events, came[key].conns = append(came[key].events, event), append(came[key].conns, conn)
		}
	}
	for key, j := range came {
		for i, answer := range r.register(key, j.conns) {
			if !errors.Is(answer.Err, loader.ErrNotAttached) {
				report(j.events[i], answer.Slot, answer.Err)
			}
		}
	}
}

// joiners are listeners of one group.
type joiners struct {
	events []watch.Event
	conns  []syscall.Conn
}

// registrar registers listeners that came at the same time.
type registrar struct {
	fs    loader.FS
	found map[sockets.Query][]sockets.Group // what has been looked for
}

// register registers listeners of one group.
func (r *registrar) register(key loader.Key, conns []syscall.Conn) []loader.Registration {
	answers, err := func() ([]loader.Registration, error) {
		group, err := r.fs.Open(key)
		if err != nil {
			return nil, err
		}
		defer group.Close()
		answers, err := group.RegisterAll(conns)
		if errors.Is(err, loader.ErrNotAttached) {
			return r.attachAgain(conns)
		}
		return answers, err
	}()
	if err != nil {
		return slices.Repeat([]loader.Registration{{Err: err}}, len(conns))
	}
	return answers
}

// attachAgain attaches the group of listeners that are the first after all the
// group's sockets had closed, and the program with them. Like "rpsel attach" it
// registers whatever else is there.
func (r *registrar) attachAgain(conns []syscall.Conn) ([]loader.Registration, error) {
	group, err := r.fs.Attach(conns[0], loader.Options{Again: true})
	if err != nil {
		return nil, err
	}
	defer group.Close()
	return group.RegisterAll(conns)
}

// borrow borrows a listener, and names its group. The caller closes it.
func (r *registrar) borrow(event watch.Event) (loader.Key, *sockets.Conn, error) {
	group, socket, err := r.find(event)
	if err != nil {
		return loader.Key{}, nil, err
	}
	// One in use may be registered already, and RegisterAll knows by whom.
	if err := socket.Check(); err != nil && !errors.Is(err, sockets.ErrInUse) {
		return loader.Key{}, nil, err
	}
	conn, err := socket.Take()
	return group.Key, conn, err
}

// find finds a listener and its group: in the process that bound it, or, in
// another pid namespace or if that has passed it on, in all.
func (r *registrar) find(event watch.Event) (group sockets.Group, socket sockets.Socket, err error) {
	everywhere := sockets.Query{NetNS: event.NetNS, Proto: event.Proto, Port: event.Addr.Port()}
	there := everywhere
	there.PID = event.PID
	for _, q := range []sockets.Query{there, everywhere} {
		if _, ok := r.found[q]; !ok {
			if r.found[q], err = sockets.Find(q); err != nil {
				return group, socket, err
			}
		}
		for _, g := range r.found[q] {
			for _, m := range g.Members {
				// The cookie of an MPTCP listener is not the one that was reported.
				byPID := func(h sockets.Holder) bool { return h.PID == event.PID }
				mptcp := m.MPTCP && g.Addr == event.Addr && slices.ContainsFunc(m.Holders, byPID)
				if (m.Cookie == event.Cookie || mptcp) && len(m.Holders) > 0 {
					return g, m, nil
				}
			}
		}
	}
	return group, socket, fmt.Errorf("%w: it was closed", sockets.ErrGone)
}

// bothValue is a flag that takes a protocol, or both.
type bothValue sockets.Proto

func (b *bothValue) Set(text string) error {
	if text == "both" {
		*b = 0
		return nil
	}
	if (*protoValue)(b).Set(text) != nil {
		return errors.New("use udp, tcp or both")
	}
	return nil
}

func (b *bothValue) String() string {
	if *b == 0 {
		return "both"
	}
	return sockets.Proto(*b).String()
}
func (b *bothValue) Type() string { return "udp|tcp|both" }

// switchValue is a flag that takes on, off or leave.
type switchValue force.Switch

func (s *switchValue) Set(text string) error {
	if (*force.Switch)(s).UnmarshalText([]byte(text)) != nil {
		return errors.New("use on, off or leave")
	}
	return nil
}

func (s *switchValue) String() string { return force.Switch(*s).String() }
func (s *switchValue) Type() string   { return "on|off|leave" }
