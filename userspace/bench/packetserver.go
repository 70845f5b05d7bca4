// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"

	"snilb/userspace/packet"
)

// What the server's side of a connection waits for. The handshake leaves no state.
const (
	reading  = iota + 1 // the rest of the hello; free is 0
	answered            // the acknowledgment of the answer and the peer's FIN
)

const (
	sessionSets = 1 << 14
	sessionWays = 4
	idleLimit   = int64(10e9)
	replyTries  = 6
)

// cookieMSS are the peers' MSS that a cookie can say; a peer's is rounded down.
var cookieMSS = [8]uint16{88, 536, 1200, 1400, 1420, 1440, 1460, 8940}

// session is one connection since the first byte of its hello. Offsets count from the byte after our SYN.
type session struct {
	peer, local        netip.AddrPort
	touched            int64
	iss, rcvNxt        uint32
	tsRecent           uint32
	acked, sent        uint32 // offsets in the answer, its FIN is one byte more
	size               uint16
	state, tries, held uint8 // held: segments not acknowledged yet
	timestamps         bool
	peerFIN            bool
	hop                hop
	hello              helloReader
}

// server is the responder. It is as stateless as it can be: a flood of SYNs costs answers and no memory.
type server struct {
	listen []netip.AddrPort
	line   line
	mss    int
	reply  flight
	secret [2]uint64
	slab   []session // sessionSets sets of sessionWays
	tags   []uint32  // of each session a part of its hash, so that only the right one is looked at; 0: free
	wheel  *wheel
	now    int64
	hop    hop // back to whom the frame came from
	taker  func([]byte)
}

func newServer(listen []netip.AddrPort, reply []byte, mss int, to line, secret [2]uint64, now int64) *server {
	v := &server{
		listen: listen, line: to, mss: mss, reply: flight{data: reply}, secret: secret,
		slab: make([]session, sessionSets*sessionWays), tags: make([]uint32, sessionSets*sessionWays),
		wheel: newWheel(sessionSets*sessionWays, now), now: now,
	}
	v.taker = v.take
	return v
}

// step is the client's, for the server.
func (v *server) step(now int64) (bool, error) {
	v.now = now
	taken := v.line.receive(turn, v.taker)
	v.wheel.expire(now, v.expired)
	return taken > 0, v.line.flush()
}

func (v *server) take(frame []byte) {
	if len(frame) < ethernetHeader {
		return
	}
	s, err := packet.Parse(frame[ethernetHeader:])
	if err != nil || !slices.Contains(v.listen, s.Dst) {
		return
	}
	copy(v.hop[:6], frame[6:12])
	copy(v.hop[6:], frame[:6])
	if s.Has(packet.SYN) {
		if s.Flags&(packet.ACK|packet.RST|packet.FIN) == 0 {
			v.gotSYN(&s)
		}
		return
	}
	hash := v.mix(&s, 0)
	at, ok := v.find(&s, hash)
	switch {
	case ok && s.Has(packet.RST):
		if s.Seq-v.slab[at].rcvNxt <= fullWindow {
			v.release(at)
		}
	case ok && s.Has(packet.ACK):
		v.gotSegment(at, &s)
	case !ok && s.Has(packet.ACK):
		v.gotFirst(&s, hash)
	}
}

func (v *server) gotSYN(s *packet.Segment) {
	o := &s.Options
	answer := packet.Segment{
		Src: s.Dst, Dst: s.Src, Seq: v.cookie(s, s.Seq, mssIndex(o.MSS)), Ack: s.Seq + 1,
		Flags: packet.SYN | packet.ACK, Window: fullWindow,
		Options: packet.Options{
			MSS: uint16(v.mss), SACKPermitted: o.SACKPermitted, HasTimestamps: o.HasTimestamps, HasWScale: o.HasWScale,
		},
	}
	if o.HasTimestamps {
		answer.Options.TSVal, answer.Options.TSEcr = clockMillis(v.now), o.TSVal
	}
	if o.HasWScale {
		answer.Options.WScale = windowScale
	}
	put(v.line, &v.hop, &answer, nil, 0)
}

func mssIndex(mss uint16) uint32 {
	i := len(cookieMSS) - 1
	for i > 1 && cookieMSS[i] > mss {
		i--
	}
	if mss != 0 && mss < cookieMSS[1] {
		i = 0
	}
	return uint32(i)
}

// cookie is the sequence number of a SYN-ACK: which connection and which SYN it is of, and the MSS in the last three bits.
func (v *server) cookie(s *packet.Segment, peerISS, mss uint32) uint32 {
	return uint32(v.mix(s, uint64(peerISS)|1<<32))&^7 | mss
}

