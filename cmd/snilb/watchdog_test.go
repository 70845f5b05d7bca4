// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"testing"
	"time"
)

// The service manager hears of an engine that works, and of no other.
func TestWatchdogPings(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	ticks, alive := make(chan time.Time), make(chan bool)
	pings := 0
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		pingWhile(ctx, ticks, func() bool { return <-alive }, func() { pings++ })
	}()
	for _, works := range []bool{true, true, false, false, true} {
		ticks <- time.Time{}
		alive <- works
	}
	cancel()
	<-ended
	if pings != 3 {
		t.Errorf("%d pings in five ticks, three of them alive", pings)
	}
}
