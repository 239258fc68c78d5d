package daemon

import (
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// notify tells the service manager, if there is one (sd_notify(3)).
func (k *keeper) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		k.fails("notify", fmt.Errorf("tell the service manager: %w", err))
	}
}

// reloading is what Type=notify-reload asks for: which reload is meant.
func reloading() string {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // cannot fail
	return fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000)
}

// watchdog ticks twice in the time in which the service manager wants to hear
// of the loop, or never.
func watchdog() *time.Ticker {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil || interval <= 0 {
		t := time.NewTicker(time.Hour)
		t.Stop()
		return t
	}
	return time.NewTicker(interval / 2)
}
