// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"time"
	"unsafe"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/hello"
	"snilb/userspace/packet"
)

const (
	// ackAfter without progress the bytes that came are acknowledged, since a
	// client with Nagle's algorithm, or a small first flight, waits for that.
	ackAfter = 40 * time.Millisecond
	// startRepeats of the lowest segment say that nothing is missing before it: TCP
	// repeats from there. Once may be a probe for a lost tail (RFC 8985 7), which
	// is the last segment and not the first.
	startRepeats = 2
	// repeatGap tells a repetition from a copy that the network made, and is less
	// than any retransmission timeout (RFC 6298, 200 ms on Linux).
	repeatGap = 150 * time.Millisecond
	// loneByteAfter one byte alone, which hardly is a segment of a hello, but may be
	// a probe whose sender waits for an answer, is acknowledged.
	loneByteAfter = time.Second
	// windowToClient is in the engine's own ACKs: the SYN-ACK's 64240 bytes as a
	// client that scales understands them.
	windowToClient = 64240
	// handshakeMemory is what a handshake takes beside its hello's bytes, rounded
	// up: the struct, its places in three maps and among the timers. A test
	// compares it with the heap.
	handshakeMemory = 2048
)

type phase uint8

const (
	collecting phase = iota // the hello is not whole
	paused                  // no backend to try now, but some to try again
	connecting              // a SYN is out to a backend
	pushing                 // the backend must still ACK what only we can repeat
	refused                 // decided, nothing more to do: remembered to stay silent
)

// handshake is one connection from its first data to its bind.
type handshake struct {
	connection
	timer    uint32 // in worker.timers
	plan     *Plan  // all of the connection is decided by, whatever is reloaded meanwhile
	listener *config.Listener
	cookie   uint32 // our initial sequence number on the client leg
	phase    phase

	proxied bool       // a PROXY header must come first
	skip    int        // its length, 0 as long as it is not there
	origin  connection // as it says, or the connection itself

	hello    hello.Assembler
	probed   bool            // a keepalive probe's byte stood before the hello
	held     int             // counted in Engine.held
	acked    int             // bytes from hello.Start on that the client will not repeat
	noted    maps.OwnedHello // in Engine.owned, if not zero
	again    bool            // the first segment came twice: the client repeats from there
	repeats  int             // how often it did, and when last
	repeatAt int64
	fin      bool   // the client's FIN came
	finAt    uint32 // its sequence number
	options  packet.Options
	tsEcr    uint32 // the TSval of our SYN-ACK
	window   uint16

	started  int64
	progress int64 // of the last new byte
	deadline int64 // of the hello, then of the connect
	sni      string
	alpn     string // the client's offer, if it is one protocol
	decision decision
	attempt  attempt

	refusedAt uint32 // the client's next number, once refused
}

// newHandshake returns nil when a limit is hit: the client repeats its hello.
func (w *worker) newHandshake(c connection, id uint16, s *packet.Segment) *handshake {
	plan := w.e.plan.Load()
	listener := plan.listeners[id]
	if listener == nil || !listener.Takes(c.listener) {
		w.stats.staleEvents++ // a reload has taken it away since, or a daemon with other numbers read the routes
		return nil
	}
	limits := plan.config.Limits
	if w.memoryIsFull() {
		return nil
	}
	proxied := listener.TakesProxy(c.client.Addr())
	perSource := limits.HellosPerSource
	if proxied {
		perSource = 0 // this address speaks for many
	}
	if !w.e.sources.enter(c.client.Addr(), perSource) {
		w.stats.hellos[helloSourceLimit]++
		w.log.limited(w.now, "too many hellos of one client: see limits.hellos_per_source", "client", c.client.Addr())
		return nil
	}
	h := &handshake{
		connection: c,
		plan:       plan,
		listener:   listener,
		proxied:    proxied,
		origin:     c,
		cookie:     s.Ack - 1,
		options:    cookieOptions(s.Ack-1, c.client.Addr().Is4()),
		tsEcr:      s.Options.TSEcr,
		started:    w.now,
		progress:   w.now,
		repeatAt:   w.now,
		deadline:   w.now + int64(plan.config.Timeouts.Hello),
	}
	h.options.HasTimestamps = s.Options.HasTimestamps
	w.handshakes[c] = h
	h.account(w)
	return h
}

