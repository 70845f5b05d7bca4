// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"time"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/userspace/packet"
)

const (
	// closedQuiet is how long a flow whose FINs are both acknowledged must be
	// silent: the last ACK may be asked for again.
	closedQuiet = 2 * time.Second
	// closedHurry is closedQuiet while ports towards the backend are scarce: longer than the first repetition of a FIN takes
	// on most ways (RFC 6298 with Linux's least of 200 ms). Who asks for the last ACK later than that is answered by a
	// reset, where a new connection would find no port.
	closedHurry = 300 * time.Millisecond
	// unheardQuiet is how long a flow must be silent that both sides have ended to be closed, where it is not known whether the last
	// FIN was acknowledged: who still repeats it does so in less, unless all was lost for as long (RFC 6298 5.5).
	unheardQuiet = 15 * time.Second
	// outlived is how long after its RST a side that still sends is alive.
	outlived = 3 * time.Second
	// resetQuiet is how long a flow must be silent after a RST, which may have
	// been forged: later traffic brings the flow back.
	resetQuiet = 10 * time.Second
)

// bothFINs reports whether each side has ended.
func (c *closing) bothFINs() bool { return c.fin[maps.LegClient] && c.fin[maps.LegBackend] }

// ended reports whether anything was said of an end.
func (c *closing) ended() bool { return c.reset || c.fin != [2]bool{} }

// closingSegment is the first FIN or RST of one side, as that side sent it.
func (w *worker) closingSegment(leg maps.Leg, s *packet.Segment) {
	f := w.flowOf(leg, s)
	if f == nil {
		w.stats.unknown++
		return
	}
	c := &f.closing
	if !c.ended() {
		c.backendFirst = leg == maps.LegBackend
	}
	if s.Has(packet.RST) {
		c.reset, c.resetBy, c.resetAt, c.resetBefore = true, uint8(leg), w.now, false
	}
	if s.Has(packet.FIN) {
		c.fin[leg], c.end[leg], c.unheard[leg] = true, s.End(), false
	}
	v := w.flows.wayOf(f)
	w.flowTimers.set(w.flows.number(f), w.now+int64(f.quiet(&v, false)))
}

// isOver reports whether a RST, or both FINs, have ended the flow: it is kept for
// what may still come.
func (f *flow) isOver() bool {
	return f.closing.reset || f.closing.bothFINs()
}

// flowOf finds a flow by a packet of one of its legs.
func (w *worker) flowOf(leg maps.Leg, s *packet.Segment) *flow {
	if leg == maps.LegClient {
		return w.flows.byClient(connection{client: s.Src, listener: s.Dst})
	}
	return w.flows.byBackend(s.Src, s.Dst)
}

// quiet is how long the flow must be silent to be over; 0 is never.
func (f *flow) quiet(v *way, acknowledged bool) time.Duration {
	switch c := &f.closing; {
	case !c.ended():
		return v.timeouts.Idle
	case c.reset && c.resetBefore && c.fin == [2]bool{}:
		return v.timeouts.Closing
	case c.reset && !acknowledged:
		return min(resetQuiet, v.timeouts.Closing)
	case c.bothFINs() && v.ports != nil && v.ports.scarce():
		return closedHurry
	case c.bothFINs() && acknowledged:
		return closedQuiet
	case c.bothFINs():
		return min(closedQuiet, v.timeouts.Closing)
	}
	return v.timeouts.Closing
}

