// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// What XDP alone does: next hops with link addresses and tags, and what it leaves to TC,
// which must get it as it came.

func newXDPRig(t testing.TB, set settings) *rig {
	t.Helper()
	set.xdp = true
	return newFlowRig(t, set)
}

func (r *rig) setHop(change func(*Nexthop)) {
	r.Helper()
	hop := nextHop(nexthopMTU)
	change(&hop)
	must(r, r.tables.Nexthops.Put(uint32(nexthopIndex), hop))
}

// expectLeft feeds a packet of a bound flow: TC gets it, and the entry does not know.
func (r *rig) expectLeft(f family, leg Leg, s segment, reason Reason) {
	r.Helper()
	before := r.entry(f, leg)
	r.expect(program(leg), s.frame(), pass(reason))
	r.untouched(f, leg, before)
}

// shapes are packets of a bound flow that differ in what XDP writes to.
var shapes = map[string]func(*segment){
	"ACK":             func(*segment) {},
	"odd data":        func(s *segment) { s.payload = []byte("odd") },
	"FIN":             func(s *segment) { s.flags |= fin },
	"RST":             func(s *segment) { s.flags = rst },
	"timestamps":      func(s *segment) { s.options = timestamps(0) },
	"odd timestamps":  func(s *segment) { s.options, s.payload = timestamps(3), []byte("even") },
	"padding":         func(s *segment) { s.padding = []byte("pad") },
	"40 bytes of NOP": func(s *segment) { s.options = bytes.Repeat([]byte{optNOP}, 40) },
}

// bothLegsShapes runs a test for each family, leg and shape of a bound flow's packet.
func (r *rig) bothLegsShapes(t *testing.T, test func(r *rig, f family, leg Leg, s segment)) {
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		for name, shape := range shapes {
			t.Run(name, func(t *testing.T) {
				r := r.with(t)
				r.bind(f, leg, nil)
				s := f.legSegment(leg, ack)
				shape(&s)
				test(r, f, leg, s)
			})
		}
	})
}

// A next hop whose link address is not known, or is behind what XDP cannot send by.
func TestXDPLeavesNexthop(t *testing.T) {
	r := newXDPRig(t, settings{})
	for _, hop := range []func(*Nexthop){
		func(h *Nexthop) { h.XdpIfindex = 0 },
		func(h *Nexthop) { h.XdpIfindex, h.Dmac, h.Smac = 0, mac{}, mac{} },
		func(h *Nexthop) { h.XdpIfindex, h.VlanProto, h.VlanId = 0, Port(0x8100), Port(30) },
		func(h *Nexthop) { h.XdpIfindex, h.Flags = 0, NexthopBuffers },
	} {
		r.setHop(hop)
		r.bothLegsShapes(t, func(r *rig, f family, leg Leg, s segment) {
			r.expectLeft(f, leg, s, bpfReasonREASON_LEFT_NEXTHOP)
			s.tags = []vlan{{0x8100, 20}}
			r.expectLeft(f, leg, s, bpfReasonREASON_LEFT_NEXTHOP)
			s.ttl = 1 // TC would not do better
			r.expect(program(leg), s.frame(), drop(bpfReasonREASON_TTL_EXPIRED))
			s.ttl = 2
			overMTU(&s)
			r.expectLeft(f, leg, s, bpfReasonREASON_LEFT_TOO_BIG)
		})
	}
	r.setHop(func(h *Nexthop) { h.Ifindex = 0 })
	r.bothLegsShapes(t, func(r *rig, _ family, leg Leg, s segment) {
		r.expect(program(leg), s.frame(), drop(bpfReasonREASON_NO_NEXTHOP))
	})
}

// A packet that is the next hop's MTU and not one byte more is sent.
func TestXDPLeavesTooBig(t *testing.T) {
	r := newXDPRig(t, settings{})
	for _, hop := range []func(*Nexthop){
		func(*Nexthop) {},
		func(h *Nexthop) { h.VlanProto, h.VlanId = Port(0x8100), Port(30) },
		func(h *Nexthop) { h.Flags = NexthopBuffers },
	} {
		r.setHop(hop)
		r.bothLegsShapes(t, func(r *rig, f family, leg Leg, s segment) {
			overMTU(&s)
			r.expectLeft(f, leg, s, bpfReasonREASON_LEFT_TOO_BIG)
			s.payload = s.payload[1:]
			r.expectForward(f, leg, s, skbuff{})
		})
	}
}

