package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/rpsel/rpsel/internal/cgroup"
	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/door"
	"github.com/rpsel/rpsel/internal/metrics"
	"github.com/rpsel/rpsel/internal/owner"
	"github.com/rpsel/rpsel/internal/statedir"
	"github.com/rpsel/rpsel/internal/watch"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// Options say what an agent works with.
type Options struct {
	// FS holds the state of the groups.
	FS loader.FS
	// Config is the file with the services. Optional tells that it may be
	// missing.
	Config   string
	Optional bool
	// Cgroup is the cgroup2 directory whose processes are watched; "" is the
	// root of the hierarchy.
	Cgroup string
	// Version is rpsel's own, for the metrics.
	Version string
	// Log is told what happens, a line each.
	Log *slog.Logger
	// Reload asks for the file to be read again.
	Reload <-chan os.Signal

	pace pace // of a test, else usual
}

// pace is how often the agent does what it does by itself, and how long it waits for
// others.
type pace struct {
	tick, sweep, poll time.Duration
	retry             time.Duration // for events while it polls, and for metrics
	// young is how long after its first listener came a group counts as new.
	young time.Duration
	// lock is how long commands may have the lock of a namespace until the agent
	// goes on with others. All but the copying of very many flows takes
	// milliseconds.
	lock time.Duration
}

var usual = pace{
	tick: time.Second, sweep: 10 * time.Second, poll: 250 * time.Millisecond, retry: 30 * time.Second,
	young: 2 * time.Second, lock: time.Second,
}

// grace is how long the end of the loop is waited for. It may wait for another
// command's lock; nothing it does then need be completed.
const grace = time.Second

// Run keeps the groups of a BPF file system until the context ends, which is no
// error. It leaves everything as it is then: traffic goes on.
//
// Errors: ErrRunning, config.ErrInvalid, fs.ErrNotExist (the file, the cgroup),
// cgroup.ErrNotCgroup2, loader.ErrNoBPFFS, loader.ErrPermission, sockets.ErrUnsupported.
func Run(ctx context.Context, o Options) error {
	if o.pace == (pace{}) {
		o.pace = usual
	}
	services, place, err := load(o)
	if err != nil {
		return err
	}
	if o.Cgroup != "" {
		dir, err := cgroup.Open(o.Cgroup)
		if err != nil {
			return err // a mistake, and no reason to poll
		}
		dir.Close()
	}
	if err := statedir.FS(o.FS).MakeMount(); err != nil {
		return err
	}
	claim, err := newClaim(string(o.FS))
	if err != nil {
		return err
	}
	defer claim.drop()
	own, err := sockets.OpenNetNS("")
	if err != nil {
		return err
	}
	own.Close()
	k := &keeper{
		Options: o, claim: claim, services: services, own: own.Cookie(), place: place,
		groups: map[loader.Key]*group{}, failures: map[string]failure{}, locked: map[uint64]bool{}, named: map[string]uint64{}, refused: map[loader.Key][]string{},
		inbox: newInbox(o.pace.young), ended: make(chan error, 1), polling: time.NewTicker(o.pace.poll), polled: map[uint64]*polled{},
	}
	if err := k.start(ctx); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		k.loop(ctx)
	}()
	<-ctx.Done()
	k.notify(daemon.SdNotifyStopping)
	select {
	case <-ended:
	case <-time.After(grace):
	}
	k.Log.Info("stopped: traffic goes on as it is")
	return nil
}

// load reads the services, and where metrics are served.
func load(o Options) (services []*config.Service, place string, err error) {
	file, err := config.Load(o.Config)
	if errors.Is(err, fs.ErrNotExist) && o.Optional {
		return nil, config.DefaultMetrics, nil
	}
	for _, s := range file.Services {
		services = append(services, &s)
	}
	return services, file.Metrics, err
}

