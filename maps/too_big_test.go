// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"net/netip"
	"testing"
)

func overMTU(s *segment) {
	s.payload = nil
	s.payload = make([]byte, nexthopMTU+1-len(s.packet()))
}

// tooBig is what the engine has to be told of a packet that does not fit: all of it,
// and what would. XDP leaves that to TC.
func (r *rig) tooBig(s segment, leg Leg, worker int, mtu uint16) want {
	if r.set.xdp {
		return pass(bpfReasonREASON_LEFT_TOO_BIG)
	}
	e := eventOf(s, EventTooBig, EventData)
	e.Leg, e.Worker, e.MTU = leg, worker, mtu
	return told(bpfReasonREASON_TOO_BIG_CUT, e)
}

// untouched wants an entry as it was, when it was last seen included.
func (r *rig) untouched(f family, leg Leg, before Entry) {
	r.Helper()
	if got := r.entry(f, leg); got != before {
		r.Errorf("entry is %+v, was %+v", got, before)
	}
}

// A packet over its next hop's MTU goes to the worker that owns the flow, whatever it
// is, and the flow does not know of it.
func TestFlowTooBig(t *testing.T) {
	changes := map[string]func(*segment){
		"data":         func(*segment) {},
		"FIN":          func(s *segment) { s.flags |= fin },
		"RST":          func(s *segment) { s.flags = rst },
		"URG":          func(s *segment) { s.flags |= urg; s.urgent = 7 },
		"timestamps":   func(s *segment) { s.options = timestamps(0) },
		"all options":  func(s *segment) { s.options = timestamps(30) },
		"802.1Q":       func(s *segment) { s.tags = []vlan{{0x8100, 20}} },
		"padding":      func(s *segment) { s.padding = []byte("pad") },
		"bad checksum": func(s *segment) { s.wrong = 1 },
	}
	skins(t, newFlowRig, settings{workers: 5}, func(t *testing.T, r *rig) {
		bothLegs(t, func(t *testing.T, f family, leg Leg) {
			for i, mtu := range []uint16{576, 1280, 1500, 2000} {
				for name, change := range changes {
					t.Run(fmt.Sprint(mtu, "/", name), func(t *testing.T) {
						r := r.with(t)
						r.hop(mtu)
						before := r.bind(f, leg, func(e *Entry) { e.Flow.Control = FlowControl(nexthopIndex, 3, i+1) })
						s := f.legSegment(leg, ack|psh)
						change(&s)
						fits := int(mtu) - len(s.packet())
						for _, size := range []int{fits + 1, fits + 999} {
							s.payload = make([]byte, size)
							r.expect(program(leg), s.frame(), r.tooBig(s, leg, i+1, mtu))
							r.untouched(f, leg, before)
						}
						s.payload = make([]byte, fits)
						if s.wrong == 0 {
							r.expectForward(f, leg, s, skbuff{})
						}
					})
				}
			}
		})
	})
}

// So do super-packets whose segments are over the MTU.
func TestFlowGSOTooBig(t *testing.T) {
	r := newFlowRig(t, settings{workers: 3})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		r.bind(f, leg, func(e *Entry) { e.Flow.Control = FlowControl(nexthopIndex, 0, 2) })
		s := f.legSegment(leg, ack)
		s.options = timestamps(0)
		fits := uint32(nexthopMTU - len(s.packet()))
		s.payload = make([]byte, 3000)
		r.expectForward(f, leg, s, skbuff{GSOSegs: 3, GSOSize: fits})
		r.expectForward(f, leg, s, skbuff{GSOSize: fits})
		before := r.entry(f, leg)
		r.expectSkb(program(leg), s.frame(), skbuff{GSOSegs: 3, GSOSize: fits + 1}, r.tooBig(s, leg, 2, nexthopMTU))
		r.expectSkb(program(leg), s.frame(), skbuff{GSOSize: fits + 1}, r.tooBig(s, leg, 2, nexthopMTU))
		r.untouched(f, leg, before)
	})
}

// A replay that does not fit comes back.
func TestTapReplayTooBig(t *testing.T) {
	r := newFlowRig(t, settings{workers: 3})
	requests := map[Leg]uint8{LegClient: TapReplayClient, LegBackend: TapReplayBackend}
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		before := r.bind(f, leg, func(e *Entry) { e.Flow.Control = FlowControl(nexthopIndex, 0, 1) })
		s := f.legSegment(leg, ack)
		overMTU(&s)
		r.expect(ProgramTap, tapFrame(s, requests[leg], 0), r.tooBig(s, leg, 1, nexthopMTU))
		r.untouched(f, leg, before)
	})
}

