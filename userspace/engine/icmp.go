// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/userspace/packet"
)

// smallestMTU is the least an ICMP error can lower our own segments to: what every
// host takes (RFC 1122 3.3.3, RFC 8200 5), so that a forged one does little harm.
func smallestMTU(v4 bool) int {
	if v4 {
		return 576
	}
	return 1280
}

// icmpError is an ICMP error about a packet that left us on that leg. Before the
// bind it is the engine's own; afterwards whoever sent the packet on the other leg
// hears of it.
func (w *worker) icmpError(leg maps.Leg, raw []byte) {
	e, err := packet.ParseICMP(raw)
	if err != nil {
		w.stats.badEvents++
		return
	}
	// A packet in answer to the quoted one.
	answer := packet.Segment{Src: e.Quoted.Dst, Dst: e.Quoted.Src}
	if f := w.flowOf(leg, &answer); f != nil {
		w.translateError(leg, f, &e)
		return
	}
	if leg == maps.LegBackend {
		if h := w.leases[maps.Tuple{Src: answer.Src, Dst: answer.Dst}]; h != nil {
			h.backendError(w, &e)
		}
	}
}

// translateError tells the other leg, in its own addresses and numbers. What the
// answer to the quoted packet would be rewritten to, the quoted packet came from.
func (w *worker) translateError(leg maps.Leg, f *flow, e *packet.ICMPError) {
	tuple := f.clientTuple()
	if leg == maps.LegBackend {
		tuple = w.flows.backendTuple(f)
	}
	entry, err := w.e.o.Tables.LookupFlow(leg, tuple)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return
	}
	if err != nil {
		w.log.limited(w.now, "flow not read", "error", err)
		return
	}
	w.stats.icmp++
	// Said by us: the router is a stranger there, and a firewall may know us only.
	e.Src, e.Dst = entry.To.Src.Addr(), entry.To.Dst.Addr()
	e.Quoted.Src, e.Quoted.Dst = entry.To.Dst, entry.To.Src
	e.Quoted.Seq += entry.Flow.Ack
	w.sendError(e)
}

// backendError is an ICMP error about a packet of the handshake's own. Only one that
// quotes a number in flight is believed (RFC 5927 4.1).
func (h *handshake) backendError(w *worker, e *packet.ICMPError) {
	a := &h.attempt
	switch {
	case e.TooBig && h.phase == pushing:
		mtu := max(e.MTU, smallestMTU(h.client.Addr().Is4()))
		first := a.isn + 1
		if e.Quoted.Seq-first >= h.pushEnd()-first || mtu >= a.hop.MTU {
			return
		}
		a.hop.MTU = mtu
		h.push(w)
	case !e.TooBig && h.phase == connecting && e.Quoted.Seq == a.isn:
		h.fail(w, "icmp_unreachable")
	}
}

// tooBig is a packet of a bound flow that does not fit the other leg. Its sender is
// told, and what came is sent on in pieces: a sender that never hears of ICMP, or
// may not listen, is slow instead of stalled.
func (w *worker) tooBig(leg maps.Leg, s *packet.Segment, length, mtu int) {
	w.stats.tooBig++
	w.sendError(&packet.ICMPError{
		Src: s.Dst.Addr(), Dst: s.Src.Addr(), TooBig: true, MTU: mtu,
		Quoted: packet.Quote{Src: s.Src, Dst: s.Dst, Seq: s.Seq, Length: length},
	})
	if s.Missing > 0 {
		s.Flags &^= packet.FIN | packet.PSH // they belong to the end, which is not here
	}
	w.replay(leg, *s, segmentSize(65535, mtu, s.Src.Addr().Is4(), s.Options.HasTimestamps))
}

// sendError sends an ICMP error out to its destination.
func (w *worker) sendError(e *packet.ICMPError) {
	hop, err := w.e.o.NextHop(e.Dst)
	if err != nil {
		w.stats.unroutable++
		return
	}
	w.emit(maps.TapOutput, hop.Index, e.Dst.Is4(), e.Append)
}
