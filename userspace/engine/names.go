// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"

	"snilb/userspace/config"
	"snilb/userspace/pool"
)

// names says what the ids in flows' entries mean, which an earlier daemon has given.
type names struct {
	plan       *Plan
	pools      map[string]*pool.Pool
	byIdentity map[pool.Identity]*pool.Backend // of the plan, and those that were made here
	byAddr     map[netip.AddrPort]*pool.Backend
}

func newNames(p *Plan) *names {
	n := &names{
		plan:       p,
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

// backend is the one of an id and an address: a pool's of the plan with that address, or one without a pool.
func (n *names) backend(id uint16, addr netip.AddrPort) *pool.Backend {
	if b := n.byAddr[addr]; b != nil {
		return b
	}
	b := &pool.Backend{ID: id, Addr: addr}
	n.byAddr[addr] = b
	return b
}

// route is the name of a route by what an entry holds.
func (n *names) route(uint16) string { return "" }

// timeouts are those of a pool by its name, the file's if it is no more.
func (n *names) timeouts(name string) *config.Timeouts {
	if p := n.pools[name]; p != nil {
		return &p.Config.Timeouts
	}
	return &n.plan.config.Timeouts
}
