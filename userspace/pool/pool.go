// SPDX-License-Identifier: Apache-2.0

// Package pool picks a backend.
//
// Everything here is pure and built once from a config.Config. Picking takes no
// lock. It depends on nothing that differs between nodes or runs: the same
// routes.yaml gives the same Maglev tables and the same hashes everywhere, so
// any node sends a client to the same backend.
//
// Health is the caller's: a backend that is down, drained or has been tried is
// one for which the function "tried" returns true.
package pool

import (
	"errors"
	"fmt"
	"net/netip"

	"snilb/userspace/config"
)

// Backend is a server as the data path knows it.
type Backend struct {
	ID     uint16 // 1 or above, unique over all pools: 0 in a map means unset.
	Pool   string
	Name   string
	Addr   netip.AddrPort
	Weight int // 1 or above.
}

// Family is an address family. A client is only sent to a backend of its own.
type Family uint8

// The address families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// FamilyOf returns the family of an address; IPv4 in IPv6 is IPv4.
func FamilyOf(addr netip.Addr) Family {
	if addr.Unmap().Is4() {
		return IPv4
	}
	return IPv6
}

// Balancer picks backends. It is safe for concurrent use.
type Balancer interface {
	// Next returns a backend of the family for which tried is false, or nil
	// when there is none. A nil tried means that none was tried. With the
	// answers of earlier calls in tried, every backend comes once.
	Next(hash uint64, family Family, tried func(*Backend) bool) *Backend
}

// Pool is a pool ready for use.
type Pool struct {
	Config   *config.Pool
	Backends []*Backend // In file order.
	Balancer Balancer
}

// Hash returns what Balancer.Next wants for a connection.
func (p *Pool) Hash(client, listener netip.AddrPort, sni string, key Key) uint64 {
	return Hash(p.Config.Hash, client, listener, sni, key)
}

// Set is all pools of a file.
type Set struct {
	Pools []*Pool // As config.Config.Pools: by config.Pool.Index.
	byID  map[uint16]*Backend
}

// Backend returns the backend with that id, or nil.
func (s *Set) Backend(id uint16) *Backend {
	return s.byID[id]
}

// Of returns the pool that was built from p.
func (s *Set) Of(p *config.Pool) *Pool {
	return s.Pools[p.Index]
}

// Identity is what keeps a backend's id through a reload.
type Identity struct {
	Pool string
	Addr netip.AddrPort
}

// Identities returns the ids in use, to hand to the next Build.
func (s *Set) Identities() map[Identity]uint16 {
	known := make(map[Identity]uint16, len(s.byID))
	for id, b := range s.byID {
		known[Identity{Pool: b.Pool, Addr: b.Addr}] = id
	}
	return known
}

// ErrNoIDs is why there are no pools: every id is taken.
var ErrNoIDs = errors.New("all ids are taken")

// Build makes the pools of a file. A backend that is in known keeps its id, and
// no other backend gets it: flows that outlive a reload are counted by id. It
// returns ErrNoIDs when the ids run out.
func Build(c *config.Config, known map[Identity]uint16) (*Set, error) {
	s := &Set{byID: map[uint16]*Backend{}}
	taken := make(map[uint16]bool, len(known))
	for _, id := range known {
		taken[id] = true
	}
	next := uint16(1)
	for _, cp := range c.Pools {
		p := &Pool{Config: cp}
		for _, cb := range cp.Backends {
			id := known[Identity{Pool: cp.Name, Addr: cb.Addr}]
			if id == 0 {
				for next != 0 && taken[next] {
					next++
				}
				if next == 0 {
					return nil, fmt.Errorf("number the backends, %d at most: %w", config.MaxBackends, ErrNoIDs)
				}
				id, taken[next] = next, true
			}
			b := &Backend{ID: id, Pool: cp.Name, Name: cb.Name, Addr: cb.Addr, Weight: cb.Weight}
			p.Backends = append(p.Backends, b)
			s.byID[id] = b
		}
		switch cp.Balance {
		case config.Maglev:
			p.Balancer = NewMaglev(p.Backends)
		default:
			p.Balancer = NewRoundRobin(p.Backends)
		}
		s.Pools = append(s.Pools, p)
	}
	return s, nil
}

// ofFamily returns the backends of one family, in their order.
func ofFamily(backends []*Backend, family Family) []*Backend {
	var some []*Backend
	for _, b := range backends {
		if FamilyOf(b.Addr.Addr()) == family {
			some = append(some, b)
		}
	}
	return some
}
