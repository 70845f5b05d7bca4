// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
)

// bind writes both entries, the backend's direction first, and replays the hello.
// From the second insert on the flow is the kernel's.
func (h *handshake) bind(w *worker) {
	w.hearEnds()
	a := &h.attempt
	limit := w.e.plan.Load().config.Limits.Flows
	back, err := w.e.o.NextHop(h.client.Addr())
	switch {
	case err != nil && w.now < h.deadline: // a route that flaps
		a.retry = min(a.retry, maxPause)
		h.retryAt(w)
		return
	case err != nil:
		h.abandon(w, "no_route_to_client")
		return
	case w.e.flows.Load() >= int64(limit):
		h.abandonFull(w, limit)
		return
	}
	if old := w.flows.byClient(h.connection); old != nil {
		old.remove(w, "replaced")
	}
	w.generation++
	toBackend, toClient := h.entries(w, back)
	pair := maps.Pair{Client: maps.Tuple{Src: h.client, Dst: h.connection.listener}, Backend: a.tuple(), Up: toBackend, Down: toClient}
	if err := w.jobs.Bind(&pair, a.local.ports == nil); err != nil {
		if errors.Is(err, unix.E2BIG) {
			h.abandonFull(w, limit)
			return
		}
		result := "map_error"
		if errors.Is(err, ebpf.ErrKeyExist) {
			result = "duplicate"
		}
		w.log.limited(w.now, "flow not bound", "client", h.client, "error", err)
		h.abandon(w, result)
		return
	}
	w.stats.connect(a.backend, "ok")
	mss := int(h.settle(w).mss)
	h.replayHello(w, mss)
	for i := range a.pending {
		// An ACK of our header alone means nothing to the client.
		a.pending[i].Ack = a.ack
		w.replay(maps.LegBackend, a.pending[i], mss)
	}
}

func (h *handshake) abandonFull(w *worker, limit int) {
	w.log.limited(w.now, "flow table is full: raise limits.flows", "flows", limit)
	h.abandon(w, "flow_table_full")
}

// abandon resets both legs of a connection that cannot be bound.
func (h *handshake) abandon(w *worker, result string) {
	w.stats.connect(h.attempt.backend, result)
	s := h.toBackend(w, packet.RST|packet.ACK, h.attempt.ack, nil)
	w.sendBy(h.attempt.hop, &s)
	h.refuse(w, config.Reset)
}

// settle turns the handshake into a flow of the worker.
func (h *handshake) settle(w *worker) *flow {
	a := &h.attempt
	v := way{a.backend, a.local.ports, &h.decision.pool.Config.Timeouts, h.decision.routeName()}
	f := w.flows.add(h.connection, a.local.AddrPort, v, h.sni, h.origin.client)
	f.cookie, f.generation, f.bound = h.cookie, w.generation, w.now
	toClient := segmentSize(h.options.MSS, a.hop.MTU, h.client.Addr().Is4(), h.options.HasTimestamps)
	f.mss = uint16(min(h.segmentSize(), toClient))
	w.note(f)
	delete(w.leases, a.tuple())
	a.local = local{} // it is the flow's now
	w.drop(h)
	w.flowTimers.set(w.flows.number(f), w.now+int64(v.timeouts.Unconfirmed))
	w.e.flows.Add(1)
	w.stats.handshakes++
	w.stats.handshakeNanoseconds += uint64(w.now - h.started)
	return f
}

// entries are the two directions' rewrites. The client's stream starts at one
// number and at another on the backend leg; our numbers end at the cookie, the
// backend's at its SYN-ACK's.
func (h *handshake) entries(w *worker, back Hop) (toBackend, toClient *maps.Entry) {
	a := &h.attempt
	seq := a.start() - h.start()
	ack := a.peer.Seq - h.cookie
	var ts, ecr uint32
	if h.options.HasTimestamps {
		ts = h.backendClock(w) - h.options.TSVal
		ecr = a.peer.Options.TSVal - h.tsEcr
	}
	up, down := h.shifts()
	seen := uint32(w.now >> 20)
	var route uint16 // its index plus 1; 0: no route
	if r := h.decision.route; r != nil {
		route = uint16(r.Index + 1)
	}
	toBackend = &maps.Entry{
		To: maps.Tuple{Src: a.local.AddrPort, Dst: a.backend.Addr},
		Flow: maps.Flow{
			Seq: seq, Ack: ack, Tsval: ts, Tsecr: ecr, LastAck: h.cookie + 1, LastSeen: seen,
			Bytes:   uint64(a.delivered()),
			Control: maps.FlowControl(a.hop.Index, up, w.id), Generation: w.generation, Id: a.backend.ID,
		},
	}
	toClient = &maps.Entry{
		To: maps.Tuple{Src: h.connection.listener, Dst: h.client},
		Flow: maps.Flow{
			Seq: -ack, Ack: -seq, Tsval: -ecr, Tsecr: -ts, LastAck: a.ack, LastSeen: seen,
			Control: maps.FlowControl(back.Index, down, w.id), Generation: w.generation, Id: route,
		},
	}
	return toBackend, toClient
}

// shifts are how far each direction's window moves: from the scale its sender
// uses to the one its receiver was told. Scaling is only in force where both sides
// of a leg had the option (RFC 7323 2.2).
func (h *handshake) shifts() (toBackend, toClient int) {
	peer := h.attempt.peer.Options
	if h.options.HasWScale {
		toBackend = int(h.options.WScale)
		toClient = -maps.AnnouncedWindowScale
	}
	if h.options.HasWScale && peer.HasWScale {
		toBackend -= int(h.options.WScale)
		toClient += int(peer.WScale)
	}
	return toBackend, toClient
}

// replayHello sends what the client will repeat if it is lost: all but what the
// backend has acknowledged, and the client's FIN if that stands right behind. It
// also is the ACK of the backend's SYN-ACK.
func (h *handshake) replayHello(w *worker, mss int) {
	sent := h.attempt.delivered()
	rest := h.stream()[sent:]
	s := packet.Segment{
		Src: h.client, Dst: h.connection.listener,
		Seq: h.start() + uint32(sent), Ack: h.cookie + 1,
		Flags: packet.ACK, Window: h.window, Payload: rest,
	}
	if len(rest) > 0 {
		s.Flags |= packet.PSH
	}
	if h.fin && h.finAt == h.end() {
		s.Flags |= packet.FIN
	}
	if h.options.HasTimestamps {
		s.Options = packet.Options{HasTimestamps: true, TSVal: h.options.TSVal, TSEcr: h.tsEcr}
	}
	if len(rest) == 0 && !s.Has(packet.FIN) {
		return // all of it is with the backend already
	}
	w.replay(maps.LegClient, s, mss)
}
