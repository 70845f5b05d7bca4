// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"

	"snilb/maps"
	"snilb/userspace/packet"
)

// write sends one segment as a frame into the TAP device, where the kernel program
// reads from the destination address what to do: request and next hop.
func (w *worker) write(request uint8, hop uint16, s *packet.Segment) {
	w.emit(request, hop, s.Src.Addr().Is4(), s.Append)
}

// emit writes a frame around the IP packet that appendTo makes.
func (w *worker) emit(request uint8, hop uint16, v4 bool, appendTo func([]byte) []byte) {
	ethertype := [2]byte{0x08, 0x00}
	if !v4 {
		ethertype = [2]byte{0x86, 0xdd}
	}
	b := append(w.frame[:0],
		0x02, 's', 'n', request, byte(hop>>8), byte(hop),
		0x02, 's', 'n', 0, 0, 0,
		ethertype[0], ethertype[1])
	b = appendTo(b)
	w.frame = b
	if _, err := w.queue.Write(b); err != nil {
		w.stats.writeErrors++
		w.log.limited(w.now, "frame not sent", "error", fmt.Errorf("write to the TAP device: %w", err))
	}
}

// send sends a segment out to its destination.
func (w *worker) send(s *packet.Segment) {
	hop, err := w.e.o.NextHop(s.Dst.Addr())
	if err != nil {
		w.stats.unroutable++
		w.log.limited(w.now, "no way back", "to", s.Dst, "error", err)
		return
	}
	w.write(maps.TapOutput, hop.Index, s)
}

// sendBy sends a segment by a next hop that is known.
func (w *worker) sendBy(hop Hop, s *packet.Segment) {
	w.write(maps.TapOutput, hop.Index, s)
}

// replay hands a segment to the kernel as if it had just arrived on that leg of a
// bound flow: the rewrite exists once, there. Cut to what fits a packet of size
// mss, since it may have been merged on its way here.
func (w *worker) replay(leg maps.Leg, s packet.Segment, mss int) {
	request := maps.TapReplayClient
	if leg == maps.LegBackend {
		request = maps.TapReplayBackend
	}
	payload, flags := s.Payload, s.Flags
	// Sizes allow for timestamps and for no other option: a piece that was too big again
	// would come back without end.
	s.Options = packet.Options{HasTimestamps: s.Options.HasTimestamps, TSVal: s.Options.TSVal, TSEcr: s.Options.TSEcr}
	for {
		n := min(len(payload), mss)
		s.Payload, payload = payload[:n], payload[n:]
		s.Flags = flags
		if len(payload) > 0 {
			s.Flags &^= packet.FIN | packet.PSH
		}
		w.write(request, 0, &s)
		if len(payload) == 0 {
			return
		}
		s.Seq += uint32(n)
	}
}

// answerTo is a segment without payload that acknowledges all of s, from where its
// sender expects us.
func answerTo(s *packet.Segment, flags uint8) packet.Segment {
	return packet.Segment{Src: s.Dst, Dst: s.Src, Seq: s.Ack, Ack: s.End(), Flags: flags | packet.ACK}
}

// reset answers a segment that belongs to nothing (RFC 9293 3.10.7.1).
func (w *worker) reset(s *packet.Segment) {
	if s.Has(packet.RST) {
		return
	}
	r := packet.Segment{Src: s.Dst, Dst: s.Src, Flags: packet.RST}
	if s.Has(packet.ACK) {
		r.Seq = s.Ack
	} else {
		r.Flags |= packet.ACK
		r.Ack = s.End()
	}
	w.send(&r)
}

// headersSize is the bytes of the IP and TCP headers without options.
func headersSize(v4 bool) int {
	if v4 {
		return 40
	}
	return 60
}

// segmentSize is the most payload a segment to a peer may have.
func segmentSize(peerMSS uint16, mtu int, v4, timestamps bool) int {
	size := min(int(peerMSS), mtu-headersSize(v4))
	if timestamps {
		size -= 12
	}
	return max(size, 64)
}