// A checksum that is not finished: only TC can tell the device so. What is not ours is
// told before, for it is most.
func TestXDPLeavesChecksum(t *testing.T) {
	r := newXDPRig(t, settings{})
	left := pass(bpfReasonREASON_LEFT_CHECKSUM)
	r.bothLegsShapes(t, func(r *rig, f family, leg Leg, s segment) {
		for _, tags := range [][]vlan{nil, {{0x8100, 20}}} {
			s.tags = tags
			r.expectLeft(f, leg, s.unfinished(), bpfReasonREASON_LEFT_CHECKSUM)
			for _, flags := range []uint16{syn, syn | ack, 0} {
				s := s
				s.flags = flags
				r.expectLeft(f, leg, s.unfinished(), bpfReasonREASON_LEFT_CHECKSUM)
			}
		}
		must(r, r.tables.DeleteFlow(leg, f.tuple(leg)))
		r.expect(program(leg), s.unfinished().frame(), left)
		s.dst = netip.AddrPortFrom(s.dst.Addr(), portLast+1)
		r.expect(program(leg), s.unfinished().frame(), pass(bpfReasonREASON_NOT_OURS))
	})
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		s := r.hello(f)
		r.expect(ProgramClient, s.unfinished().frame(), left)
		r.expect(ProgramClient, s.frame(), hello(s))
		s = f.clientSegment(syn)
		s.options = timestamps(2)
		r.expect(ProgramClient, s.unfinished().frame(), left)
		r.expectAnswer(s)
		s.payload = []byte("early")
		r.expect(ProgramClient, s.unfinished().frame(), left)
		b := f.backendSegment(syn | ack)
		r.expect(ProgramBackend, b.unfinished().frame(), left)
		r.expect(ProgramBackend, b.frame(), backendEvent(b))
	})
}

// The sum is over all of both addresses, and the length.
func TestXDPChecksumRandom(t *testing.T) {
	r := newXDPRig(t, settings{})
	random := rand.New(rand.NewPCG(9, 10))
	address := func(f family) netip.Addr {
		b := f.vip.Addr().AsSlice()
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		a, _ := netip.AddrFromSlice(b)
		return a
	}
	for range 2000 {
		f := families[random.IntN(2)]
		s := f.clientSegment(ack)
		s.src = netip.AddrPortFrom(address(f), uint16(random.Uint32()))
		s.dst = netip.AddrPortFrom(address(f), vipPort)
		s.payload, s.padding = make([]byte, random.IntN(1400)), make([]byte, random.IntN(10))
		r.expect(ProgramClient, s.unfinished().frame(), pass(bpfReasonREASON_LEFT_CHECKSUM))
		r.expect(ProgramClient, s.frame(), pass(bpfReasonREASON_NOT_OURS))
		if t.Failed() {
			t.Fatalf("packet was %x", s.frame())
		}
	}
}

// ICMP is TC's, whoever is quoted; what the parser refuses it refuses here too.
func TestXDPLeavesICMP(t *testing.T) {
	r := newXDPRig(t, settings{})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r.with(t).bind(f, leg, nil)
		at, protocol := 6, byte(unix.IPPROTO_ICMPV6)
		if f.is4() {
			at, protocol = 9, unix.IPPROTO_ICMP
		}
		for _, c := range append(icmpCases[f.name], icmpCases["both"]...) {
			t.Run(c.name, func(t *testing.T) {
				e := f.icmpError(leg)
				c.change(&e)
				w := pass(c.reason)
				if (c.reason == isTold || c.reason == isNotTCP) && e.packet()[at] == protocol {
					w = pass(bpfReasonREASON_LEFT_ICMP)
				}
				r.with(t).expect(program(leg), e.frame(), w)
			})
		}
	})
}

