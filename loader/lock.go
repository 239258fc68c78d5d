package loader

import (
	"errors"
	"os"
	"time"

	"github.com/rpsel/rpsel/internal/statedir"
)

// lockPatience is how long a command waits for another one. Tests are less
// patient.
var lockPatience = 10 * time.Second

// lock takes the lock of a network namespace, whose directory must exist.
func (fs FS) lock(netns uint64) (*statedir.Lock, error) { return fs.dirs().Lock(netns, lockPatience) }

// lockNew is lock for a namespace whose directory may have to be made, or be
// removed by a detach while it waits.
func (fs FS) lockNew(netns uint64) (*statedir.Lock, error) {
	for {
		if err := fs.dirs().Make(fs.netnsDir(netns)); err != nil {
			return nil, err
		}
		l, err := fs.lock(netns)
		if !errors.Is(err, os.ErrNotExist) {
			return l, err
		}
	}
}
