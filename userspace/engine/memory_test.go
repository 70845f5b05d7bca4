// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"snilb/userspace/packet"
)

// flowGoal is what a bound flow may take of the daemon's memory, in bytes.
const flowGoal = 200

// memoryRoutes have room for a million connections, each with a port of ours, and many names.
func memoryRoutes() string {
	var backends []string
	for n := range 20 {
		backends = append(backends, fmt.Sprintf("\"192.0.2.%d:443\"", 10+n))
	}
	return `
listen: ":443"
pools:
  p: {backends: [` + strings.Join(backends, ", ") + `]}
routes: [{sni: "*.example.com", pool: p}]
`
}

// hold has a worker bind that many connections, from the hello on as the engine does it, but for the kernel's part.
func hold(tb testing.TB, connections int) *desk {
	d := newDeskOf(tb, memoryRoutes())
	d.e.o.SourcePortFirst, d.e.o.SourcePortLast, d.e.o.SourcePortsOwn = 1024, 65535, [2]uint16{1024, 65535}
	hellos := make([][]byte, min(1000, connections/10))
	for n := range hellos {
		hellos[n] = helloOf(fmt.Sprintf("host-%d.example.com", n))
	}
	for n := range connections {
		c := client{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 40000), 1000}
		d.sends(c, 1, hellos[n%len(hellos)], packet.PSH)
		h := d.handshake(c)
		if h == nil || h.phase != connecting {
			tb.Fatalf("connection %d is not about to be bound: %s", n, d.log.String())
		}
		h.settle(d.worker)
		d.out = nil
	}
	return d
}

// daemonMemory is bytes of the heap that live, those of the pages that they are in, and what the process has of the machine.
type daemonMemory struct{ heap, inUse, resident float64 }

func memoryNow(tb testing.TB) daemonMemory {
	tb.Helper()
	var m runtime.MemStats
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		tb.Fatal(err)
	}
	var size, pages float64
	if _, err := fmt.Sscan(string(text), &size, &pages); err != nil {
		tb.Fatal(err)
	}
	runtime.GC()
	runtime.GC() // what the first one made garbage
	runtime.ReadMemStats(&m)
	return daemonMemory{float64(m.HeapAlloc), float64(m.HeapInuse), pages * float64(os.Getpagesize())}
}

// memoryOf is what a connection takes.
func memoryOf(tb testing.TB, connections int) daemonMemory {
	tb.Helper()
	before := memoryNow(tb)
	d := hold(tb, connections)
	after, by := memoryNow(tb), float64(connections)
	if got := d.e.Bound(); got != connections {
		tb.Fatalf("%d flows are bound, want %d", got, connections)
	}
	runtime.KeepAlive(d)
	return daemonMemory{(after.heap - before.heap) / by, (after.inUse - before.inUse) / by, (after.resident - before.resident) / by}
}

// TestMemory bounds what the worker keeps of a connection.
func TestMemory(t *testing.T) {
	heap := memoryOf(t, 20_000).heap
	t.Logf("%.0f bytes a connection", heap)
	if heap > flowGoal*1.25 {
		t.Errorf("the worker keeps %.0f bytes of a connection, want at most %d", heap, flowGoal)
	}
}

// BenchmarkMemory is the same with a million connections. The process has more of the machine than it uses: garbage, which
// is collected when it is as much as what lives.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		m := memoryOf(b, 1_000_000)
		b.ReportMetric(m.heap, "B/connection")
		b.ReportMetric(m.inUse, "in-use-B")
		b.ReportMetric(m.resident, "resident-B")
	}
	b.ReportMetric(0, "ns/op")
}