// Packets over the MTU are rationed, and dropped where the engine cannot be told.
func TestFlowTooBigLimit(t *testing.T) {
	r := newFlowRig(t, settings{})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		before := r.bind(f, leg, nil)
		s := f.legSegment(leg, ack)
		overMTU(&s)
		r.inWindow(func(r *rig, window uint64) {
			r.allow(EventTooBig, window, eventsPerWindow-1)
			r.expect(program(leg), s.frame(), r.tooBig(s, leg, 0, nexthopMTU))
			r.expect(program(leg), s.frame(), drop(bpfReasonREASON_TOO_BIG))
			r.expect(program(leg), s.frame(), drop(bpfReasonREASON_TOO_BIG))
			r.allow(EventTooBig, window-1, 1<<40)
			r.expect(program(leg), s.frame(), r.tooBig(s, leg, 0, nexthopMTU))
		})
		r.untouched(f, leg, before)
	})
}

// A flood of one kind takes nothing from the others: a sender of unknown packets must not keep path MTU discovery from working.
func TestAllowances(t *testing.T) {
	r := newICMPRig(t, settings{})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		r.bind(f, leg, nil)
		e, big, stranger := f.icmpError(leg), f.legSegment(leg, ack), f.clientSegment(ack)
		overMTU(&big)
		stranger.src = netip.AddrPortFrom(stranger.src.Addr(), 1)
		kinds := map[EventKind]struct {
			program          string
			frame            []byte
			allowed, limited want
		}{
			EventUnknown: {ProgramClient, stranger.frame(), unknown(stranger), drop(bpfReasonREASON_UNKNOWN_LIMITED)},
			EventICMP:    {program(leg), e.frame(), e.event(leg, 0), drop(bpfReasonREASON_ICMP_LIMITED)},
			EventTooBig:  {program(leg), big.frame(), r.tooBig(big, leg, 0, nexthopMTU), drop(bpfReasonREASON_TOO_BIG)},
		}
		for flooded := range kinds {
			r.inWindow(func(r *rig, window uint64) {
				for kind := range kinds {
					r.allow(kind, window, 0)
				}
				r.allow(flooded, window, eventsPerWindow)
				for kind, k := range kinds {
					w := k.allowed
					if kind == flooded {
						w = k.limited
					}
					r.expect(k.program, k.frame, w)
				}
			})
		}
	})
}

// fill leaves no room in the one ring, until the next look at it.
func (r *rig) fill(f family) {
	r.Helper()
	s := f.backendSegment(syn | ack)
	for _, size := range []int{3000, 0} { // the last bytes too
		s.payload = make([]byte, size)
		for before := -1; before < r.readers[0].AvailableBytes(); {
			before = r.readers[0].AvailableBytes()
			r.run(ProgramBackend, s.frame(), skbuff{})
		}
	}
}

// countedFull runs a program over a frame while the rings are full.
func (r *rig) countedFull(program string, frame []byte, reason Reason) {
	r.Helper()
	before := r.counters()
	out, action := r.run(program, frame, skbuff{})
	sameFrame(r, out, frame)
	before.Packets[reason]++
	if got := r.counters(); action != shot || got != before {
		r.Errorf("action is %d, counters %v, want %v", action, got, before)
	}
}

func TestFlowTooBigRingFull(t *testing.T) {
	r := newFlowRig(t, settings{ringSize: 8192})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		r.fill(f)
		before := r.bind(f, leg, nil)
		s := f.legSegment(leg, ack)
		overMTU(&s)
		r.countedFull(program(leg), s.frame(), bpfReasonREASON_TOO_BIG)
		r.untouched(f, leg, before)
		r.events(0)
		r.expect(program(leg), s.frame(), r.tooBig(s, leg, 0, nexthopMTU))
	})
}

// Of a super-packet the engine gets what an event holds.
func TestDeviceTooBig(t *testing.T) {
	r := newFlowRig(t, settings{})
	w := r.newWires(false, false)
	bothFamilies(t, func(t *testing.T, f family) {
		for _, size := range []int{1600, 15000, 17000, 40000} {
			t.Run(fmt.Sprint(size), func(t *testing.T) {
				r := r.with(t)
				before := r.bind(f, LegClient, nil)
				s := f.clientSegment(ack)
				s.payload = make([]byte, size)
				h, frame := s.superPacket(1500)
				r.send(w.client, h, frame, bpfReasonREASON_TOO_BIG_CUT)
				want := eventOf(s, EventTooBig, EventData)
				want.MTU = nexthopMTU
				// The checksum is its sender's hardware's to finish.
				copy(want.Data, frame[14:14+len(want.Data)])
				r.sameEvents(w.client, want)
				r.untouched(f, LegClient, before)
				r.receiveNothing(w.backend)
			})
		}
	})
}
