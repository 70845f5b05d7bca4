// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"encoding/binary"
	"math/bits"
	"net/netip"

	"snilb/userspace/config"
)

// Key makes hashes unpredictable for clients, who could otherwise choose their
// ports so that all their connections hit one backend. Nodes that must agree on
// the backend need the same key; the zero Key is valid and the same everywhere,
// but no secret.
type Key [16]byte

// Hash returns the hash of what the pool's setting asks for. It is the same on
// every node and in every run for the same key.
func Hash(kind config.HashKey, client, listener netip.AddrPort, sni string, key Key) uint64 {
	h := newSip(key)
	switch kind {
	case config.HashSNI:
		h.text(sni)
	case config.HashFlow:
		h.addr(client.Addr())
		h.addr(listener.Addr())
		h.word(uint64(client.Port())<<16 | uint64(listener.Port()))
	default:
		h.addr(client.Addr())
	}
	return h.sum()
}

// sip is SipHash-2-4 (Aumasson and Bernstein, 2012): keyed, short, and fixed
// for ever, which maphash is not.
type sip struct {
	v0, v1, v2, v3 uint64
	length         uint64 // Bytes taken so far.
	tail           uint64 // Bytes that do not fill a word yet.
}

func newSip(key Key) sip {
	k0, k1 := binary.LittleEndian.Uint64(key[:8]), binary.LittleEndian.Uint64(key[8:])
	return sip{
		v0: k0 ^ 0x736f6d6570736575,
		v1: k1 ^ 0x646f72616e646f6d,
		v2: k0 ^ 0x6c7967656e657261,
		v3: k1 ^ 0x7465646279746573,
	}
}

func (s *sip) round() {
	s.v0 += s.v1
	s.v1 = bits.RotateLeft64(s.v1, 13) ^ s.v0
	s.v0 = bits.RotateLeft64(s.v0, 32)
	s.v2 += s.v3
	s.v3 = bits.RotateLeft64(s.v3, 16) ^ s.v2
	s.v0 += s.v3
	s.v3 = bits.RotateLeft64(s.v3, 21) ^ s.v0
	s.v2 += s.v1
	s.v1 = bits.RotateLeft64(s.v1, 17) ^ s.v2
	s.v2 = bits.RotateLeft64(s.v2, 32)
}

func (s *sip) compress(m uint64) {
	s.v3 ^= m
	s.round()
	s.round()
	s.v0 ^= m
}

func (s *sip) byte(b byte) {
	s.tail |= uint64(b) << (8 * (s.length % 8))
	s.length++
	if s.length%8 == 0 {
		s.compress(s.tail)
		s.tail = 0
	}
}

func (s *sip) text(t string) {
	for i := range len(t) {
		s.byte(t[i])
	}
}

func (s *sip) word(w uint64) {
	for i := range 8 {
		s.byte(byte(w >> (8 * i)))
	}
}

// addr takes 4 or 16 bytes: IPv4 in IPv6 counts as IPv4.
func (s *sip) addr(a netip.Addr) {
	a = a.Unmap()
	if a.Is4() {
		for _, b := range a.As4() {
			s.byte(b)
		}
		return
	}
	for _, b := range a.As16() {
		s.byte(b)
	}
}

func (s *sip) sum() uint64 {
	s.compress(s.tail | s.length<<56)
	s.v2 ^= 0xff
	for range 4 {
		s.round()
	}
	return s.v0 ^ s.v1 ^ s.v2 ^ s.v3
}
