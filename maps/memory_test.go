// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
)

// What a connection may take of the kernel's memory, in bytes: two entries and its part of the table.
var memoryGoal = map[string]float64{"v4": 320, "v6": 450}

// kernelMemory is what the kernel holds, in bytes.
type kernelMemory struct {
	slabs  map[string]float64 // objects in use, each with its part of a slab, by cache: those that map entries come from
	tables float64            // what is too large for a slab: a table's buckets, its counters for each CPU
	all    float64            // as the kernel sums it up: the slabs of everybody
}

// since is what slabs have taken since before. A cache that holds less does not count: somebody else has freed something.
func (m kernelMemory) since(before kernelMemory) (sum float64) {
	for name, now := range m.slabs {
		sum += max(0, now-before.slabs[name])
	}
	return sum
}

func readKernelMemory(tb testing.TB) kernelMemory {
	tb.Helper()
	m := kernelMemory{slabs: make(map[string]float64)}
	text, err := os.ReadFile("/proc/slabinfo")
	must(tb, err)
	for line := range strings.Lines(string(text)) {
		var name string
		var used, objects, size, perSlab, pages float64
		_, err := fmt.Sscanf(line, "%s %f %f %f %f %f", &name, &used, &objects, &size, &perSlab, &pages)
		if err == nil && strings.HasPrefix(name, "kmalloc-") {
			m.slabs[name] = used * pages * float64(os.Getpagesize()) / perSlab
		}
	}
	text, err = os.ReadFile("/proc/meminfo")
	must(tb, err)
	for line := range strings.Lines(string(text)) {
		var name string
		var kilobytes float64
		if n, _ := fmt.Sscanf(line, "%s %f kB", &name, &kilobytes); n != 2 {
			continue
		}
		switch name {
		case "Slab:":
			m.all = kilobytes * 1024
		case "VmallocUsed:", "Percpu:":
			m.tables += kilobytes * 1024
		}
	}
	if len(m.slabs) == 0 || m.tables == 0 || m.all == 0 {
		tb.Fatalf("memory cannot be read: %+v", m)
	}
	return m
}

// manyFlows are the jobs that write a table of one family, with what the empty table takes, and how to close both.
func manyFlows(tb testing.TB, f family, entries int) (jobs *Jobs, empty float64, closeAll func()) {
	tb.Helper()
	must(tb, rlimit.RemoveMemlock())
	spec := testSpec(tb, settings{workers: 1, ringSize: defaultRing})
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return name != ProgramJobs })
	name := bpfMapFlows4
	if f.client.Addr().Is6() {
		name = bpfMapFlows6
	}
	spec.Maps[name].MaxEntries = uint32(entries)
	before := readKernelMemory(tb)
	table, err := ebpf.NewMap(spec.Maps[name])
	must(tb, err)
	empty = readKernelMemory(tb).tables - before.tables
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{name: table}})
	must(tb, err)
	jobs, err = NewJobs(coll.Programs[ProgramJobs], coll.Maps[MapJobs], 0)
	must(tb, err)
	return jobs, empty, func() {
		must(tb, jobs.Close())
		coll.Close()
		must(tb, table.Close())
	}
}

// awaitFreed waits until most of what was taken is given back, and no more is: the kernel does so on its own time, and what
// is measured next must not meet it. It is no error if somebody else takes as much meanwhile.
func awaitFreed(tb testing.TB, before kernelMemory, took float64) {
	tb.Helper()
	last := took
	for range 100 {
		now := readKernelMemory(tb)
		left := max(now.since(before), now.all-before.all)
		if left < took/2 && left >= last {
			return
		}
		last = left
		time.Sleep(100 * time.Millisecond)
	}
}

// memoryOf binds connections as the engine does, each of another client, in a table that has room for them and no more:
// bytes by connection of their entries, of the table, and of all slabs of the machine.
func memoryOf(tb testing.TB, f family, connections int) (entries, table, all float64) {
	tb.Helper()
	needRoot(tb)
	jobs, empty, closeAll := manyFlows(tb, f, 2*connections)
	before := readKernelMemory(tb)
	for n := range connections {
		must(tb, jobs.Bind(f.pairOfMany(n), false))
	}
	after, by := readKernelMemory(tb), float64(connections)
	took := after.since(before)
	closeAll()
	awaitFreed(tb, before, took)
	return took / by, empty / by, (after.all - before.all) / by
}

// pairOfMany is a flow of a client address of its own.
func (f family) pairOfMany(n int) *Pair {
	p := f.pairOf(0)
	client := f.client.Addr().AsSlice()
	binary.BigEndian.PutUint32(client[len(client)-4:], 10<<24+uint32(n))
	addr, _ := netip.AddrFromSlice(client)
	p.Client.Src = netip.AddrPortFrom(addr, f.client.Port())
	p.Backend.Dst = netip.AddrPortFrom(f.source.Addr(), uint16(n))
	backend := f.backend.Addr().AsSlice()
	backend[len(backend)-1] = byte(n >> 16) // a port is not enough for all
	addr, _ = netip.AddrFromSlice(backend)
	p.Backend.Src = netip.AddrPortFrom(addr, f.backend.Port())
	p.Up.To, p.Down.To = p.Backend.Reverse(), p.Client.Reverse()
	return p
}

// TestMemory bounds what a connection takes. Only few are bound here, and what others on the machine take or give back
// meanwhile counts as well, so it is tried some times.
func TestMemory(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		goal := memoryGoal[f.name]
		for range 5 {
			entries, table, _ := memoryOf(t, f, 50_000)
			t.Logf("%.0f bytes a connection in entries, %.0f of the table, want %.0f in all", entries, table, goal)
			if took := entries + table; took < 1.5*goal && took > goal/1.5 {
				return
			}
		}
		t.Error("a connection takes too much of the kernel's memory, or it cannot be measured")
	})
}

// BenchmarkMemory is the same with a million connections, what limits.flows is by default.
func BenchmarkMemory(b *testing.B) {
	for _, f := range families {
		b.Run(f.name, func(b *testing.B) {
			for b.Loop() {
				entries, table, all := memoryOf(b, f, 1_000_000)
				b.ReportMetric(entries+table, "B/connection")
				b.ReportMetric(entries, "entries-B")
				b.ReportMetric(table, "table-B")
				b.ReportMetric(all, "meminfo-B")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
