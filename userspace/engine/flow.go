// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
	"snilb/userspace/pool"
)

const (
	// closedQuiet is how long a flow whose FINs are both acknowledged must be
	// silent: the last ACK may be asked for again.
	closedQuiet = 2 * time.Second
	// closedHurry is closedQuiet while ports towards the backend are scarce: longer than the first repetition of a FIN takes
	// on most ways (RFC 6298 with Linux's least of 200 ms). Who asks for the last ACK later than that is answered by a
	// reset, where a new connection would find no port.
	closedHurry = 300 * time.Millisecond
	// outlived is how long after its RST a side that still sends is alive.
	outlived = 3 * time.Second
	// resetQuiet is how long a flow must be silent after a RST, which may have
	// been forged: later traffic brings the flow back.
	resetQuiet = 10 * time.Second
)

// flow is a bound connection as the engine remembers it: who, and how it ends. Its
// numbers are in the two entries, which the kernel writes.
type flow struct {
	timer
	connection
	cookie     uint32
	generation uint16
	routeID    uint16 // index of the route plus 1; 0: no route
	local      local
	mss        int // payload of a segment that both ways take
	backend    *pool.Backend
	route, sni string
	bound      int64
	place      int              // in worker.order
	timeouts   *config.Timeouts // of its pool, which a reload leaves as it is
	outlived   [2]bool          // by leg: a RST of it was no end
	closing    *closing         // nil while neither side ended
	origin     *netip.AddrPort  // the client by its PROXY header; nil: no other than the peer
}

// closing is what a flow's FINs and RSTs said.
type closing struct {
	fin          [2]bool // by leg
	end          [2]uint32
	reset        bool
	resetBy      maps.Leg
	resetAt      int64
	backendFirst bool
	unheard      bool // an end was only seen in an entry: where its FIN stands is not known
}

// bothFINs reports whether each side has ended.
func (c *closing) bothFINs() bool { return c.fin[maps.LegClient] && c.fin[maps.LegBackend] }

func newFlow(h *handshake, generation uint16) *flow {
	a := &h.attempt
	f := &flow{
		connection: h.connection,
		cookie:     h.cookie,
		generation: generation,
		local:      a.local,
		mss:        min(h.segmentSize(), segmentSize(h.options.MSS, a.hop.MTU, h.client.Addr().Is4(), h.options.HasTimestamps)),
		backend:    a.backend,
		route:      h.decision.routeName(),
		sni:        h.sni,
		bound:      h.progress,
		timeouts:   &h.decision.pool.Config.Timeouts,
	}
	if r := h.decision.route; r != nil {
		f.routeID = uint16(r.Index + 1)
	}
	if origin := h.origin.client; origin != h.client {
		f.origin = &origin
	}
	f.owner = f
	return f
}

func (f *flow) clientTuple() maps.Tuple {
	return maps.Tuple{Src: f.client, Dst: f.listener}
}

func (f *flow) backendTuple() maps.Tuple {
	return maps.Tuple{Src: f.backend.Addr, Dst: f.local.AddrPort}
}

// closingSegment is the first FIN or RST of one side, as that side sent it.
func (w *worker) closingSegment(leg maps.Leg, s *packet.Segment) {
	f := w.flowOf(leg, s)
	if f == nil {
		w.stats.unknown++
		return
	}
	if f.closing == nil {
		f.closing = &closing{backendFirst: leg == maps.LegBackend}
	}
	if s.Has(packet.RST) {
		f.closing.reset, f.closing.resetBy, f.closing.resetAt = true, leg, w.now
	}
	if s.Has(packet.FIN) {
		f.closing.fin[leg], f.closing.end[leg] = true, s.End()
	}
	w.timers.set(&f.timer, w.now+int64(f.quiet(false)))
}

// isOver reports whether a RST, or both FINs, have ended the flow: it is kept for
// what may still come.
func (f *flow) isOver() bool {
	c := f.closing
	return c != nil && (c.reset || c.bothFINs())
}

// flowOf finds a flow by a packet of one of its legs.
func (w *worker) flowOf(leg maps.Leg, s *packet.Segment) *flow {
	if leg == maps.LegClient {
		return w.flows[connection{client: s.Src, listener: s.Dst}]
	}
	return w.leaseOf(s.Src, s.Dst).flow
}

