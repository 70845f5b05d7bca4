// SPDX-License-Identifier: Apache-2.0

package engine

import "math/bits"

const (
	// A tick of the wheel, 2^22 ns, is what timers are late by at most, so that those of many connections are one wake-up.
	tickShift = 22
	// wheelSlots ticks, some 17 s, are a turn of the wheel. What is further off is passed over once a turn.
	wheelSlots = 1 << 12
)

// timers is a wheel of what waits: setting, moving and stopping a timer costs the same however many there are. A timer is a
// place in one slice, without pointers but for its owner's, and only those that run take memory. The owner keeps the number
// of its place, 0 while its timer does not run, where field says.
type timers[T any] struct {
	field func(T) *uint32
	all   []timer[T]              // first the heads of rings: what is ready, and each slot's
	free  uint32                  // places that are not in use, linked by next; 0: none
	used  [wheelSlots / 64]uint64 // a bit a slot: clear if it is empty
	tick  int64                   // the first tick that may hold something
}

type timer[T any] struct {
	at         int64 // CLOCK_MONOTONIC ns
	next, prev uint32
	owner      T
}

// ready heads the ring of those taken off the wheel because their time has come; firstSlot that of the first slot.
const (
	ready     = 0
	firstSlot = 1
)

// newTimers makes a wheel that begins at now: or it would turn through all the time since the boot.
func newTimers[T any](now int64, field func(T) *uint32) timers[T] {
	t := timers[T]{field: field, tick: now >> tickShift, all: make([]timer[T], firstSlot+wheelSlots)}
	for head := range t.all {
		t.all[head].next, t.all[head].prev = uint32(head), uint32(head)
	}
	return t
}

// set starts, moves or, with at 0, stops a timer.
func (t *timers[T]) set(owner T, at int64) {
	place := t.field(owner)
	if *place != 0 {
		t.unlink(*place)
	}
	if at == 0 {
		t.stop(place)
		return
	}
	if *place == 0 {
		*place = t.take()
		t.all[*place].owner = owner
	}
	tick := max(at>>tickShift, t.tick)
	slot := tick % wheelSlots
	t.used[slot/64] |= 1 << (slot % 64)
	t.all[*place].at = at
	t.insert(firstSlot+uint32(slot), *place)
}

// take returns a place that is not in use.
func (t *timers[T]) take() uint32 {
	place := t.free
	if place == 0 {
		t.all = append(t.all, timer[T]{})
		return uint32(len(t.all) - 1)
	}
	t.free = t.all[place].next
	return place
}

// stop gives an owner's place back, which is in no ring.
func (t *timers[T]) stop(place *uint32) {
	if *place == 0 {
		return
	}
	t.all[*place] = timer[T]{next: t.free}
	t.free, *place = *place, 0
}

func (t *timers[T]) insert(head, place uint32) {
	one, next := &t.all[place], t.all[head].next
	one.prev, one.next = head, next
	t.all[head].next, t.all[next].prev = place, place
}

func (t *timers[T]) unlink(place uint32) {
	one := &t.all[place]
	t.all[one.prev].next, t.all[one.next].prev = one.next, one.prev
}

// due stops a timer whose time has come. Returns false if there is none.
func (t *timers[T]) due(now int64) (owner T, ok bool) {
	for t.all[ready].next == ready {
		tick := t.first()
		if tick > now>>tickShift || tick == t.tick+wheelSlots {
			t.tick = max(t.tick, now>>tickShift)
			return owner, false
		}
		t.tick = tick
		if !t.collect(tick%wheelSlots, now) && tick == now>>tickShift {
			return owner, false // what is left in this slot is for later
		}
	}
	owner = t.all[t.all[ready].next].owner
	t.set(owner, 0)
	return owner, true
}

// collect moves what is due from a slot to ready. Returns false if there was nothing. A slot whose tick is over is left
// behind with what later turns are for.
func (t *timers[T]) collect(slot, now int64) bool {
	head := firstSlot + uint32(slot)
	var next uint32
	for one := t.all[head].next; one != head; one = next {
		next = t.all[one].next
		if t.all[one].at <= now {
			t.unlink(one)
			t.insert(ready, one)
		}
	}
	if t.all[head].next == head {
		t.used[slot/64] &^= 1 << (slot % 64)
	}
	if t.tick < now>>tickShift {
		t.tick++
	}
	return t.all[ready].next != ready
}

// first is the first tick from t.tick on whose slot is used, or one a turn away.
func (t *timers[T]) first() int64 {
	at := t.tick % wheelSlots
	// The word of at, without the bits before it, and in the end the whole of it.
	word := t.used[at/64] >> (at % 64) << (at % 64)
	for i := range int64(len(t.used) + 1) {
		if word != 0 {
			base := (at/64 + i) * 64
			return t.tick - at + base + int64(bits.TrailingZeros64(word))
		}
		word = t.used[(at/64+i+1)%int64(len(t.used))]
	}
	return t.tick + wheelSlots
}

// next is when to look again, at the latest: 0 if no timer runs.
func (t *timers[T]) next() int64 {
	if one := t.all[ready].next; one != ready {
		return t.all[one].at
	}
	tick := t.first()
	if tick == t.tick+wheelSlots {
		return 0
	}
	return tick << tickShift
}