// account brings the engine's sum up to date with what this handshake holds.
func (h *handshake) account(w *worker) {
	held := handshakeMemory + h.hello.Held()
	for i := range h.attempt.pending {
		held += int(unsafe.Sizeof(packet.Segment{})) + cap(h.attempt.pending[i].Payload)
	}
	w.e.held.Add(int64(held - h.held))
	h.held = held
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

// begunAnew reports whether a segment is of a later connection with the same cookie,
// of which the kernel has answered the SYN: a hello that begins behind a gap, or a FIN
// without data that lies beyond our window.
func (h *handshake) begunAnew(s *packet.Segment) bool {
	next := h.refusedAt
	if h.phase != refused {
		next = h.end()
	}
	gap := int32(s.Seq - next)
	return gap > 0 && hello.LooksLike(s.Payload) == nil || gap > windowToClient && s.Has(packet.FIN) && len(s.Payload) == 0
}

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
	if len(s.Payload) > 0 && !h.take(w, s) {
		return
	}
	if s.Has(packet.FIN) && s.Missing == 0 {
		h.fin, h.finAt = true, s.End()-1
	}
	if h.phase == collecting {
		h.examine(w)
	}
}

// take keeps a segment's payload. Returns false when a limit refuses it: it is not
// acknowledged then, so the client sends it again.
func (h *handshake) take(w *worker, s *packet.Segment) bool {
	seq, payload := h.aboveStart(s)
	if h.grows(seq, payload) && w.memoryIsFull() {
		return false
	}
	added, err := h.hello.Add(seq, payload)
	if err != nil {
		w.stats.outOfWindow++
		w.log.limited(w.now, "a client's segments lie too far apart for a hello", "client", h.client, "error", err)
		return false
	}
	h.account(w)
	acked := h.hello.Start() + uint32(h.acked)
	switch {
	case added > 0:
		h.progress = w.now
	case h.acked > 0 && int32(s.Seq+uint32(len(s.Payload))-acked) <= 0:
		h.ack(w) // the last one was lost, or this is a keepalive probe
	case s.Seq == h.hello.Start():
		h.again = true
		if w.now-h.repeatAt >= int64(repeatGap) {
			h.repeats++
			h.repeatAt = w.now
		}
	}
	return true
}

// aboveStart leaves out what lies below the first byte once that is certain, be it
// acknowledged or a hello's: what comes there is a keepalive probe.
func (h *handshake) aboveStart(s *packet.Segment) (seq uint32, payload []byte) {
	below := int32(h.hello.Start() - s.Seq)
	if below <= 0 || !h.settled() {
		return s.Seq, s.Payload
	}
	return h.hello.Start(), s.Payload[min(int(below), len(s.Payload)):]
}

// grows reports whether a segment may bring what is not there yet. The very first
// does not count: newHandshake has let it in.
func (h *handshake) grows(seq uint32, payload []byte) bool {
	if len(h.hello.Bytes()) == 0 {
		return false
	}
	return int32(seq-h.hello.Start()) < 0 || int32(seq+uint32(len(payload))-h.end()) > 0
}

// memoryIsFull counts and logs it if so.
func (w *worker) memoryIsFull() bool {
	if w.e.held.Load() < w.e.plan.Load().config.Limits.HelloMemory {
		return false
	}
	w.stats.hellos[helloMemory]++
	w.log.limited(w.now, "hello memory is full: raise limits.hello_memory or lower timeouts.hello")
	return true
}

// examine looks whether the hello is whole, and decides.
func (h *handshake) examine(w *worker) {
	parsed, err := h.parse()
	switch {
	case err == nil:
		w.stats.hellos[helloOK]++
		h.sni = parsed.ServerName
		if len(parsed.ALPN) == 1 {
			h.alpn = parsed.ALPN[0]
		}
		h.act(w, h.plan.decide(h.listener, h.origin, &parsed))
	case errors.Is(err, hello.ErrNeedMore):
		h.wait(w)
	case errors.Is(err, hello.ErrNotTLS):
		h.notTLS(w, err)
	default:
		h.noHello(w, err)
	}
}

// parse reads what came so far.
func (h *handshake) parse() (hello.Hello, error) {
	if err := h.readHeader(); err != nil {
		return hello.Hello{}, err
	}
	return hello.Parse(h.stream())
}

