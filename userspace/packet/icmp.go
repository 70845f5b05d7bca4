// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

const (
	headerICMP     = 8
	quotedTCP      = 8 // bytes every router quotes (RFC 792): ports and sequence number
	protocolICMP   = 1
	protocolICMPv6 = 58

	unreachable4    = 3 // RFC 792
	fragNeeded4     = 4 // code of unreachable4, RFC 1191
	unreachable6    = 1 // RFC 4443 3.1
	packetTooBig6   = 2 // RFC 4443 3.2
	minimumMTU6     = 1280
	maximumQuoteTCP = 20
)

// ErrNotICMP is for what is no ICMP error about a TCP packet.
var ErrNotICMP = errors.New("no ICMP error about a TCP packet")

// ICMPError is what a router or host says about a TCP packet that it did not
// deliver. The quoted packet's addresses are of the same family as the error's own.
type ICMPError struct {
	Src, Dst netip.Addr // of the error
	TooBig   bool       // frag-needed (RFC 1191) or packet-too-big (RFC 8201); else unreachable
	Code     uint8      // of an unreachable
	MTU      int        // with TooBig: bytes of an IP packet that would fit; 0 by an old router

	Quoted Quote
}

// Quote is the packet an ICMP error is about, as far as its sender can rely on it.
type Quote struct {
	Src, Dst netip.AddrPort
	Seq      uint32
	Length   int // of the IP packet, bytes
}

// ParseICMP reads an ICMP or ICMPv6 error, from its IP header on. A capture that was
// cut short is allowed as long as the quote holds 8 bytes of TCP.
func ParseICMP(b []byte) (ICMPError, error) {
	if len(b) < 1 {
		return ICMPError{}, ErrTruncated
	}
	switch b[0] >> 4 {
	case 4:
		return parseICMP4(b)
	case 6:
		return parseICMP6(b)
	}
	return ICMPError{}, ErrNotICMP
}

func parseICMP4(b []byte) (ICMPError, error) {
	const quote = header4 + headerICMP
	if len(b) < quote+header4+quotedTCP {
		return ICMPError{}, ErrTruncated
	}
	if b[0] != 0x45 || b[9] != protocolICMP || b[header4] != unreachable4 || b[quote] != 0x45 || b[quote+9] != protocolTCP {
		return ICMPError{}, ErrNotICMP
	}
	if length := int(binary.BigEndian.Uint16(b[2:])); length <= len(b) && length > header4 && fold(add(0, b[header4:length])) != 0xffff {
		return ICMPError{}, ErrChecksum
	}
	e := ICMPError{
		Src: netip.AddrFrom4([4]byte(b[12:16])), Dst: netip.AddrFrom4([4]byte(b[16:20])),
		Code: b[header4+1], TooBig: b[header4+1] == fragNeeded4,
	}
	if e.TooBig {
		e.MTU = int(binary.BigEndian.Uint16(b[header4+6:]))
	}
	q := b[quote:]
	e.Quoted.read(netip.AddrFrom4([4]byte(q[12:16])), netip.AddrFrom4([4]byte(q[16:20])), q[header4:])
	e.Quoted.Length = int(binary.BigEndian.Uint16(q[2:]))
	return e, nil
}

func parseICMP6(b []byte) (ICMPError, error) {
	const quote = header6 + headerICMP
	if len(b) < quote+header6+quotedTCP {
		return ICMPError{}, ErrTruncated
	}
	kind := b[header6]
	if b[6] != protocolICMPv6 || kind != unreachable6 && kind != packetTooBig6 || b[quote]>>4 != 6 || b[quote+6] != protocolTCP {
		return ICMPError{}, ErrNotICMP
	}
	src, dst := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	if length := int(binary.BigEndian.Uint16(b[4:])); header6+length <= len(b) &&
		fold(add(pseudoSum(src, dst, length)+protocolICMPv6-protocolTCP, b[header6:header6+length])) != 0xffff {
		return ICMPError{}, ErrChecksum
	}
	e := ICMPError{Src: src, Dst: dst, Code: b[header6+1], TooBig: kind == packetTooBig6}
	if e.TooBig {
		e.Code, e.MTU = 0, int(binary.BigEndian.Uint32(b[header6+4:]))
	}
	q := b[quote:]
	e.Quoted.read(netip.AddrFrom16([16]byte(q[8:24])), netip.AddrFrom16([16]byte(q[24:40])), q[header6:])
	e.Quoted.Length = header6 + int(binary.BigEndian.Uint16(q[4:]))
	return e, nil
}

func (q *Quote) read(src, dst netip.Addr, tcp []byte) {
	q.Src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(tcp))
	q.Dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(tcp[2:]))
	q.Seq = binary.BigEndian.Uint32(tcp[4:])
}

// Append writes the error as an IP packet behind b, checksums included, and returns
// the longer slice. It quotes a TCP header of 20 bytes, of which the first 8 are
// the packet's.
func (e *ICMPError) Append(b []byte) []byte {
	if e.Dst.Is4() {
		return e.append4(b)
	}
	return e.append6(b)
}

func (e *ICMPError) append4(b []byte) []byte {
	b = appendIP4(b, e.Src, e.Dst, header4+headerICMP+header4+maximumQuoteTCP, protocolICMP)
	at := len(b)
	mtu := 0
	if e.TooBig {
		mtu = min(e.MTU, 65535)
	}
	b = append(b, unreachable4, e.code4(), 0, 0, 0, 0, byte(mtu>>8), byte(mtu))
	b = appendIP4(b, e.Quoted.Src.Addr(), e.Quoted.Dst.Addr(), e.Quoted.Length, protocolTCP)
	b = e.Quoted.appendTCP(b)
	binary.BigEndian.PutUint16(b[at+2:], ^fold(add(0, b[at:])))
	return b
}

func (e *ICMPError) code4() byte {
	if e.TooBig {
		return fragNeeded4
	}
	return e.Code
}

func (e *ICMPError) append6(b []byte) []byte {
	const length = headerICMP + header6 + maximumQuoteTCP
	b = appendIP6(b, e.Src, e.Dst, length, protocolICMPv6)
	at := len(b)
	if e.TooBig {
		b = append(b, packetTooBig6, 0, 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(max(e.MTU, minimumMTU6)))
	} else {
		b = append(b, unreachable6, e.Code, 0, 0, 0, 0, 0, 0)
	}
	b = appendIP6(b, e.Quoted.Src.Addr(), e.Quoted.Dst.Addr(), e.Quoted.Length-header6, protocolTCP)
	b = e.Quoted.appendTCP(b)
	sum := pseudoSum(e.Src, e.Dst, length) + protocolICMPv6 - protocolTCP
	binary.BigEndian.PutUint16(b[at+2:], ^fold(add(sum, b[at:])))
	return b
}

func (q *Quote) appendTCP(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, q.Src.Port())
	b = binary.BigEndian.AppendUint16(b, q.Dst.Port())
	b = binary.BigEndian.AppendUint32(b, q.Seq)
	return append(b, 0, 0, 0, 0, headerTCP/4<<4, ACK, 0, 0, 0, 0, 0, 0)
}
