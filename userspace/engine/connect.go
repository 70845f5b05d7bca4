// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"slices"
	"time"

	"snilb/userspace/config"
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
	// maxPause is how long after the beginning of a round over a pool's backends the
	// next one may have to wait: firstRetry at first, each time twice as long.
	maxPause = time.Second
)

// rounds is who was tried already.
type rounds struct {
	tried []*pool.Backend
	later []*pool.Backend // of these, those that may serve yet: our SYNs may be lost, or the route come back
	next  int64           // when these may be tried again at the earliest
	pause time.Duration
}

// begin lets those that may serve yet be tried: there is time, a bad network loses a few SYNs now and then, and a route
// that flaps is away for a moment.
func (r *rounds) begin(now int64) {
	r.tried = slices.DeleteFunc(r.tried, func(b *pool.Backend) bool { return slices.Contains(r.later, b) })
	r.later = nil
	r.pause = max(firstRetry, min(2*r.pause, maxPause))
	r.next = now + int64(r.pause)
}

// attempt is the handshake with one backend.
type attempt struct {
	rounds
	backend *pool.Backend
	hop     Hop
	local   local
	isn     uint32 // ours
	tsval   uint32 // of our SYN
	begun   int64
	ends    int64 // of this backend's time
	retry   time.Duration
	busy    int // ports refused by a challenge ACK

	prefix  []byte         // the PROXY header it gets
	ack     uint32         // its latest acknowledgment
	peer    packet.Segment // its SYN-ACK, without payload
	pending []packet.Segment
}

// connect tries the pool's next backend; when none is left, what no_backend says
// happens.
func (h *handshake) connect(w *worker) {
	d := &h.decision
	for w.now < h.deadline {
		b := d.pool.Balancer.Next(d.hash, pool.FamilyOf(h.client.Addr()), func(b *pool.Backend) bool {
			return slices.Contains(h.attempt.tried, b)
		})
		if b == nil && len(h.attempt.later) == 0 {
			break
		}
		if b == nil && w.now < h.attempt.next {
			h.phase = paused
			w.timers.set(h, min(h.attempt.next, h.deadline))
			return
		}
		if b == nil {
			h.attempt.begin(w.now)
			continue
		}
		h.attempt = attempt{rounds: h.attempt.rounds, backend: b}
		h.attempt.tried = append(h.attempt.tried, b)
		if h.open(w) {
			return
		}
	}
	w.log.limited(w.now, "no backend can be reached", "pool", d.poolName())
	next := h.plan.decideNoBackend(*d, h.origin, h.sni)
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
		h.tryLater()
		return false
	}
	a.hop = hop
	if a.prefix, err = h.header(); err != nil {
		w.stats.connect(a.backend, "no_proxy_header")
		w.log.limited(w.now, "no PROXY header for a backend", "backend", a.backend.Addr, "error", err)
		return false
	}
	if !h.takeLocal(w) {
		w.stats.connect(a.backend, "no_port")
		return false
	}
	h.number(w)
	a.begun = w.now
	a.retry = firstRetry
	a.ends = min(w.now+int64(h.decision.pool.Config.Timeouts.Attempt), h.deadline)
	h.phase = connecting
	h.sendSYN(w)
	return true
}

// tryLater has a backend tried again whose route is away, or to which the client's own port is in use, unless there is a pool to
// go to instead: that would have to wait.
func (h *handshake) tryLater() {
	if a := &h.attempt; h.decision.pool.Config.NoBackend.Kind != config.ToPool {
		a.later = append(a.later, a.backend)
	}
}

// number chooses our initial sequence number and timestamp. With source: client they
// are the client's own, which rise towards that tuple as the client takes care.
func (h *handshake) number(w *worker) {
	a := &h.attempt
	if h.isClients(a.local) {
		a.isn, a.tsval = h.start()-1-uint32(len(a.prefix)), h.options.TSVal
		return
	}
	a.isn, a.tsval = w.e.numbers(w.now, a.local.AddrPort, a.backend.Addr)
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
		Src: a.local.AddrPort, Dst: a.backend.Addr, Seq: a.isn,
		Flags: packet.SYN, Window: windowToClient, Options: o,
	}
	w.sendBy(a.hop, &s)
	h.retryAt(w)
}

// backendClock is our TSval on the backend leg now.
func (h *handshake) backendClock(w *worker) uint32 {
	if h.isClients(h.attempt.local) {
		return h.options.TSVal
	}
	return h.attempt.tsval + uint32((w.now-h.attempt.begun)/int64(time.Millisecond))
}

func (h *handshake) retryAt(w *worker) {
	w.timers.set(h, min(w.now+int64(h.attempt.retry), h.attempt.ends))
	h.attempt.retry *= 2
}

// expireAttempt repeats what the backend did not answer, or goes to the next one.
func (h *handshake) expireAttempt(w *worker) {
	switch {
	case h.phase == paused:
		h.connect(w)
	case h.phase == pushing && !h.mustPush():
		h.bind(w) // the client's route was away
	case w.now >= h.attempt.ends:
		if h.phase == connecting {
			h.attempt.later = append(h.attempt.later, h.attempt.backend)
			h.blameRoute(w)
		}
		h.fail(w, "timeout")
	case h.phase == pushing:
		h.push(w)
	default:
		h.sendSYN(w)
	}
}

