package daemon

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rpsel/rpsel/internal/metrics"
)

// report is how the agent stands, for those who ask from other goroutines.
type report struct {
	agent metrics.Agent
	at    time.Time // the loop came round
	// ill is what keeps the agent from its work, and note what to know of how it works.
	ill  []string
	note string
}

// illTime is for how long a failure counts that is not met again: what the agent
// cannot do it tries at each tick, or at each sweep. stuckTime is how long one
// turn of the loop may take.
const (
	illTime   = 30 * time.Second
	stuckTime = 30 * time.Second
)

// grave tells whether a failure keeps the agent from its work, and is not the fault
// of a server or a service.
func grave(subject string) bool {
	return slices.Contains([]string{"keys", "sweep", "find"}, subject) || strings.HasPrefix(subject, openSubject)
}

// publish makes a report.
func (k *keeper) publish() {
	r := &report{agent: k.done, at: time.Now()}
	r.agent.Services, r.agent.Polling = len(k.services), k.watcher == nil
	for subject, f := range k.failures {
		if !f.error || subject == watchSubject {
			continue // that it polls is told as such
		}
		r.agent.Failures++
		if grave(subject) && time.Since(f.at) < illTime {
			r.ill = append(r.ill, f.text)
		}
	}
	slices.Sort(r.ill)
	if k.watcher == nil {
		r.note = "polling: " + strings.Join(strings.Fields(k.why), " ")
	}
	k.report.Store(r)
}

// health says in a line whether the agent does its work, and if not, why.
func (r *report) health(now time.Time) (line string, healthy bool) {
	if late := now.Sub(r.at); late > stuckTime {
		return fmt.Sprintf("stuck: nothing was done for %v", late.Round(time.Second)), false
	}
	if len(r.ill) > 0 {
		return strings.Join(r.ill, "; "), false
	}
	if r.note != "" {
		return "ok, " + r.note, true
	}
	return "ok", true
}
