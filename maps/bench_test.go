// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// Nanoseconds a packet takes in a program, by repeated program runs: one packet over
// and over, so hot in every cache. A run finds the packet as the last one left it,
// so a small program in front writes its bytes again; what that costs is the first
// figure, and is part of the others.

// restoring is a program that writes the frame anew and then jumps into `into`.
func (r *rig) restoring(into *ebpf.Program, frame []byte) *ebpf.Program {
	r.Helper()
	template := r.newMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(frame)), MaxEntries: 1})
	must(r, template.Put(uint32(0), frame))
	jump := r.newMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(r, jump.Put(uint32(0), into))
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.Mov.Imm(asm.R2, 0),
			asm.LoadMapValue(asm.R3, template.FD(), 0),
			asm.Mov.Imm(asm.R4, int32(len(frame))),
			asm.Mov.Imm(asm.R5, 0),
			asm.FnSkbStoreBytes.Call(),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.LoadMapPtr(asm.R2, jump.FD()),
			asm.Mov.Imm(asm.R3, 0),
			asm.FnTailCall.Call(),
			asm.Mov.Imm(asm.R0, 99),
			asm.Return(),
		},
	})
	must(r, err)
	r.Cleanup(func() { must(r, prog.Close()) })
	return prog
}

func (r *rig) newMap(spec *ebpf.MapSpec) *ebpf.Map {
	r.Helper()
	m, err := ebpf.NewMap(spec)
	must(r, err)
	r.Cleanup(func() { must(r, m.Close()) })
	return m
}

// benchmark lets the kernel repeat a program and reports its average.
func (r *rig) benchmark(b *testing.B, into *ebpf.Program, frame []byte, action int) {
	b.Helper()
	r = r.with(b)
	prog := r.restoring(into, frame)
	const batch = 1000
	var total time.Duration
	var batches int
	r.setClock()
	for b.Loop() {
		var ret uint32
		r.ns.try(b, func() (err error) {
			var average time.Duration
			ret, average, err = prog.Benchmark(frame, batch, nil)
			total += average
			return err
		})
		if int(int32(ret)) != action {
			b.Fatalf("action is %d, want %d", int32(ret), action)
		}
		batches++
		r.events(0)
		if batches%1000 == 0 {
			r.setClock()
		}
	}
	b.ReportMetric(float64(total.Nanoseconds())/float64(batches), "ns/packet")
	b.ReportMetric(0, "ns/op") // of a batch, with what Go does around it
}

func BenchmarkPrograms(b *testing.B) {
	r := newFlowRig(b, settings{ringSize: 4 << 20})
	nothing, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	must(b, err)
	defer nothing.Close() //nolint:errcheck // gone with the test
	client, backend := r.coll.Programs[ProgramClient], r.coll.Programs[ProgramBackend]
	for _, f := range families {
		for _, leg := range []Leg{LegClient, LegBackend} {
			e := f.entry(leg)
			must(b, r.tables.InsertFlow(leg, f.tuple(leg), &e))
		}
		bound, stranger := f.clientSegment(ack), f.clientSegment(syn)
		bound.options = timestamps(0)
		stranger.src, stranger.options = f.source, []byte{2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7}
		data := bound
		data.payload = make([]byte, 1400)
		odd := bound
		odd.options = timestamps(1)
		back := f.backendSegment(ack)
		back.options, back.payload = timestamps(0), data.payload
		other := bound
		other.dst = f.backend
		f.client = f.source // no flow is bound to it
		hi := r.hello(f)
		hi.payload = bytes.Repeat([]byte{0x16}, 517)

		b.Run(f.name+"/restoring alone", func(b *testing.B) { r.benchmark(b, nothing, bound.frame(), next) })
		b.Run(f.name+"/not ours", func(b *testing.B) { r.benchmark(b, client, other.frame(), next) })
		b.Run(f.name+"/SYN answered", func(b *testing.B) { r.benchmark(b, client, stranger.frame(), redirect) })
		b.Run(f.name+"/hello of 517 bytes", func(b *testing.B) { r.benchmark(b, client, hi.frame(), shot) })
		b.Run(f.name+"/flow, ACK", func(b *testing.B) { r.benchmark(b, client, bound.frame(), redirect) })
		b.Run(f.name+"/flow, odd options", func(b *testing.B) { r.benchmark(b, client, odd.frame(), redirect) })
		b.Run(f.name+"/flow, 1400 bytes", func(b *testing.B) { r.benchmark(b, client, data.frame(), redirect) })
		b.Run(f.name+"/flow back, 1400 bytes", func(b *testing.B) { r.benchmark(b, backend, back.frame(), redirect) })
	}
	// Not counted run by run: the sum is not this rig's to check.
	*r.total = sumOf(r.counters())
}
