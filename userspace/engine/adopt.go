// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"time"

	"snilb/maps"
	"snilb/userspace/pool"
)

// adoption makes the flows in the kernel's tables, which an earlier daemon has bound, this one's. The tables are read once: a client's
// entry becomes a flow at once, and of the backends' those are remembered that come before.
type adoption struct {
	e      *Engine
	now    int64
	names  *names
	of     []adopting // by worker
	early  []backward
	halves uint64
	err    error
}

// backward is what is needed of a backend's entry.
type backward struct {
	backend, local, client, listener endpoint
	control                          uint32
	generation, route                uint16
}

// adopting is what is noted of a worker's flows until all is read.
type adopting struct {
	paired      bitset // numbers of flows with both entries
	unconfirmed bitset // numbers of flows whose client has not acknowledged anything yet
	generations bitset // in use
}

const (
	// settleSpread is how far the looks at flows that are over are apart at the most: they all ended at unknown times.
	settleSpread = 4 * time.Second
	// settleSlow flows more would be as far apart: a few are not made to wait.
	settleSlow = 1000
)

// smallestMSS is the least that segmentSize returns.
const smallestMSS = 64

// smallestSegment is what every way takes that is in use (the smallest classes of a cookie, less the timestamps): for flows
// of which nothing better is known.
func smallestSegment(v4 bool) uint16 {
	if v4 {
		return maps.MSSClasses4[0] - 12
	}
	return maps.MSSClasses6[0] - 12
}

// adopt is done before anything else touches the flows.
func (e *Engine) adopt() error {
	known, err := e.journal.knownIDs()
	if err != nil {
		e.o.Log.Warn("journal not read: flows are taken over without their names", "error", err)
	}
	a := &adoption{e: e, now: e.clock.now(), names: newNames(e.plan.Load(), known), of: make([]adopting, len(e.workers))}
	if err := e.o.Tables.Flows(a.read); err != nil {
		return err
	}
	if a.err != nil {
		return a.err // before anything is removed
	}
	for i := range a.early {
		if !a.pair(&a.early[i]) {
			a.removeHalf(maps.LegBackend, a.early[i].tuple())
		}
	}
	if err != nil || !a.recall(e.journal) {
		if err := e.recallPeers(); err != nil {
			return err
		}
	}
	for _, w := range e.workers {
		a.settle(w)
	}
	e.halves = a.halves
	if e.adopted = e.Bound(); e.adopted > 0 || a.halves > 0 {
		e.o.Log.Info("took over the flows of an earlier daemon", "flows", e.adopted, "half_flows", a.halves)
	}
	return nil
}

// worker is who an entry belongs to, nil if there is none.
func (a *adoption) worker(control uint32) *worker {
	n := (&maps.Entry{Flow: maps.Flow{Control: control}}).Worker()
	if n < len(a.e.workers) {
		return a.e.workers[n]
	}
	a.err = fmt.Errorf("there is a flow of worker %d, and there are %d workers: the number of workers differs from that of the daemon that bound it",
		n, len(a.e.workers))
	return nil
}

// read takes any entry.
func (a *adoption) read(leg maps.Leg, t maps.Tuple, entry *maps.Entry) {
	w := a.worker(entry.Flow.Control)
	switch {
	case w == nil:
	case leg == maps.LegClient:
		a.readClient(w, t, entry)
	default:
		b := backward{
			endpointOf(t.Src), endpointOf(t.Dst), endpointOf(entry.To.Dst), endpointOf(entry.To.Src),
			entry.Flow.Control, entry.Flow.Generation, entry.Flow.Id,
		}
		if !a.pair(&b) {
			a.early = append(a.early, b)
		}
	}
}

// readClient makes a flow of a client's entry.
func (a *adoption) readClient(w *worker, t maps.Tuple, up *maps.Entry) {
	c := connection{client: t.Src, listener: t.Dst}
	if w.flows.byClient(c) != nil { // read twice
		return
	}
	backend := a.names.backend(up.Flow.Id, up.To.Dst)
	v := way{backend: backend, timeouts: a.names.timeouts(backend.Pool)}
	f := w.flows.add(c, up.To.Src, v, "", c.client)
	f.generation, f.bound = up.Flow.Generation, a.now
	f.mss = smallestSegment(c.client.Addr().Is4())
	f.adoptEnds(a.now, maps.LegClient, up.Flow.Control)
	if !up.Has(maps.FlowConfirmed) {
		a.of[w.id].unconfirmed.set(int(w.flows.number(f)))
	}
	a.of[w.id].generations.set(int(f.generation))
}

