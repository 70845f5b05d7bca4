// SPDX-License-Identifier: Apache-2.0

package engine

import "math/bits"

const (
	// A tick of the wheel, 2^22 ns, is what timers are late by at most, so that those of many connections are one wake-up.
	tickShift = 22
	// wheelSlots ticks, some 17 s, are a turn of the wheel. What is further off is passed over once a turn.
	wheelSlots = 1 << 12
)

// timer is embedded in what waits; at 0 it is not running.
type timer struct {
	at    int64 // CLOCK_MONOTONIC ns
	next  *timer
	link  **timer // what points here
	owner interface{ expire(*worker) }
}

// timers is a wheel: setting, moving and stopping a timer costs the same however many there are.
type timers struct {
	slots [wheelSlots]*timer
	used  [wheelSlots / 64]uint64 // a bit a slot: clear if it is empty
	tick  int64                   // the first tick that may hold something
	ready *timer                  // taken off the wheel, their time has come
}

// set starts, moves or, with at 0, stops a timer.
func (t *timers) set(one *timer, at int64) {
	if one.at != 0 {
		one.unlink()
	}
	one.at = at
	if at == 0 {
		return
	}
	tick := max(at>>tickShift, t.tick)
	slot := tick % wheelSlots
	t.used[slot/64] |= 1 << (slot % 64)
	one.insert(&t.slots[slot])
}

func (one *timer) insert(head **timer) {
	one.next, one.link = *head, head
	if one.next != nil {
		one.next.link = &one.next
	}
	*head = one
}

func (one *timer) unlink() {
	*one.link = one.next
	if one.next != nil {
		one.next.link = one.link
	}
	one.next, one.link = nil, nil
}

// due takes a timer off whose time has come, nil if there is none.
func (t *timers) due(now int64) *timer {
	for t.ready == nil {
		tick := t.first()
		if tick > now>>tickShift || tick == t.tick+wheelSlots {
			t.tick = max(t.tick, now>>tickShift)
			return nil
		}
		t.tick = tick
		if !t.collect(tick%wheelSlots, now) && tick == now>>tickShift {
			return nil // what is left in this slot is for later
		}
	}
	one := t.ready
	one.unlink()
	one.at = 0
	return one
}

// collect moves what is due from a slot to ready. Returns false if there was nothing. A slot whose tick is over is left
// behind with what later turns are for.
func (t *timers) collect(slot, now int64) bool {
	var next *timer
	for one := t.slots[slot]; one != nil; one = next {
		next = one.next
		if one.at <= now {
			one.unlink()
			one.insert(&t.ready)
		}
	}
	if t.slots[slot] == nil {
		t.used[slot/64] &^= 1 << (slot % 64)
	}
	if t.tick < now>>tickShift {
		t.tick++
	}
	return t.ready != nil
}

// first is the first tick from t.tick on whose slot is used, or one a turn away.
func (t *timers) first() int64 {
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
func (t *timers) next() int64 {
	if t.ready != nil {
		return t.ready.at
	}
	tick := t.first()
	if tick == t.tick+wheelSlots {
		return 0
	}
	return tick << tickShift
}
