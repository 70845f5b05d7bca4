// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"testing"

	"snilb/maps"
)

// TestFlowsListed lists more flows than are looked at at once, of which some end and some begin meanwhile: nobody waits for who reads
// the list, each that is there all the time is in it once, and has what the kernel counted.
func TestFlowsListed(t *testing.T) {
	const workers, flows = 2, 3 * chunkFlows
	k := newKernel(t, workers, flows)
	ends, pairs := make(map[string]bool), make(map[string]*maps.Pair)
	for n := range flows {
		p := pairOf(n, n%workers, n%4 < 2, false)
		p.Up.Flow.Bytes, p.Down.Flow.Bytes = uint64(1+n), uint64(10+n)
		p.Up.Flow.LastSeen -= 5_000_000
		p.Down.Flow.LastSeen -= 2000
		k.bind(p)
		pairs[p.Client.Src.String()] = p
	}
	d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
	w := d.workers[1]
	later := connection{netip.MustParseAddrPort("192.0.2.77:77"), netip.MustParseAddrPort("192.0.2.1:443")}
	listed, changed := make(map[string]int), false
	for f := range d.Flows() {
		listed[f.Client]++
		for _, w := range d.workers {
			if !w.mu.TryLock() {
				t.Fatal("a worker has to wait while a flow is listed")
			}
			w.mu.Unlock()
		}
		if ends[f.Client] || f.BytesOut != f.BytesIn+9 || f.Idle < 1.5 || f.Idle > 600 || f.State != "open" {
			t.Errorf("%+v, want its bytes, idle for 2 s, and not if it has ended", f)
		}
		if changed || len(listed) <= flows/workers {
			continue
		}
		changed = true // in the middle of the second worker's
		v := w.flows.wayOf(w.flows.at(w.flows.order[0]))
		w.flows.add(later, netip.MustParseAddrPort("198.51.100.1:77"), v, "", later.client).bound = d.clock.now()
		for range chunkFlows {
			f := w.flows.at(w.flows.order[w.flows.len()-2])
			client := f.client.addrPort().String()
			ends[client] = true
			f.remove(w, "idle")
			p := pairs[client]
			p.Up.Flow.Generation++
			p.Up.Flow.Bytes, p.Down.Flow.Bytes = 0, 0
			k.bind(p) // another connection by now
		}
	}
	seen := 0
	for client, times := range listed {
		if times != 1 || client == later.client.String() {
			t.Errorf("%s is listed %d times", client, times)
		}
		if !ends[client] {
			seen++
		}
	}
	if seen != flows-len(ends) || len(ends) != chunkFlows {
		t.Errorf("%d that were there all the time are listed, want %d; %d ended meanwhile", seen, flows-len(ends), len(ends))
	}
	n := 0
	for range d.Flows() {
		if n++; n == 10 {
			break
		}
	}
}
