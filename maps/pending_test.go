// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
)

// expectPending feeds a packet of a pending entry: its worker gets all of it, and
// nothing is written.
func (r *rig) expectPending(f family, s segment) {
	r.Helper()
	before := r.entry(f, LegBackend)
	if r.leaves(ProgramBackend, s) {
		r.untouched(f, LegBackend, before)
		return
	}
	w := backendEvent(s)
	w.events[0].Worker = int(before.Flow.Control >> 21 & 63)
	r.expect(ProgramBackend, s.frame(), w)
	r.untouched(f, LegBackend, before)
}

// What a backend sends before its flow is bound is the engine's, whatever would keep a
// bound flow's packet from leaving.
func TestPending(t *testing.T) {
	skins(t, newFlowRig, settings{workers: 7}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			for worker := range 7 {
				for _, hop := range []uint16{0, nexthopIndex} {
					for _, flags := range []uint16{syn | ack, ack, ack | psh, ack | fin, fin, rst, rst | ack, syn, 0} {
						t.Run(fmt.Sprint(worker, "/", hop, "/", flags), func(t *testing.T) {
							r := r.with(t)
							r.bind(f, LegBackend, func(e *Entry) {
								e.Flow.Control = FlowControl(hop, 0, worker) | FlowPending
							})
							s := f.backendSegment(flags)
							r.expectPending(f, s)
							s.options, s.tags, s.padding = timestamps(0), []vlan{{0x8100, 3}}, []byte("pad")
							r.expectPending(f, s)
							s.ttl = 1
							overMTU(&s)
							r.expectPending(f, s)
						})
					}
				}
			}
		})
	})
}

// A pending entry needs no path; without the entry there is none to have.
func TestPendingWithoutPath(t *testing.T) {
	skins(t, newRig, settings{workers: 2}, func(t *testing.T, r *rig) {
		r.hop(nexthopMTU)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			s := f.backendSegment(syn | ack)
			r.expect(ProgramBackend, s.frame(), pass(bpfReasonREASON_NOT_OURS))
			r.bind(f, LegBackend, func(e *Entry) { e.Flow.Control = FlowControl(0, 0, 1) | FlowPending })
			r.expectPending(f, s)
		})
	})
}

// An entry is inserted where there is none, be it a pending one; TestJobsBindPending is how a flow takes its place.
func TestPendingStays(t *testing.T) {
	r := newRig(t, settings{})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		e := f.entry(leg)
		before := r.bind(f, leg, func(e *Entry) { e.Flow.Control |= FlowPending })
		if err := r.tables.InsertFlow(leg, f.tuple(leg), &e); !errors.Is(err, ebpf.ErrKeyExist) {
			t.Errorf("inserted twice: %v", err)
		}
		r.untouched(f, leg, before)
	})
}

func TestPendingRingFull(t *testing.T) {
	skins(t, newFlowRig, settings{ringSize: 8192}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			r.fill(f)
			before := r.bind(f, LegBackend, func(e *Entry) { e.Flow.Control |= FlowPending })
			r.countedFull(ProgramBackend, f.backendSegment(ack).frame(), bpfReasonREASON_EVENT_LOST)
			r.untouched(f, LegBackend, before)
			r.events(0)
			r.expectPending(f, f.backendSegment(ack))
		})
	})
}

// Ports outside the range have flows only with source: client, and never packets for
// the engine but by their entry.
func TestSourceClient(t *testing.T) {
	skins(t, newFlowRig, settings{workers: 3}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			for flags := range uint32(8) {
				for _, port := range []uint16{0, 1, vipPort, portFirst - 1, portLast + 1, clientPort, 65535} {
					t.Run(fmt.Sprint(flags, "/", port), func(t *testing.T) {
						r := r.with(t)
						r.live.Flags = flags
						r.setClock()
						f := f
						f.source = netip.AddrPortFrom(f.source.Addr(), port)
						// XDP takes what is sent to a listener's port for a client's.
						client := r.set.xdp && port == vipPort
						r.anyPort(f, flags&LiveSourceClient != 0 && !client)
					})
				}
			}
		})
		r.live.Flags = 0
		r.setClock()
	})
}

// anyPort judges a backend's packets to a port outside the range.
func (r *rig) anyPort(f family, looked bool) {
	r.Helper()
	data, again := f.backendSegment(ack), f.backendSegment(syn|ack)
	data.payload = []byte("data")
	r.expect(ProgramBackend, data.frame(), pass(bpfReasonREASON_NOT_OURS))
	before := r.bind(f, LegBackend, func(e *Entry) { e.Flow.Control = FlowControl(nexthopIndex, 0, 2) })
	if !looked {
		r.expect(ProgramBackend, data.frame(), pass(bpfReasonREASON_NOT_OURS))
		r.expect(ProgramBackend, again.frame(), pass(bpfReasonREASON_NOT_OURS))
		r.untouched(f, LegBackend, before)
		return
	}
	w := backendEvent(again)
	w.events[0].Worker = 2
	r.expect(ProgramBackend, again.frame(), w)
	r.untouched(f, LegBackend, before)
	r.expectForward(f, LegBackend, data, skbuff{})
	must(r, r.tables.DeleteFlow(LegBackend, f.tuple(LegBackend)))

	e := f.entry(LegBackend)
	e.Flow.Control = FlowControl(nexthopIndex, 0, 1) | FlowPending
	must(r, r.tables.InsertFlow(LegBackend, f.tuple(LegBackend), &e))
	r.expectPending(f, data)
	r.expectPending(f, again)
}
