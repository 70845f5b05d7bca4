// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"time"

	"snilb/userspace/packet"
)

// What the client's side of a connection waits for.
const (
	free      uint8 = iota
	synSent         // SYN-ACK
	helloSent       // the answer
	finSent         // the peer's FIN, and the acknowledgment of ours
)

const (
	synRetry   = int64(time.Second)            // the first; each later one is twice as long
	dataRetry  = int64(200 * time.Millisecond) // likewise
	closeTries = 4                             // after which a connection is reset: 3 s
	// The most segments on their way, as Linux begins.
	burst = 10
	// What is announced: 64240 bytes, with a scale of 7 if the peer scales too.
	fullWindow  = 64240
	windowScale = 7
	// Attempts begun, and frames taken, before the other has its turn.
	turn = 128
)

// clientConn is one connection. Offsets count from the byte after the SYN.
type clientConn struct {
	intended, deadline int64
	pair               uint32
	iss, rcvNxt        uint32
	tsRecent           uint32
	acked, sent        uint32 // offsets in the hello
	got                uint32 // bytes of answer
	window             uint32 // the peer's
	hello              int32
	size               uint16 // of segments
	state, tries       uint8
	peerScale          uint8
	timestamps, scaled bool
	peerFIN, finAcked  bool
}

// client is the generator's side of all connections. Times are nanoseconds of the wall clock at first, monotonic after.
type client struct {
	load    *Load
	line    line
	hop     hop
	mss     int
	tally   *tally
	sources pairs
	target  netip.AddrPort
	picker  *picker
	flights []*flight // by the name's index, the nameless first

	// The slot of a connection is the number of its pair, in the lower bits. Pairs are taken in turn; one whose slot is
	// taken is passed over.
	conns   []clientConn
	wheel   *wheel
	next    uint32
	running int // attempts
	used    int // slots
	stopped bool
	now     int64
	due     float64 // open loop: when the next attempt is
	err     error
	taker   func([]byte) // c.take: to make one a turn would allocate
}

func newClient(l *Load, sources pairs, mss int, way hop, to line, t *tally, now int64) (*client, error) {
	slots := 1 << bits.Len(uint(max(2*l.Concurrency, 2048)-1))
	c := &client{
		load: l, line: to, hop: way, mss: mss, tally: t, sources: sources, target: l.Target,
		picker:  newPicker(l.Hellos.opts.Names, rand.Uint64()),
		flights: make([]*flight, len(l.Hellos.opts.Names.List)+1),
		conns:   make([]clientConn, slots), wheel: newWheel(slots, now),
		next: uint32(rand.Uint64N(sources.total())), // a run does not meet what the last one left
		now:  now, due: float64(now),
	}
	c.taker = c.take
	return c, sources.check(l.Target, l.Concurrency)
}

// step does what there is to do at a time, and says if that was anything.
func (c *client) step(now int64) bool {
	c.now = now
	taken := c.line.receive(turn, c.taker)
	c.wheel.expire(now, c.expired)
	begun := 0
	for begun < turn && c.mayBegin() && c.begin() {
		begun++
	}
	if err := c.line.flush(); err != nil {
		c.err = err
	}
	return taken+begun > 0
}

// idle is how long nothing need be done unless something comes.
func (c *client) idle() time.Duration {
	d := wheelTick
	if c.load.Rate > 0 && !c.stopped && c.running < c.load.Concurrency {
		d = min(d, int64(c.due)-c.now)
	}
	return time.Duration(max(d, 0))
}

func (c *client) mayBegin() bool {
	return !c.stopped && c.running < c.load.Concurrency && (c.load.Rate == 0 || int64(c.due) <= c.now)
}

