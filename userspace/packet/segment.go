// SPDX-License-Identifier: Apache-2.0

// Package packet reads and writes TCP segments over IPv4 and IPv6, without
// allocating: what the handshake engine needs, and no more.
package packet

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// Flags of a segment (RFC 9293 3.1).
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// TCP option kinds (RFC 9293 3.2, RFC 7323, RFC 2018).
const (
	optionEOL           = 0
	optionNOP           = 1
	optionMSS           = 2
	optionWindowScale   = 3
	optionSACKPermitted = 4
	optionTimestamps    = 8
)

// Segment is one TCP segment with its addresses. Numbers are in host byte order.
// A slice in it belongs to the buffer it was parsed from.
type Segment struct {
	Src, Dst netip.AddrPort // of one family
	Seq, Ack uint32
	Flags    uint8
	Window   uint16 // as on the wire, not scaled
	Options  Options
	Payload  []byte
	// Missing is how many bytes of the payload the capture did not hold.
	Missing int
}

// Options are the TCP options the engine speaks.
type Options struct {
	MSS           uint16 // 0: not there
	HasTimestamps bool
	HasWScale     bool
	SACKPermitted bool
	WScale        uint8 // 0 to 14
	TSVal, TSEcr  uint32
}

// Has reports whether all of these flags are set.
func (s *Segment) Has(flags uint8) bool { return s.Flags&flags == flags }

// End is the sequence number after the segment: its payload, SYN and FIN.
func (s *Segment) End() uint32 {
	end := s.Seq + uint32(len(s.Payload)+s.Missing)
	if s.Has(SYN) {
		end++
	}
	if s.Has(FIN) {
		end++
	}
	return end
}

// What Parse refuses.
var (
	ErrTruncated = errors.New("packet ends inside its headers")
	ErrNotTCP    = errors.New("no TCP over IPv4 or IPv6 without options or extensions")
	ErrChecksum  = errors.New("wrong TCP checksum")
)

// Parse reads a packet that starts with its IP header. A capture that was cut
// short of the packet is allowed as long as the headers are whole; its checksum
// cannot be verified and is taken to be right.
//
// The checksum may also be the bare sum of the pseudo header: the packet was then
// handed over inside this machine, or merged by GRO, before or after the real one
// was due.
func Parse(b []byte) (Segment, error) {
	if len(b) < 1 {
		return Segment{}, ErrTruncated
	}
	switch b[0] >> 4 {
	case 4:
		return parse4(b)
	case 6:
		return parse6(b)
	}
	return Segment{}, ErrNotTCP
}

func parse4(b []byte) (Segment, error) {
	if len(b) < header4 {
		return Segment{}, ErrTruncated
	}
	if b[0] != 0x45 || b[9] != protocolTCP {
		return Segment{}, ErrNotTCP
	}
	src := netip.AddrFrom4([4]byte(b[12:16]))
	dst := netip.AddrFrom4([4]byte(b[16:20]))
	return parseTCP(src, dst, b[header4:], int(binary.BigEndian.Uint16(b[2:]))-header4)
}

func parse6(b []byte) (Segment, error) {
	if len(b) < header6 {
		return Segment{}, ErrTruncated
	}
	if b[6] != protocolTCP {
		return Segment{}, ErrNotTCP
	}
	src := netip.AddrFrom16([16]byte(b[8:24]))
	dst := netip.AddrFrom16([16]byte(b[24:40]))
	return parseTCP(src, dst, b[header6:], int(binary.BigEndian.Uint16(b[4:])))
}

// length is TCP's own, header and payload, as IP tells it.
func parseTCP(src, dst netip.Addr, b []byte, length int) (Segment, error) {
	if len(b) < headerTCP || length < headerTCP {
		return Segment{}, ErrTruncated
	}
	if len(b) > length {
		b = b[:length] // Ethernet padding
	}
	header := int(b[12]>>4) * 4
	if header < headerTCP || header > len(b) {
		return Segment{}, ErrTruncated
	}
	if len(b) == length && !checksumOK(src, dst, b) {
		return Segment{}, ErrChecksum
	}
	return Segment{
		Src:     netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)),
		Dst:     netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])),
		Seq:     binary.BigEndian.Uint32(b[4:]),
		Ack:     binary.BigEndian.Uint32(b[8:]),
		Flags:   b[13] & 0x1f,
		Window:  binary.BigEndian.Uint16(b[14:]),
		Options: parseOptions(b[headerTCP:header]),
		Payload: b[header:],
		Missing: length - len(b),
	}, nil
}

// parseOptions stops where the options end or make no sense, as every receiver
// does (RFC 9293 3.1).
func parseOptions(b []byte) Options {
	var o Options
	for len(b) > 0 && b[0] != optionEOL {
		if b[0] == optionNOP {
			b = b[1:]
			continue
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			break
		}
		o.set(b[0], b[2:b[1]])
		b = b[b[1]:]
	}
	return o
}

func (o *Options) set(kind byte, value []byte) {
	switch {
	case kind == optionMSS && len(value) == 2:
		o.MSS = binary.BigEndian.Uint16(value)
	case kind == optionWindowScale && len(value) == 1:
		o.HasWScale = true
		o.WScale = min(value[0], 14) // RFC 7323 2.3
	case kind == optionSACKPermitted && len(value) == 0:
		o.SACKPermitted = true
	case kind == optionTimestamps && len(value) == 8:
		o.HasTimestamps = true
		o.TSVal = binary.BigEndian.Uint32(value)
		o.TSEcr = binary.BigEndian.Uint32(value[4:])
	}
}
