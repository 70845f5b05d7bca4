// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/hex"
	"errors"
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
)

// The engine hears once of each side's FIN, and once of its RST.
func TestFlowCloses(t *testing.T) {
	skins(t, newFlowRig, settings{workers: 3}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			r.bind(f, LegClient, nil)
			r.bind(f, LegBackend, nil)
			for _, step := range []struct {
				leg   Leg
				flags uint16
				state uint32
			}{
				{LegClient, ack, 0},
				{LegClient, ack | fin, FlowFIN},
				{LegClient, ack | fin | psh, FlowFIN},
				{LegBackend, ack, 0},
				{LegBackend, ack | fin, FlowFIN},
				{LegBackend, ack | rst, FlowFIN | FlowRST},
				{LegBackend, rst, FlowFIN | FlowRST},
				{LegClient, ack, FlowFIN},
				{LegClient, rst, FlowFIN | FlowRST},
				{LegClient, rst | fin, FlowFIN | FlowRST},
				{LegBackend, fin | rst, FlowFIN | FlowRST},
			} {
				s := f.legSegment(step.leg, step.flags)
				s.ack = lastAck
				r.expectForward(f, step.leg, s, skbuff{})
				if e := r.entry(f, step.leg); e.Flow.Control&(FlowFIN|FlowRST) != step.state {
					t.Errorf("state is %#x after %+v", e.Flow.Control, step)
				}
			}
		})
	})
}

// endNumbers are where a FIN or RST may stand and where not, counted from the last ACK of the other side.
var endNumbers = []struct {
	bytes    uint64 // sent before
	ahead    uint32
	believed bool
}{
	{0, 0, true},
	{0, ^uint32(0), true}, // the number of the FIN before it
	{0, ^uint32(1), false},
	{0, 64 << 10, true},
	{0, 64<<10 + 1, false},
	{1000, 1000, true},
	{1000, 1000 + 64<<10, true},
	{1000, 1000 + 64<<10 + 1, false},
	{16 << 20, 16<<20 + 64<<10, true},
	{16 << 20, 16<<20 + 64<<10 + 1, false},
	{16<<20 + 1, 16<<20 + 64<<10, true},
	{1 << 40, 1<<31 - 1, false},
	{1 << 40, 1 << 31, false},
	{1 << 40, 1<<32 - 16<<20, false},
}

// A FIN or RST at a number that its receiver cannot be at is forwarded, and changes nothing here: anybody can forge one.
func TestFlowEndNumbers(t *testing.T) {
	skins(t, newFlowRig, settings{workers: 3}, func(t *testing.T, r *rig) {
		bothLegs(t, func(t *testing.T, f family, leg Leg) {
			for _, c := range endNumbers {
				for _, flags := range []uint16{rst, rst | ack, fin | ack, fin | rst} {
					for _, data := range []int{0, 999} {
						if c.bytes < uint64(data) {
							continue // they count as well
						}
						t.Run(fmt.Sprint(c, flags, data), func(t *testing.T) {
							r := r.with(t)
							s := f.legSegment(leg, flags)
							s.payload = make([]byte, data)
							r.bind(f, leg, func(e *Entry) { e.Flow.Bytes = c.bytes - uint64(data) })
							r.bind(f, 1-leg, func(e *Entry) { e.Flow.LastAck = s.seq + uint32(data) + e.Flow.Seq - c.ahead })
							r.expectForward(f, leg, s, skbuff{})
							if e := r.entry(f, leg); (e.Flow.Control&(FlowFIN|FlowRST) != 0) != c.believed {
								t.Errorf("state is %#x", e.Flow.Control)
							}
						})
					}
				}
			}
		})
	})
}

// A RST this far ahead is repeated, a FIN is not: up to the largest window there is.
func TestFlowEndFarAhead(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothLegs(t, func(t *testing.T, f family, leg Leg) {
			for _, c := range []struct {
				flags    uint16
				ahead    uint32
				believed bool
			}{
				{rst, 16<<20 + 64<<10, true},
				{rst, 16<<20 + 64<<10 + 1, false},
				{rst | fin, 16<<20 + 64<<10 + 1, false},
				{fin | ack, 16<<20 + 64<<10 + 1, true},
				{fin | ack, 1<<30 + 64<<10, true},
				{fin | ack, 1<<30 + 64<<10 + 1, false},
			} {
				t.Run(fmt.Sprint(c), func(t *testing.T) {
					r := r.with(t)
					r.bind(f, leg, func(e *Entry) { e.Flow.Bytes = 1 << 40 })
					r.bind(f, 1-leg, func(e *Entry) { e.Flow.LastAck -= c.ahead })
					r.expectForward(f, leg, f.legSegment(leg, c.flags), skbuff{})
					if e := r.entry(f, leg); (e.Flow.Control&(FlowFIN|FlowRST) != 0) != c.believed {
						t.Errorf("state is %#x", e.Flow.Control)
					}
				})
			}
		})
	})
}

// A forged RST, and a SYN behind it: the flow lives, and the SYN is the backend's to answer.
func TestFlowForgedReset(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothLegs(t, func(t *testing.T, f family, leg Leg) {
			r := r.with(t)
			r.bind(f, LegClient, nil)
			r.bind(f, LegBackend, nil)
			for _, number := range []uint32{1, 1 << 20, 0x11223344 - 2, 0x11223344 + 1<<20, 1 << 31, ^uint32(0)} {
				s := f.legSegment(leg, rst)
				s.seq = number
				r.expectForward(f, leg, s, skbuff{})
				r.expectForward(f, LegClient, f.clientSegment(syn), skbuff{})
			}
			r.expectForward(f, leg, f.legSegment(leg, rst), skbuff{})
			r.expectAnswer(f.clientSegment(syn))
		})
	})
}