// pair finds the flow of a backend's entry. Returns false if there is none: it was of a handshake, a SYN has removed the client's, or
// that is still to come.
func (a *adoption) pair(b *backward) bool {
	w := a.worker(b.control)
	f := w.flows.find(maps.LegClient, ends{b.client, b.listener})
	if f == nil || b.control&maps.FlowPending != 0 || f.generation != b.generation || f.local != b.local {
		return false
	}
	v := w.flows.wayOf(f)
	if endpointOf(v.backend.Addr) != b.backend {
		return false
	}
	a.of[w.id].paired.set(int(w.flows.number(f)))
	f.adoptEnds(a.now, maps.LegBackend, b.control)
	v.route = a.names.route(b.route)
	w.flows.setWay(f, v)
	return true
}

// tuple is what the backend's packets show.
func (b *backward) tuple() maps.Tuple {
	return maps.Tuple{Src: b.backend.addrPort(), Dst: b.local.addrPort()}
}

func (a *adoption) removeHalf(leg maps.Leg, t maps.Tuple) {
	a.halves++
	if err := a.e.o.Tables.DeleteFlow(leg, t); err != nil {
		a.e.workers[0].log.limited(a.now, "half of a flow not removed", "error", err)
	}
}

// adoptEnds notes what an entry says of its side's end. Where a FIN stands is not known, unless the event of it is still in the ring.
// That a RST came is known only from now on: a sender who goes on outlives it, and has longer to do so.
func (f *flow) adoptEnds(now int64, leg maps.Leg, control uint32) {
	c := &f.closing
	if control&maps.FlowFIN != 0 {
		c.fin[leg], c.unheard[leg] = true, true
	}
	if control&maps.FlowRST != 0 {
		c.reset, c.resetBy, c.resetAt, c.resetBefore = true, uint8(leg), now, true
	}
	// Who was first is not known: a backend that ended at all may hold the port.
	c.backendFirst = c.backendFirst || leg == maps.LegBackend && c.ended() && (c.fin[leg] || c.resetBy == uint8(leg))
}

// settle gives a worker's flows their ports and timers, now that all is read, and removes the halves.
func (a *adoption) settle(w *worker) {
	mine := &a.of[w.id]
	apart := int64(settleSpread) / int64(w.flows.used+settleSlow)
	for i := w.flows.len() - 1; i >= 0; i-- { // remove moves the last one
		n := w.flows.order[i]
		f := w.flows.at(n)
		if !mine.paired.has(int(n)) {
			a.removeHalf(maps.LegClient, f.clientTuple())
			w.flows.remove(f)
			continue
		}
		v := w.flows.wayOf(f)
		v.ports = a.ports(w, f, v.backend)
		if f.local.port < a.e.o.SourcePortFirst || f.local.port > a.e.o.SourcePortLast {
			a.e.sourceClient.Store(true) // or the kernel would not look for its entry
		}
		w.flows.setWay(f, v)
		switch {
		case f.closing.ended():
			w.flowTimers.set(n, a.now+int64(f.quiet(&v, false))+apart*int64(n))
		case mine.unconfirmed.has(int(n)):
			w.flowTimers.set(n, max(a.now, f.bound+int64(v.timeouts.Unconfirmed)))
		}
		a.e.flows.Add(1)
	}
	w.generation = lastGeneration(mine.generations)
}

// ports are where the port of a flow belongs, which is now known to be in use; nil if it is the client's own or of a pool
// that is no more. (A port that nobody knows of is still not handed out as long as the flow is there: see worker.speaks.)
func (a *adoption) ports(w *worker, f *flow, b *pool.Backend) *ports {
	local, p := f.local.addrPort(), a.names.pools[b.Pool]
	if p == nil || p.Config.Source.Client || f.local == f.client || local == w.flows.originOf(f) {
		return nil
	}
	all := w.portsTo(pathKey{local.Addr(), b.Addr, p.Config.Source.PortFirst, p.Config.Source.PortLast})
	if !all.adopt(local.Port()) {
		return nil
	}
	return all
}

// lastGeneration is one in use behind which there is the longest run of generations that are not. They wrap, so the largest says
// nothing.
func lastGeneration(used bitset) uint16 {
	const all = 1 << 16
	last, best, longest := 0, 0, 0
	for i := range 2 * all {
		switch {
		case used.has(i % all):
			last = i
		case i-last > longest:
			best, longest = last, i-last
		}
	}
	return uint16(best)
}
