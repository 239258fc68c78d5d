package force

import (
	"context"
	"errors"
	"fmt"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/rpsel/rpsel/internal/cgroup"
)

// Watch forces the settings on what binds in the cgroup at path and below,
// until the context ends or the cgroup is gone; neither is an error. Sockets
// that are bound by then stay as they are. Nothing is left behind, however the
// process ends.
//
// Errors: as of Command.Run, cgroup.ErrNotCgroup2.
func Watch(ctx context.Context, path string, s Settings, h Handler) error {
	if err := s.check(); err != nil {
		return err
	}
	dir, err := cgroup.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	objects, err := s.load()
	if err != nil {
		return err
	}
	defer objects.Close()
	links, err := dir.Link(s.programs(objects))
	if err != nil {
		return err
	}
	defer links.Close()

	events, err := ringbuf.NewReader(objects.Events)
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	handled := make(chan error, 1)
	go func() {
		err := h.handle(ctx, events)
		stop()
		handled <- err
	}()
	err = dir.AwaitRemoval(ctx)
	if ctx.Err() != nil {
		err = nil
	}
	stop()
	return errors.Join(err, <-handled)
}
