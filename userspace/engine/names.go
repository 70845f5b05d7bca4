// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"sync"

	"snilb/userspace/config"
	"snilb/userspace/pool"
)

// names says what the ids in flows' entries mean, which an earlier daemon has given.
type names struct {
	plan       *Plan
	ids        ids
	pools      map[string]*pool.Pool
	mu         sync.Mutex                      // of what is below
	byIdentity map[pool.Identity]*pool.Backend // of the plan, and those that were made here
	byAddr     map[netip.AddrPort]*pool.Backend
}

func newNames(p *Plan, known ids) *names {
	n := &names{
		plan:       p,
		ids:        known,
		pools:      make(map[string]*pool.Pool),
		byIdentity: make(map[pool.Identity]*pool.Backend),
		byAddr:     make(map[netip.AddrPort]*pool.Backend),
	}
	for _, some := range p.pools.Pools {
		n.pools[some.Config.Name] = some
		for _, b := range some.Backends {
			n.byIdentity[pool.Identity{Pool: b.Pool, Addr: b.Addr}] = b
			if n.byAddr[b.Addr] == nil {
				n.byAddr[b.Addr] = b
			}
		}
	}
	return n
}

// backendOf is the plan's backend of that pool and address, or one made for all flows that have it.
func (n *names) backendOf(b pool.Backend) *pool.Backend {
	n.mu.Lock()
	defer n.mu.Unlock()
	key := pool.Identity{Pool: b.Pool, Addr: b.Addr}
	if n.byIdentity[key] == nil {
		n.byIdentity[key] = &b
	}
	return n.byIdentity[key]
}

// backend is the one of an id and an address by an entry: as the journal says; otherwise one of the plan with that address, or one without
// a pool.
func (n *names) backend(id uint16, addr netip.AddrPort) *pool.Backend {
	if b := n.ids.backends[id]; b != nil && b.Addr == addr {
		return n.backendOf(*b)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if b := n.byAddr[addr]; b != nil {
		return b
	}
	b := &pool.Backend{ID: id, Addr: addr}
	n.byAddr[addr] = b
	return b
}

// route is the name of a route by what an entry holds, "" if that is not known.
func (n *names) route(id uint16) string { return n.ids.routes[id] }

// timeouts are those of a pool by its name, the file's if it is no more.
func (n *names) timeouts(name string) *config.Timeouts {
	if p := n.pools[name]; p != nil {
		return &p.Config.Timeouts
	}
	return &n.plan.config.Timeouts
}
