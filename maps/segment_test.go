// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket/layers"
)

type mac = [6]byte

// The cast: a client speaks to an address of ours, and we, from a source address,
// to a backend.
var (
	clientMAC = mac{0x02, 0, 0, 0, 0, 0x0c}
	ourMAC    = mac{0x02, 0, 0, 0, 0, 0x01}

	clientIP4 = netip.MustParseAddr("192.0.2.10")
	vip4      = netip.MustParseAddr("192.0.2.1")
	source4   = netip.MustParseAddr("198.51.100.1")
	backend4  = netip.MustParseAddr("198.51.100.10")
	clientIP6 = netip.MustParseAddr("2001:db8:1::10")
	vip6      = netip.MustParseAddr("2001:db8:1::1")
	source6   = netip.MustParseAddr("2001:db8:2::1")
	backend6  = netip.MustParseAddr("2001:db8:2::10")
)

const (
	clientPort  = 50123
	vipPort     = 443
	sourcePort  = 20345
	backendPort = 8443
)

// family is one of the two worlds a case is run in.
type family struct {
	name                         string
	client, vip, source, backend netip.AddrPort
}

var families = []family{
	{
		"v4", netip.AddrPortFrom(clientIP4, clientPort), netip.AddrPortFrom(vip4, vipPort),
		netip.AddrPortFrom(source4, sourcePort), netip.AddrPortFrom(backend4, backendPort),
	},
	{
		"v6", netip.AddrPortFrom(clientIP6, clientPort), netip.AddrPortFrom(vip6, vipPort),
		netip.AddrPortFrom(source6, sourcePort), netip.AddrPortFrom(backend6, backendPort),
	},
}

func (f family) is4() bool { return f.client.Addr().Is4() }

// bothFamilies runs a test once with IPv4 and once with IPv6.
func bothFamilies(t *testing.T, test func(t *testing.T, f family)) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) { test(t, f) })
	}
}

// Flags of the 12 bits after the data offset.
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
	urg
	ece
	cwr
	ae
)

const reservedFlags = 0xe00

type vlan struct{ tpid, tci uint16 }

// segment is a TCP packet in the making: a test takes a good one and changes one
// field.
type segment struct {
	srcMAC, dstMAC mac
	tags           []vlan
	src, dst       netip.AddrPort
	tos, ttl       uint8 // tos: DSCP and ECN
	id             uint16
	flowLabel      uint32
	seq, ack       uint32
	flags          uint16
	window, urgent uint16
	options        []byte
	payload        []byte
	padding        []byte // of Ethernet, behind the IP packet
	wrong          uint16 // xored into the TCP checksum
}

// clientSegment is a good packet from a client to one of our addresses.
func (f family) clientSegment(flags uint16) segment {
	return segment{
		srcMAC: clientMAC, dstMAC: ourMAC, src: f.client, dst: f.vip,
		tos: 0xb8, ttl: 57, id: 0x4711, flowLabel: 0xabcde,
		seq: 0x11223344, ack: 0x99aabbcc, flags: flags, window: 29200,
	}
}

// backendSegment is a good packet from a backend to a source port of ours.
func (f family) backendSegment(flags uint16) segment {
	s := f.clientSegment(flags)
	s.src, s.dst = f.backend, f.source
	return s
}

func sum16(sum uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return sum
}

func (s segment) tcp() []byte {
	b := make([]byte, 20, 60+len(s.payload))
	binary.BigEndian.PutUint16(b[0:], s.src.Port())
	binary.BigEndian.PutUint16(b[2:], s.dst.Port())
	binary.BigEndian.PutUint32(b[4:], s.seq)
	binary.BigEndian.PutUint32(b[8:], s.ack)
	binary.BigEndian.PutUint16(b[12:], uint16(20+len(s.options))/4<<12|s.flags)
	binary.BigEndian.PutUint16(b[14:], s.window)
	binary.BigEndian.PutUint16(b[18:], s.urgent)
	b = append(append(b, s.options...), s.payload...)

	pseudo := slices.Concat(s.src.Addr().AsSlice(), s.dst.Addr().AsSlice())
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(b)))
	pseudo = append(pseudo, 0, 0, 0, 6)
	binary.BigEndian.PutUint16(b[16:], ^uint16(sum16(sum16(0, pseudo), b))^s.wrong)
	return b
}

