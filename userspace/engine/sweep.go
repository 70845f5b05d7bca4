// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"time"

	"snilb/maps"
)

const (
	sweepInterval = time.Second
	// sweepShare bounds the sweep's own time: after one that took t, the next
	// waits sweepShare times t.
	sweepShare = 200
)

// runSweep looks for flows that are over without having said so: idle ones, ones
// their client never confirmed, and ones whose FIN or RST was lost to a full ring.
func (e *Engine) runSweep(ctx context.Context) {
	wait := sweepInterval
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		begun := time.Now()
		if err := e.sweep(); err != nil {
			e.o.Log.Warn("sweep of the flow table", "error", err)
		}
		wait = max(sweepInterval, sweepShare*time.Since(begun))
	}
}

// sweep reads the table in batches and has each suspect reviewed by its owner.
func (e *Engine) sweep() error {
	now := e.clock.now()
	var suspects []connection
	shortest := e.plan.Load().shortestIdle()
	err := e.o.Tables.Flows(func(leg maps.Leg, t maps.Tuple, entry *maps.Entry) {
		silent := idle(now, entry.Flow.LastSeen)
		ended := (entry.Has(maps.FlowFIN) || entry.Has(maps.FlowRST)) && silent >= staleAfter
		if leg == maps.LegBackend {
			if ended {
				suspects = append(suspects, connection{client: entry.To.Dst, listener: entry.To.Src})
			}
			return
		}
		quiet := shortest > 0 && silent >= shortest
		if quiet || ended || !entry.Has(maps.FlowConfirmed) {
			suspects = append(suspects, connection{client: t.Src, listener: t.Dst})
		}
	})
	for _, c := range suspects {
		e.review(c)
	}
	return err
}

func (e *Engine) review(c connection) {
	for _, w := range e.workers {
		w.mu.Lock()
		if f := w.flows[c]; f != nil {
			w.now = e.clock.now()
			w.review([]*flow{f})
		}
		w.mu.Unlock()
	}
}

// shortestIdle is the smallest idle timeout of any pool, 0 if none has one.
func (p *Plan) shortestIdle() time.Duration {
	var shortest time.Duration
	for _, some := range p.config.Pools {
		if t := some.Timeouts.Idle; t > 0 && (shortest == 0 || t < shortest) {
			shortest = t
		}
	}
	return shortest
}
