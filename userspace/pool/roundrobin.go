// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"slices"
	"sync/atomic"
)

// roundRobin walks through a plan in which every backend stands as often as its
// weight says, spread evenly. The hash is not looked at.
type roundRobin struct {
	v4, v6 *rotation
}

// NewRoundRobin returns a weighted round robin over the backends of each
// family.
func NewRoundRobin(backends []*Backend) Balancer {
	return &roundRobin{
		v4: newRotation(ofFamily(backends, IPv4)),
		v6: newRotation(ofFamily(backends, IPv6)),
	}
}

func (r *roundRobin) Next(_ uint64, family Family, tried func(*Backend) bool) *Backend {
	if family == IPv4 {
		return r.v4.next(tried)
	}
	return r.v6.next(tried)
}

// rotation is one family's plan.
type rotation struct {
	backends []*Backend
	plan     []*Backend

	// turn counts picks, detour those that met a backend which was tried. They
	// are apart so that a backend that is down does not disturb the others'
	// turns.
	turn   atomic.Uint64
	_      [56]byte // The two are written by all workers: not one cache line.
	detour atomic.Uint64
}

func newRotation(backends []*Backend) *rotation {
	return &rotation{backends: backends, plan: plan(backends)}
}

func (r *rotation) next(tried func(*Backend) bool) *Backend {
	if len(r.plan) == 0 {
		return nil
	}
	b := r.plan[(r.turn.Add(1)-1)%uint64(len(r.plan))]
	if tried == nil || !tried(b) {
		return b
	}
	return r.instead(tried)
}

// instead shares the turns of a backend out by weight. Taking the next one in
// the plan would give them all to one neighbour: with four equal backends and
// one down, one of the three would get half of everything.
func (r *rotation) instead(tried func(*Backend) bool) *Backend {
	sum := uint64(0)
	for _, b := range r.backends {
		if !tried(b) {
			sum += uint64(b.Weight)
		}
	}
	if sum == 0 {
		return nil
	}
	point := (r.detour.Add(1) - 1) % sum
	var last *Backend
	for _, b := range r.backends {
		if tried(b) {
			continue
		}
		last = b
		if point < uint64(b.Weight) {
			break
		}
		point -= uint64(b.Weight)
	}
	// When health changed between the two loops the point may lie behind the
	// end: the last one that can be taken is as good as any.
	return last
}

// plan spreads each backend's turns evenly over one round. The round has as
// many turns as the weights add up to, divided by what they have in common.
func plan(backends []*Backend) []*Backend {
	common := 0
	for _, b := range backends {
		common = gcd(common, b.Weight)
	}
	type turn struct {
		at, per int // The turn's place in the round is at/per.
		backend int
	}
	var turns []turn
	for i, b := range backends {
		weight := b.Weight / common
		for k := range weight {
			// Backend i is shifted by (i+1/2)/n of its own distance, so that
			// equal weights alternate and light ones do not all meet in the
			// middle.
			turns = append(turns, turn{at: 2*len(backends)*k + 2*i + 1, per: weight, backend: i})
		}
	}
	slices.SortFunc(turns, func(a, b turn) int {
		if d := a.at*b.per - b.at*a.per; d != 0 {
			return d
		}
		return a.backend - b.backend
	})
	planned := make([]*Backend, len(turns))
	for i, t := range turns {
		planned[i] = backends[t.backend]
	}
	return planned
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
