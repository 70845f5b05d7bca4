// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	cacheShards = 64
	// Beyond that many addresses a shard begins anew: a flood of addresses costs lookups, no memory.
	cachePerShard = 1024
	// unreachableFor is how long it is believed that there is no route, though nothing has changed: many connections may want
	// one of many backends that cannot be reached.
	unreachableFor = time.Second
)

// routeCache keeps the next hops of addresses, or that there are none, until anything
// changes in the network. The zero value is empty. Sharded, so that workers do not wait for each
// other.
type routeCache struct {
	generation atomic.Uint64 // raised by flush
	shards     [cacheShards]cacheShard

	mu    sync.RWMutex     // guards links
	links map[int]linkInfo // by index
}

// linkInfo is what next hops need to know of an interface.
type linkInfo struct {
	mtu int // 0: the interface is gone
	xdp xdpOutput
}

type cacheShard struct {
	mu    sync.RWMutex
	known map[netip.Addr]answer
	_     [32]byte // a cache line of its own
}

// answer is a next hop, or why there is none, and until when that is believed.
type answer struct {
	hop   NextHop
	err   error
	until time.Time
}

func (c *routeCache) shard(dst netip.Addr) *cacheShard {
	b := dst.As16()
	h := binary.LittleEndian.Uint64(b[:8]) ^ binary.LittleEndian.Uint64(b[8:])
	h *= 0x9e3779b97f4a7c15 // spreads neighbours (Knuth's multiplicative hash)
	return &c.shards[h>>58]
}

// get returns what is known of an address; ok is false if nothing is.
func (c *routeCache) get(dst netip.Addr) (hop NextHop, ok bool, err error) {
	s := c.shard(dst)
	s.mu.RLock()
	a, ok := s.known[dst]
	s.mu.RUnlock()
	if a.err != nil && time.Now().After(a.until) {
		return NextHop{}, false, nil
	}
	return a.hop, ok, a.err
}

// put keeps an answer, unless the network changed after it was asked for.
func (c *routeCache) put(dst netip.Addr, a answer, generation uint64) {
	s := c.shard(dst)
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.generation.Load() != generation {
		return
	}
	if s.known == nil || len(s.known) >= cachePerShard {
		s.known = make(map[netip.Addr]answer)
	}
	s.known[dst] = a
}

// flush forgets everything. The generation goes first: what is being asked for now
// is not kept.
func (c *routeCache) flush() {
	c.generation.Add(1)
	for n := range c.shards {
		s := &c.shards[n]
		s.mu.Lock()
		s.known = nil
		s.mu.Unlock()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.links = nil
}

// link returns what is known of an interface, which is asked for once until the next
// flush: an interface's description is long, and takes twice the time of a route.
func (c *routeCache) link(ifindex int, ask func(ifindex int) (linkInfo, error)) (linkInfo, error) {
	c.mu.RLock()
	known, ok := c.links[ifindex]
	c.mu.RUnlock()
	if ok {
		return known, nil
	}
	generation := c.generation.Load()
	asked, err := ask(ifindex)
	if err != nil {
		return linkInfo{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.generation.Load() == generation {
		if c.links == nil {
			c.links = make(map[int]linkInfo)
		}
		c.links[ifindex] = asked
	}
	return asked, nil
}