// begin begins an attempt, unless no pair is free.
func (c *client) begin() bool {
	slot, ok := c.freeSlot()
	if !ok {
		return false
	}
	intended := c.now
	if c.load.Rate > 0 {
		intended = int64(c.due)
		c.due += float64(time.Second) / c.load.Rate
	}
	k := &c.conns[slot]
	*k = clientConn{
		state: synSent, pair: c.next, hello: int32(c.picker.next() + 1), intended: intended,
		// Late by the generator's own doing is part of the latency but not of the patience.
		deadline: c.now + int64(c.load.Timeout),
		// It grows faster than any peer takes data, so that a pair can be used again (RFC 9293, section 3.4.1).
		iss: uint32(c.now >> 6),
	}
	c.used++
	c.running++
	c.tally.began()
	if _, err := c.flight(k); err != nil {
		c.err = errors.Join(c.err, err)
		c.fail(slot, k, Local)
		return true
	}
	c.sendSYN(k)
	c.retry(slot, k, synRetry)
	return true
}

// freeSlot moves next to a pair whose slot is free.
func (c *client) freeSlot() (int32, bool) {
	for range 1024 {
		c.next++
		if uint64(c.next) >= c.sources.total() {
			c.next = 0
		}
		slot := c.next & uint32(len(c.conns)-1)
		if c.conns[slot].state == free {
			return int32(slot), true
		}
	}
	return 0, false
}

// flight is the hello of a connection.
func (c *client) flight(k *clientConn) (*flight, error) {
	f := c.flights[k.hello]
	if f == nil {
		data, err := c.load.Hellos.of(int(k.hello) - 1)
		if err != nil {
			return nil, err
		}
		f = &flight{data: data}
		c.flights[k.hello] = f
	}
	return f, nil
}

// retry sets the timer to the next of a row of retransmissions, or to the end of the attempt.
func (c *client) retry(slot int32, k *clientConn, first int64) {
	due := c.now + first<<min(k.tries, 6)
	if k.state != finSent {
		due = min(due, k.deadline)
	}
	k.tries++
	c.wheel.set(slot, due)
}

// expired is what happens when an answer did not come in time.
func (c *client) expired(slot int32) {
	k := &c.conns[slot]
	switch {
	case k.state == finSent && k.tries > closeTries:
		c.reset(k)
		c.release(slot, k)
	case k.state == finSent:
		end := k.sent // our FIN is there, even if some of the hello was never sent
		k.sent = k.acked
		c.sendUpTo(k, end)
		c.control(k, packet.FIN|packet.ACK)
		c.retry(slot, k, dataRetry)
	case c.now >= k.deadline:
		if k.state == helloSent {
			c.reset(k)
		}
		c.fail(slot, k, Timeout)
	case k.state == synSent:
		c.sendSYN(k)
		c.retry(slot, k, synRetry)
	default:
		k.sent = k.acked
		c.sendHello(k)
		c.retry(slot, k, dataRetry)
	}
}

// fail ends an attempt and its connection.
func (c *client) fail(slot int32, k *clientConn, why Failure) {
	c.tally.fail(why)
	c.running--
	c.release(slot, k)
}

func (c *client) release(slot int32, k *clientConn) {
	k.state = free
	c.used--
	c.wheel.cancel(slot)
}

// take deals with a frame.
func (c *client) take(frame []byte) {
	s, err := packet.Parse(frame[min(ethernetHeader, len(frame)):])
	if err != nil || s.Src != c.target {
		return
	}
	pair, ok := c.sources.number(s.Dst)
	if !ok {
		return
	}
	slot := int32(pair & uint32(len(c.conns)-1))
	k := &c.conns[slot]
	switch {
	case k.state == free || k.pair != pair:
		stray(c.line, &c.hop, &s, clockMillis(c.now))
	case s.Has(packet.RST):
		c.gotRST(slot, k, &s)
	case k.state == synSent:
		c.gotSYNACK(slot, k, &s)
	case !s.Has(packet.SYN) && s.Has(packet.ACK):
		c.gotSegment(slot, k, &s)
	}
}

