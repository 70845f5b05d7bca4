// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

// listen makes both families' addresses listeners.
func (r *rig) listen(unknownFlow uint8) {
	r.Helper()
	l := Listener{Id: listenerID, UnknownFlow: unknownFlow}
	all := make(map[netip.AddrPort]Listener)
	for _, f := range families {
		all[f.vip] = l
	}
	must(r, r.tables.SetListeners(all))
}

// connect makes the source addresses ours towards the backends.
func (r *rig) connect() {
	r.Helper()
	for _, f := range families {
		must(r, r.tables.AddPath(f.source.Addr(), f.backend, 1))
	}
}

// mutation is one change of a good frame and why it then is not for us.
type mutation struct {
	name   string
	change func(frame []byte, l3, l4 int) []byte
	reason Reason
}

func setByte(at int, v byte) func([]byte, int, int) []byte {
	return func(b []byte, l3, _ int) []byte {
		b[l3+at] = v
		return b
	}
}

func setTCPOffset(words byte) func([]byte, int, int) []byte {
	return func(b []byte, _, l4 int) []byte {
		b[l4+12] = words<<4 | b[l4+12]&0xf
		return b
	}
}

func setLength(at int, v uint16) func([]byte, int, int) []byte {
	return func(b []byte, l3, _ int) []byte {
		binary.BigEndian.PutUint16(b[l3+at:], v)
		return b
	}
}

func setType(v uint16) func([]byte, int, int) []byte {
	return func(b []byte, l3, _ int) []byte {
		binary.BigEndian.PutUint16(b[l3-2:], v)
		return b
	}
}

// setTo changes the first byte of the address the frame is sent to.
func setTo(v byte) func([]byte, int, int) []byte {
	return func(b []byte, _, _ int) []byte {
		b[0] = v
		return b
	}
}