// review reads the entries of at most maps.FlowJobs flows and removes those that are over.
func (w *worker) review(flows []*flow) {
	if len(flows) == 0 {
		return
	}
	for _, f := range flows {
		w.jobs.Read(f.clientTuple(), w.flows.backendTuple(f), f.generation)
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
		w.flowTimers.set(w.flows.number(f), w.now+int64(time.Second))
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
	if f.outliveReset(w.now, up, down) {
		w.note(f)
	}
	v := w.flows.wayOf(f)
	if reason := f.over(&v, w.now, up, down, silent); reason != "" {
		if reason != "closed" && reason != "reset" {
			f.tellBoth(w, up, down)
		}
		return reason
	}
	if f.closing.ended() {
		wait := max(f.quietNow(&v, up, down)-silent, closedQuiet/8)
		if f.closing.bothFINs() {
			// The last ACK, late because a FIN was lost, is no event.
			wait = min(wait, closedQuiet)
		}
		w.flowTimers.set(w.flows.number(f), w.now+int64(wait))
	}
	return ""
}

// noticeEnds makes up for FINs and RSTs whose events were lost, or were too old when
// the engine came to them. The kernel programs tell of each only once.
func (f *flow) noticeEnds(up, down *maps.Entry) {
	c := &f.closing
	for leg, entry := range [2]*maps.Entry{maps.LegClient: up, maps.LegBackend: down} {
		fin, reset := entry.Has(maps.FlowFIN), entry.Has(maps.FlowRST) && !f.outlived[leg]
		if (c.fin[leg] || !fin) && (c.reset || !reset) {
			continue
		}
		if !c.ended() {
			c.backendFirst = maps.Leg(leg) == maps.LegBackend
		}
		c.unheard[leg] = true
		c.fin[leg] = c.fin[leg] || fin
		c.reset = c.reset || reset
	}
}

// outliveReset forgets a RST whose sender went on: it was forged, or at a wrong
// number. Who has reset only answers what was still under way.
// Returns true if so.
func (f *flow) outliveReset(now int64, up, down *maps.Entry) bool {
	c := &f.closing
	if !c.reset || c.unheard != [2]bool{} {
		return false
	}
	entry := up
	if maps.Leg(c.resetBy) == maps.LegBackend {
		entry = down
	}
	if now-int64(idle(now, entry.Flow.LastSeen)) < c.resetAt+int64(outlived) {
		return false
	}
	f.outlived[c.resetBy] = true // the entry's mark stays
	c.reset = false
	return true
}

func (f *flow) quietNow(v *way, up, down *maps.Entry) time.Duration {
	closed := f.closed(up, down)
	if f.closing.bothFINs() && !f.closing.reset && !closed {
		if f.closing.unheard != [2]bool{} {
			return min(unheardQuiet, v.timeouts.Closing)
		}
		return v.timeouts.Closing
	}
	return f.quiet(v, closed)
}

// over says why a flow is to be removed, "" if it is not.
func (f *flow) over(v *way, now int64, up, down *maps.Entry, silent time.Duration) string {
	quiet := f.quietNow(v, up, down)
	switch {
	case f.closing.ended() && silent >= quiet:
		switch {
		case f.closed(up, down): // by a RST it has answered a repetition that was late
			return "closed"
		case f.closing.reset:
			return "reset"
		case f.closing.bothFINs() && f.closing.unheard != [2]bool{} && silent >= unheardQuiet:
			return "closed"
		}
		return "closing_timeout"
	case !f.closing.ended() && quiet > 0 && silent >= quiet:
		return "idle"
	case !up.Has(maps.FlowConfirmed) && now-f.bound >= int64(v.timeouts.Unconfirmed):
		return "unconfirmed"
	}
	return ""
}

// closed reports whether each side has ended, and has the other's FIN.
func (f *flow) closed(up, down *maps.Entry) bool {
	return f.closing.bothFINs() && f.acknowledged(up, down)
}

// acknowledged reports whether each side has the other's FIN. An entry holds the
// last ACK as its side sent it, and what the rewrite adds to it.
func (f *flow) acknowledged(up, down *maps.Entry) bool {
	c := &f.closing
	if c.unheard != [2]bool{} {
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
	return err == nil && f.owns(w, &up) || err != nil && !errors.Is(err, ebpf.ErrKeyNotExist)
}

// owns reports whether the client's entry is of this flow and not of a later one
// from the same client port.
func (f *flow) owns(w *worker, up *maps.Entry) bool {
	return up.Flow.Generation == f.generation && up.To == w.flows.backendTuple(f).Reverse()
}

// tellBoth resets both sides where each will accept it: the last ACK a side sent
// is the number it waits for.
func (f *flow) tellBoth(w *worker, up, down *maps.Entry) {
	client, backend := f.clientTuple(), w.flows.backendTuple(f)
	toClient := packet.Segment{Src: client.Dst, Dst: client.Src, Seq: up.Flow.LastAck, Flags: packet.RST}
	toBackend := packet.Segment{Src: backend.Dst, Dst: backend.Src, Seq: down.Flow.LastAck, Flags: packet.RST}
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
		w.jobs.Remove(e.flow.clientTuple(), w.flows.backendTuple(e.flow), e.flow.generation)
	}
	err := w.jobs.Run()
	if err != nil {
		w.log.limited(w.now, "flows not removed", "error", err)
	}
	for _, e := range all {
		if err != nil && e.reason != "replaced" {
			// Its entries are there, so its port must not be anybody else's.
			w.flowTimers.set(w.flows.number(e.flow), w.now+int64(time.Second))
			continue
		}
		e.flow.forget(w, e.reason)
	}
}

// forget is remove without the entries.
func (f *flow) forget(w *worker, reason string) {
	w.flowTimers.set(w.flows.number(f), 0)
	if p := w.flows.wayOf(f).ports; p != nil {
		p.give(w.now, f.local.port, f.closing.ended() && f.closing.backendFirst)
	}
	w.flows.remove(f)
	w.e.flows.Add(-1)
	w.stats.closed[reason]++
}
