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
	slabs  float64 // objects in use, of the caches that map entries come from, each with its part of a slab
	tables float64 // what is too large for a slab: a table's buckets, its counters for each CPU
	all    float64 // as the kernel sums it up: the slabs of everybody
}

func readKernelMemory(tb testing.TB) (m kernelMemory) {
	tb.Helper()
	text, err := os.ReadFile("/proc/slabinfo")
	must(tb, err)
	for line := range strings.Lines(string(text)) {
		var name string
		var used, objects, size, perSlab, pages float64
		_, err := fmt.Sscanf(line, "%s %f %f %f %f %f", &name, &used, &objects, &size, &perSlab, &pages)
		if err == nil && strings.HasPrefix(name, "kmalloc-") {
			m.slabs += used * pages * float64(os.Getpagesize()) / perSlab
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
	if m.slabs == 0 || m.tables == 0 || m.all == 0 {
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

// awaitFreed waits until less than that is in use, and no more is freed: the kernel does so on its own time, and what is
// measured next must not meet it.
func awaitFreed(tb testing.TB, most float64) {
	tb.Helper()
	last := most
	for range 100 {
		now := readKernelMemory(tb).slabs
		if now < most && now >= last {
			return
		}
		last = now
		time.Sleep(100 * time.Millisecond)
	}
	tb.Error("the kernel keeps the memory of closed tables")
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
	closeAll()
	awaitFreed(tb, (before.slabs+after.slabs)/2)
	return (after.slabs - before.slabs) / by, empty / by, (after.all - before.all) / by
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

// TestMemory bounds what a connection takes by twice the goal: few are bound, and others on the machine allocate meanwhile.
func TestMemory(t *testing.T) {
	bothFamilies(t, func(t *testing.T, f family) {
		entries, table, _ := memoryOf(t, f, 50_000)
		t.Logf("%.0f bytes a connection in entries, %.0f of the table", entries, table)
		if took, goal := entries+table, memoryGoal[f.name]; took > 2*goal || entries < goal/2 {
			t.Errorf("a connection takes %.0f bytes of the kernel's memory, want about %.0f", took, goal)
		}
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
