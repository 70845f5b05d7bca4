// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"math/rand/v2"
	"testing"
	"time"
)

type waiting struct{ timer uint32 }

func newWheel(now int64) timers[*waiting] {
	return newTimers(now, func(w *waiting) *uint32 { return &w.timer })
}

// TestTimers compares the wheel with a plain list, over turns, at random times.
func TestTimers(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, start := range []int64{0, int64(time.Hour) + 12345, 1 << 60} {
		wheel := newWheel(start)
		now := start
		all := make([]waiting, 300)
		want := map[*waiting]int64{}
		for range 20_000 {
			one := &all[random.IntN(len(all))]
			switch random.IntN(4) {
			case 0:
				wheel.set(one, 0)
				delete(want, one)
			default:
				// From the past up to more than two turns ahead, most of them near.
				at := now + int64(random.ExpFloat64()*float64(10*time.Second)) - int64(time.Second)*random.Int64N(2)
				at = max(at, 1)
				wheel.set(one, at)
				want[one] = at
			}
			if random.IntN(3) == 0 {
				now += int64(random.ExpFloat64() * float64(300*time.Millisecond))
			}
			check(t, &wheel, want, now)
		}
		if most := firstSlot + wheelSlots + len(all); len(wheel.all) > most {
			t.Errorf("%d places for %d timers", len(wheel.all), len(all))
		}
	}
}

// check takes everything due off both, and compares what is next.
func check(t *testing.T, wheel *timers[*waiting], want map[*waiting]int64, now int64) {
	t.Helper()
	for one, some := wheel.due(now); some; one, some = wheel.due(now) {
		at, ok := want[one]
		if !ok || at > now || one.timer != 0 {
			t.Fatalf("at %d a timer for %d came (%v)", now, at, ok)
		}
		delete(want, one)
	}
	first := int64(0)
	for _, at := range want {
		if at <= now {
			t.Fatalf("at %d a timer for %d did not come", now, at)
		}
		if first == 0 || at < first {
			first = at
		}
	}
	next := wheel.next()
	if (next == 0) != (first == 0) || next > first {
		t.Fatalf("at %d next is %d, want at most %d", now, next, first)
	}
	// It may be early by what later turns keep in a slot, never so that waiting for it is idle: a tick, or one a turn.
	if next != 0 && next <= now-1<<tickShift {
		t.Fatalf("at %d next is %d: the worker would spin", now, next)
	}
}

// TestTimersDoNotSpin waits as the worker does: each wait must end behind the last one.
func TestTimersDoNotSpin(t *testing.T) {
	now := int64(time.Hour)
	wheel := newWheel(now)
	var one waiting
	wheel.set(&one, now+int64(50*time.Second))
	waits := 0
	for one.timer != 0 {
		next := wheel.next()
		if next == 0 {
			t.Fatal("the timer is lost")
		}
		now = (next>>tickShift + 1) << tickShift
		wheel.due(now)
		waits++
	}
	if waits > 8 || now < int64(time.Hour)+int64(50*time.Second) || now > int64(time.Hour)+int64(50*time.Second)+2<<tickShift {
		t.Errorf("came after %d waits at %v", waits, time.Duration(now))
	}
}

func BenchmarkTimers(b *testing.B) {
	now := int64(time.Hour)
	wheel := newWheel(now)
	all := make([]waiting, 100_000)
	for i := range all {
		wheel.set(&all[i], now+int64(i)*int64(300*time.Microsecond))
	}
	for i := 0; b.Loop(); i++ {
		wheel.set(&all[i%len(all)], now+int64(i%len(all))*int64(100*time.Microsecond))
	}
}
