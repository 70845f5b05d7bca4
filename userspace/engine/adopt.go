// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"sync"
	"time"

	"snilb/maps"
	"snilb/userspace/pool"
)

// adoption makes the flows in the kernel's tables, which an earlier daemon has bound, this one's. The tables are read once: a client's
// entry becomes a flow at once, and of the backends' those are remembered that come before. Each worker takes its own entries,
// side by side with the others: connections that begin meanwhile wait for the last.
type adoption struct {
	e     *Engine
	now   int64
	names *names
	of    []*adopting // by worker
}

// backward is what is needed of a backend's entry.
type backward struct {
	backend, local, client, listener endpoint
	control                          uint32
	generation, route                uint16
}

// adopting is a worker's part of it.
type adopting struct {
	*adoption
	w           *worker
	backends    map[backendKey]*pool.Backend // what names said
	early       [][]backward                 // in chunks, as there may be many
	paired      bitset                       // numbers of flows with both entries
	unconfirmed bitset                       // numbers of flows whose client has not acknowledged anything yet
	generations bitset                       // in use
	halves      uint64
}

// backendKey is by what names knows a backend.
type backendKey struct {
	id   uint16
	addr netip.AddrPort
}

// earlyChunk backwards are some 350 KB.
const earlyChunk = 4096

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
	a := &adoption{e: e, now: e.clock.now(), names: newNames(e.plan.Load(), known)}
	var read []func(maps.Leg, maps.Tuple, *maps.Entry)
	for _, w := range e.workers {
		mine := &adopting{adoption: a, w: w, backends: make(map[backendKey]*pool.Backend)}
		a.of, read = append(a.of, mine), append(read, mine.read)
	}
	if err := e.o.Tables.FlowsByWorker(read); err != nil {
		return err // before anything is removed
	}
	a.each((*adopting).pairEarly)
	if err != nil || !a.recall(e.journal) {
		if err := e.recallPeers(); err != nil {
			return err
		}
	}
	a.each((*adopting).settle)
	for _, mine := range a.of {
		e.halves += mine.halves
	}
	if e.adopted = e.Bound(); e.adopted > 0 || e.halves > 0 {
		e.o.Log.Info("took over the flows of an earlier daemon", "flows", e.adopted, "half_flows", e.halves)
	}
	return nil
}

// each has all workers' parts done, side by side.
func (a *adoption) each(do func(*adopting)) {
	var all sync.WaitGroup
	for _, mine := range a.of {
		all.Go(func() { do(mine) })
	}
	all.Wait()
}

// read takes any entry of the worker's.
func (a *adopting) read(leg maps.Leg, t maps.Tuple, entry *maps.Entry) {
	if leg == maps.LegClient {
		a.readClient(t, entry)
		return
	}
	b := backward{
		endpointOf(t.Src), endpointOf(t.Dst), endpointOf(entry.To.Dst), endpointOf(entry.To.Src),
		entry.Flow.Control, entry.Flow.Generation, entry.Flow.Id,
	}
	if !a.pair(&b) {
		a.keep(b)
	}
}

// keep remembers an entry until all are read.
func (a *adopting) keep(b backward) {
	last := len(a.early) - 1
	if last < 0 || len(a.early[last]) == earlyChunk {
		a.early, last = append(a.early, make([]backward, 0, earlyChunk)), last+1
	}
	a.early[last] = append(a.early[last], b)
}

// readClient makes a flow of a client's entry.
func (a *adopting) readClient(t maps.Tuple, up *maps.Entry) {
	c := connection{client: t.Src, listener: t.Dst}
	w := a.w
	if w.flows.byClient(c) != nil { // read twice
		return
	}
	backend := a.backend(up.Flow.Id, up.To.Dst)
	v := way{backend: backend, timeouts: a.names.timeouts(backend.Pool)}
	f := w.flows.add(c, up.To.Src, v, "", c.client)
	f.generation, f.bound = up.Flow.Generation, a.now
	f.mss = smallestSegment(c.client.Addr().Is4())
	f.adoptEnds(a.now, maps.LegClient, up.Flow.Control)
	if !up.Has(maps.FlowConfirmed) {
		a.unconfirmed.set(int(w.flows.number(f)))
	}
	a.generations.set(int(f.generation))
}

