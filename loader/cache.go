// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
)

const (
	cacheShards = 64
	// Beyond that many addresses a shard begins anew: a flood of addresses costs lookups, no memory.
	cachePerShard = 1024
)

// routeCache keeps the next hops of addresses until anything changes in the
// network. The zero value is empty. Sharded, so that workers do not wait for each
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
	known map[netip.Addr]NextHop
	_     [32]byte // a cache line of its own
}

func (c *routeCache) shard(dst netip.Addr) *cacheShard {
	b := dst.As16()
	h := binary.LittleEndian.Uint64(b[:8]) ^ binary.LittleEndian.Uint64(b[8:])
	h *= 0x9e3779b97f4a7c15 // spreads neighbours (Knuth's multiplicative hash)
	return &c.shards[h>>58]
}

func (c *routeCache) get(dst netip.Addr) (NextHop, bool) {
	s := c.shard(dst)
	s.mu.RLock()
	h, ok := s.known[dst]
	s.mu.RUnlock()
	return h, ok
}

// put keeps an answer, unless the network changed after it was asked for.
func (c *routeCache) put(dst netip.Addr, h NextHop, generation uint64) {
	s := c.shard(dst)
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.generation.Load() != generation {
		return
	}
	if s.known == nil || len(s.known) >= cachePerShard {
		s.known = make(map[netip.Addr]NextHop)
	}
	s.known[dst] = h
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
