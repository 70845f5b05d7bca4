// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"sync"

	"snilb/maps"
	"snilb/userspace/packet"
	"snilb/userspace/pool"
)

// leastAnnounced bounds how far a backend's MSS lowers what all clients are told:
// what a packet of IPv6's least MTU holds. A backend that takes less gets packets
// cut to its size instead.
const leastAnnounced = 1220

// peers is what backends' SYN-ACKs said of their stacks. The lock is held for one
// map operation a connection.
type peers struct {
	mu     sync.Mutex
	byAddr map[netip.AddrPort]peer
}

// peer is one backend's stack, as far as it was offered anything.
type peer struct {
	mss                  uint16
	noSACK, noTimestamps bool
}

// learn notes a SYN-ACK to a SYN with the options offered, and reports whether it
// said anything new.
func (p *peers) learn(backend netip.AddrPort, offered, said *packet.Options) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, known := p.byAddr[backend]
	now := old
	now.mss = said.MSS
	if offered.SACKPermitted {
		now.noSACK = !said.SACKPermitted
	}
	if offered.HasTimestamps {
		now.noTimestamps = !said.HasTimestamps
	}
	if known && now == old {
		return false
	}
	if p.byAddr == nil {
		p.byAddr = make(map[netip.AddrPort]peer)
	}
	p.byAddr[backend] = now
	return true
}

// keep forgets all others.
func (p *peers) keep(backends map[netip.AddrPort]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for addr := range p.byAddr {
		if !backends[addr] {
			delete(p.byAddr, addr)
		}
	}
}

// announcement is what SYN-ACKs to clients say.
type announcement struct {
	mss4, mss6 uint16
	flags      uint32 // maps.Live*
}

// announcement is what all backends can keep. An option is left out when some pool
// has no backend with it: one odd backend in a pool does not lower all. Who was never
// spoken to is taken to have everything.
func (p *peers) announcement(pools *pool.Set, mss4, mss6 uint16) announcement {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := announcement{mss4: mss4, mss6: mss6}
	for _, some := range pools.Pools {
		for _, family := range []pool.Family{pool.IPv4, pool.IPv6} {
			a.flags |= p.lacking(some, family)
		}
		for _, b := range some.Backends {
			known, ok := p.byAddr[b.Addr]
			if !ok {
				continue
			}
			announced := &a.mss4
			if b.Addr.Addr().Is6() {
				announced = &a.mss6
			}
			*announced = min(*announced, max(mssOf(known.mss, b.Addr.Addr().Is4()), leastAnnounced))
		}
	}
	return a
}

// lacking is what no backend of a pool's family has.
func (p *peers) lacking(some *pool.Pool, family pool.Family) uint32 {
	flags, any := maps.LiveNoSACK|maps.LiveNoTimestamps, false
	for _, b := range some.Backends {
		if pool.FamilyOf(b.Addr.Addr()) != family {
			continue
		}
		any = true
		known := p.byAddr[b.Addr]
		if !known.noSACK {
			flags &^= maps.LiveNoSACK
		}
		if !known.noTimestamps {
			flags &^= maps.LiveNoTimestamps
		}
	}
	if !any {
		return 0
	}
	return flags
}

// mssOf is what a SYN's MSS means: without one, what every host takes (RFC 9293
// 3.7.1).
func mssOf(option uint16, v4 bool) uint16 {
	switch {
	case option != 0:
		return option
	case v4:
		return 536
	}
	return 1220
}