// The ways a packet can come in and go out: XDP takes the tag off, puts one on, or
// writes the next link's over it.
func TestXDPVlan(t *testing.T) {
	r := newXDPRig(t, settings{})
	in := append(tagged[:len(tagged):len(tagged)], struct {
		name string
		tags []vlan
	}{"id 0", []vlan{{0x8100, 0}}})
	for _, out := range []vlan{{}, {0x8100, 30}, {0x88a8, 0x0fff}, {0x8100, 0}} {
		r.setHop(func(h *Nexthop) { h.VlanProto, h.VlanId = Port(out.tpid), Port(out.tci) })
		for _, tag := range in {
			t.Run(fmt.Sprintf("%s to %x", tag.name, out), func(t *testing.T) {
				r.bothLegsShapes(t, func(r *rig, f family, leg Leg, s segment) {
					s.tags = tag.tags
					r.expectForward(f, leg, s, skbuff{})
					r.expectForward(f, leg, s, skbuff{})
					s.tags = []vlan{{0x88a8, 20}, {0x8100, 21}}
					r.expectLeft(f, leg, s, bpfReasonREASON_VLAN_STACKED)
				})
			})
		}
	}
}

// The room in front of a frame, less what the kernel keeps of it.
const xdpRoom = 256 - 40

// Where a driver leaves no room for a tag, TC puts it on. The other ways need none.
func TestXDPLeavesNoRoom(t *testing.T) {
	r := newXDPRig(t, settings{})
	r.setHop(func(h *Nexthop) { h.VlanProto, h.VlanId = Port(0x8100), Port(30) })
	r.bothLegsShapes(t, func(r *rig, f family, leg Leg, s segment) {
		r.cramped = xdpRoom - 4
		r.expectForward(f, leg, s, skbuff{})
		r.cramped = xdpRoom
		r.expectLeft(f, leg, s, bpfReasonREASON_LEFT_FRAME)
		s.tags = []vlan{{0x88a8, 20}}
		r.expectForward(f, leg, s, skbuff{})
		r.hop(nexthopMTU)
		r.expectForward(f, leg, s, skbuff{})
		r.setHop(func(h *Nexthop) { h.VlanProto, h.VlanId = Port(0x8100), Port(30) })
	})
}

// A frame in several buffers is sent where the next hop's device takes such.
func TestXDPBuffers(t *testing.T) {
	r := newXDPRig(t, settings{})
	r.bothLegsShapes(t, func(r *rig, f family, leg Leg, s segment) {
		for _, out := range []vlan{{}, {0x8100, 30}} {
			for _, tags := range [][]vlan{nil, {{0x8100, 20}}} {
				for _, size := range []int{1000, 3400, 4096, 9001, 60001} {
					s.tags, s.payload = tags, bytes.Repeat([]byte{0xfe, 1, 2, 3, 5}, size/5+1)[:size]
					hop := func(h *Nexthop) { h.Mtu, h.VlanProto, h.VlanId = 65535, Port(out.tpid), Port(out.tci) }
					r.setHop(hop)
					if size < 4096 {
						r.expectForward(f, leg, s, skbuff{})
					} else {
						r.expectLeft(f, leg, s, bpfReasonREASON_LEFT_FRAME)
					}
					r.setHop(func(h *Nexthop) {
						hop(h)
						h.Flags = NexthopBuffers
					})
					r.expectForward(f, leg, s, skbuff{})
				}
			}
		}
	})
}

// The engine gets all of a packet in several buffers, as far as an event goes; one that
// is cut short is malformed.
func TestXDPBuffersEvent(t *testing.T) {
	r := newXDPRig(t, settings{})
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		for _, length := range []int{4096, 9000, EventData - 1, EventData, EventData + 1, 60000} {
			s, b := r.hello(f), f.backendSegment(ack)
			s.payload = nil
			s.payload = bytes.Repeat([]byte("hello"), length/5+1)[:length-len(s.packet())]
			b.payload = s.payload
			r.expect(ProgramClient, s.frame(), hello(s))
			r.expect(ProgramBackend, b.frame(), backendEvent(b))
			cut := s.frame()
			r.expect(ProgramClient, cut[:len(cut)-1], pass(bpfReasonREASON_MALFORMED))
		}
	})
}

