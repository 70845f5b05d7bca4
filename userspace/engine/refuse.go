// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"time"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
)

const (
	// refusedFor is how long a connection that no backend gets is remembered, so
	// that its repetitions are not decided again.
	refusedFor = 10 * time.Second
	// maxRefused bounds how many of them a worker remembers. Of those beyond,
	// each repetition is decided anew, and alike.
	maxRefused = 10_000
)

// refuse ends a connection that no backend gets, and lets go of its hello.
func (h *handshake) refuse(w *worker, action config.ActionKind) {
	h.decision.action = action
	h.refusedAt = h.end()
	if h.fin && h.finAt == h.refusedAt {
		h.refusedAt++
	}
	h.answer(w)
	if w.refused >= maxRefused {
		w.drop(h)
		return
	}
	h.letGo(w)
	h.phase = refused
	w.refused++
	h.hello.Reset()
	w.timers.set(h, w.now+int64(refusedFor))
}

// answer is what the client gets: a reset, an alert or nothing.
func (h *handshake) answer(w *worker) {
	switch h.decision.action {
	case config.Reset:
		s := h.toClient(packet.RST | packet.ACK)
		s.Ack, s.Window, s.Options = h.refusedAt, 0, packet.Options{}
		w.send(&s)
	case config.Alert:
		h.alert(w)
	}
}

// Descriptions of alerts (RFC 8446 6.2, RFC 6066 3).
const (
	unexpectedMessage = 10
	internalError     = 80
	unrecognizedName  = 112
)

// alert closes with a fatal TLS alert, which the client reads before the FIN. All of
// its bytes are acknowledged: with some unread, its stack would not get to the alert.
func (h *handshake) alert(w *worker) {
	s := h.toClient(packet.ACK | packet.PSH | packet.FIN)
	s.Ack = h.refusedAt
	// A record of version TLS 1.2, as every version since accepts it.
	s.Payload = []byte{21, 3, 3, 0, 2, 2, h.decision.alertDescription()}
	w.send(&s)
}

func (d *decision) alertDescription() byte {
	switch d.reason {
	case reasonNotTLS:
		return unexpectedMessage
	case reasonNoBackend:
		return internalError
	}
	return unrecognizedName
}

// afterRefusal answers what a client goes on to send. Nothing is repeated by us: a
// client that misses the alert, or the acknowledgment of its FIN, asks again.
func (h *handshake) afterRefusal(w *worker, s *packet.Segment) {
	if int32(s.Seq-h.refusedAt) <= 0 && int32(s.End()-h.refusedAt) > 0 && s.Missing == 0 {
		h.refusedAt = s.End()
	}
	if s.Ack == h.cookie+1 {
		h.answer(w)
		return
	}
	r := h.toClient(packet.ACK)
	r.Seq, r.Ack = s.Ack, h.refusedAt
	w.send(&r)
}

// closedSegment is what a client sends that has acknowledged an alert of ours and the
// FIN behind it.
func (w *worker) closedSegment(s *packet.Segment) {
	h := w.handshakes[connection{client: s.Src, listener: s.Dst}]
	switch {
	case h != nil && h.phase == refused && s.Ack == h.cookie+1+maps.AlertLength+1:
		h.afterRefusal(w, s)
	case s.Has(packet.FIN) && len(s.Payload) == 0: // its last, repeated late
		r := answerTo(s, 0)
		r.Options = echo(s)
		w.send(&r)
	default:
		w.stats.unknown++
		w.reset(s)
	}
}