// keeper is an agent at work. Only its loop touches it, but for the inbox and the
// report.
type keeper struct {
	Options
	claim    *claim
	services []*config.Service // in the order in which they count
	own      uint64            // the agent's network namespace
	shown    string            // the last line for the service manager
	named    map[string]uint64 // what names of services stand for; looked up anew for each thing that is done
	groups   map[loader.Key]*group
	failures map[string]failure
	locked   map[uint64]bool         // namespaces that are busy; see there
	putOff   bool                    // something, for that
	refused  map[loader.Key][]string // of the options of their services

	watcher *watch.Watcher // nil: it polls
	why     string         // it polls
	ports   []watch.Port   // that are watched
	missed  uint64         // events so far
	tried   time.Time      // to watch, last
	inbox   *inbox
	ended   chan error // of the watcher
	door    *door.Door
	// announced are the services as the door's goroutines see them.
	announced atomic.Pointer[[]*config.Service]
	polling   *time.Ticker // stopped while the kernel tells
	polled    map[uint64]*polled

	place    string // where metrics are served, "" if they are not
	web      *web   // nil: it could not be
	webTried time.Time
	done     metrics.Agent // what metrics tell of the agent, as far as it is counted
	report   atomic.Pointer[report]
}

// start does what has to be done before the agent is ready. An error means that
// it cannot work here.
func (k *keeper) start(ctx context.Context) error {
	if err := k.claim.say(k.info()); err != nil {
		return fmt.Errorf("write to the run directory: %w", err)
	}
	if err := k.recover(); err != nil {
		return err
	}
	opened, err := door.Open(k.claim.dir, owner.Groups{FS: k.FS, Coming: k.coming})
	if err != nil {
		return fmt.Errorf("open the door for owners: %w", err)
	}
	k.door = opened
	k.forcePins()
	k.refresh()
	k.openDoors()
	k.watch(ctx)
	if err := k.sweep(); err != nil {
		return err
	}
	k.publish()
	k.serve()
	k.Log.Info("ready", "services", len(k.services), "groups", len(k.groups), "mode", k.mode())
	k.notify(daemon.SdNotifyReady + "\n" + k.statusLine())
	return nil
}

// loop works until the context ends.
func (k *keeper) loop(ctx context.Context) {
	defer k.close()
	tick, sweep, alive := time.NewTicker(k.pace.tick), time.NewTicker(k.pace.sweep), watchdog()
	for _, t := range []*time.Ticker{tick, sweep, k.polling, alive} {
		defer t.Stop()
	}
	for ctx.Err() == nil {
		clear(k.named)
		select {
		case <-ctx.Done():
		case <-k.inbox.wake:
			k.arrived(k.inbox.take())
		case <-tick.C:
			if k.tick(ctx) {
				k.trySweep()
			}
		case <-sweep.C:
			k.trySweep()
		case <-k.polling.C:
			k.poll()
		case <-k.Reload:
			k.reload()
		case err := <-k.ended:
			k.unwatch(fmt.Errorf("read events: %w", err))
		case <-alive.C:
			k.notify(daemon.SdNotifyWatchdog)
		}
		k.publish()
	}
}

// tick is what is due every second. It reports whether a sweep is due, too.
func (k *keeper) tick(ctx context.Context) (sweep bool) {
	if k.watcher == nil && time.Since(k.tried) >= k.pace.retry {
		k.watch(ctx)
		sweep = k.watcher != nil // for what came since the last poll
	}
	if k.watcher != nil {
		missed, err := k.watcher.Missed()
		k.fails("missed", err)
		if missed != k.missed {
			k.Log.Warn("events were missed: looking for all listeners", "missed", missed-k.missed)
			k.done.Missed += missed - k.missed
			k.missed, sweep = missed, true
		}
	}
	k.keepServing()
	if k.refresh() || k.putOff {
		k.putOff, sweep = false, true
	}
	for _, g := range k.groups {
		k.housekeep(g)
	}
	k.openDoors()
	k.inbox.forget()
	k.forgetFailures()
	if line := k.statusLine(); line != k.shown {
		k.notify(line)
		k.shown = line
	}
	return sweep
}

// trySweep sweeps, and logs what keeps it from that.
func (k *keeper) trySweep() { k.fails("sweep", k.sweep()) }

// close gives back what the agent holds.
func (k *keeper) close() {
	k.web.close()
	k.unwatch(nil)
	k.door.Close()
	for _, g := range k.groups {
		g.Close()
	}
}

// mode tells how the agent learns of new listeners.
func (k *keeper) mode() Mode {
	if k.watcher == nil {
		return Polling
	}
	return Events
}

// statusLine is what the service manager shows.
func (k *keeper) statusLine() string {
	line := fmt.Sprintf("STATUS=%d groups, %d services", len(k.groups), len(k.services))
	if k.watcher == nil {
		line += ", polling: " + k.why
	}
	return line
}