func (s segment) ip4(proto uint8, inner []byte) []byte {
	b := make([]byte, 20, 20+len(inner))
	b[0], b[1] = 0x45, s.tos
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(inner)))
	binary.BigEndian.PutUint16(b[4:], s.id)
	b[6], b[8], b[9] = 0x40, s.ttl, proto
	copy(b[12:], s.src.Addr().AsSlice())
	copy(b[16:], s.dst.Addr().AsSlice())
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum16(0, b)))
	return append(b, inner...)
}

func (s segment) ip6(proto uint8, inner []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, 6<<28|uint32(s.tos)<<20|s.flowLabel)
	b = binary.BigEndian.AppendUint16(b, uint16(len(inner)))
	b = append(b, proto, s.ttl)
	b = append(b, s.src.Addr().AsSlice()...)
	b = append(b, s.dst.Addr().AsSlice()...)
	return append(b, inner...)
}

// packet is the segment from its IP header on.
func (s segment) packet() []byte {
	if s.src.Addr().Is4() {
		return s.ip4(6, s.tcp())
	}
	return s.ip6(6, s.tcp())
}

// frame is the segment as it is on the link.
func (s segment) frame() []byte { return s.onLink(s.packet()) }

// onLink is any packet in the segment's place.
func (s segment) onLink(packet []byte) []byte {
	b := slices.Concat(s.dstMAC[:], s.srcMAC[:])
	for _, t := range s.tags {
		b = binary.BigEndian.AppendUint16(b, t.tpid)
		b = binary.BigEndian.AppendUint16(b, t.tci)
	}
	proto := uint16(0x0800)
	if s.src.Addr().Is6() {
		proto = 0x86dd
	}
	b = binary.BigEndian.AppendUint16(b, proto)
	return slices.Concat(b, packet, s.padding)
}

// l3 and l4 are where IP and TCP start in the frame.
func (s segment) l3() int { return 14 + 4*len(s.tags) }

func (s segment) l4() int {
	if s.src.Addr().Is4() {
		return s.l3() + 20
	}
	return s.l3() + 40
}

// The builder is held against another reader of packets.
func TestSegmentFrame(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		s := f.clientSegment(syn | ack | ece | ae)
		s.options, s.payload = []byte{2, 4, 5, 180}, []byte("odd")
		s.tags, s.urgent = []vlan{{0x8100, 0x2014}}, 9
		wellFormed(t, s.frame())
		p := decoded(s.frame())
		tcp, ok := p.TransportLayer().(*layers.TCP)
		if !ok {
			t.Fatalf("no TCP in %v", p)
		}
		if string(tcp.Payload) != "odd" || tcp.Seq != s.seq || tcp.Ack != s.ack || tcp.Window != s.window ||
			tcp.Urgent != 9 || !tcp.SYN || !tcp.ACK || !tcp.ECE || !tcp.NS || tcp.FIN || len(tcp.Options) != 1 {
			t.Errorf("read %v", p)
		}
		if uint16(tcp.SrcPort) != clientPort || uint16(tcp.DstPort) != vipPort {
			t.Errorf("ports of %v", p)
		}
		if got := p.NetworkLayer().NetworkFlow().String(); got != f.client.Addr().String()+"->"+f.vip.Addr().String() {
			t.Errorf("addresses are %s", got)
		}
		if tag := p.Layer(layers.LayerTypeDot1Q); tag == nil || tag.(*layers.Dot1Q).VLANIdentifier != 20 {
			t.Errorf("tag of %v", p)
		}
	})
}