// quiet is how long the flow must be silent to be over; 0 is never.
func (f *flow) quiet(acknowledged bool) time.Duration {
	switch c := f.closing; {
	case c == nil:
		return f.timeouts.Idle
	case c.reset:
		return min(resetQuiet, f.timeouts.Closing)
	case c.bothFINs() && f.local.ports != nil && f.local.ports.scarce():
		return closedHurry
	case c.bothFINs() && acknowledged:
		return closedQuiet
	case c.bothFINs():
		return min(closedQuiet, f.timeouts.Closing)
	}
	return f.timeouts.Closing
}

// expire looks at a closing flow again.
func (f *flow) expire(w *worker) { w.review([]*flow{f}) }

// review reads the entries of at most maps.FlowJobs flows and removes those that are over.
func (w *worker) review(flows []*flow) {
	// Between its timer and this, a handshake's may have found that the flow is over and removed it.
	flows = slices.DeleteFunc(flows, func(f *flow) bool { return f.place == struck })
	if len(flows) == 0 {
		return
	}
	for _, f := range flows {
		w.jobs.Read(f.clientTuple(), f.backendTuple(), f.generation)
	}
	failed := w.jobs.Run()
	over := w.over[:0]
	for i, f := range flows {
		err := failed
		if err == nil {
			err = w.jobs.Result(i)
		}
		if reason := f.look(w, i, err); reason != "" {
			over = append(over, ended{f, reason})
		}
	}
	w.remove(over...)
	clear(over) // nothing here keeps a flow
	w.over = over
}

// ended is a flow to be removed, and why.
type ended struct {
	flow   *flow
	reason string
}

// look says why a flow is to be removed, "" if it is not: by the entries of that job, or the error in their place.
func (f *flow) look(w *worker, job int, err error) (reason string) {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return "replaced"
	}
	if err != nil {
		w.log.limited(w.now, "flow not read", "error", err)
		w.timers.set(&f.timer, w.now+int64(time.Second))
		return ""
	}
	up, down := w.jobs.Flows(job)
	return f.judge(w, &up, &down)
}

// judge is look with both entries, up being the client's direction.
func (f *flow) judge(w *worker, up, down *maps.Entry) (reason string) {
	silent := min(idle(w.now, up.Flow.LastSeen), idle(w.now, down.Flow.LastSeen))
	if silent >= staleAfter {
		f.noticeEnds(up, down)
	}
	f.outliveReset(w.now, up, down)
	if reason := f.over(w.now, up, down, silent); reason != "" {
		if reason != "closed" && reason != "reset" {
			f.tellBoth(w, up, down)
		}
		return reason
	}
	if f.closing != nil {
		wait := max(f.quietNow(up, down)-silent, closedQuiet/8)
		if f.closing.bothFINs() {
			// The last ACK, late because a FIN was lost, is no event.
			wait = min(wait, closedQuiet)
		}
		w.timers.set(&f.timer, w.now+int64(wait))
	}
	return ""
}

// noticeEnds makes up for FINs and RSTs whose events were lost, or were too old when
// the engine came to them. The kernel programs tell of each only once.
func (f *flow) noticeEnds(up, down *maps.Entry) {
	for leg, entry := range [2]*maps.Entry{maps.LegClient: up, maps.LegBackend: down} {
		fin, reset := entry.Has(maps.FlowFIN), entry.Has(maps.FlowRST) && !f.outlived[leg]
		if !fin && !reset || f.closing != nil && (f.closing.fin[leg] || !fin) && (f.closing.reset || !reset) {
			continue
		}
		if f.closing == nil {
			f.closing = &closing{backendFirst: maps.Leg(leg) == maps.LegBackend}
		}
		f.closing.unheard = true
		f.closing.fin[leg] = f.closing.fin[leg] || fin
		f.closing.reset = f.closing.reset || reset
	}
}

// outliveReset forgets a RST whose sender went on: it was forged, or at a wrong
// number. Who has reset only answers what was still under way.
func (f *flow) outliveReset(now int64, up, down *maps.Entry) {
	c := f.closing
	if c == nil || !c.reset || c.unheard {
		return
	}
	entry := up
	if c.resetBy == maps.LegBackend {
		entry = down
	}
	if now-int64(idle(now, entry.Flow.LastSeen)) < c.resetAt+int64(outlived) {
		return
	}
	f.outlived[c.resetBy] = true // the entry's mark stays
	c.reset = false
	if !c.fin[0] && !c.fin[1] {
		f.closing = nil
	}
}

