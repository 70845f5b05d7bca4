// SPDX-License-Identifier: Apache-2.0

// Package ringbuftest writes into ring buffer maps, for tests of what reads them.
package ringbuftest

import (
	"bytes"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// RecordSize is the bytes of a record: no multiple of the eight that records are aligned to.
const RecordSize = 197

// Producer writes records into a ring buffer map by a kernel program.
type Producer struct {
	Ring *ebpf.Map // of a page

	t    *testing.T
	prog *ebpf.Program
}

// New makes a ring, and a program that writes the first bytes of its packet to it, with flags of bpf_ringbuf_output. It
// skips without root, which CI has.
func New(t *testing.T, flags int32) *Producer {
	t.Helper()
	NeedRoot(t)
	ring, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(os.Getpagesize())})
	if err != nil {
		t.Fatal(err)
	}
	const room = -(RecordSize + 7) / 8 * 8
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, 0),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, room),
			asm.Mov.Imm(asm.R4, RecordSize),
			asm.FnSkbLoadBytes.Call(),
			asm.LoadMapPtr(asm.R1, ring.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, room),
			asm.Mov.Imm(asm.R3, RecordSize),
			asm.Mov.Imm(asm.R4, flags),
			asm.FnRingbufOutput.Call(),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = prog.Close()
		_ = ring.Close()
	})
	return &Producer{ring, t, prog}
}

// Write writes a record of one byte over and over. Returns false when the ring is full.
func (p *Producer) Write(fill byte) bool { return p.Put(bytes.Repeat([]byte{fill}, RecordSize)) }

// Put writes a record with that begin.
func (p *Producer) Put(data []byte) bool {
	ret, err := p.prog.Run(&ebpf.RunOptions{Data: append(bytes.Clone(data), make([]byte, RecordSize-len(data))...)})
	if err != nil {
		p.t.Error(err)
	}
	return ret == 0
}

// NeedRoot skips without root, which CI has.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}