// By the interface a frame came in by, it leaves as the constant says.
func TestXDPBack(t *testing.T) {
	for _, redirectBack := range []bool{false, true} {
		r := newXDPRig(t, settings{redirectBack: redirectBack})
		for _, out := range []uint32{1, xdpIfindex} {
			r.setHop(func(h *Nexthop) { h.XdpIfindex = out })
			r.bothLegsShapes(t, func(r *rig, f family, leg Leg, s segment) { r.expectForward(f, leg, s, skbuff{}) })
		}
		bothFamilies(t, func(t *testing.T, f family) {
			s := f.clientSegment(syn)
			r.with(t).expectAnswer(s)
			s.payload = []byte("early")
			r.with(t).expectAnswer(s)
		})
	}
}

// Where no clients come in, what is sent to a listener is not ours, though a flow be
// bound; backends are served.
func TestXDPBackendsOnly(t *testing.T) {
	r := newXDPRig(t, settings{backendsOnly: true})
	r.bothLegsShapes(t, func(r *rig, f family, leg Leg, s segment) {
		if leg == LegBackend {
			r.expectForward(f, leg, s, skbuff{})
			must(r, r.tables.DeleteFlow(leg, f.tuple(leg)))
			r.expect(ProgramBackend, s.frame(), backendEvent(s))
			return
		}
		r.expectLeft(f, leg, s, bpfReasonREASON_NOT_OURS)
		s.flags = syn
		r.expectLeft(f, leg, s, bpfReasonREASON_NOT_OURS)
	})
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		h := r.hello(f)
		r.expect(ProgramClient, h.frame(), pass(bpfReasonREASON_NOT_OURS))
		// A client's port may be a listener's.
		r.live.Flags = LiveSourceClient
		r.setClock()
		f.source = netip.AddrPortFrom(f.source.Addr(), vipPort)
		r.bind(f, LegBackend, nil)
		r.expectForward(f, LegBackend, f.backendSegment(ack), skbuff{})
		r.expect(ProgramClient, h.frame(), pass(bpfReasonREASON_NOT_OURS))
	})
}

// expectOn lets the kernel do what XDP says to a frame of the device in, and takes it
// from the device out.
func (r *rig) expectOn(in, out *tap, frame []byte, reason Reason, want []byte) {
	r.Helper()
	before := r.counters()
	r.ns.try(r, func() error {
		_, err := r.coll.Programs[ProgramXDP].Run(&ebpf.RunOptions{
			Data: frame, Flags: unix.BPF_F_TEST_XDP_LIVE_FRAMES, Repeat: 1,
			Context: &xdpMD{DataEnd: uint32(len(frame)), IngressIfindex: uint32(in.index)},
		})
		return err
	})
	*r.total++
	before.Packets[reason]++
	if got := r.counters(); got != before {
		r.Errorf("counters are %v, want %v", got, before)
	}
	_, got := r.receive(out)
	sameFrame(r, got, want)
}

// Which device a frame leaves by.
func TestXDPDevice(t *testing.T) {
	for _, redirectBack := range []bool{false, true} {
		r := newXDPRig(t, settings{redirectBack: redirectBack})
		client, backend := r.newTap("eth0", false), r.newTap("eth1", false)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			r.setClock()
			s := f.clientSegment(syn)
			r.expectOn(client, client, s.frame(), bpfReasonREASON_SYN_ANSWERED, r.answer(s, 0).frame())
			e := r.bind(f, LegClient, nil)
			s = f.clientSegment(ack)
			for _, out := range []*tap{backend, client} {
				r.setHop(func(h *Nexthop) { h.XdpIfindex = uint32(out.index) })
				r.expectOn(client, out, s.frame(), bpfReasonREASON_FORWARDED, r.leaving(s, e).frame)
			}
		})
		r.receiveNothing(client)
		r.receiveNothing(backend)
	}
}
