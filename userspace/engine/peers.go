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
	news   map[netip.AddrPort]bool // that the journal has not
	said   announcement            // the last one that was asked for
}

// peer is one backend's stack, as far as it was offered anything.
type peer struct {
	mss                  uint16
	noSACK, noTimestamps bool
	guessed              bool // by what an earlier daemon announced: see guess
}

// learn notes a SYN-ACK to a SYN with the options offered, and reports whether what
// is announced may change by it: seldom, and it must not take long to see that it does not.
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
	bothOffered := offered.SACKPermitted && offered.HasTimestamps
	now.guessed = now.guessed && !bothOffered && (now.noSACK || now.noTimestamps)
	if known && now == old {
		return false
	}
	p.set(backend, now)
	return now.noSACK != old.noSACK || now.noTimestamps != old.noTimestamps || p.moves(backend, old.mss, now.mss, known)
}

// moves reports whether the MSS that is announced may be another one as a backend says now instead of old, or for the first
// time. With mu held.
func (p *peers) moves(backend netip.AddrPort, old, now uint16, known bool) bool {
	said, v4 := p.said.mss6, backend.Addr().Is4()
	if v4 {
		said = p.said.mss4
	}
	less := bounding(now, v4) < said
	bounded := known && old != now && bounding(old, v4) <= said
	return less || bounded
}

// set notes what is known of a backend now. With mu held.
func (p *peers) set(backend netip.AddrPort, now peer) {
	if p.byAddr == nil {
		p.byAddr, p.news = make(map[netip.AddrPort]peer), make(map[netip.AddrPort]bool)
	}
	p.byAddr[backend], p.news[backend] = now, true
}

// keep forgets all others, and what was only guessed: without the backend whose lack it was, nobody would ever be offered
// timestamps again, and so no backend could show that it has them.
func (p *peers) keep(backends map[netip.AddrPort]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for addr, one := range p.byAddr {
		if !backends[addr] || one.guessed {
			delete(p.byAddr, addr)
			delete(p.news, addr)
		}
	}
}

// recall takes over what an earlier daemon learned.
func (p *peers) recall(backend netip.AddrPort, known peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(backend, known)
}

// guess is for when nobody knows whose lack it was that an earlier daemon went by: everyone's, of whom nothing is known. Better
// all clients go without than that those of one pool are promised what they will be refused.
func (p *peers) guess(backends []netip.AddrPort, was announcement, mss4, mss6 uint16) {
	lacks := peer{noSACK: was.flags&maps.LiveNoSACK != 0, noTimestamps: was.flags&maps.LiveNoTimestamps != 0, guessed: true}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, addr := range backends {
		one, most := lacks, mss4
		if one.mss = was.mss4; addr.Addr().Is6() {
			one.mss, most = was.mss6, mss6
		}
		_, known := p.byAddr[addr]
		if !known && (one.mss < most || one.noSACK || one.noTimestamps) {
			p.set(addr, one)
		}
	}
}

// journal adds to b what is known of all backends, or what is new since the last time.
func (p *peers) journal(b []byte, all bool) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	note := func(addr netip.AddrPort) {
		r := record{kind: recordPeer, backend: addr, peer: p.byAddr[addr]}
		b = r.append(b)
	}
	if all {
		for addr := range p.byAddr {
			note(addr)
		}
	} else {
		for addr := range p.news {
			note(addr)
		}
	}
	clear(p.news)
	return b
}

// announcement is what SYN-ACKs to clients say.
type announcement struct {
	mss4, mss6 uint16
	flags      uint32 // maps.Live*
}

// announce is the announcement, and remembers it as what is said from now on.
func (p *peers) announce(pools *pool.Set, mss4, mss6 uint16) announcement {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.said = p.announcement(pools, mss4, mss6)
	return p.said
}

// changes reports whether the announcement is another one than what is said.
func (p *peers) changes(pools *pool.Set, mss4, mss6 uint16) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.said != p.announcement(pools, mss4, mss6)
}

// announcement is what all backends can keep. An option is left out when some pool
// has no backend with it: one odd backend in a pool does not lower all. Who was never
// spoken to is taken to have everything. With mu held.
func (p *peers) announcement(pools *pool.Set, mss4, mss6 uint16) announcement {
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
			*announced = min(*announced, bounding(known.mss, b.Addr.Addr().Is4()))
		}
	}
	return a
}

// bounding is what a backend's MSS lowers an announcement to.
func bounding(mss uint16, v4 bool) uint16 { return max(mssOf(mss, v4), leastAnnounced) }

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
		if flags == 0 {
			return 0
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
