// SPDX-License-Identifier: Apache-2.0

package engine

import "container/heap"

// timer is embedded in what waits; at 0 it is not running.
type timer struct {
	at    int64 // CLOCK_MONOTONIC ns
	index int   // in the heap
	owner interface{ expire(*worker) }
}

// timers is a heap, the next one first.
type timers []*timer

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].at < t[j].at }
func (t timers) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].index, t[j].index = i, j
}

// Push is heap.Interface's.
func (t *timers) Push(x any) {
	one := x.(*timer)
	one.index = len(*t)
	*t = append(*t, one)
}

// Pop is heap.Interface's.
func (t *timers) Pop() any {
	last := len(*t) - 1
	one := (*t)[last]
	(*t)[last] = nil
	*t = (*t)[:last]
	return one
}

// set starts, moves or, with at 0, stops a timer.
func (t *timers) set(one *timer, at int64) {
	switch {
	case one.at == 0 && at == 0:
	case one.at == 0:
		one.at = at
		heap.Push(t, one)
	case at == 0:
		heap.Remove(t, one.index)
		one.at = 0
	default:
		one.at = at
		heap.Fix(t, one.index)
	}
}

// next is when the first timer ends, 0 if none runs.
func (t timers) next() int64 {
	if len(t) == 0 {
		return 0
	}
	return t[0].at
}

// due takes the first timer off if its time has come.
func (t *timers) due(now int64) *timer {
	if len(*t) == 0 || (*t)[0].at > now {
		return nil
	}
	one := heap.Pop(t).(*timer)
	one.at = 0
	return one
}
