// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"testing"
	"time"
)

func unused(uint16) bool { return false }

// Two workers share a range without ever meeting at a port.
func TestPortsAreSplitBetweenWorkers(t *testing.T) {
	seen := make(map[uint16]int)
	for worker := range 2 {
		p := newPorts(10000, 10000, 10010, worker, 2)
		for {
			port, ok := p.take(0, unused)
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
	p := newPorts(10000, 10000, 10002, 0, 1)
	take := func(now time.Duration) uint16 {
		t.Helper()
		port, ok := p.take(int64(now), unused)
		if !ok {
			t.Fatal("no port")
		}
		return port
	}
	first, second, third := take(0), take(0), take(0)
	if _, ok := p.take(0, unused); ok {
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

// A pool's own range begins anywhere in the instance's, and each worker keeps to the
// ports whose packets reach it.
func TestPortsOfAPartOfTheRange(t *testing.T) {
	const base, workers = 10000, 3
	for first := uint16(10000); first < 10007; first++ {
		seen := 0
		for worker := range workers {
			p := newPorts(base, first, 10008, worker, workers)
			for port, ok := p.take(0, unused); ok; port, ok = p.take(0, unused) {
				if seen++; int(port-base)%workers != worker || port < first || port > 10008 {
					t.Errorf("range from %d: worker %d has port %d", first, worker, port)
				}
			}
		}
		if seen != int(10009-first) {
			t.Errorf("range from %d: %d ports", first, seen)
		}
	}
}

// What somebody else has by another range is passed over and not lost.
func TestPortsInUse(t *testing.T) {
	p := newPorts(10000, 10000, 10003, 0, 1)
	port, ok := p.take(0, func(port uint16) bool { return port < 10002 })
	if !ok || port != 10002 {
		t.Fatalf("port %d, %v", port, ok)
	}
	for _, want := range []uint16{10003, 10000, 10001} {
		if port, ok := p.take(0, unused); !ok || port != want {
			t.Errorf("port %d, %v, want %d", port, ok, want)
		}
	}
	if _, ok := p.take(0, unused); ok {
		t.Error("a fifth port of four")
	}
}

// With source: client the backend sees the client's own numbers, which the client takes care to raise; else ours.
func TestNumbersOfSourceClient(t *testing.T) {
	h, w, _ := proxyHandshakeOf(t, []byte("hello"))
	h.options.HasTimestamps, h.options.TSVal = true, 777
	w.now = int64(time.Hour)
	a := &h.attempt
	a.prefix = []byte("PROXY out")
	a.local = local{AddrPort: h.client}
	h.number(w)
	if a.start() != h.start() || a.tsval != 777 || h.backendClock(w) != 777 {
		t.Errorf("the stream starts at %d of the client and at %d of ours; TSval %d, now %d", h.start(), a.start(), a.tsval, h.backendClock(w))
	}
	up, _ := h.entries(w, Hop{})
	if up.Flow.Seq != 0 || up.Flow.Tsval != 0 {
		t.Errorf("the rewrite adds %d to the numbers and %d to the timestamps", up.Flow.Seq, up.Flow.Tsval)
	}
	a.local = local{netip.MustParseAddrPort("198.51.100.1:10000"), &ports{}}
	h.number(w)
	if a.start() == h.start() || a.tsval == 777 {
		t.Errorf("our own port has the client's numbers")
	}
}

// Ports are scarce when less than half of them are free, resting or never used.
func TestPortsScarce(t *testing.T) {
	p := newPorts(10000, 10000, 10099, 1, 2) // fifty
	var taken []uint16
	for n := range 50 {
		if want := n > 25; p.scarce() != want {
			t.Errorf("with %d of 50 taken: scarce is %v", n, !want)
		}
		port, ok := p.take(0, unused)
		if !ok {
			t.Fatal("no port")
		}
		taken = append(taken, port)
	}
	for n, port := range taken {
		if want := n < 25; p.scarce() != want {
			t.Errorf("with %d of 50 given back: scarce is %v", n, !want)
		}
		p.give(0, port, n%2 == 0)
	}
}