// A backend that knows nothing of the connection any more, and has no listener, answers a client's SYN by a RST at 0.
func TestFlowResetOfSYN(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			r.bind(f, LegClient, nil)
			r.bind(f, LegBackend, nil)
			s := f.backendSegment(rst | ack)
			s.seq = 0
			r.expectForward(f, LegBackend, s, skbuff{}) // nobody asked for it
			r.expectForward(f, LegClient, f.clientSegment(syn), skbuff{})
			s.seq = 1
			r.expectForward(f, LegBackend, s, skbuff{})
			r.expectForward(f, LegClient, f.clientSegment(syn), skbuff{})
			s.seq = 0
			r.expectForward(f, LegBackend, s, skbuff{})
			r.expectAnswer(f.clientSegment(syn))
		})
	})
}

// A SYN on a live flow is translated, so that the backend's answer heals it; its
// window has no scale and stays.
func TestFlowSynLive(t *testing.T) {
	states := map[string][2]uint32{
		"open": {}, "client's FIN": {FlowFIN, 0}, "backend's FIN": {0, FlowFIN}, "confirmed": {FlowConfirmed, FlowConfirmed},
	}
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			for name, state := range states {
				t.Run(name, func(t *testing.T) {
					r := r.with(t)
					r.bind(f, LegClient, func(e *Entry) { e.Flow.Control = FlowControl(nexthopIndex, 5, 0) | state[0] })
					r.bind(f, LegBackend, func(e *Entry) { e.Flow.Control |= state[1] })
					s := f.clientSegment(syn)
					s.options, _ = hex.DecodeString("020405b40402080a112233440000000001030307")
					r.expectForward(f, LegClient, s, skbuff{})
					s.flags = syn | ack
					r.expectForward(f, LegClient, s, skbuff{})
				})
			}
		})
	})
}

// A SYN on a flow that is over starts a new connection: the kernel forgets both
// entries and answers.
func TestFlowSynClosing(t *testing.T) {
	states := map[string][2]uint32{
		"both FINs": {FlowFIN, FlowFIN}, "client's RST": {FlowRST, 0}, "backend's RST": {0, FlowRST},
		"all": {FlowFIN | FlowRST, FlowFIN | FlowRST | FlowConfirmed},
	}
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			for name, state := range states {
				t.Run(name, func(t *testing.T) {
					r := r.with(t)
					r.bind(f, LegClient, func(e *Entry) { e.Flow.Control |= state[0] })
					r.bind(f, LegBackend, func(e *Entry) { e.Flow.Control |= state[1] })
					r.closingSyn(f)
					if _, err := r.tables.LookupFlow(LegBackend, f.tuple(LegBackend)); !errors.Is(err, ebpf.ErrKeyNotExist) {
						t.Errorf("the backend's entry, by which old data would reach the new connection: %v", err)
					}
				})
			}
			t.Run("no backend entry", func(t *testing.T) {
				r := r.with(t)
				r.bind(f, LegClient, nil)
				r.closingSyn(f)
			})
		})
	})
}

func (r *rig) closingSyn(f family) {
	r.Helper()
	// A SYN-ACK is not a new connection.
	before := r.entry(f, LegClient)
	s := f.clientSegment(syn | ack)
	r.expect(ProgramClient, s.frame(), unknown(s))
	r.sameEntry(r.entry(f, LegClient), before)

	r.expectAnswer(f.clientSegment(syn))
	if _, err := r.tables.LookupFlow(LegClient, f.tuple(LegClient)); !errors.Is(err, ebpf.ErrKeyNotExist) {
		r.Errorf("the client's entry: %v", err)
	}
	s = r.hello(f)
	r.expect(ProgramClient, s.frame(), hello(s))
}

// A repeated SYN-ACK of a backend goes to the engine and not to the client, with or without a path.
func TestFlowSynAckRepeated(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			before := r.bind(f, LegBackend, nil)
			s := f.backendSegment(syn | ack)
			r.expect(ProgramBackend, s.frame(), backendEvent(s))
			must(t, r.tables.DeletePath(f.source.Addr(), f.backend))
			r.expect(ProgramBackend, s.frame(), backendEvent(s))
			r.sameEntry(r.entry(f, LegBackend), before)
			r.expectForward(f, LegBackend, f.backendSegment(ack), skbuff{}) // the flow needs no path
			must(t, r.tables.AddPath(f.source.Addr(), f.backend, 1))
		})
	})
}

// The last ACK is the newest one: one that was overtaken on the way says nothing, and neither does a RST's. One further
// back than that is of a side that began anew, or repairs what a forged one did.
func TestFlowLastAck(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			e := r.bind(f, LegClient, func(e *Entry) { e.Flow.LastAck = 0xfffffff0 })
			for _, step := range []struct {
				flags     uint16
				ack, want uint32
			}{
				{ack, 0xffffffe0, 0xfffffff0},
				{ack, 0xfffffff0, 0xfffffff0},
				{ack | psh, 0x10, 0x10},
				{ack, 0xfffffff8, 0x10},
				{ack | rst, 0x2000, 0x10},
				{ack | fin, 0x11, 0x11},
				{ack, 0xff000011, 0x11},
				{ack, 0xff000010, 0xff000010},
				{ack, 0x11, 0x11},
				{ack, 0x11 + 1<<31, 0x11 + 1<<31},
				{rst, 1, 0x11 + 1<<31},
			} {
				s := f.legSegment(LegClient, step.flags)
				s.ack = step.ack
				r.expectForward(f, LegClient, s, skbuff{})
				if e = r.entry(f, LegClient); e.Flow.LastAck != step.want {
					t.Errorf("after ACK %#x: %#x, want %#x", step.ack, e.Flow.LastAck, step.want)
				}
			}
		})
	})
}
