// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// watchdog tells the service manager, if it asks for it (WatchdogSec= in systemd), that the
// daemon works, until ctx ends. An engine that hangs makes it silent, and the manager starts
// the daemon again.
func (s *server) watchdog(ctx context.Context) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("read the watchdog's interval (WATCHDOG_USEC, WATCHDOG_PID): %w", err)
	}
	if interval <= 0 {
		<-ctx.Done()
		return nil
	}
	// Two of three may come late on a busy machine.
	tick := time.NewTicker(max(interval/3, time.Millisecond))
	defer tick.Stop()
	pingWhile(ctx, tick.C, s.engine.Alive, func() { s.notify(daemon.SdNotifyWatchdog) })
	return nil
}

// pingWhile pings at each tick at which alive, until ctx ends.
func pingWhile(ctx context.Context, tick <-chan time.Time, alive func() bool, ping func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
			if alive() {
				ping()
			}
		}
	}
}
