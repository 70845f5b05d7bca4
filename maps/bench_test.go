// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// Nanoseconds a packet takes in a program, by repeated program runs. A run finds the
// packet as the last one left it, so a small program in front writes its headers again;
// what that costs is "restoring alone", and is part of the other figures. One packet
// over and over is hot in every cache; a cold one has another client each time, of
// coldFlows that are met in no order that a cache could foresee.

const (
	coldFlows = 1 << 17
	// Odd, and so a permutation of the low bits: neighbours in time are none in the table.
	coldStride = 0x9e3779b1
	// Where the restoring program finds the packet, by type of program.
	skbData, xdpData = 76, 0
	// What it restores: all headers there can be.
	restored = 14 + 4 + 40 + 60
)

// restoring is a program that writes the headers of the frame anew and then jumps into
// `into`. flows above 1 makes it another client's, or backend's, each time.
func (r *rig) restoring(into *ebpf.Program, frame []byte, l3 int, flows uint32) *ebpf.Program {
	r.Helper()
	count := r.newMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	head := frame[:min(len(frame), restored)&^7]
	data := int16(skbData)
	if into.Type() == ebpf.XDP {
		data = xdpData
	}
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R6, data, asm.Word),
		asm.LoadMem(asm.R8, asm.R6, data+4, asm.Word),
		asm.Mov.Reg(asm.R2, asm.R7),
		asm.Add.Imm(asm.R2, int32(len(head))),
		asm.JGT.Reg(asm.R2, asm.R8, "end"),
	}
	for at := 0; at < len(head); at += 8 {
		code = append(code,
			asm.LoadImm(asm.R2, int64(binary.NativeEndian.Uint64(head[at:])), asm.DWord),
			asm.StoreMem(asm.R7, int16(at), asm.R2, asm.DWord))
	}
	if flows > 1 {
		source := l3 + 12
		if frame[l3]>>4 == 6 {
			source = l3 + 8 + 12
		}
		base := binary.BigEndian.Uint32(frame[source:])
		code = append(code,
			asm.LoadMapValue(asm.R1, count.FD(), 0),
			asm.LoadMem(asm.R2, asm.R1, 0, asm.DWord),
			asm.Add.Imm(asm.R2, 1),
			asm.StoreMem(asm.R1, 0, asm.R2, asm.DWord),
			asm.LoadImm(asm.R3, coldStride, asm.DWord),
			asm.Mul.Reg(asm.R2, asm.R3),
			asm.And.Imm(asm.R2, int32(flows-1)),
			asm.LoadImm(asm.R3, int64(base), asm.DWord),
			asm.Add.Reg(asm.R2, asm.R3),
			asm.HostTo(asm.BE, asm.R2, asm.Word),
			asm.StoreMem(asm.R7, int16(source), asm.R2, asm.Word))
	}
	code = append(code, r.jumpTo(into)...)
	return r.newProgram(into.Type(), code)
}

// benchCase is a packet and what becomes of it.
type benchCase struct {
	name   string
	leg    Leg
	s      segment
	action int
	flows  uint32 // that it is rotated over
}

// benchmark lets the kernel repeat a program and reports its average.
func (r *rig) benchmark(b *testing.B, into *ebpf.Program, c benchCase) {
	b.Helper()
	r = r.with(b)
	frame := c.s.frame()
	prog := r.restoring(into, frame, c.s.l3(), c.flows)
	const batch = 10000
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
		if action := r.said(ret); action != c.action {
			b.Fatalf("action is %d, want %d", action, c.action)
		}
		batches++
		r.drain()
		if batches%100 == 0 {
			r.setClock()
		}
	}
	b.ReportMetric(float64(total.Nanoseconds())/float64(batches), "ns/packet")
	b.ReportMetric(0, "ns/op") // of a batch, with what Go does around it
}

// drain empties the rings unread.
func (r *rig) drain() {
	for _, reader := range r.readers {
		for reader.AvailableBytes() > 0 {
			if _, err := reader.Read(); err != nil {
				break
			}
		}
	}
}

var benchSack = []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 1, 5, 18, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 8, 0}

// linuxSYN is the option layout of a Linux SYN.
var linuxSYN = []byte{2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7}

// benchCases are packets of one bound flow, and of none.
func (r *rig) benchCases(f family) []benchCase {
	ackOnly, back := f.clientSegment(ack), f.backendSegment(ack)
	ackOnly.options, back.options = timestamps(0), timestamps(0)
	data, sack, odd, tagged := ackOnly, ackOnly, ackOnly, ackOnly
	data.payload = make([]byte, 1400)
	back.payload = data.payload
	sack.options = benchSack
	odd.options = timestamps(1)
	tagged.tags = []vlan{{0x8100, 100}}
	other := ackOnly
	other.dst = f.backend
	stranger := f.clientSegment(syn)
	stranger.src, stranger.options = f.source, linuxSYN
	windows := stranger
	windows.options = []byte{2, 4, 5, 180, 1, 3, 3, 8, 1, 1, 4, 2}
	unknown := ackOnly
	unknown.src, unknown.payload = f.source, []byte{1}
	spoofed := f
	spoofed.client = f.source // no flow is bound to it
	hi := r.hello(spoofed)
	hi.payload = bytes.Repeat([]byte{0x16}, 517)
	return []benchCase{
		{"not ours", LegClient, other, next, 1},
		{"SYN answered", LegClient, stranger, r.back(), 1},
		{"SYN of Windows answered", LegClient, windows, r.back(), 1},
		{"SYNs of a flood", LegClient, stranger, r.back(), coldFlows},
		{"hello of 517 bytes", LegClient, hi, shot, 1},
		{"unknown flow", LegClient, unknown, shot, 1},
		{"flow, ACK", LegClient, ackOnly, redirect, 1},
		{"flow, SACK", LegClient, sack, redirect, 1},
		{"flow, odd options", LegClient, odd, redirect, 1},
		{"flow, 1400 bytes", LegClient, data, redirect, 1},
		{"flow, 1400 bytes, VLAN", LegClient, tagged, redirect, 1},
		{"flow back, 1400 bytes", LegBackend, back, redirect, 1},
	}
}

