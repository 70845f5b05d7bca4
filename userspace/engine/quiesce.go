// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"fmt"
	"time"

	"snilb/maps"
)

// quiescePoll is how often is looked whether connections are still being set up.
const quiescePoll = 10 * time.Millisecond

// Quiesce makes the engine ready to leave everything to the next daemon: no new connection is begun, and those are finished that
// would be lost. Returns when there is none, or with an error that is ctx's when it ends before: backends that have bytes are reset then. SYNs are still answered, bound
// flows go on. There is no way back.
//
// A worker that has nothing to finish leaves its rings alone: the next daemon reads what is in them. One that has must read on,
// for the backends' answers come there too; hellos that it meets are not acknowledged, so their clients repeat them.
func (e *Engine) Quiesce(ctx context.Context) error {
	e.quiescing.Store(true)
	tick := time.NewTicker(quiescePoll)
	defer tick.Stop()
	for {
		left := 0
		for _, w := range e.workers {
			left += w.quiesce()
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			for _, w := range e.workers {
				w.abandon()
			}
			return fmt.Errorf("%d connections are still being set up: %w", left, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// quiesce forgets the handshakes whose bytes the clients still have, and counts the others.
func (w *worker) quiesce() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, h := range w.handshakes {
		if h.phase == collecting && !h.ownsHello() {
			w.drop(h)
		}
	}
	return w.halfOpen()
}

// abandon resets the backends that have bytes of ours, and would wait for the client. A client whose bytes only we have stays noted:
// the next daemon resets it.
func (w *worker) abandon() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.e.clock.now()
	for _, h := range w.handshakes {
		if h.phase != pushing {
			continue
		}
		h.release(w, true)
		if h.ownsHello() {
			h.noted = maps.OwnedHello{}
		}
		w.drop(h)
	}
}

// halfOpen is how many handshakes go on.
func (w *worker) halfOpen() int { return len(w.handshakes) - w.refused }

// isQuiet reports whether the engine quiesces and this worker has nothing to finish.
func (w *worker) isQuiet() bool {
	if !w.e.quiescing.Load() {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.halfOpen() == 0
}
