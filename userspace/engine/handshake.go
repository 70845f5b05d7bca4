// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"time"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/hello"
	"snilb/userspace/packet"
)

const (
	// ackAfter without progress the bytes that came are acknowledged, since a
	// client with Nagle's algorithm, or a small first flight, waits for that.
	ackAfter = 40 * time.Millisecond
	// notTLSAfter is how long bytes that start no hello wait for a segment that
	// belongs before them. A lost first segment comes again after a fifth of a
	// second, twice that and so on, and after three where the client has no
	// timestamps and its SYN was lost too (RFC 6298 5.7).
	notTLSAfter = 3500 * time.Millisecond
	// windowToClient is in the engine's own ACKs: the SYN-ACK's 64240 bytes as a
	// client that scales understands them.
	windowToClient = 64240
)

type phase uint8

const (
	collecting phase = iota // the hello is not whole
	connecting              // a SYN is out to a backend
	pushing                 // the backend must still ACK bytes we ACKed
	refused                 // decided, nothing more to do: remembered to stay silent
)

// handshake is one connection from its first data to its bind.
type handshake struct {
	timer
	connection
	listener int    // index in the configuration
	cookie   uint32 // our initial sequence number on the client leg
	phase    phase

	hello   hello.Assembler
	held    int    // counted in Engine.held
	acked   int    // bytes from hello.Start on that the client will not repeat
	again   bool   // the first segment came twice: the client repeats from there
	fin     bool   // the client's FIN came
	finAt   uint32 // its sequence number
	options packet.Options
	tsEcr   uint32 // the TSval of our SYN-ACK
	window  uint16

	started  int64
	progress int64 // of the last new byte
	deadline int64 // of the hello, then of the connect
	sni      string
	decision decision
	attempt  attempt

	refusedAt uint32 // the client's next number, once refused
}

// newHandshake returns nil when a limit is hit: the client repeats its hello.
func (w *worker) newHandshake(c connection, listener int, s *packet.Segment) *handshake {
	plan := w.e.plan.Load()
	if listener < 0 || listener >= len(plan.config.Listeners) {
		w.stats.badEvents++
		return nil
	}
	limits := plan.config.Limits
	if w.e.held.Load() >= limits.HelloMemory {
		w.stats.hellos[helloMemory]++
		w.log.limited(w.now, "hello memory is full: raise limits.hello_memory or lower timeouts.hello")
		return nil
	}
	if !w.e.sources.enter(c.client.Addr(), limits.HellosPerSource) {
		w.stats.hellos[helloSourceLimit]++
		w.log.limited(w.now, "too many hellos of one client: see limits.hellos_per_source", "client", c.client.Addr())
		return nil
	}
	h := &handshake{
		connection: c,
		listener:   listener,
		cookie:     s.Ack - 1,
		options:    cookieOptions(s.Ack-1, c.client.Addr().Is4()),
		tsEcr:      s.Options.TSEcr,
		started:    w.now,
		progress:   w.now,
		deadline:   w.now + int64(plan.config.Timeouts.Hello),
	}
	h.owner = h
	h.options.HasTimestamps = s.Options.HasTimestamps
	w.handshakes[c] = h
	return h
}

// cookieOptions is what the client's SYN said, from the cookie (bpf/cookie.h).
func cookieOptions(cookie uint32, v4 bool) packet.Options {
	classes := maps.MSSClasses6
	if v4 {
		classes = maps.MSSClasses4
	}
	o := packet.Options{
		MSS:           classes[cookie>>27&7],
		SACKPermitted: cookie>>22&1 == 1,
	}
	if scale := uint8(cookie >> 23 & 15); scale != maps.CookieNoWindowScale {
		o.HasWScale, o.WScale = true, scale
	}
	return o
}

// end is the sequence number the engine waits for.
func (h *handshake) end() uint32 { return h.hello.Start() + uint32(len(h.hello.Bytes())) }

// add takes a segment with data, FIN or both.
func (h *handshake) add(w *worker, s *packet.Segment) {
	if h.phase == refused {
		h.afterRefusal(w, s)
		return
	}
	h.window = s.Window
	if s.Options.HasTimestamps && int32(s.Options.TSVal-h.options.TSVal) > 0 || h.options.TSVal == 0 {
		h.options.TSVal = s.Options.TSVal
	}
	if len(s.Payload) > 0 {
		added, err := h.hello.Add(s.Seq, s.Payload)
		if err != nil {
			w.stats.outOfWindow++
			return
		}
		held := h.hello.Held()
		w.e.held.Add(int64(held - h.held))
		h.held = held
		if added > 0 {
			h.progress = w.now
		} else if s.Seq == h.hello.Start() || int32(s.Seq-h.hello.Start()-uint32(h.acked)) < 0 {
			h.again = true
		}
	}
	if s.Has(packet.FIN) && s.Missing == 0 {
		h.fin, h.finAt = true, s.End()-1
	}
	if h.phase == collecting {
		h.examine(w)
	}
}

