package metrics

import (
	"errors"

	"github.com/rpsel/rpsel/loader"
)

// Reader reads all groups of a BPF file system, at each call. One that cannot be
// opened is told of as such.
func Reader(fs loader.FS) func() ([]loader.Summary, error) {
	return func() ([]loader.Summary, error) {
		keys, err := fs.Keys(0)
		if err != nil {
			return nil, err
		}
		var groups []*loader.Group
		var damaged []loader.Summary
		for _, key := range keys {
			g, err := fs.Open(key)
			switch {
			case errors.Is(err, loader.ErrNotAttached): // detached since it was listed
			case err != nil:
				damaged = append(damaged, loader.Summary{Status: loader.Status{Key: key}, Err: err})
			default:
				defer g.Close()
				groups = append(groups, g)
			}
		}
		return append(loader.Summarize(groups), damaged...), nil
	}
}
