// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"net/netip"
	"testing"
)

func backendEvent(s segment) want {
	return told(bpfReasonREASON_BACKEND, eventOf(s, EventBackend, EventData))
}

// What a backend sends to a port of ours is the engine's, whatever it is.
func TestBackendEvent(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.connect()
		bothFamilies(t, func(t *testing.T, f family) {
			for _, flags := range []uint16{syn | ack, ack, rst, rst | ack, fin | ack, ack | psh, syn, 0} {
				for _, size := range []int{0, 1, 61, 1400} {
					r := r.with(t)
					s := f.backendSegment(flags)
					s.payload = make([]byte, size)
					r.expect(ProgramBackend, s.frame(), backendEvent(s))
					s.tags, s.padding = []vlan{{0x8100, 7}}, []byte("pad")
					r.expect(ProgramBackend, s.frame(), backendEvent(s))
				}
			}
		})
	})
}

// Everything else is not ours, the border of the port range included.
func TestBackendNotOurs(t *testing.T) {
	port := func(p uint16) func(*segment) {
		return func(s *segment) { s.dst = netip.AddrPortFrom(s.dst.Addr(), p) }
	}
	cases := []struct {
		name   string
		change func(*segment)
		ours   bool
	}{
		{"first port", port(portFirst), true},
		{"last port", port(portLast), true},
		{"before the first port", port(portFirst - 1), false},
		{"behind the last port", port(portLast + 1), false},
		{"port 0", port(0), false},
		{"port 65535", port(65535), false},
		{"port of a listener", port(vipPort), false},
		{"another backend", func(s *segment) { s.src = netip.AddrPortFrom(s.src.Addr().Next(), backendPort) }, false},
		{"another backend port", func(s *segment) { s.src = netip.AddrPortFrom(s.src.Addr(), backendPort+1) }, false},
		{"another source", func(s *segment) { s.dst = netip.AddrPortFrom(s.dst.Addr().Next(), sourcePort) }, false},
		{"the way back", func(s *segment) { s.src, s.dst = s.dst, s.src }, false},
	}
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.connect()
		bothFamilies(t, func(t *testing.T, f family) {
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) {
					s := f.backendSegment(syn | ack)
					c.change(&s)
					w := pass(bpfReasonREASON_NOT_OURS)
					if c.ours {
						w = backendEvent(s)
					}
					r.with(t).expect(ProgramBackend, s.frame(), w)
				})
			}
		})
	})
}

// A source port has one owner.
func TestBackendWorkers(t *testing.T) {
	for _, workers := range []uint32{1, 2, 3, 7, 64} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			skins(t, newRig, settings{workers: workers, ringSize: 4096}, func(t *testing.T, r *rig) {
				r.connect()
				for port := uint16(portFirst); port <= portLast; port += 3 {
					s := families[port%2].backendSegment(ack)
					s.dst = netip.AddrPortFrom(s.dst.Addr(), port)
					w := backendEvent(s)
					w.events[0].Worker = int(port-portFirst) % int(workers)
					r.expect(ProgramBackend, s.frame(), w)
				}
			})
		})
	}
}

// tapFrame is a frame of the engine's: what it asks for and the next hop's index
// stand in the destination address.
func tapFrame(s segment, request uint8, index uint16) []byte {
	s.dstMAC = mac{0x02, 0, 0, request, byte(index >> 8), byte(index)}
	return s.frame()
}

func TestTapOutput(t *testing.T) {
	r := newRig(t, settings{})
	for _, index := range []uint32{1, 7, 256, 65535} {
		must(t, r.tables.Nexthops.Put(index, &Nexthop{Ifindex: 1, Mtu: nexthopMTU}))
	}
	out := want{action: redirect, reason: bpfReasonREASON_ENGINE_OUTPUT}
	bothFamilies(t, func(t *testing.T, f family) {
		for index, w := range map[uint16]want{
			1: out, 7: out, 256: out, 65535: out,
			0: drop(bpfReasonREASON_NO_NEXTHOP), 2: drop(bpfReasonREASON_NO_NEXTHOP),
			0x0700: drop(bpfReasonREASON_NO_NEXTHOP), 65534: drop(bpfReasonREASON_NO_NEXTHOP),
		} {
			for _, flags := range []uint16{syn, ack, rst, ack | psh, fin | ack} {
				r := r.with(t)
				s := f.clientSegment(flags)
				s.src, s.dst, s.ttl = f.source, f.backend, 1
				r.expect(ProgramTap, tapFrame(s, TapOutput, index), w)
			}
		}
	})
}

// A replay is a packet of its leg that the engine held back.
func TestTapReplay(t *testing.T) {
	r := newRig(t, settings{})
	r.hop(nexthopMTU)
	bothFamilies(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			name    string
			request uint8
			leg     Leg
		}{{"client", TapReplayClient, LegClient}, {"backend", TapReplayBackend, LegBackend}} {
			t.Run(c.name, func(t *testing.T) {
				r := r.with(t)
				s := f.legSegment(c.leg, ack|psh)
				s.payload = []byte("hello")
				frame := tapFrame(s, c.request, 0)
				r.expect(ProgramTap, frame, drop(bpfReasonREASON_REPLAY_MISSED))
				e := r.bind(f, c.leg, nil)
				s.dstMAC = mac(frame[:6])
				w := want{action: redirect, reason: bpfReasonREASON_FORWARDED, frame: forwarded(s, e).frame()}
				r.expect(ProgramTap, frame, w)
				// The other leg's table is not looked into.
				other := TapReplayClient + TapReplayBackend - c.request
				r.expect(ProgramTap, tapFrame(s, other, 0), drop(bpfReasonREASON_REPLAY_MISSED))
			})
		}
	})
}