// The good packet has 12 bytes of options and 8 of payload.
var mutations = map[string][]mutation{
	"v4": {
		{"version 6", setByte(0, 0x65), bpfReasonREASON_MALFORMED},
		{"version 0", setByte(0, 0x05), bpfReasonREASON_MALFORMED},
		{"ihl 4", setByte(0, 0x44), bpfReasonREASON_MALFORMED},
		{"ihl 0", setByte(0, 0x40), bpfReasonREASON_MALFORMED},
		{"ihl 6", setByte(0, 0x46), bpfReasonREASON_IP_OPTIONS},
		{"ihl 15", setByte(0, 0x4f), bpfReasonREASON_IP_OPTIONS},
		{"first fragment", setByte(6, 0x20), bpfReasonREASON_FRAGMENT},
		{"middle fragment", setLength(6, 0x2000|185), bpfReasonREASON_FRAGMENT},
		{"last fragment", setLength(6, 185), bpfReasonREASON_FRAGMENT},
		{"largest offset", setLength(6, 0x1fff), bpfReasonREASON_FRAGMENT},
		{"UDP", setByte(9, 17), bpfReasonREASON_NOT_TCP},
		{"ICMP", setByte(9, 1), bpfReasonREASON_NOT_TCP},
		{"length over the frame", setLength(2, 61), bpfReasonREASON_MALFORMED},
		{"length 65535", setLength(2, 65535), bpfReasonREASON_MALFORMED},
		{"length within TCP options", setLength(2, 51), bpfReasonREASON_MALFORMED},
		{"length within TCP", setLength(2, 39), bpfReasonREASON_MALFORMED},
		{"length within IP", setLength(2, 19), bpfReasonREASON_MALFORMED},
		{"length 0", setLength(2, 0), bpfReasonREASON_MALFORMED},
	},
	"v6": {
		{"version 4", setByte(0, 0x4b), bpfReasonREASON_MALFORMED},
		{"version 0", setByte(0, 0x0b), bpfReasonREASON_MALFORMED},
		{"fragment", setByte(6, 44), bpfReasonREASON_FRAGMENT},
		{"hop-by-hop options", setByte(6, 0), bpfReasonREASON_EXTENSION_HEADER},
		{"routing header", setByte(6, 43), bpfReasonREASON_EXTENSION_HEADER},
		{"destination options", setByte(6, 60), bpfReasonREASON_EXTENSION_HEADER},
		{"authentication header", setByte(6, 51), bpfReasonREASON_EXTENSION_HEADER},
		{"UDP", setByte(6, 17), bpfReasonREASON_NOT_TCP},
		{"ICMPv6", setByte(6, 58), bpfReasonREASON_NOT_TCP},
		{"ESP", setByte(6, 50), bpfReasonREASON_NOT_TCP},
		{"length over the frame", setLength(4, 41), bpfReasonREASON_MALFORMED},
		{"length 65535", setLength(4, 65535), bpfReasonREASON_MALFORMED},
		{"length within TCP options", setLength(4, 31), bpfReasonREASON_MALFORMED},
		{"length within TCP", setLength(4, 19), bpfReasonREASON_MALFORMED},
		{"jumbogram", setLength(4, 0), bpfReasonREASON_MALFORMED},
	},
	"both": {
		{"data offset 0", setTCPOffset(0), bpfReasonREASON_MALFORMED},
		{"data offset 4", setTCPOffset(4), bpfReasonREASON_MALFORMED},
		{"data offset beyond the packet", setTCPOffset(11), bpfReasonREASON_MALFORMED},
		{"data offset 15", setTCPOffset(15), bpfReasonREASON_MALFORMED},
		{"ARP", setType(0x0806), bpfReasonREASON_NOT_TCP},
		{"802.3 length", setType(60), bpfReasonREASON_NOT_TCP},
		{"a second 802.1Q tag", setType(0x8100), bpfReasonREASON_VLAN_STACKED},
		{"broadcast", setTo(0xff), bpfReasonREASON_NOT_OURS}, // a SYN-ACK would come from that address
		{"multicast", setTo(0x01), bpfReasonREASON_NOT_OURS},
		{"IPv6 multicast", setTo(0x33), bpfReasonREASON_NOT_OURS},
		{"a second 802.1ad tag", setType(0x88a8), bpfReasonREASON_VLAN_STACKED},
	},
}

// tagged are the ways a good packet can arrive.
var tagged = []struct {
	name string
	tags []vlan
}{
	{"untagged", nil},
	{"802.1Q", []vlan{{0x8100, 0x2014}}},
	{"802.1ad", []vlan{{0x88a8, 0x0fff}}},
}

// What the parser refuses goes on as it came, whatever the program; the engine's
// own device has nothing to pass on.
func TestParse(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowDrop)
		r.connect()
		for _, f := range families {
			for _, tag := range tagged {
				for _, m := range append(mutations[f.name], mutations["both"]...) {
					stacked := m.reason == bpfReasonREASON_VLAN_STACKED
					if stacked && tag.tags == nil {
						continue
					}
					t.Run(f.name+"/"+tag.name+"/"+m.name, func(t *testing.T) {
						r := r.with(t)
						icmp, onTap, w := m.name == "ICMP" || m.name == "ICMPv6", drop(bpfReasonREASON_JUNK), pass(m.reason)
						if icmp && r.set.xdp {
							w = pass(bpfReasonREASON_LEFT_ICMP)
						}
						r.refuse(f.clientSegment(ack), tag.tags, m, ProgramClient, w)
						r.refuse(f.backendSegment(ack), tag.tags, m, ProgramBackend, w)
						if r.set.xdp {
							return // that has no such program
						}
						if icmp {
							onTap = drop(bpfReasonREASON_NO_NEXTHOP) // the engine's own, to a next hop that is not there
						}
						r.refuse(f.backendSegment(ack), tag.tags, m, ProgramTap, onTap)
					})
				}
			}
		}
	})
}