// examine looks whether the hello is whole, and decides.
func (h *handshake) examine(w *worker) {
	plan := w.e.plan.Load()
	bytes := h.hello.Bytes()
	parsed, err := hello.Parse(bytes)
	switch {
	case err == nil:
		w.stats.hellos[helloOK]++
		h.sni = parsed.ServerName
		h.act(w, plan.decide(h.listener, h.connection, &parsed))
	case errors.Is(err, hello.ErrNeedMore):
		h.wait(w)
	case errors.Is(err, hello.ErrNotTLS) && !hello.Plaintext(bytes) && w.now < h.waitsForFirst():
		// Perhaps the second segment of a hello whose first is late.
		w.timers.set(&h.timer, h.waitsForFirst())
	default:
		w.stats.hellos[helloResult(err)]++
		h.act(w, plan.decideNotHello(h.connection, err))
	}
}

// waitsForFirst is until when bytes that start no hello wait for what may belong
// before them.
func (h *handshake) waitsForFirst() int64 {
	return min(h.started+int64(notTLSAfter), h.deadline)
}

// wait acknowledges what came when the client seems to wait for that, and sets the
// timer to look again.
func (h *handshake) wait(w *worker) {
	if h.fin && h.finAt == h.end() {
		w.stats.hellos[helloCut]++
		h.refuse(w, config.Reset)
		return
	}
	have := len(h.hello.Bytes())
	// Six bytes of a hello are no chance; fewer prove nothing until the client
	// repeats from there.
	known := h.again || have >= 6
	// What was acknowledged and comes again says that the ACK was lost.
	if known && (h.again || have > h.acked && w.now-h.progress >= int64(ackAfter)) {
		h.acked = have
		h.again = false
		h.ack(w)
	}
	at := h.deadline
	if have > h.acked {
		at = min(at, max(h.progress+int64(ackAfter), w.now+int64(ackAfter)/4))
	}
	w.timers.set(&h.timer, at)
}

// ack acknowledges h.acked bytes to the client.
func (h *handshake) ack(w *worker) {
	s := h.toClient(packet.ACK)
	w.send(&s)
	w.stats.acks++
}

// toClient is a segment of ours without payload, at the client's next number.
func (h *handshake) toClient(flags uint8) packet.Segment {
	s := packet.Segment{
		Src: h.connection.listener, Dst: h.client,
		Seq: h.cookie + 1, Ack: h.hello.Start() + uint32(h.acked),
		Flags: flags, Window: windowToClient,
	}
	if h.options.HasWScale {
		s.Window >>= maps.AnnouncedWindowScale
	}
	if h.options.HasTimestamps {
		// The SYN-ACK's own TSval again: the backend's clock takes over from
		// exactly there.
		s.Options = packet.Options{HasTimestamps: true, TSVal: h.tsEcr, TSEcr: h.options.TSVal}
	}
	return s
}

// act does what was decided.
func (h *handshake) act(w *worker, d decision) {
	h.decision = d
	w.stats.decision(&d)
	if d.action != config.ToPool {
		h.refuse(w, d.action)
		return
	}
	h.phase = connecting
	h.attempt = attempt{}
	h.deadline = w.now + int64(d.pool.Config.Timeouts.Connect)
	h.connect(w)
}

// expire is the timer's: what it means depends on the phase.
func (h *handshake) expire(w *worker) {
	switch {
	case h.phase == refused:
		w.drop(h)
	case h.phase != collecting:
		h.expireAttempt(w)
	case w.now < h.deadline || h.isNotTLS():
		h.examine(w)
	default:
		w.stats.hellos[helloTimeout]++
		h.refuse(w, config.Reset)
	}
}

func (h *handshake) isNotTLS() bool {
	_, err := hello.Parse(h.hello.Bytes())
	return errors.Is(err, hello.ErrNotTLS)
}

// drop forgets a handshake.
func (w *worker) drop(h *handshake) {
	w.timers.set(&h.timer, 0)
	if h.phase == refused {
		w.refused--
	} else {
		h.letGo(w)
	}
	if w.handshakes[h.connection] == h {
		delete(w.handshakes, h.connection)
	}
}

// letGo gives back what a handshake that goes on holds: its port, its share of the
// limits.
func (h *handshake) letGo(w *worker) {
	h.release(w, false)
	w.e.held.Add(-int64(h.held))
	h.held = 0
	w.e.sources.leave(h.client.Addr())
}