// mix hashes addresses, ports and a number by the secret.
func (v *server) mix(s *packet.Segment, n uint64) uint64 {
	src, dst := s.Src.Addr().As16(), s.Dst.Addr().As16()
	h := v.secret[0]
	for _, w := range [...]uint64{
		binary.BigEndian.Uint64(src[:8]), binary.BigEndian.Uint64(src[8:]),
		binary.BigEndian.Uint64(dst[:8]), binary.BigEndian.Uint64(dst[8:]),
		uint64(s.Src.Port())<<48 | uint64(s.Dst.Port())<<32 | n&0xffffffff, n >> 32,
	} {
		high, low := bits.Mul64(h^w, v.secret[1])
		h = high ^ low ^ bits.RotateLeft64(w, 31)
	}
	return h
}

func (v *server) find(s *packet.Segment, hash uint64) (int32, bool) {
	set := int32(hash%sessionSets) * sessionWays
	for at := set; at < set+sessionWays; at++ {
		if v.tags[at] != tagOf(hash) {
			continue
		}
		if k := &v.slab[at]; k.peer == s.Src && k.local == s.Dst {
			return at, true
		}
	}
	return 0, false
}

func tagOf(hash uint64) uint32 { return uint32(hash>>32) | 1 }

// gotFirst deals with a segment of no session. It makes one when this is the first of a connection whose SYN was answered.
func (v *server) gotFirst(s *packet.Segment, hash uint64) {
	cookie := v.cookie(s, s.Seq-1, 0)
	switch {
	case s.Has(packet.RST):
	case (s.Ack-1)&^7 != cookie:
		stray(v.line, &v.hop, s, clockMillis(v.now))
	case s.End() != s.Seq: // a bare acknowledgment need not be remembered
		at := v.room(hash)
		k := &v.slab[at]
		peer := s.Options
		peer.MSS = cookieMSS[(s.Ack-1)&7]
		*k = session{
			peer: s.Src, local: s.Dst, iss: s.Ack - 1, rcvNxt: s.Seq, state: reading, hop: v.hop,
			timestamps: s.Options.HasTimestamps, size: segmentSize(v.mss, &peer, 0),
		}
		v.tags[at] = tagOf(hash)
		v.wheel.set(at, v.now+idleLimit)
		v.gotSegment(at, s)
	}
}

// room finds a place for a session, in need that of the one which was silent for the longest.
func (v *server) room(hash uint64) int32 {
	set := int32(hash%sessionSets) * sessionWays
	oldest := set
	for at := set; at < set+sessionWays; at++ {
		if v.tags[at] == 0 {
			return at
		}
		if v.slab[at].touched < v.slab[oldest].touched {
			oldest = at
		}
	}
	v.release(oldest)
	return oldest
}

func (v *server) release(at int32) {
	v.slab[at].state, v.tags[at] = free, 0
	v.wheel.cancel(at)
}

func (v *server) gotSegment(at int32, s *packet.Segment) {
	k := &v.slab[at]
	k.touched, k.hop = v.now, v.hop
	if s.Options.HasTimestamps {
		k.tsRecent = s.Options.TSVal
	}
	v.gotACK(at, k, s.Ack)
	if s.End() == s.Seq {
		return
	}
	payload, fin := v.absorb(k, s)
	switch {
	case k.state == reading && len(payload) > 0:
		v.read(at, k, payload, fin)
	case k.state == reading && fin:
		v.giveUp(at, k)
	default:
		v.control(k, packet.ACK)
	}
	v.maybeDone(at, k)
}

// absorb returns what is new in a segment. What the capture does not hold was never received, nor what comes before something
// else that is missing: it will be repeated.
func (v *server) absorb(k *session, s *packet.Segment) (payload []byte, fin bool) {
	skip := int(k.rcvNxt - s.Seq) // behind a gap, more than any payload
	if skip <= len(s.Payload) && !k.peerFIN {
		payload = s.Payload[skip:]
		k.rcvNxt += uint32(len(payload))
		if fin = s.Has(packet.FIN) && s.Missing == 0; fin {
			k.peerFIN = true
			k.rcvNxt++
		}
	}
	return payload, fin
}

// read reads on in the hello, and answers it when it is whole.
func (v *server) read(at int32, k *session, payload []byte, fin bool) {
	switch k.hello.feed(payload) {
	case helloWhole:
		k.state, k.tries = answered, 0
		v.sendReply(k)
		v.wheel.set(at, v.now+dataRetry)
	case helloBad:
		v.control(k, packet.RST|packet.ACK)
		v.release(at)
	default:
		if fin {
			v.giveUp(at, k)
			return
		}
		// As a receiver must, every second one at the latest (RFC 9293, section 3.8.6.3).
		if k.held++; k.held == 2 {
			k.held = 0
			v.control(k, packet.ACK)
		}
	}
}

