// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"net/netip"
)

const (
	header4     = 20
	header6     = 40
	headerTCP   = 20
	protocolTCP = 6
	hopLimit    = 64
)

// Append writes the segment as an IP packet behind b, checksums included, and
// returns the longer slice. The payload must fit an IP packet.
func (s *Segment) Append(b []byte) []byte {
	var options [40]byte
	opt := s.appendOptions(options[:0])
	length := headerTCP + len(opt) + len(s.Payload)
	if s.Src.Addr().Is4() {
		b = appendIP4(b, s.Src.Addr(), s.Dst.Addr(), header4+length, protocolTCP)
	} else {
		b = appendIP6(b, s.Src.Addr(), s.Dst.Addr(), length, protocolTCP)
	}
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, s.Src.Port())
	b = binary.BigEndian.AppendUint16(b, s.Dst.Port())
	b = binary.BigEndian.AppendUint32(b, s.Seq)
	b = binary.BigEndian.AppendUint32(b, s.Ack)
	b = append(b, byte((headerTCP+len(opt))/4)<<4, s.Flags)
	b = binary.BigEndian.AppendUint16(b, s.Window)
	b = append(b, 0, 0, 0, 0)
	b = append(b, opt...)
	b = append(b, s.Payload...)
	tcp := b[at:]
	sum := fold(add(pseudoSum(s.Src.Addr(), s.Dst.Addr(), len(tcp)), tcp))
	binary.BigEndian.PutUint16(tcp[16:], ^sum)
	return b
}

// appendIP4 writes a header for a packet of length bytes, itself included.
func appendIP4(b []byte, src, dst netip.Addr, length int, protocol byte) []byte {
	at := len(b)
	b = append(b, 0x45, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(length))
	b = append(b, 0, 0, 0x40, 0, hopLimit, protocol, 0, 0) // DF, so no identification
	s, d := src.As4(), dst.As4()
	b = append(b, s[:]...)
	b = append(b, d[:]...)
	binary.BigEndian.PutUint16(b[at+10:], ^fold(add(0, b[at:])))
	return b
}

// appendIP6 writes a header for a packet of length bytes behind it.
func appendIP6(b []byte, src, dst netip.Addr, length int, protocol byte) []byte {
	b = append(b, 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(length))
	b = append(b, protocol, hopLimit)
	s, d := src.As16(), dst.As16()
	b = append(b, s[:]...)
	return append(b, d[:]...)
}

// appendOptions lays them out as Linux does: timestamps aligned, and alone behind
// two NOPs outside of SYNs, the layout the kernel programs are quickest with.
func (s *Segment) appendOptions(b []byte) []byte {
	o := &s.Options
	if o.MSS != 0 {
		b = append(b, optionMSS, 4)
		b = binary.BigEndian.AppendUint16(b, o.MSS)
	}
	switch {
	case o.SACKPermitted:
		b = append(b, optionSACKPermitted, 2)
		if !o.HasTimestamps {
			b = append(b, optionNOP, optionNOP)
		}
	case o.HasTimestamps:
		b = append(b, optionNOP, optionNOP)
	}
	if o.HasTimestamps {
		b = append(b, optionTimestamps, 10)
		b = binary.BigEndian.AppendUint32(b, o.TSVal)
		b = binary.BigEndian.AppendUint32(b, o.TSEcr)
	}
	if o.HasWScale {
		b = append(b, optionNOP, optionWindowScale, 3, o.WScale)
	}
	return b
}

// checksumOK reports whether the TCP checksum is right, or the bare sum of the
// pseudo header that a sender leaves to its device.
func checksumOK(src, dst netip.Addr, tcp []byte) bool {
	pseudo := pseudoSum(src, dst, len(tcp))
	if fold(add(pseudo, tcp)) == 0xffff {
		return true
	}
	return binary.BigEndian.Uint16(tcp[16:]) == fold(pseudo)
}

func pseudoSum(src, dst netip.Addr, length int) uint64 {
	sum := uint64(protocolTCP) + uint64(length)
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		return add(add(sum, s[:]), d[:])
	}
	s, d := src.As16(), dst.As16()
	return add(add(sum, s[:]), d[:])
}

// add sums b as 32-bit words in network byte order (RFC 1071: one's complement
// addition may be done in wider words and folded later).
func add(sum uint64, b []byte) uint64 {
	for len(b) >= 4 {
		sum += uint64(binary.BigEndian.Uint32(b))
		b = b[4:]
	}
	if len(b) >= 2 {
		sum += uint64(binary.BigEndian.Uint16(b)) << 16
		if len(b) == 3 {
			sum += uint64(b[2]) << 8
		}
		return sum
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 24
	}
	return sum
}

func fold(sum uint64) uint16 {
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}
