package daemon

import (
	"strings"
	"time"
)

// failure is what was logged of a subject last.
type failure struct {
	text  string
	at    time.Time // it was met again
	error bool      // not a complaint
}

// failureTime is how long a failure that is not met any more is remembered.
const failureTime = 5 * time.Minute

// fails logs an error once, until it is another one, and that it is over.
func (k *keeper) fails(subject string, err error, attrs ...any) {
	if err == nil {
		delete(k.failures, subject)
		return
	}
	k.complains(subject, strings.Join(strings.Fields(err.Error()), " "), attrs...)
	f := k.failures[subject]
	f.error = true
	k.failures[subject] = f
	k.done.Errors++
}

// complains is fails for what is no error.
func (k *keeper) complains(subject, text string, attrs ...any) {
	if k.failures[subject].text != text {
		k.Log.Warn(text, attrs...)
	}
	k.failures[subject] = failure{text: text, at: time.Now()}
}

// forgetFailures forgets what has not been met for long, such as of sockets that
// are gone.
func (k *keeper) forgetFailures() {
	for subject, f := range k.failures {
		if time.Since(f.at) > failureTime {
			delete(k.failures, subject)
		}
	}
}
