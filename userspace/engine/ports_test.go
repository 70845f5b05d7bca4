// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"testing"
	"time"
)

var testPath = pathKey{
	source:  netip.MustParseAddr("198.51.100.1"),
	backend: netip.MustParseAddrPort("198.51.100.11:443"),
}

// Two workers share a range without ever meeting at a port.
func TestPortsAreSplitBetweenWorkers(t *testing.T) {
	seen := make(map[uint16]int)
	for worker := range 2 {
		p := newPorts(testPath, 10000, 10010, worker, 2)
		for {
			port, ok := p.take(0, lease{})
			if !ok {
				break
			}
			if int(port-10000)%2 != worker {
				t.Errorf("worker %d has port %d, whose events go to the other", worker, port)
			}
			seen[port]++
		}
	}
	if len(seen) != 11 {
		t.Errorf("%d ports of 11 were handed out", len(seen))
	}
	for port, n := range seen {
		if n != 1 {
			t.Errorf("port %d was handed out %d times", port, n)
		}
	}
}

func TestPortsOldestFirst(t *testing.T) {
	p := newPorts(testPath, 10000, 10002, 0, 1)
	take := func(now time.Duration) uint16 {
		t.Helper()
		port, ok := p.take(int64(now), lease{})
		if !ok {
			t.Fatal("no port")
		}
		return port
	}
	first, second, third := take(0), take(0), take(0)
	if _, ok := p.take(0, lease{}); ok {
		t.Fatal("a fourth port of three")
	}
	p.give(0, second, false)
	p.give(0, first, true) // rests
	p.give(0, third, false)
	for i, want := range []uint16{second, third} {
		if got := take(time.Second); got != want {
			t.Errorf("take %d: port %d, want %d: a resting port comes last", i, got, want)
		}
	}
	if got := take(time.Second); got != first {
		t.Errorf("port %d, want %d: a resting port is better than none", got, first)
	}
	p.give(0, first, true)
	p.give(int64(time.Minute), second, false)
	if got := take(restAfterClose + time.Second); got != second {
		t.Errorf("port %d, want %d, which was free before the other had rested", got, second)
	}
	if got := take(restAfterClose + time.Second); got != first {
		t.Errorf("port %d, want %d", got, first)
	}
}

func TestQueueGivesMemoryBack(t *testing.T) {
	var q queue[int]
	for i := range 100_000 {
		q.push(i)
		if got, ok := q.pop(); !ok || got != i {
			t.Fatalf("pop %d: %d, %v", i, got, ok)
		}
	}
	if cap(q.items) > 1024 {
		t.Errorf("%d items are kept for an empty queue", cap(q.items))
	}
}
