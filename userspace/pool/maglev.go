// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"math"
	"slices"
	"strings"
)

// tableSize is a prime, as Maglev wants, and large against the number of
// backends: shares are right to about n/tableSize. It is one constant and not
// made from the number of backends, because another size moves every client.
const tableSize = 65537

// maglev picks by a table that gives every backend its share and changes little
// when a backend comes or goes (Eisenbud and others, 2016).
type maglev struct {
	v4, v6 *lookup
}

// NewMaglev returns a weighted Maglev table for the backends of each family. The
// order of the backends is of no account, nor is anything but their addresses
// and weights.
func NewMaglev(backends []*Backend) Balancer {
	return &maglev{
		v4: newLookup(ofFamily(backends, IPv4), tableSize),
		v6: newLookup(ofFamily(backends, IPv6), tableSize),
	}
}

func (m *maglev) Next(hash uint64, family Family, tried func(*Backend) bool) *Backend {
	if family == IPv4 {
		return m.v4.next(hash, tried)
	}
	return m.v6.next(hash, tried)
}

// lookup is one family's table.
type lookup struct {
	backends []*Backend // Ordered by address.
	seeds    []uint64   // Of backends.
	table    []uint16   // Index into backends.
}

func newLookup(backends []*Backend, size int) *lookup {
	l := &lookup{backends: slices.Clone(backends)}
	slices.SortFunc(l.backends, func(a, b *Backend) int {
		if d := a.Addr.Compare(b.Addr); d != 0 {
			return d
		}
		return strings.Compare(a.Name, b.Name)
	})
	for _, b := range l.backends {
		l.seeds = append(l.seeds, seedOf(b, 0))
	}
	if len(backends) > 0 {
		l.table = fill(l.backends, size)
	}
	return l
}

// seedOf hashes a backend's address. The salt makes independent numbers of one.
func seedOf(b *Backend, salt uint64) uint64 {
	h := newSip(Key{})
	h.addr(b.Addr.Addr())
	h.word(uint64(b.Addr.Port()))
	h.word(salt)
	return h.sum()
}

// fill lets the backends take turns in choosing a slot, each in its own order,
// until all slots are taken. A backend gets turns in proportion to its weight.
func fill(backends []*Backend, size int) []uint16 {
	const empty = math.MaxUint16
	table := make([]uint16, size)
	for i := range table {
		table[i] = empty
	}
	heaviest := 0
	slot, step, credit := make([]int, len(backends)), make([]int, len(backends)), make([]int, len(backends))
	for i, b := range backends {
		slot[i] = int(seedOf(b, 1) % uint64(size))
		// Any step but 0 visits every slot of a prime number of them.
		step[i] = int(seedOf(b, 2)%uint64(size-1)) + 1
		heaviest = max(heaviest, b.Weight)
	}
	for left := size; left > 0; {
		for i, b := range backends {
			if credit[i] += b.Weight; credit[i] < heaviest {
				continue
			}
			credit[i] -= heaviest
			for table[slot[i]] != empty {
				slot[i] = (slot[i] + step[i]) % size
			}
			table[slot[i]] = uint16(i)
			if left--; left == 0 {
				break
			}
		}
	}
	return table
}

func (l *lookup) next(hash uint64, tried func(*Backend) bool) *Backend {
	if len(l.table) == 0 {
		return nil
	}
	b := l.backends[l.table[hash%uint64(len(l.table))]]
	if tried == nil || !tried(b) {
		return b
	}
	return l.instead(hash, tried)
}

// instead picks among the backends that are left by weighted rendezvous: each
// draws a number from the hash and its seed, and the best wins. So the clients
// of a backend that is down spread over all others by weight, every node makes
// the same choice, and clients of other backends stay where they are. Walking
// on in the table would do that too, but may take as many steps as it has slots.
func (l *lookup) instead(hash uint64, tried func(*Backend) bool) *Backend {
	var best *Backend
	lowest := math.Inf(1)
	for i, b := range l.backends {
		if tried(b) {
			continue
		}
		// An exponential of rate weight: the chance to be the least of all is
		// the weight's share. Uniform in (0, 1], so the logarithm is finite.
		uniform := (float64(mix(hash^l.seeds[i])>>11) + 1) / (1 << 53)
		if score := -math.Log(uniform) / float64(b.Weight); best == nil || score < lowest {
			best, lowest = b, score
		}
	}
	return best
}

// mix spreads every bit of x over the whole result (the finisher of splitmix64).
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
