// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
)

// tablesOnly are empty flow tables, and nothing else.
func tablesOnly(t *testing.T, entries int) *Tables {
	t.Helper()
	needRoot(t)
	must(t, rlimit.RemoveMemlock())
	spec := testSpec(t, settings{workers: 1, ringSize: defaultRing})
	open := func(name string) *ebpf.Map {
		spec.Maps[name].MaxEntries = uint32(entries)
		m, err := ebpf.NewMap(spec.Maps[name])
		must(t, err)
		t.Cleanup(func() { _ = m.Close() })
		return m
	}
	return &Tables{Flows4: open(bpfMapFlows4), Flows6: open(bpfMapFlows6)}
}

// read is an entry as somebody was given it.
type read struct {
	leg   Leg
	tuple Tuple
	entry Entry
}

// TestFlowsByWorker reads tables of several batches: each worker gets its entries once, and nobody else's; and one by one all are the
// same.
func TestFlowsByWorker(t *testing.T) {
	const entries, workers = 3*batchRows + 100, 3
	tables := tablesOnly(t, entries)
	want, wantHops := make(map[read]int), make(map[string]int)
	for _, f := range families {
		for n := range entries {
			leg, worker := Leg(n%2), n%7%workers
			control := FlowControl(uint16(n), n%15, worker)
			if n%11 == 0 {
				control |= FlowPending
			}
			at := netip.AddrPortFrom(nthAddr(f.client.Addr(), n), uint16(1+n))
			e := read{leg, Tuple{Src: at, Dst: f.vip}, Entry{Flow: Flow{Control: control, Generation: uint16(n)}, To: Tuple{Src: f.vip, Dst: at}}}
			must(t, tables.InsertFlow(e.leg, e.tuple, &e.entry))
			e.entry.Flow.Sport, e.entry.Flow.Dport = Port(e.entry.To.Src.Port()), Port(e.entry.To.Dst.Port())
			want[e] = worker
			if control&FlowPending == 0 {
				wantHops[fmt.Sprint(uint16(n), at.Addr())]++
			}
		}
	}
	got := make([][]read, workers)
	var each []func(Leg, Tuple, *Entry)
	for n := range workers {
		each = append(each, func(leg Leg, tuple Tuple, e *Entry) {
			if got[n] = append(got[n], read{leg, tuple, *e}); n == 1 && len(got[n])%100 == 0 {
				time.Sleep(100 * time.Microsecond) // what is read must wait for the slow
			}
		})
	}
	must(t, tables.FlowsByWorker(each))
	for n, all := range got {
		for _, one := range all {
			if worker, ok := want[one]; !ok || worker != n {
				t.Fatalf("worker %d was given %+v (of worker %d, or a second time)", n, one, worker)
			}
			delete(want, one)
		}
	}
	if len(want) > 0 {
		t.Errorf("%d entries were given to nobody", len(want))
	}
	all := slices.Concat(got...)
	must(t, tables.Flows(func(leg Leg, tuple Tuple, e *Entry) {
		want[read{leg, tuple, *e}]++
	}))
	for _, one := range all {
		if want[one] != 1 {
			t.Fatalf("one by one %+v comes %d times", one, want[one])
		}
	}
	must(t, tables.FlowHops(func(index uint16, dst netip.Addr) { wantHops[fmt.Sprint(index, dst)]-- }))
	for hop, n := range wantHops {
		if n != 0 {
			t.Fatalf("hop and destination %s: %d times more than given", hop, n)
		}
	}
	if err := tables.FlowsByWorker(each[:workers-1]); err == nil {
		t.Error("no error for an entry of a worker that is not there")
	}
}
