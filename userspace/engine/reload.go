// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"maps"
	"net/netip"
	"slices"
)

// Reload decides new connections by another plan, made by NewPlan from the one in
// force. Bound flows are not touched, and connections whose hello has begun go by the
// plan they began with: Unsettled counts them. If it returns an error nothing has
// changed.
func (e *Engine) Reload(p *Plan) error {
	e.reloading.Lock()
	defer e.reloading.Unlock()
	old := e.plan.Load()
	if p.sourceClient || old.sourceClient {
		e.sourceClient.Store(true)
	}
	// Before any connection goes by the new plan: the answer to its SYN must not go to the stack.
	if err := e.beat(); err != nil {
		return err
	}
	e.plan.Store(p)
	backends := make(map[netip.AddrPort]bool)
	for _, addr := range p.Backends() {
		backends[addr] = true
	}
	e.peers.keep(backends)
	for _, w := range e.workers {
		w.forgetPaths(backends)
	}
	return e.beat()
}

// Plan is the one in force.
func (e *Engine) Plan() *Plan { return e.plan.Load() }

// Unsettled is how many connections without a flow go by an earlier plan, and may
// still be given a backend of it. Their timeouts bound how long.
func (e *Engine) Unsettled() int {
	n := 0
	for _, w := range e.workers {
		w.mu.Lock()
		n += w.unsettled(e.plan.Load())
		w.mu.Unlock()
	}
	return n
}

func (w *worker) unsettled(plan *Plan) (n int) {
	for _, h := range w.handshakes {
		if h.phase != refused && h.plan != plan {
			n++
		}
	}
	return n
}

// dropSourceClient ends what Reload began for the sake of a plan with source: client,
// once nothing goes by it. It waits for nobody's lock: the heart must not stop for a worker that keeps its own.
func (e *Engine) dropSourceClient() {
	if !e.sourceClient.Load() || !e.reloading.TryLock() {
		return
	}
	defer e.reloading.Unlock()
	if slices.ContainsFunc(e.workers, (*worker).mayBorrow) {
		return
	}
	e.sourceClient.Store(false)
}

// mayBorrow reports whether a bound flow has its client's address and port, or a handshake of an earlier plan may get them; or that
// it is not known, since the worker is busy.
func (w *worker) mayBorrow() bool {
	if !w.mu.TryLock() {
		return true
	}
	defer w.mu.Unlock()
	if w.unsettled(w.e.plan.Load()) > 0 {
		return true
	}
	for _, one := range w.flows.ways.all {
		if one.users > 0 && one.value.ports == nil {
			return true
		}
	}
	return false
}

// forgetPaths forgets the ports towards all other backends, where none is in use or rests.
func (w *worker) forgetPaths(backends map[netip.AddrPort]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.e.clock.now()
	maps.DeleteFunc(w.paths, func(key pathKey, p *ports) bool { return !backends[key.backend] && p.idle(now) })
}