// notTLS deals with bytes that start no hello as they stand.
func (h *handshake) notTLS(w *worker, err error) {
	bytes := h.hello.Bytes()
	mayBeLate := !h.settled() && h.repeats < startRepeats && w.now < h.deadline
	switch {
	case h.skip == 0 && h.skipProbe(w):
		h.examine(w)
	case len(bytes) == 1 && w.now < h.deadline && !h.closed():
		h.loneByte(w)
	case mayBeLate && !hello.Plaintext(bytes):
		// Perhaps the second segment of a hello whose first is late.
		w.timers.set(h, h.deadline)
	default:
		h.noHello(w, err)
	}
}

// skipProbe leaves the first byte out if what follows it starts a stream: some
// stacks probe an idle connection by one garbage byte below their next number (RFC
// 9293 3.8.4). Returns false if it does not.
func (h *handshake) skipProbe(w *worker) bool {
	rest := h.hello.Bytes()[1:]
	err := hello.LooksLike(rest)
	waited := len(rest) > 0 && errors.Is(err, hello.ErrNeedMore) && w.now-h.started >= int64(loneByteAfter)
	if err != nil && !waited && !hello.Plaintext(rest) {
		return false
	}
	h.hello.Skip()
	h.acked = max(h.acked-1, 0)
	h.probed = true
	// The hello's time begins with the hello.
	h.started = w.now
	h.deadline = w.now + int64(h.plan.config.Timeouts.Hello)
	return true
}

// loneByte keeps a byte that may be a probe or something typed. After a while it is
// acknowledged: a prober whom nobody answers gives the connection up.
func (h *handshake) loneByte(w *worker) {
	at := h.started + int64(loneByteAfter)
	if w.now >= at || h.repeats >= startRepeats {
		if h.acked == 0 {
			h.acked = 1
			h.ack(w)
		}
		at = h.deadline
	}
	w.timers.set(h, min(at, h.deadline))
}

// noHello counts what came in place of a hello and does what is set for it.
func (h *handshake) noHello(w *worker, err error) {
	w.stats.hellos[helloResult(err)]++
	if errors.Is(err, hello.ErrTooLong) {
		w.log.limited(w.now, "a client's hello is too long", "client", h.client, "error", err)
	}
	h.act(w, h.plan.decideNotHello(h.origin, err))
}

// closed reports whether the client has closed behind the bytes that came.
func (h *handshake) closed() bool { return h.fin && h.finAt == h.end() }

// wait acknowledges what came when the client seems to wait for that, and sets the
// timer to look again.
func (h *handshake) wait(w *worker) {
	if h.closed() {
		h.cut(w)
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
	if have > h.acked && known {
		at = min(at, max(h.progress+int64(ackAfter), w.now+int64(ackAfter)/4))
	}
	w.timers.set(h, at)
}

// cut: the client closed before its hello was whole. Behind a PROXY header alone
// that is a proxy which looks whether the port is open, and gets an orderly close.
func (h *handshake) cut(w *worker) {
	if h.skip == 0 || len(h.stream()) > 0 {
		w.stats.hellos[helloCut]++
		h.refuse(w, config.Reset)
		return
	}
	w.stats.hellos[helloNone]++
	s := h.toClient(packet.FIN | packet.ACK)
	s.Ack = h.finAt + 1
	w.send(&s)
	w.drop(h)
}

// ack acknowledges h.acked bytes to the client.
func (h *handshake) ack(w *worker) {
	h.own(w)
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
	h.attempt = attempt{}
	h.attempt.begin(w.now)
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
	case w.now >= h.deadline && h.isIncomplete():
		w.stats.hellos[helloTimeout]++
		w.log.limited(w.now, "a client's hello took too long: see timeouts.hello", "client", h.client)
		h.refuse(w, config.Reset)
	default:
		h.examine(w)
	}
}

func (h *handshake) isIncomplete() bool {
	_, err := h.parse()
	return errors.Is(err, hello.ErrNeedMore)
}

// drop forgets a handshake.
func (w *worker) drop(h *handshake) {
	w.timers.set(h, 0)
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
// limits, its note for the next daemon.
func (h *handshake) letGo(w *worker) {
	h.release(w, false)
	h.disown(w)
	w.e.held.Add(-int64(h.held))
	h.held = 0
	w.e.sources.leave(h.client.Addr())
}
