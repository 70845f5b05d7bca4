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
	last *maps.CounterSet // nil: not looked yet
}

// look warns once for each of the reasons that has been counted since the last look. The first one only remembers: what was
// before is an earlier daemon's.
func (p *pressure) look(now *maps.CounterSet) {
	for i := range maps.Reasons {
		if p.last == nil {
			break
		}
		n := now.Packets[i] - p.last.Packets[i]
		if warning, ok := pressures[maps.Reasons[i].Name]; ok && n > 0 {
			p.log.Warn(warning, "reason", maps.Reasons[i].Name, "packets", n)
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
		sum, err := s.allPackets()
		if err != nil {
			return err
		}
		p.look(sum)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (s *server) allPackets() (*maps.CounterSet, error) {
	var sum maps.CounterSet
	for slot := range uint32(maps.MaxCounterSlots) {
		some, err := s.instance.Tables().Packets(slot)
		if err != nil {
			return nil, err
		}
		for i, n := range some.Packets {
			sum.Packets[i] += n
		}
	}
	return &sum, nil
}