func (r *rig) refuse(s segment, tags []vlan, m mutation, program string, w want) {
	r.Helper()
	s.tags = tags
	s.options = []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
	s.payload = []byte("8 octets")
	r.expect(program, m.change(s.frame(), s.l3(), s.l4()), w)
}

// A frame that ends anywhere before the end of its packet is malformed.
func TestParseTruncated(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowDrop)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			s := f.clientSegment(ack)
			s.options, s.payload = []byte{1, 1, 1, 1}, []byte("8 octets")
			for _, tag := range tagged {
				s.tags = tag.tags
				frame := s.frame()
				// A program run wants a whole IP header where Ethernet names IP.
				start := s.l4()
				if len(tag.tags) > 0 {
					start = 15
				}
				for n := start; n < len(frame); n++ {
					r.expect(ProgramClient, frame[:n], pass(bpfReasonREASON_MALFORMED))
				}
				r.expect(ProgramClient, frame, drop(bpfReasonREASON_UNKNOWN_DROP))
			}
		})
	})
}

// A frame that is short on the IP header's own length, and one where the length
// says less than the frame holds.
func TestParseOptionsBeyondFrame(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowDrop)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			s := f.clientSegment(ack)
			// TCP says 60 bytes, the packet has 20, the frame 60 of padding: in reach of
			// the frame, not of the packet.
			s.padding = make([]byte, 60)
			frame := setTCPOffset(15)(s.frame(), s.l3(), s.l4())
			r.expect(ProgramClient, frame, pass(bpfReasonREASON_MALFORMED))
		})
	})
}

// Good packets of every shape get past the parser, to be told by address and port.
func TestParseGood(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowDrop)
		r.connect()
		for _, f := range families {
			for _, tag := range tagged {
				for _, options := range []int{0, 4, 20, 40} {
					for _, padding := range []int{0, 1, 20} {
						s := f.clientSegment(ack)
						s.tags, s.options, s.padding = tag.tags, make([]byte, options), make([]byte, padding)
						r.expect(ProgramClient, s.frame(), drop(bpfReasonREASON_UNKNOWN_DROP))
						s.dst = netip.AddrPortFrom(s.dst.Addr(), vipPort+1)
						r.expect(ProgramClient, s.frame(), pass(bpfReasonREASON_NOT_OURS))
					}
				}
			}
		}
	})
}

// Don't-fragment, the reserved bit and every DSCP are no reason to refuse.
func TestParseHarmlessBits(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowDrop)
		s := families[0].clientSegment(ack)
		for _, bits := range []byte{0x00, 0x40, 0x80, 0xc0} {
			frame := s.frame()
			frame[s.l3()+6] = bits
			r.expect(ProgramClient, frame, drop(bpfReasonREASON_UNKNOWN_DROP))
		}
		for _, f := range families {
			for tos := range 256 {
				s := f.clientSegment(ack)
				s.tos = uint8(tos)
				r.expect(ProgramClient, s.frame(), drop(bpfReasonREASON_UNKNOWN_DROP))
			}
		}
	})
}

// Whose packet it is: a bit of the port, then the address with the port.
func TestNotOurs(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowDrop)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			for _, flags := range []uint16{syn, ack, ack | psh, rst, fin | ack, syn | ack, 0} {
				s := f.clientSegment(flags)
				for port := range uint16(1024) { // every bit of 16 words
					if port == vipPort {
						continue
					}
					if s.dst = netip.AddrPortFrom(f.vip.Addr(), port); flags != syn && port%64 != vipPort%64 {
						continue
					}
					r.expect(ProgramClient, s.frame(), pass(bpfReasonREASON_NOT_OURS))
				}
				for _, addr := range []netip.Addr{f.source.Addr(), f.client.Addr(), f.vip.Addr().Next(), f.vip.Addr().Prev()} {
					s.dst = netip.AddrPortFrom(addr, vipPort)
					r.expect(ProgramClient, s.frame(), pass(bpfReasonREASON_NOT_OURS))
				}
			}
		})
	})
}
