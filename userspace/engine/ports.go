// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"time"
)

// restAfterClose is how long a port rests whose backend closed first: that backend
// holds the tuple in TIME_WAIT for as long (RFC 9293 3.6.1, 60 s on Linux).
const restAfterClose = 60 * time.Second

// pathKey is a source address of ours that speaks to a backend, from ports of a
// range; first and last are 0 for the instance's own.
type pathKey struct {
	source      netip.Addr
	backend     netip.AddrPort
	first, last uint16
}

// ports are one worker's source ports towards one backend: every step-th of the
// range, so that the kernel can tell the worker from the port. What was never used by
// this daemon is taken first, once around from where it begins: an earlier one may have
// used its first ports a moment ago.
type ports struct {
	first, step int // the ports are first, first+step and so on
	all         int // how many they are; a port's place is below
	begin       int // the place that was taken first
	passed      int // places from begin on, around, that are not new any more
	adopted     bitset
	ahead       int // places that are adopted and not passed: with a flow, or in a queue
	free        queue[uint16]
	resting     queue[rest]
}

type rest struct {
	port  uint16
	until int64
}

// newPorts takes a worker's share of the ports from first to last, which lie in the
// instance's range; that begins at base, with worker 0.
func newPorts(base, first, last uint16, worker, workers int) *ports {
	ahead := (worker - int(first-base)%workers + workers) % workers
	p := &ports{first: int(first) + ahead, step: workers}
	p.all = max(0, (int(last)-p.first+workers)/workers)
	return p
}

// unused are the ports never used yet.
func (p *ports) unused() int { return p.all - p.passed - p.ahead }

// adopt marks a port that a flow has which this daemon did not bind. Before any is taken. Returns false
// for a port that is not one of these.
func (p *ports) adopt(port uint16) bool {
	place := (int(port) - p.first) / p.step
	if int(port) < p.first || place >= p.all || p.first+place*p.step != int(port) {
		return false
	}
	if !p.adopted.has(place) {
		p.adopted.set(place)
		p.ahead++
	}
	return true
}

// new returns the next port never used yet, false if there is none.
func (p *ports) new() (uint16, bool) {
	for p.passed < p.all {
		place := (p.begin + p.passed) % p.all
		p.passed++
		if !p.adopted.has(place) {
			return uint16(p.first + place*p.step), true
		}
		p.ahead--
	}
	p.adopted = nil
	return 0, false
}

// scarce reports whether more than half of the ports are in use: those of closed flows should come back soon.
func (p *ports) scarce() bool {
	return 2*(p.unused()+p.free.len()+p.resting.len()) < p.all
}

// idle reports whether nobody has a port, and none rests.
func (p *ports) idle(now int64) bool {
	for i := range p.resting.len() {
		if p.resting.items[p.resting.head+i].until > now {
			return false
		}
	}
	return p.unused()+p.free.len()+p.resting.len() == p.all
}

// take returns the port that has been unused the longest. When only resting ones
// are left, the one that rested longest: our numbers rise, so most backends take
// it. inUse says of a port whether somebody has it by another range. Returns false
// when all are in use.
func (p *ports) take(now int64, inUse func(uint16) bool) (uint16, bool) {
	var busy []uint16
	defer func() {
		for _, port := range busy {
			p.free.push(port)
		}
	}()
	for {
		port, ok := p.oldest(now)
		if !ok || !inUse(port) {
			return port, ok
		}
		busy = append(busy, port)
	}
}

func (p *ports) oldest(now int64) (uint16, bool) {
	for {
		r, ok := p.resting.first()
		if !ok || r.until > now {
			break
		}
		p.resting.pop()
		p.free.push(r.port)
	}
	if port, ok := p.new(); ok {
		return port, true
	}
	if port, ok := p.free.pop(); ok {
		return port, true
	}
	r, ok := p.resting.pop()
	return r.port, ok
}

// give returns a port, which rests if asked to.
func (p *ports) give(now int64, port uint16, resting bool) {
	if resting {
		p.resting.push(rest{port, now + int64(restAfterClose)})
		return
	}
	p.free.push(port)
}

// queue is first in, first out, and gives memory back.
type queue[T any] struct {
	items []T
	head  int
}

func (q *queue[T]) push(x T) { q.items = append(q.items, x) }

func (q *queue[T]) len() int { return len(q.items) - q.head }

func (q *queue[T]) first() (T, bool) {
	if q.head == len(q.items) {
		var none T
		return none, false
	}
	return q.items[q.head], true
}

func (q *queue[T]) pop() (T, bool) {
	x, ok := q.first()
	if !ok {
		return x, false
	}
	q.head++
	if q.head > 64 && q.head > len(q.items)/2 {
		q.items = append(q.items[:0], q.items[q.head:]...)
		q.head = 0
	}
	return x, true
}