// backend is what names says, asked once for all flows that have it.
func (a *adopting) backend(id uint16, addr netip.AddrPort) *pool.Backend {
	key := backendKey{id, addr}
	b := a.backends[key]
	if b == nil {
		b = a.names.backend(id, addr)
		a.backends[key] = b
	}
	return b
}

// pair finds the flow of a backend's entry. Returns false if there is none: it was of a handshake, a SYN has removed the client's, or
// that is still to come.
func (a *adopting) pair(b *backward) bool {
	w := a.w
	f := w.flows.find(maps.LegClient, ends{b.client, b.listener})
	if f == nil || b.control&maps.FlowPending != 0 || f.generation != b.generation || f.local != b.local {
		return false
	}
	v := w.flows.wayOf(f)
	if endpointOf(v.backend.Addr) != b.backend {
		return false
	}
	a.paired.set(int(w.flows.number(f)))
	f.adoptEnds(a.now, maps.LegBackend, b.control)
	v.route = a.names.route(b.route)
	w.flows.setWay(f, v)
	return true
}

// pairEarly pairs the backends' entries that came before the clients', now that all is read, and removes the halves.
func (a *adopting) pairEarly() {
	for _, some := range a.early {
		for i := range some {
			if b := &some[i]; !a.pair(b) {
				a.removeHalf(maps.LegBackend, b.tuple())
			}
		}
	}
	a.early = nil
}

// tuple is what the backend's packets show.
func (b *backward) tuple() maps.Tuple {
	return maps.Tuple{Src: b.backend.addrPort(), Dst: b.local.addrPort()}
}

func (a *adopting) removeHalf(leg maps.Leg, t maps.Tuple) {
	a.halves++
	if err := a.e.o.Tables.DeleteFlow(leg, t); err != nil {
		a.w.log.limited(a.now, "half of a flow not removed", "error", err)
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

// settle gives the flows their ports and timers, now that all is known, and removes the halves.
func (a *adopting) settle() {
	w := a.w
	apart := int64(settleSpread) / int64(w.flows.used+settleSlow)
	for i := w.flows.len() - 1; i >= 0; i-- { // remove moves the last one
		n := w.flows.order[i]
		f := w.flows.at(n)
		if !a.paired.has(int(n)) {
			a.removeHalf(maps.LegClient, f.clientTuple())
			w.flows.remove(f)
			continue
		}
		v := w.flows.wayOf(f)
		v.ports = a.ports(f, v.backend)
		if f.local.port < a.e.o.SourcePortFirst || f.local.port > a.e.o.SourcePortLast {
			a.e.sourceClient.Store(true) // or the kernel would not look for its entry
		}
		w.flows.setWay(f, v)
		switch {
		case f.closing.ended():
			w.flowTimers.set(n, a.now+int64(f.quiet(&v, false))+apart*int64(n))
		case a.unconfirmed.has(int(n)):
			w.flowTimers.set(n, max(a.now, f.bound+int64(v.timeouts.Unconfirmed)))
		}
	}
	a.e.flows.Add(int64(w.flows.len()))
	w.generation = lastGeneration(a.generations)
}

// ports are where the port of a flow belongs, which is now known to be in use; nil if it is the client's own or of a pool
// that is no more. (A port that nobody knows of is still not handed out as long as the flow is there: see worker.speaks.)
func (a *adopting) ports(f *flow, b *pool.Backend) *ports {
	w, local, p := a.w, f.local.addrPort(), a.names.pools[b.Pool]
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