// blameRoute says what most likely is wrong when a backend that sees clients' own
// addresses does not answer.
func (h *handshake) blameRoute(w *worker) {
	if h.attempt.local.ports == nil {
		w.log.limited(w.now, "no answer by this node: with source: client a backend's route to clients must lead through it",
			"backend", h.attempt.backend.Addr, "client", h.client)
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
	if !a.local.IsValid() {
		return
	}
	if abort && h.phase == pushing {
		// Behind what was pushed: had the backend none of it, its challenge ACK is
		// answered by a reset at the number it asks for.
		s := h.toBackend(w, packet.RST|packet.ACK, h.pushEnd(), nil)
		w.sendBy(a.hop, &s)
	}
	h.giveUpLocal(w)
}

// toBackend is a segment of ours on the backend leg.
func (h *handshake) toBackend(w *worker, flags uint8, seq uint32, payload []byte) packet.Segment {
	a := &h.attempt
	s := packet.Segment{
		Src: a.local.AddrPort, Dst: a.backend.Addr,
		Seq: seq, Ack: a.peer.Seq + 1,
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
// (whose clock would be too old), and another port is tried; with source: client the
// same one again.
func (h *handshake) challenged(w *worker, s *packet.Segment) {
	a := &h.attempt
	w.reset(s)
	w.stats.connect(a.backend, "port_busy")
	h.giveUpLocal(w)
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
	a.peer, a.ack = *s, s.Ack
	a.peer.Payload = nil
	h.phase = pushing // it has a connection now, which fail resets
	if result := h.agree(w, s); result != "" {
		h.fail(w, result)
		return
	}
	a.retry = firstRetry
	a.ends = h.deadline
	if !h.mustPush() {
		h.bind(w)
		return
	}
	h.push(w)
}

// agree makes ready what the bytes to the backend need, or returns why it is not to
// get them.
func (h *handshake) agree(w *worker, s *packet.Segment) (result string) {
	a := &h.attempt
	if err := h.learn(w, s); err != nil {
		w.log.limited(w.now, "no way to a backend within its MSS", "backend", a.backend.Addr, "error", err)
		h.tryLater()
		return "no_nexthop"
	}
	if h.options.HasTimestamps && !s.Options.HasTimestamps {
		// The client was promised timestamps and may drop what has none (RFC 7323
		// 3.2).
		w.log.limited(w.now, "backend has no timestamps: enable tcp_timestamps there", "backend", a.backend.Addr)
		return "no_timestamps"
	}
	return ""
}

// learn notes what the backend can do, for later clients. This one may have been
// told of a larger MSS than the backend has: its packets then get a next hop that
// knows.
func (h *handshake) learn(w *worker, s *packet.Segment) error {
	a := &h.attempt
	v4 := h.client.Addr().Is4()
	if w.e.peers.learn(a.backend.Addr, &h.options, &s.Options) {
		if err := w.e.announce(); err != nil {
			w.log.limited(w.now, "what SYN-ACKs announce not changed", "error", err)
		}
	}
	takes := int(mssOf(s.Options.MSS, v4)) + headersSize(v4)
	if takes >= a.hop.MTU {
		return nil
	}
	hop, err := w.e.o.NextHopWithin(a.backend.Addr.Addr(), takes)
	if err != nil {
		return err
	}
	a.hop = hop
	return nil
}

// push sends the backend what it has not acknowledged. After the bind the engine
// no longer sees the backend's ACKs, so what the client will not repeat must be in
// before; the rest goes along, so that the backend can answer at once.
func (h *handshake) push(w *worker) {
	h.own(w)
	a := &h.attempt
	all, size := h.toPush(), h.segmentSize()
	for at := int(a.ack - (a.isn + 1)); at < len(all); at += size {
		s := h.toBackend(w, packet.ACK|packet.PSH, a.isn+1+uint32(at), all[at:min(at+size, len(all))])
		w.sendBy(a.hop, &s)
	}
	h.retryAt(w)
}

// pushed: the backend acknowledged some of what was pushed, perhaps with its
// answer, which waits for the bind. What is not kept of it comes again, for nobody
// has acknowledged it.
func (h *handshake) pushed(w *worker, s *packet.Segment) {
	a := &h.attempt
	if int32(s.Ack-h.pushEnd()) > 0 {
		return // it acknowledges what was never sent
	}
	if int32(s.Ack-a.ack) > 0 {
		a.ack = s.Ack
	}
	done := !h.mustPush()
	// The ACK that ends it is worth keeping by itself: the client waits for it.
	if (s.End() != s.Seq || done) && s.Missing == 0 && len(a.pending) < maxPending && !w.memoryIsFull() {
		kept := *s
		kept.Payload = append([]byte(nil), s.Payload...)
		a.pending = append(a.pending, kept)
		h.account(w)
	}
	if done {
		h.bind(w)
	}
}

// segmentSize is what a segment to the backend may carry.
func (h *handshake) segmentSize() int {
	a := &h.attempt
	mss := mssOf(a.peer.Options.MSS, h.client.Addr().Is4())
	return segmentSize(mss, a.hop.MTU, h.client.Addr().Is4(), h.options.HasTimestamps)
}
