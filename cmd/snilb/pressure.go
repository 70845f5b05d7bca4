// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"time"

	"snilb/maps"
)

// pressurePoll is how often the daemon looks whether the kernel programs had to do
// without it, and so the most often that it says so.
const pressurePoll = 3 * time.Second

// pressures are the reasons that tell of an engine that does not keep up, or did not for a
// while: who is stopped, or dead, hears of it when it is back.
var pressures = map[string]string{
	"ring_busy":  "new connections go to the stack, as the engine does not keep up: give it more --workers or a faster CPU",
	"event_lost": "packets for the engine are lost, and sent again by their senders: give it more --workers or a faster CPU",
	"late_hold":  "new connections had to wait, as the daemon gave no sign of life and its ring was full",

	"daemon_dead": "new connections went to the stack while the daemon was taken for dead (--dead-after)",
	"dead_reset":  "new connections were refused while the daemon was taken for dead (--dead-after)",
	"dead_hold":   "new connections had to wait while the daemon was taken for dead (--dead-after)",
}

// pressure compares the kernel programs' counters with what they were.
type pressure struct {
	log  *slog.Logger
	last [len(maps.Reasons)]uint64
}

// look warns once for each of the reasons that has been counted since the last look.
func (p *pressure) look(now [len(maps.Reasons)]uint64) {
	for i, n := range now {
		if warning, ok := pressures[maps.Reasons[i].Name]; ok && n > p.last[i] {
			p.log.Warn(warning, "reason", maps.Reasons[i].Name, "packets", n-p.last[i])
		}
	}
	p.last = now
}

// watchPressure looks at the counters of all interfaces, those that are gone too,
// until ctx ends.
func (s *server) watchPressure(ctx context.Context) error {
	p := pressure{log: s.log}
	tick := time.NewTicker(pressurePoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		var sum maps.CounterSet
		for slot := range uint32(maps.MaxCounterSlots) {
			some, err := s.instance.Tables().Packets(slot)
			if err != nil {
				return err
			}
			for i, n := range some.Packets {
				sum.Packets[i] += n
			}
		}
		p.look(sum.Packets)
	}
}
