// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"testing"
)

// siphash is SipHash-2-4 as its paper has it: bytes in, no words of ours.
func siphash(k0, k1 uint64, msg []byte) uint64 {
	v := [4]uint64{
		k0 ^ 0x736f6d6570736575, k1 ^ 0x646f72616e646f6d,
		k0 ^ 0x6c7967656e657261, k1 ^ 0x7465646279746573,
	}
	round := func() {
		v[0] += v[1]
		v[2] += v[3]
		v[1] = bits.RotateLeft64(v[1], 13) ^ v[0]
		v[3] = bits.RotateLeft64(v[3], 16) ^ v[2]
		v[0] = bits.RotateLeft64(v[0], 32)
		v[2] += v[1]
		v[0] += v[3]
		v[1] = bits.RotateLeft64(v[1], 17) ^ v[2]
		v[3] = bits.RotateLeft64(v[3], 21) ^ v[0]
		v[2] = bits.RotateLeft64(v[2], 32)
	}
	last := make([]byte, 8)
	whole := len(msg) &^ 7
	copy(last, msg[whole:])
	last[7] = byte(len(msg))
	for _, block := range append(chunks(msg[:whole]), last) {
		m := binary.LittleEndian.Uint64(block)
		v[3] ^= m
		round()
		round()
		v[0] ^= m
	}
	v[2] ^= 0xff
	for range 4 {
		round()
	}
	return v[0] ^ v[1] ^ v[2] ^ v[3]
}

func chunks(b []byte) (all [][]byte) {
	for ; len(b) >= 8; b = b[8:] {
		all = append(all, b[:8])
	}
	return all
}

// From the test vectors that go with the reference implementation: key 00 to 0f,
// message 00 to n-1.
func TestSiphash(t *testing.T) {
	vectors := map[int]uint64{
		0: 0x726fdb47dd0e0e31, 1: 0x74f839c593dc67fd, 7: 0xab0200f58b01d137, 8: 0x93f5f5799a932462,
		15: 0xa129ca6149be45e5, 47: 0xd06c98cd5c0975eb, 48: 0xe612a3cb9ecba951, 63: 0x958a324ceb064572,
	}
	msg := make([]byte, 64)
	for i := range msg {
		msg[i] = byte(i)
	}
	for n, want := range vectors {
		if got := siphash(0x0706050403020100, 0x0f0e0d0c0b0a0908, msg[:n]); got != want {
			t.Errorf("siphash of %d bytes is %#x, want %#x", n, got, want)
		}
	}
}

// cookieFields is what a cookie says, and cookieFields.make the cookie that says it.
type cookieFields struct {
	class, wscale uint8
	sack          bool
}

func (c cookieFields) bits() uint32 {
	b := uint32(c.class)<<5 | uint32(c.wscale)<<1
	if c.sack {
		b |= 1
	}
	return b
}

func (c cookieFields) make(keys [4]CookieKey, slot uint64, src, dst netip.AddrPort) uint32 {
	var msg []byte
	for _, a := range []netip.AddrPort{src, dst} {
		msg = append(msg, a.Addr().AsSlice()...)
	}
	msg = binary.BigEndian.AppendUint16(msg, src.Port())
	msg = binary.BigEndian.AppendUint16(msg, dst.Port())
	msg = binary.LittleEndian.AppendUint32(msg, c.bits())
	msg = binary.LittleEndian.AppendUint64(msg, slot)[:len(msg)+7]
	key := keys[slot%4]
	return uint32(slot)<<30 | c.bits()<<22 | uint32(siphash(key.K0, key.K1, msg))&0x3fffff
}

// classOf is the largest MSS class not above mss; the smallest where all are above.
func classOf(is4 bool, mss uint16) uint8 {
	classes := MSSClasses6
	if is4 {
		classes = MSSClasses4
	}
	for i := len(classes) - 1; i > 0; i-- {
		if classes[i] <= mss {
			return uint8(i)
		}
	}
	return 0
}
