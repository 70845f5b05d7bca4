// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"time"

	"snilb/maps"
)

const (
	// sweepInterval is between two steps of a sweep, sweepRound what a sweep of a small table takes.
	sweepInterval = 100 * time.Millisecond
	sweepRound    = 10 * time.Second
	// sweepMost bounds the flows of one step, some 0.2 ms of work: a sweep of a million flows takes some minutes.
	sweepMost = 8 * maps.FlowJobs
)

// runSweep looks for flows that are over without having said so: idle ones, and ones whose FIN or RST was lost to a full
// ring. It asks for each flow by its key: to read the table through, mostly empty, holds a CPU for tens of milliseconds, and
// every packet that is that CPU's.
func (e *Engine) runSweep(ctx context.Context) {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, w := range e.workers {
			w.sweepStep()
		}
	}
}

// sweepStep goes on where the last one ended.
func (w *worker) sweepStep() {
	w.mu.Lock()
	left := min(w.flows.len()/int(sweepRound/sweepInterval)+1, sweepMost)
	w.mu.Unlock()
	for left > 0 {
		n := min(left, maps.FlowJobs)
		left -= n
		w.sweep(n)
	}
}

// sweep reviews at most n flows; the lock is held for no longer.
func (w *worker) sweep(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.swept >= w.flows.len() {
		w.swept = 0
	}
	// Before any is reviewed, because flows that are over leave the order.
	w.due = w.due[:0]
	for _, number := range w.flows.order[w.swept:min(w.swept+n, w.flows.len())] {
		w.due = append(w.due, w.flows.at(number))
	}
	w.swept += len(w.due)
	if len(w.due) > 0 {
		w.now = w.e.clock.now()
		w.review(w.due)
	}
}