// giveUp answers a peer that closes without a hello by closing too.
func (v *server) giveUp(at int32, k *session) {
	k.state, k.tries, k.sent = answered, 0, uint32(len(v.reply.data))
	k.acked = k.sent
	k.iss -= k.sent // so that the FIN, behind an answer that was never sent, has the next number
	v.finish(k)
	v.wheel.set(at, v.now+dataRetry)
}

// gotACK moves on in the answer.
func (v *server) gotACK(at int32, k *session, ack uint32) {
	offset := ack - k.iss - 1
	if k.state != answered || offset <= k.acked || offset > k.sent+1 {
		return
	}
	k.acked, k.tries = offset, 0
	if int(offset) <= len(v.reply.data) {
		v.sendReply(k)
		v.wheel.set(at, v.now+dataRetry)
		return
	}
	v.wheel.set(at, v.now+idleLimit)
	v.maybeDone(at, k)
}

func (v *server) maybeDone(at int32, k *session) {
	if k.state == answered && k.peerFIN && int(k.acked) > len(v.reply.data) {
		v.release(at)
	}
}

// sendReply sends what the burst allows of what was not sent yet, and the FIN with the last of it.
func (v *server) sendReply(k *session) {
	end := uint32(len(v.reply.data))
	limit := min(end, k.acked+burst*uint32(k.size))
	for k.sent < limit {
		payload, sum := v.reply.part(int(k.sent), int(k.size))
		s := v.segment(k, packet.ACK|packet.PSH)
		if k.sent+uint32(len(payload)) == end {
			s.Flags |= packet.FIN
		}
		put(v.line, &k.hop, &s, payload, sum)
		k.sent += uint32(len(payload))
	}
}

func (v *server) finish(k *session) { v.control(k, packet.FIN|packet.ACK) }

func (v *server) expired(at int32) {
	k := &v.slab[at]
	end := uint32(len(v.reply.data))
	if k.state == reading || k.acked > end || k.tries == replyTries {
		v.release(at)
		return
	}
	k.sent = k.acked
	if k.sent == end {
		v.finish(k)
	} else {
		v.sendReply(k)
	}
	k.tries++
	v.wheel.set(at, v.now+dataRetry<<k.tries)
}

func (v *server) segment(k *session, flags uint8) packet.Segment {
	s := packet.Segment{
		Src: k.local, Dst: k.peer, Seq: k.iss + 1 + k.sent, Ack: k.rcvNxt, Flags: flags, Window: fullWindow >> windowScale,
	}
	if k.timestamps {
		s.Options = packet.Options{HasTimestamps: true, TSVal: clockMillis(v.now), TSEcr: k.tsRecent}
	}
	return s
}

// control sends a segment without payload.
func (v *server) control(k *session, flags uint8) {
	s := v.segment(k, flags)
	if k.state == answered && int(k.sent) == len(v.reply.data) && flags&packet.FIN == 0 {
		s.Seq++ // behind our FIN
	}
	put(v.line, &k.hop, &s, nil, 0)
}

// What a helloReader says.
const (
	helloMore = iota
	helloWhole
	helloBad
)

const (
	maxProtected = maxRecord + 256 // what implementations let pass (RFC 8446, section 5.2)
	maxHello     = 1 << 16
)

// helloReader finds the end of a ClientHello in a stream, over any number of records.
type helloReader struct {
	header  [5]byte
	have    uint8  // of the record's header
	left    uint16 // of the record
	message uint8  // of the message's header
	length  uint32 // of the message, what is still to come
}

func (r *helloReader) feed(b []byte) int {
	for len(b) > 0 {
		if r.left == 0 {
			r.header[r.have] = b[0]
			b = b[1:]
			if r.have++; r.have < uint8(len(r.header)) {
				continue
			}
			r.have = 0
			r.left = binary.BigEndian.Uint16(r.header[3:])
			if r.header[0] != 22 || r.header[1] != 3 || r.left == 0 || r.left > maxProtected {
				return helloBad
			}
			continue
		}
		n := min(len(b), int(r.left))
		if verdict := r.body(b[:n]); verdict != helloMore {
			return verdict
		}
		r.left -= uint16(n)
		b = b[n:]
	}
	return helloMore
}

// body reads a part of a record.
func (r *helloReader) body(b []byte) int {
	for ; r.message < 4 && len(b) > 0; b = b[1:] {
		if r.message == 0 && b[0] != 1 {
			return helloBad
		}
		if r.message++; r.message > 1 {
			r.length = r.length<<8 | uint32(b[0])
		}
	}
	if r.message < 4 {
		return helloMore
	}
	if r.length > maxHello {
		return helloBad
	}
	r.length -= min(r.length, uint32(len(b)))
	if r.length > 0 {
		return helloMore
	}
	return helloWhole
}