// nothing is a program that passes everything on.
func (r *rig) nothing() *ebpf.Program {
	r.Helper()
	kind, verdict := ebpf.SchedCLS, int32(next)
	if r.set.xdp {
		kind, verdict = ebpf.XDP, xdpPass
	}
	return r.newProgram(kind, asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()})
}

// benchHop is a next hop of another interface, which XDP sends to as well.
func (r *rig) benchHop(tagged bool) {
	r.Helper()
	hop := Nexthop{Ifindex: 1, Mtu: nexthopMTU, XdpIfindex: 99, Dmac: [6]uint8{2, 1}, Smac: [6]uint8{2, 2}}
	if tagged {
		hop.VlanProto, hop.VlanId = Port(0x8100), Port(7)
	}
	must(r, r.tables.Nexthops.Put(uint32(nexthopIndex), &hop))
}

// fillFlows binds n flows of consecutive clients, or backends, to a leg.
func (r *rig) fillFlows(f family, leg Leg, n int) {
	r.Helper()
	e, tuple := f.entry(leg), f.tuple(leg)
	for i := range n {
		t := tuple
		t.Src = netip.AddrPortFrom(nthAddr(tuple.Src.Addr(), i), tuple.Src.Port())
		must(r, r.tables.InsertFlow(leg, t, &e))
	}
}

// nthAddr adds to the last word of an address.
func nthAddr(a netip.Addr, n int) netip.Addr {
	b := a.AsSlice()
	last := b[len(b)-4:]
	binary.BigEndian.PutUint32(last, binary.BigEndian.Uint32(last)+uint32(n))
	sum, _ := netip.AddrFromSlice(b)
	return sum
}

func eachSkin(b *testing.B, run func(b *testing.B, skin string)) {
	for _, skin := range []string{"tc", "xdp"} {
		b.Run(skin, func(b *testing.B) { run(b, skin) })
	}
}

func eachFamily(b *testing.B, run func(b *testing.B, f family)) {
	for _, f := range families {
		b.Run(f.name, func(b *testing.B) { run(b, f) })
	}
}

func newBenchRig(b *testing.B, skin string, f family, flows int) *rig {
	r := newFlowRig(b, settings{ringSize: 64 << 20, xdp: skin == "xdp", flows: 2 * max(flows, coldFlows)})
	for _, leg := range []Leg{LegClient, LegBackend} {
		r.fillFlows(f, leg, flows)
	}
	r.benchHop(false)
	b.Cleanup(func() { *r.total = sumOf(r.counters()) }) // not counted run by run
	return r
}

// BenchmarkPrograms is every kind of packet with one flow in the table.
func BenchmarkPrograms(b *testing.B) {
	eachSkin(b, func(b *testing.B, skin string) {
		eachFamily(b, func(b *testing.B, f family) {
			r := newBenchRig(b, skin, f, 1)
			alone := benchCase{"restoring alone", LegClient, f.clientSegment(ack), next, 1}
			b.Run(alone.name, func(b *testing.B) { r.benchmark(b, r.nothing(), alone) })
			for _, c := range r.benchCases(f) {
				if c.s.tags != nil && skin == "tc" {
					continue // TC takes the tag off: a repeated frame would shrink each time
				}
				r.benchHop(c.s.tags != nil)
				b.Run(c.name, func(b *testing.B) { r.benchmark(b, r.program(c.leg), c) })
			}
		})
	})
}

// BenchmarkFlows is a bound flow's packet with few and many flows in the table, the same
// flow each time and another one.
func BenchmarkFlows(b *testing.B) {
	eachSkin(b, func(b *testing.B, skin string) {
		eachFamily(b, func(b *testing.B, f family) {
			for _, flows := range []int{1, 1_000_000} {
				r := newBenchRig(b, skin, f, flows)
				for _, leg := range []Leg{LegClient, LegBackend} {
					s := f.legSegment(leg, ack)
					s.options = timestamps(0)
					for _, rotated := range []uint32{1, coldFlows} {
						if int(rotated) > flows {
							continue
						}
						c := benchCase{fmt.Sprintf("flows=%d/rotated=%d/%v", flows, rotated, leg), leg, s, redirect, rotated}
						b.Run(c.name, func(b *testing.B) { r.benchmark(b, r.program(leg), c) })
					}
				}
			}
		})
	})
}
