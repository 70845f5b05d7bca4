// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// TCP flags of a [Segment].
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
	AE
)

// Segment is a TCP segment and the addresses and fields of the IP packet around it. It can hold what no sane stack sends.
type Segment struct {
	Src, Dst netip.AddrPort
	Seq, Ack uint32
	Flags    uint16 // the nine bits, and the three reserved ones above
	Window   uint16
	Urgent   uint16
	Options  []byte // as on the wire; Marshal pads with end-of-list to full words
	Payload  []byte

	TTL uint8 // zero means 64
	TOS uint8

	// BadChecksum makes Marshal spoil the TCP checksum. In a received segment it says that the checksum was wrong.
	BadChecksum bool
	// Partial says of a received segment that its checksum was left to a device that never came: it was not judged.
	Partial bool
}

// String is one line in the manner of tcpdump.
func (s Segment) String() string {
	var flags strings.Builder
	for i, name := range []string{"F", "S", "R", "P", ".", "U", "E", "W", "e"} {
		if s.Flags>>i&1 == 1 {
			flags.WriteString(name)
		}
	}
	return fmt.Sprintf("%s > %s [%s] seq %d ack %d win %d options %x length %d",
		s.Src, s.Dst, flags.String(), s.Seq, s.Ack, s.Window, s.Options, len(s.Payload))
}

// Has says whether all the given flags are set.
func (s Segment) Has(flags uint16) bool { return s.Flags&flags == flags }

// Len is what the segment takes of the sequence space.
func (s Segment) Len() uint32 {
	n := uint32(len(s.Payload))
	if s.Has(SYN) {
		n++
	}
	if s.Has(FIN) {
		n++
	}
	return n
}

// Option returns the content of the first TCP option of a kind, and whether there is one.
func (s Segment) Option(kind byte) ([]byte, bool) {
	for o := s.Options; len(o) > 0 && o[0] != optEnd; {
		if o[0] == optNOP {
			o = o[1:]
			continue
		}
		if len(o) < 2 || int(o[1]) < 2 || int(o[1]) > len(o) {
			break
		}
		if o[0] == kind {
			return o[2:o[1]], true
		}
		o = o[o[1]:]
	}
	return nil, false
}

// Kinds of TCP options.
const (
	optEnd        = 0
	optNOP        = 1
	OptMSS        = 2
	OptWScale     = 3
	OptSACKOK     = 4
	OptSACK       = 5
	OptTimestamps = 8
)

// MSS is the option that announces the largest segment. This and its siblings are joined by append.
func MSS(n uint16) []byte { return []byte{OptMSS, 4, byte(n >> 8), byte(n)} }

// WScale is the window scale option.
func WScale(shift byte) []byte { return []byte{OptWScale, 3, shift} }

// SACKOK is the option that permits selective acknowledgements.
func SACKOK() []byte { return []byte{OptSACKOK, 2} }

// NOP is the one-byte filler.
func NOP() []byte { return []byte{optNOP} }

// Timestamps is the timestamps option.
func Timestamps(val, ecr uint32) []byte {
	o := binary.BigEndian.AppendUint32([]byte{OptTimestamps, 10}, val)
	return binary.BigEndian.AppendUint32(o, ecr)
}

// LinuxSYN is the option area of a SYN from Linux on an Ethernet.
func LinuxSYN(tsval uint32) []byte {
	var o []byte
	for _, part := range [][]byte{MSS(1460), SACKOK(), Timestamps(tsval, 0), NOP(), WScale(7)} {
		o = append(o, part...)
	}
	return o
}

const (
	ip4Header = 20
	ip6Header = 40
	tcpHeader = 20
	protoTCP  = 6
)

// Marshal writes the IP packet.
func (s Segment) Marshal() []byte {
	options := append([]byte(nil), s.Options...)
	for len(options)%4 != 0 {
		options = append(options, optEnd)
	}
	tcp := make([]byte, tcpHeader, tcpHeader+len(options)+len(s.Payload))
	be := binary.BigEndian
	be.PutUint16(tcp[0:], s.Src.Port())
	be.PutUint16(tcp[2:], s.Dst.Port())
	be.PutUint32(tcp[4:], s.Seq)
	be.PutUint32(tcp[8:], s.Ack)
	be.PutUint16(tcp[12:], uint16((tcpHeader+len(options))/4)<<12|s.Flags&0x0fff)
	be.PutUint16(tcp[14:], s.Window)
	be.PutUint16(tcp[18:], s.Urgent)
	tcp = append(append(tcp, options...), s.Payload...)
	sum := checksum(tcp, pseudoSum(s.Src.Addr(), s.Dst.Addr(), len(tcp)))
	if s.BadChecksum {
		sum ^= 0x5555
	}
	be.PutUint16(tcp[16:], sum)
	return append(s.ipHeader(len(tcp)), tcp...)
}