func (f *flow) quietNow(up, down *maps.Entry) time.Duration {
	if f.closing != nil && f.closing.bothFINs() && !f.closing.reset && !f.acknowledged(up, down) {
		return f.timeouts.Closing
	}
	return f.quiet(true)
}

// over says why a flow is to be removed, "" if it is not.
func (f *flow) over(now int64, up, down *maps.Entry, silent time.Duration) string {
	quiet := f.quietNow(up, down)
	switch {
	case f.closing != nil && silent >= quiet:
		switch {
		case f.closing.reset:
			return "reset"
		case f.closing.bothFINs() && f.acknowledged(up, down):
			return "closed"
		}
		return "closing_timeout"
	case f.closing == nil && quiet > 0 && silent >= quiet:
		return "idle"
	case !up.Has(maps.FlowConfirmed) && now-f.bound >= int64(f.timeouts.Unconfirmed):
		return "unconfirmed"
	}
	return ""
}

// acknowledged reports whether each side has the other's FIN. An entry holds the
// last ACK as its side sent it, and what the rewrite adds to it.
func (f *flow) acknowledged(up, down *maps.Entry) bool {
	c := f.closing
	if c.unheard {
		return false
	}
	byBackend := down.Flow.LastAck + down.Flow.Ack - c.end[maps.LegClient]
	byClient := up.Flow.LastAck + up.Flow.Ack - c.end[maps.LegBackend]
	return int32(byBackend) >= 0 && int32(byClient) >= 0
}

// hasEntry reports whether the kernel still has the client's entry of this flow: it
// deletes that of a closing one for a SYN. When in doubt it has.
func (f *flow) hasEntry(w *worker) bool {
	up, err := w.e.o.Tables.LookupFlow(maps.LegClient, f.clientTuple())
	return err == nil && f.owns(&up) || err != nil && !errors.Is(err, ebpf.ErrKeyNotExist)
}

// owns reports whether the client's entry is of this flow and not of a later one
// from the same client port.
func (f *flow) owns(up *maps.Entry) bool {
	return up.Flow.Generation == f.generation && up.To == f.backendTuple().Reverse()
}

// tellBoth resets both sides where each will accept it: the last ACK a side sent
// is the number it waits for.
func (f *flow) tellBoth(w *worker, up, down *maps.Entry) {
	toClient := packet.Segment{Src: f.listener, Dst: f.client, Seq: up.Flow.LastAck, Flags: packet.RST}
	toBackend := packet.Segment{
		Src: f.local.AddrPort, Dst: f.backend.Addr,
		Seq: down.Flow.LastAck, Flags: packet.RST,
	}
	w.send(&toClient)
	w.send(&toBackend)
}

// remove forgets a flow at once.
func (f *flow) remove(w *worker, reason string) { w.remove(ended{f, reason}) }

// remove forgets at most maps.FlowJobs flows: their entries, if they still are their own, and their ports.
func (w *worker) remove(all ...ended) {
	if len(all) == 0 {
		return
	}
	for _, e := range all {
		w.jobs.Remove(e.flow.clientTuple(), e.flow.backendTuple(), e.flow.generation)
	}
	err := w.jobs.Run()
	if err != nil {
		w.log.limited(w.now, "flows not removed", "error", err)
	}
	for _, e := range all {
		if err != nil && e.reason != "replaced" {
			// Its entries are there, so its port must not be anybody else's.
			w.timers.set(&e.flow.timer, w.now+int64(time.Second))
			continue
		}
		e.flow.forget(w, e.reason)
	}
}

// forget is remove without the entries.
func (f *flow) forget(w *worker, reason string) {
	w.timers.set(&f.timer, 0)
	w.giveLocal(f.local, f.backend.Addr, f.closing != nil && f.closing.backendFirst)
	if w.flows[f.connection] == f {
		delete(w.flows, f.connection)
	}
	w.strike(f)
	w.e.flows.Add(-1)
	w.stats.closed[reason]++
}