func (c *client) gotRST(slot int32, k *clientConn, s *packet.Segment) {
	switch {
	case k.state == synSent && s.Ack == k.iss+1:
		c.fail(slot, k, Refused)
	case k.state == synSent || s.Seq-k.rcvNxt > fullWindow: // somebody else's
	case k.state == finSent:
		c.release(slot, k)
	default:
		c.fail(slot, k, Reset)
	}
}

func (c *client) gotSYNACK(slot int32, k *clientConn, s *packet.Segment) {
	if !s.Has(packet.SYN|packet.ACK) || s.Ack != k.iss+1 {
		return
	}
	o := &s.Options
	k.state, k.tries, k.rcvNxt = helloSent, 0, s.Seq+1
	k.timestamps, k.tsRecent = o.HasTimestamps, o.TSVal
	k.scaled, k.peerScale = o.HasWScale, o.WScale
	k.window = uint32(s.Window)
	k.size = segmentSize(c.mss, o, c.load.Hellos.opts.SegmentBytes)
	c.sendHello(k)
	c.retry(slot, k, dataRetry)
}

// segmentSize is how much payload goes into a segment for a peer with those options. A peer that names no MSS, or a silly
// one, gets what every peer must take (RFC 9293, section 3.7.1), or at least the silly one cannot make the sender spin.
func segmentSize(mss int, peer *packet.Options, wanted int) uint16 {
	if peer.MSS == 0 {
		mss = min(mss, 536)
	} else {
		mss = min(mss, max(int(peer.MSS), 88))
	}
	if peer.HasTimestamps {
		mss -= timestampBytes
	}
	if wanted > 0 {
		mss = min(mss, wanted)
	}
	return uint16(mss)
}

// gotSegment deals with a segment of an established connection.
func (c *client) gotSegment(slot int32, k *clientConn, s *packet.Segment) {
	if before(k.rcvNxt, s.Seq) {
		c.control(k, packet.ACK) // of what is missing
		return
	}
	if s.Ack-k.iss-1 <= k.sent+1 { // no acknowledgment of what was never sent
		k.window = uint32(s.Window) << k.peerScale
	}
	if s.Options.HasTimestamps {
		k.tsRecent = s.Options.TSVal
	}
	c.gotACK(slot, k, s.Ack)
	if k.state == helloSent && k.window > 0 && k.sent == 0 {
		c.sendHello(k) // the window was closed until now
	}
	news := c.absorb(k, s)
	switch {
	case k.state == helloSent && int64(k.got) >= int64(c.load.Reply):
		c.tally.succeeded(time.Duration(c.now-k.intended), int(k.got))
		c.running--
		c.finish(slot, k)
		return
	case k.state == helloSent && k.peerFIN:
		c.tally.fail(Closed)
		c.running--
		c.finish(slot, k)
		return
	case news:
		c.control(k, packet.ACK)
	}
	if k.state == finSent && k.peerFIN && k.finAcked {
		c.release(slot, k)
	}
}

// gotACK moves on in the hello, or sees that the FIN has come.
func (c *client) gotACK(slot int32, k *clientConn, ack uint32) {
	offset := ack - k.iss - 1
	switch {
	case k.state == finSent && offset == k.sent+1:
		k.acked, k.finAcked = k.sent, true
	case offset > k.acked && offset <= k.sent:
		k.acked, k.tries = offset, 0
		if k.state == helloSent {
			if int(offset) == len(c.flights[k.hello].data) {
				c.wheel.set(slot, k.deadline)
				return
			}
			c.sendHello(k)
		}
		c.retry(slot, k, dataRetry)
	}
}

// absorb takes the payload and the FIN of a segment that begins at or before what is awaited, and says if it is to be
// acknowledged.
func (c *client) absorb(k *clientConn, s *packet.Segment) bool {
	end := s.End()
	if end == s.Seq {
		return false
	}
	if !before(k.rcvNxt, end) || k.peerFIN {
		return true // once more, so the acknowledgment was lost
	}
	news := end - k.rcvNxt
	if s.Has(packet.FIN) {
		k.peerFIN = true
		news--
	}
	k.got += news
	k.rcvNxt = end
	return true
}

