// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"slices"
	"time"

	"snilb/userspace/packet"
	"snilb/userspace/pool"
)

const (
	// firstRetry is when an unanswered SYN, or data, is sent again; each later
	// wait is twice as long.
	firstRetry = 250 * time.Millisecond
	// maxPending bounds what a backend may send before the bind, in segments.
	maxPending = 16
	// busyTries bounds how many ports of a backend are tried that it still holds
	// in TIME_WAIT.
	busyTries = 8
)

// attempt is the handshake with one backend.
type attempt struct {
	tried   []*pool.Backend
	backend *pool.Backend
	hop     Hop
	ports   *ports
	port    uint16
	isn     uint32 // ours
	tsval   uint32 // of our SYN
	begun   int64
	ends    int64 // of this backend's time
	retry   time.Duration
	busy    int // ports refused by a challenge ACK

	peer    packet.Segment // its SYN-ACK, without payload
	pending []packet.Segment
}

func (a *attempt) source() netip.AddrPort {
	return netip.AddrPortFrom(a.ports.source, a.port)
}

// connect tries the pool's next backend; when none is left, what no_backend says
// happens.
func (h *handshake) connect(w *worker) {
	d := &h.decision
	for w.now < h.deadline {
		b := d.pool.Balancer.Next(d.hash, pool.FamilyOf(h.client.Addr()), func(b *pool.Backend) bool {
			return slices.Contains(h.attempt.tried, b)
		})
		if b == nil {
			break
		}
		h.attempt = attempt{tried: append(h.attempt.tried, b), backend: b}
		if h.open(w) {
			return
		}
	}
	w.log.limited(w.now, "no backend can be reached", "pool", d.poolName())
	next := w.e.plan.Load().decideNoBackend(*d, h.connection, h.sni)
	h.act(w, next)
}

// open sends a SYN from a new port. Returns false when this backend cannot be
// tried at all.
func (h *handshake) open(w *worker) bool {
	a := &h.attempt
	hop, err := w.e.o.NextHop(a.backend.Addr.Addr())
	if err != nil {
		w.stats.connect(a.backend, "unreachable")
		w.log.limited(w.now, "no route to a backend", "backend", a.backend.Addr, "error", err)
		return false
	}
	a.hop = hop
	a.ports = w.portsTo(hop.Source, a.backend.Addr)
	port, ok := a.ports.take(w.now, lease{handshake: h})
	if !ok {
		a.ports = nil
		w.stats.connect(a.backend, "no_port")
		w.log.limited(w.now, "source ports are used up: give the pool more source addresses", "backend", a.backend.Addr)
		return false
	}
	a.port = port
	a.isn, a.tsval = w.e.numbers(w.now, a.source(), a.backend.Addr)
	a.begun = w.now
	a.retry = firstRetry
	a.ends = min(w.now+int64(h.decision.pool.Config.Timeouts.Attempt), h.deadline)
	h.phase = connecting
	h.sendSYN(w)
	return true
}

func (h *handshake) sendSYN(w *worker) {
	a := &h.attempt
	o := h.options
	// What the client can take on its own way: its MSS, less where that way is
	// narrower than it knows.
	if hop, err := w.e.o.NextHop(h.client.Addr()); err == nil {
		o.MSS = uint16(segmentSize(o.MSS, hop.MTU, h.client.Addr().Is4(), false))
	}
	if o.HasTimestamps {
		o.TSVal, o.TSEcr = h.backendClock(w), 0
	}
	s := packet.Segment{
		Src: a.source(), Dst: a.backend.Addr, Seq: a.isn,
		Flags: packet.SYN, Window: windowToClient, Options: o,
	}
	w.sendBy(a.hop, &s)
	h.retryAt(w)
}

// backendClock is our TSval on the backend leg now.
func (h *handshake) backendClock(w *worker) uint32 {
	return h.attempt.tsval + uint32((w.now-h.attempt.begun)/int64(time.Millisecond))
}

func (h *handshake) retryAt(w *worker) {
	w.timers.set(&h.timer, min(w.now+int64(h.attempt.retry), h.attempt.ends))
	h.attempt.retry *= 2
}

// expireAttempt repeats what the backend did not answer, or goes to the next one.
func (h *handshake) expireAttempt(w *worker) {
	switch {
	case w.now >= h.attempt.ends:
		h.fail(w, "timeout")
	case h.phase == pushing:
		h.push(w)
	default:
		h.sendSYN(w)
	}
}

// fail gives this backend up.
func (h *handshake) fail(w *worker, result string) {
	w.stats.connect(h.attempt.backend, result)
	h.release(w, true)
	h.connect(w)
}

