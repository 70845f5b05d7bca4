// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"

	"snilb/maps"
	"snilb/userspace/pool"
)

// adoption makes the flows in the kernel's tables, which an earlier daemon has bound, this one's. The tables are read twice,
// the client's entries and then the backend's: what is remembered of the first are the flows themselves.
type adoption struct {
	e      *Engine
	now    int64
	names  *names
	of     []adopting // by worker
	halves uint64
	err    error
}

// adopting is what is noted of a worker's flows until all is read.
type adopting struct {
	paired      bitset // numbers of flows with both entries
	unconfirmed bitset // numbers of flows whose client has not acknowledged anything yet
	generations bitset // in use
}

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
	a := &adoption{e: e, now: e.clock.now(), names: newNames(e.plan.Load()), of: make([]adopting, len(e.workers))}
	for _, read := range []func(maps.Leg, maps.Tuple, *maps.Entry){a.readClient, a.readBackend} {
		if err := e.o.Tables.Flows(read); err != nil {
			return err
		}
		if a.err != nil {
			return a.err
		}
	}
	for _, w := range e.workers {
		a.settle(w)
	}
	e.sourceClient.Store(true) // until it is looked who has its client's own port
	e.halves = a.halves
	if e.adopted = e.Bound(); e.adopted > 0 || a.halves > 0 {
		e.o.Log.Info("took over the flows of an earlier daemon", "flows", e.adopted, "half_flows", a.halves)
	}
	return nil
}

// worker is who an entry belongs to, nil if there is none.
func (a *adoption) worker(entry *maps.Entry) *worker {
	if n := entry.Worker(); n < len(a.e.workers) {
		return a.e.workers[n]
	}
	a.err = fmt.Errorf("there is a flow of worker %d, and there are %d workers: the number of workers differs from that of the daemon that bound it",
		entry.Worker(), len(a.e.workers))
	return nil
}

// readClient makes a flow of a client's entry.
func (a *adoption) readClient(leg maps.Leg, t maps.Tuple, up *maps.Entry) {
	if leg != maps.LegClient || a.err != nil {
		return
	}
	w := a.worker(up)
	c := connection{client: t.Src, listener: t.Dst}
	if w == nil || w.flows.byClient(c) != nil { // read twice
		return
	}
	backend := a.names.backend(up.Flow.Id, up.To.Dst)
	v := way{backend: backend, timeouts: a.names.timeouts(backend.Pool)}
	f := w.flows.add(c, up.To.Src, v, "", c.client)
	f.generation, f.bound = up.Flow.Generation, a.now
	f.mss = smallestSegment(c.client.Addr().Is4())
	f.adoptEnds(a.now, maps.LegClient, up)
	if !up.Has(maps.FlowConfirmed) {
		a.of[w.id].unconfirmed.set(int(w.flows.number(f)))
	}
	a.of[w.id].generations.set(int(f.generation))
}

// readBackend finds the flow of a backend's entry. One without was of a handshake, or its client's was removed by a SYN.
func (a *adoption) readBackend(leg maps.Leg, t maps.Tuple, down *maps.Entry) {
	if leg != maps.LegBackend || a.err != nil {
		return
	}
	w := a.worker(down)
	if w == nil {
		return
	}
	f := w.flows.byClient(connection{client: down.To.Dst, listener: down.To.Src})
	if f == nil || down.Has(maps.FlowPending) || f.generation != down.Flow.Generation || w.flows.backendTuple(f) != t {
		a.removeHalf(maps.LegBackend, t)
		return
	}
	a.of[w.id].paired.set(int(w.flows.number(f)))
	f.adoptEnds(a.now, maps.LegBackend, down)
	v := w.flows.wayOf(f)
	v.route = a.names.route(down.Flow.Id)
	w.flows.setWay(f, v)
}

func (a *adoption) removeHalf(leg maps.Leg, t maps.Tuple) {
	a.halves++
	if err := a.e.o.Tables.DeleteFlow(leg, t); err != nil {
		a.e.workers[0].log.limited(a.now, "half of a flow not removed", "error", err)
	}
}

// adoptEnds notes what an entry says of its side's end. Where a FIN stands is not known, unless the event of it is still in the ring.
// That a RST came is known only from now on: a sender who goes on outlives it.
func (f *flow) adoptEnds(now int64, leg maps.Leg, entry *maps.Entry) {
	c := &f.closing
	if entry.Has(maps.FlowFIN) {
		c.fin[leg], c.unheard[leg] = true, true
	}
	if entry.Has(maps.FlowRST) {
		c.reset, c.resetBy, c.resetAt = true, uint8(leg), now
	}
	// Who was first is not known: a backend that ended at all may hold the port.
	c.backendFirst = c.backendFirst || leg == maps.LegBackend && c.ended() && (c.fin[leg] || c.resetBy == uint8(leg))
}

// settle gives a worker's flows their ports and timers, now that all is read, and removes the halves.
func (a *adoption) settle(w *worker) {
	mine := &a.of[w.id]
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
		w.flows.setWay(f, v)
		switch {
		case f.closing.ended():
			w.flowTimers.set(n, a.now+int64(f.quiet(&v, false)))
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