// finish sends our FIN, which acknowledges all that came.
func (c *client) finish(slot int32, k *clientConn) {
	k.state, k.tries = finSent, 0
	c.control(k, packet.FIN|packet.ACK)
	c.retry(slot, k, dataRetry)
}

func (c *client) sendSYN(k *clientConn) {
	s := packet.Segment{Src: c.sources.pair(k.pair), Dst: c.target, Seq: k.iss, Flags: packet.SYN, Window: fullWindow}
	s.Options = packet.Options{
		MSS: uint16(c.mss), SACKPermitted: true, HasTimestamps: true, HasWScale: true,
		WScale: windowScale, TSVal: clockMillis(c.now),
	}
	put(c.line, &c.hop, &s, nil, 0)
}

// sendHello sends what the window and the burst allow of what was not sent yet.
func (c *client) sendHello(k *clientConn) {
	if k.window == 0 && k.sent == 0 {
		// A proxy of SYNs opens it when it has reached the server.
		c.control(k, packet.ACK)
		return
	}
	size := uint32(k.size)
	c.sendUpTo(k, min(uint32(len(c.flights[k.hello].data)), k.acked+min(max(k.window, size), burst*size)))
}

func (c *client) sendUpTo(k *clientConn, end uint32) {
	f := c.flights[k.hello]
	for k.sent < end {
		payload, sum := f.part(int(k.sent), int(k.size))
		s := c.segment(k, packet.ACK|packet.PSH)
		put(c.line, &c.hop, &s, payload, sum)
		k.sent += uint32(len(payload))
	}
}

func (c *client) segment(k *clientConn, flags uint8) packet.Segment {
	s := packet.Segment{
		Src: c.sources.pair(k.pair), Dst: c.target, Seq: k.iss + 1 + k.sent, Ack: k.rcvNxt, Flags: flags, Window: fullWindow,
	}
	if k.scaled {
		s.Window >>= windowScale
	}
	if k.timestamps {
		s.Options = packet.Options{HasTimestamps: true, TSVal: clockMillis(c.now), TSEcr: k.tsRecent}
	}
	return s
}

// control sends a segment without payload.
func (c *client) control(k *clientConn, flags uint8) {
	s := c.segment(k, flags)
	if k.state == finSent && flags&packet.FIN == 0 {
		s.Seq++ // behind our FIN
	}
	put(c.line, &c.hop, &s, nil, 0)
}

func (c *client) reset(k *clientConn) { c.control(k, packet.RST|packet.ACK) }

// resetAll ends what is still there, so that nobody keeps state of it.
func (c *client) resetAll() error {
	for i := range c.conns {
		if k := &c.conns[i]; k.state != free {
			if k.state != synSent {
				c.reset(k)
			}
			c.release(int32(i), k)
		}
	}
	return c.line.flush()
}

// stray answers what belongs to no connection: a FIN whose acknowledgment was lost, a handshake that comes too late.
func stray(l line, h *hop, s *packet.Segment, millis uint32) {
	answer := packet.Segment{Src: s.Dst, Dst: s.Src, Seq: s.Ack}
	switch {
	case s.Has(packet.RST):
		return
	case s.Has(packet.SYN | packet.ACK):
		answer.Flags = packet.RST
	case s.Has(packet.FIN | packet.ACK):
		answer.Flags, answer.Ack, answer.Window = packet.ACK, s.End(), fullWindow>>windowScale
		if s.Options.HasTimestamps {
			answer.Options = packet.Options{HasTimestamps: true, TSVal: millis, TSEcr: s.Options.TSVal}
		}
	default:
		return
	}
	put(l, h, &answer, nil, 0)
}

func clockMillis(now int64) uint32 { return uint32(now / int64(time.Millisecond)) }