// release gives the port back. A backend that answered may still send: it is told.
func (h *handshake) release(w *worker, abort bool) {
	a := &h.attempt
	if a.ports == nil {
		return
	}
	if abort && h.phase == pushing {
		// Behind what was pushed: had the backend none of it, its challenge ACK is
		// answered by a reset at the number it asks for.
		s := h.toBackend(w, packet.RST|packet.ACK, h.acked, nil)
		w.sendBy(a.hop, &s)
	}
	a.ports.give(w.now, a.port, true)
	a.ports = nil
}

// toBackend is a segment of ours on the backend leg, offset bytes into the stream.
func (h *handshake) toBackend(w *worker, flags uint8, offset int, payload []byte) packet.Segment {
	a := &h.attempt
	s := packet.Segment{
		Src: a.source(), Dst: a.backend.Addr,
		Seq: a.isn + 1 + uint32(offset), Ack: a.peer.Seq + 1,
		Flags: flags, Window: h.window, Payload: payload,
	}
	if h.options.HasTimestamps {
		s.Options = packet.Options{HasTimestamps: true, TSVal: h.backendClock(w), TSEcr: a.peer.Options.TSVal}
	}
	return s
}

// backendSegment is an answer of the backend before the bind.
func (h *handshake) backendSegment(w *worker, s *packet.Segment) {
	a := &h.attempt
	switch {
	case s.Has(packet.RST):
		// RFC 9293 3.10.7.3: acceptable only if it acknowledges our SYN, or
		// once synchronized is where we wait.
		if h.phase == connecting && s.Has(packet.ACK) && s.Ack == a.isn+1 ||
			h.phase == pushing && s.Seq == a.peer.Seq+1 {
			h.fail(w, "refused")
		}
	case s.Has(packet.SYN | packet.ACK):
		h.synAck(w, s)
	case h.phase == connecting && s.Has(packet.ACK) && s.Ack != a.isn+1:
		h.challenged(w, s)
	case h.phase == pushing && s.Has(packet.ACK):
		h.pushed(w, s)
	}
}

// challenged: an ACK in answer to our SYN is of a connection the backend still
// holds in TIME_WAIT. It is reset at the number it asks for, without timestamps
// (whose clock would be too old), and another port is tried.
func (h *handshake) challenged(w *worker, s *packet.Segment) {
	a := &h.attempt
	w.reset(s)
	w.stats.connect(a.backend, "port_busy")
	a.ports.give(w.now, a.port, true)
	a.ports = nil
	ends := a.ends
	if a.busy++; a.busy > busyTries || !h.open(w) {
		h.connect(w)
		return
	}
	a.ends = ends
}

// synAck: the backend is there.
func (h *handshake) synAck(w *worker, s *packet.Segment) {
	a := &h.attempt
	if s.Ack != a.isn+1 {
		w.reset(s)
		return
	}
	if h.phase == pushing {
		return // again, since our answer is on its way or lost; push repeats it
	}
	if h.options.HasTimestamps && !s.Options.HasTimestamps {
		// The client was promised timestamps and drops what has none.
		h.phase = pushing // it has a connection now, which fail resets
		a.peer = *s
		w.log.limited(w.now, "backend has no timestamps: enable tcp_timestamps there", "backend", a.backend.Addr)
		h.fail(w, "no_timestamps")
		return
	}
	a.peer = *s
	a.peer.Payload = nil
	if h.acked == 0 {
		h.bind(w)
		return
	}
	h.phase = pushing
	a.retry = firstRetry
	a.ends = h.deadline
	h.push(w)
}

// push sends the backend the bytes that the client will not repeat. After the bind
// the engine no longer sees the backend's ACKs, so they must be in before.
func (h *handshake) push(w *worker) {
	owned := h.hello.Bytes()[:h.acked]
	size := h.segmentSize()
	for at := 0; at < len(owned); at += size {
		s := h.toBackend(w, packet.ACK|packet.PSH, at, owned[at:min(at+size, len(owned))])
		w.sendBy(h.attempt.hop, &s)
	}
	h.retryAt(w)
}

// pushed: the backend acknowledged some of what was pushed, perhaps with its
// answer, which waits for the bind.
func (h *handshake) pushed(w *worker, s *packet.Segment) {
	a := &h.attempt
	if len(s.Payload) > 0 && s.Missing == 0 && len(a.pending) < maxPending {
		kept := *s
		kept.Payload = append([]byte(nil), s.Payload...)
		a.pending = append(a.pending, kept)
	}
	if int32(s.Ack-(a.isn+1+uint32(h.acked))) >= 0 {
		h.bind(w)
	}
}

// segmentSize is what a segment to the backend may carry.
func (h *handshake) segmentSize() int {
	a := &h.attempt
	mss := a.peer.Options.MSS
	if mss == 0 {
		mss = 536
		if !h.client.Addr().Is4() {
			mss = 1220
		}
	}
	return segmentSize(mss, a.hop.MTU, h.client.Addr().Is4(), h.options.HasTimestamps)
}