func (s Segment) ipHeader(payload int) []byte {
	ttl := s.TTL
	if ttl == 0 {
		ttl = 64
	}
	be := binary.BigEndian
	if s.Src.Addr().Is4() {
		h := make([]byte, ip4Header)
		h[0], h[1], h[6], h[8], h[9] = 0x45, s.TOS, 0x40, ttl, protoTCP // 0x40: do not fragment
		be.PutUint16(h[2:], uint16(ip4Header+payload))
		copy(h[12:], s.Src.Addr().AsSlice())
		copy(h[16:], s.Dst.Addr().AsSlice())
		be.PutUint16(h[10:], checksum(h, 0))
		return h
	}
	h := make([]byte, ip6Header)
	be.PutUint32(h[0:], 6<<28|uint32(s.TOS)<<20)
	be.PutUint16(h[4:], uint16(payload))
	h[6], h[7] = protoTCP, ttl
	copy(h[8:], s.Src.Addr().AsSlice())
	copy(h[24:], s.Dst.Addr().AsSlice())
	return h
}

// errNotTCP says that a packet is none that ParseSegment understands.
var errNotTCP = errors.New("not a plain TCP packet")

// ParseSegment reads an IP packet. Its Payload and Options point into packet. IP options and extension headers are not
// understood and are an error, as is anything cut short.
func ParseSegment(packet []byte) (Segment, error) {
	var s Segment
	src, dst, tcp, err := s.parseIP(packet)
	if err != nil {
		return s, err
	}
	if len(tcp) < tcpHeader {
		return s, errNotTCP
	}
	be := binary.BigEndian
	header := int(tcp[12]>>4) * 4
	if header < tcpHeader || header > len(tcp) {
		return s, errNotTCP
	}
	s.Src = netip.AddrPortFrom(src, be.Uint16(tcp[0:]))
	s.Dst = netip.AddrPortFrom(dst, be.Uint16(tcp[2:]))
	s.Seq, s.Ack = be.Uint32(tcp[4:]), be.Uint32(tcp[8:])
	s.Flags = be.Uint16(tcp[12:]) & 0x0fff
	s.Window, s.Urgent = be.Uint16(tcp[14:]), be.Uint16(tcp[18:])
	s.Options, s.Payload = tcp[tcpHeader:header], tcp[header:]
	s.BadChecksum = checksum(tcp, pseudoSum(src, dst, len(tcp))) != 0
	return s, nil
}

func (s *Segment) parseIP(p []byte) (src, dst netip.Addr, payload []byte, err error) {
	be := binary.BigEndian
	switch {
	case len(p) >= ip4Header && p[0] == 0x45 && p[9] == protoTCP && be.Uint16(p[6:])&0x3fff == 0:
		total := int(be.Uint16(p[2:]))
		if total == 0 { // a BIG TCP super-packet: the length does not fit
			total = len(p)
		}
		if total < ip4Header || total > len(p) || checksum(p[:ip4Header], 0) != 0 {
			return src, dst, nil, errNotTCP
		}
		s.TOS, s.TTL = p[1], p[8]
		return netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[ip4Header:total], nil
	case len(p) >= ip6Header && p[0]>>4 == 6 && p[6] == protoTCP:
		total := ip6Header + int(be.Uint16(p[4:]))
		if total == ip6Header {
			total = len(p)
		}
		if total > len(p) {
			return src, dst, nil, errNotTCP
		}
		s.TOS, s.TTL = byte(be.Uint32(p)>>20), p[7]
		return netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), p[ip6Header:total], nil
	}
	return src, dst, nil, errNotTCP
}

// pseudoSum is the unfolded sum of the pseudo-header.
func pseudoSum(src, dst netip.Addr, length int) uint32 {
	return sum(src.AsSlice(), sum(dst.AsSlice(), protoTCP+uint32(length)))
}

func sum(b []byte, acc uint32) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		acc += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		acc += uint32(b[0]) << 8
	}
	return acc
}

// checksum is the internet checksum; over data that holds a right one it is zero. Packets are short of 128 KiB, so that
// 32 bits never overflow.
func checksum(b []byte, acc uint32) uint16 {
	acc = sum(b, acc)
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return ^uint16(acc)
}
