// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

const (
	firstPort  = 1024
	portsEach  = 65536 - firstPort
	maxSources = 1 << 16 // so that pairs are numbers of 32 bits
)

// pairs numbers the source addresses and ports: the addresses of one port first, so that a balancer which hashes addresses
// sees many of them.
type pairs struct {
	high  uint64 // of an IPv6 address
	first uint64 // the low bits of the first address
	count uint64 // addresses
	v6    bool
}

// newPairs leaves out a network's own address and its broadcast, at which routers look askance.
func newPairs(p netip.Prefix) (pairs, error) {
	if !p.IsValid() || p.Addr().Is4In6() {
		return pairs{}, errors.New("no prefix of source addresses")
	}
	p = p.Masked()
	s := pairs{v6: p.Addr().Is6(), count: maxSources}
	if host := p.Addr().BitLen() - p.Bits(); host < 16 {
		s.count = 1 << host
	}
	raw := p.Addr().As16()
	s.high, s.first = binary.BigEndian.Uint64(raw[:8]), binary.BigEndian.Uint64(raw[8:])
	if s.count > 2 {
		s.first++
		s.count -= 2
	}
	return s, nil
}

// total is how many pairs there are.
func (p *pairs) total() uint64 { return p.count * portsEach }

// pair is the pair of a number below total.
func (p *pairs) pair(n uint32) netip.AddrPort {
	port, low := uint16(firstPort+uint64(n)/p.count), p.first+uint64(n)%p.count
	var raw [16]byte
	binary.BigEndian.PutUint64(raw[8:], low)
	if !p.v6 {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw[12:])), port)
	}
	binary.BigEndian.PutUint64(raw[:8], p.high)
	return netip.AddrPortFrom(netip.AddrFrom16(raw), port)
}

// number is the opposite of pair. ok is false for what is none of them.
func (p *pairs) number(a netip.AddrPort) (n uint32, ok bool) {
	raw := a.Addr().As16()
	index := binary.BigEndian.Uint64(raw[8:]) - p.first
	if a.Addr().Is6() != p.v6 || binary.BigEndian.Uint64(raw[:8]) != p.high || index >= p.count || a.Port() < firstPort {
		return 0, false
	}
	return uint32(uint64(a.Port()-firstPort)*p.count + index), true
}

// check compares with what is to be reached by them.
func (p *pairs) check(target netip.AddrPort, concurrency int) error {
	if target.Addr().Is6() != p.v6 {
		return fmt.Errorf("source addresses of another family than %v", target)
	}
	if p.total() < 2*uint64(concurrency) {
		return fmt.Errorf("%d source addresses with %d ports each are too few for a concurrency of %d: take a larger prefix, for %d at least",
			p.count, portsEach, concurrency, 2*concurrency)
	}
	return nil
}
