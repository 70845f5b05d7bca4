// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"snilb/maps"
)

// cpuTime is what this process has used: on a machine with other work the clock says little.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkAdopt takes over a million flows, with their journal: in a few seconds, of which connections that begin meanwhile wait.
func BenchmarkAdopt(b *testing.B) {
	const flows = 1_000_000
	k, path := newKernel(b, 2, flows), filepath.Join(b.TempDir(), "flows")
	wide := func(o *Options) {
		o.Journal, o.SourcePortFirst, o.SourcePortLast, o.SourcePortsOwn = path, 1024, 65535, [2]uint16{1024, 65535}
	}
	for n := range flows {
		p := pairOf(0, n%2, false, true)
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 40000)
		local := netip.AddrPortFrom(p.Up.To.Src.Addr(), uint16(1024+n%64000))
		backend := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + n/64000)}), 443)
		p.Client.Src, p.Down.To.Dst = client, client
		p.Backend = maps.Tuple{Src: backend, Dst: local}
		p.Up.To = p.Backend.Reverse()
		p.Up.Flow.Generation, p.Down.Flow.Generation = uint16(n), uint16(n)
		k.bind(p)
	}
	start := func() *daemon {
		d := k.start(firstPlan(b, memoryRoutes(), KnownIDs(path)), wide)
		if d.Bound() != flows {
			b.Fatalf("%d flows", d.Bound())
		}
		return d
	}
	d := start()
	for _, w := range d.workers {
		for i, n := range w.flows.order {
			w.flows.setName(w.flows.at(n), fmt.Sprintf("host-%d.example.com", i%1000))
		}
	}
	d.journal.plan = nil
	d.journal.step()
	size := float64(d.journal.size)
	d = nil
	for b.Loop() {
		begin, cpu := time.Now(), cpuTime(b)
		start()
		b.ReportMetric(time.Since(begin).Seconds(), "s")
		b.ReportMetric((cpuTime(b) - cpu).Seconds(), "cpu-s")
	}
	b.ReportMetric(size/flows, "journal-B/flow")
	b.ReportMetric(0, "ns/op")
}
