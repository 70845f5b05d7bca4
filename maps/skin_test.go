// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// TC and XDP share all but what touches a frame, so they share their tests too: what a
// test says in TC's words, the rig says in XDP's.

// skins runs a test in a rig of each skin.
func skins(t *testing.T, make func(testing.TB, settings) *rig, set settings, test func(t *testing.T, r *rig)) {
	for _, xdp := range []bool{false, true} {
		name := "tc"
		if set.xdp = xdp; xdp {
			name = "xdp"
		}
		t.Run(name, func(t *testing.T) { test(t, make(t, set)) })
	}
}

// transmit is XDP's own way to say redirect, to the interface that a frame came from.
const transmit = 1000

// xdpPass is how XDP says next.
const xdpPass = 2

// said is a program's verdict in the words of the tests.
func (r *rig) said(verdict uint32) int {
	if !r.set.xdp {
		return int(int32(verdict))
	}
	switch verdict {
	case 1:
		return shot
	case xdpPass:
		return next
	case 3:
		return transmit
	case 4:
		return redirect
	}
	r.Errorf("XDP said %d", verdict)
	return 0
}

// program is the one that a leg's packets meet first.
func (r *rig) program(leg Leg) *ebpf.Program {
	if r.set.xdp {
		return r.coll.Programs[ProgramXDP]
	}
	return r.coll.Programs[program(leg)]
}

// back is how a frame leaves by the interface that it came from.
func (r *rig) back() int {
	if r.set.xdp && !r.set.redirectBack {
		return transmit
	}
	return redirect
}

func (r *rig) answered() want {
	return want{action: r.back(), reason: bpfReasonREASON_SYN_ANSWERED}
}

// xdpMD is the kernel's struct xdp_md.
type xdpMD struct {
	Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32
}

// runXDP takes of ctx what XDP has of it: the interface, lo where there is none.
func (r *rig) runXDP(in []byte, ctx skbuff) ([]byte, int) {
	r.Helper()
	opts := ebpf.RunOptions{
		Data: in, DataOut: make([]byte, len(in)+256),
		Context: &xdpMD{DataEnd: uint32(len(in)), IngressIfindex: max(ctx.Ifindex, 1)},
	}
	prog := r.coll.Programs[ProgramXDP]
	if r.cramped > 0 {
		prog = r.cramping(prog, in)
	}
	var ret uint32
	r.ns.try(r, func() (err error) {
		ret, err = prog.Run(&opts)
		return err
	})
	return opts.DataOut, r.said(ret)
}

// cramping is a program that moves the frame to the front, by as much as the rig is
// cramped, and then jumps into `into`.
func (r *rig) cramping(into *ebpf.Program, frame []byte) *ebpf.Program {
	r.Helper()
	content := r.newMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(frame)), MaxEntries: 1})
	must(r, content.Put(uint32(0), frame))
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Mov.Imm(asm.R2, -r.cramped),
		asm.FnXdpAdjustHead.Call(),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 0),
		asm.LoadMapValue(asm.R3, content.FD(), 0),
		asm.Mov.Imm(asm.R4, int32(len(frame))),
		asm.FnXdpStoreBytes.Call(),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, -r.cramped),
		asm.FnXdpAdjustTail.Call(),
	}
	return r.newProgram(ebpf.XDP, append(code, r.jumpTo(into)...))
}

// jumpTo is code that goes on in another program, with the context that is in R6. "end" is
// behind the jump.
func (r *rig) jumpTo(into *ebpf.Program) asm.Instructions {
	r.Helper()
	jump := r.newMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(r, jump.Put(uint32(0), into))
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, jump.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 99).WithSymbol("end"),
		asm.Return(),
	}
}

func (r *rig) newMap(spec *ebpf.MapSpec) *ebpf.Map {
	r.Helper()
	m, err := ebpf.NewMap(spec)
	must(r, err)
	r.Cleanup(func() { must(r, m.Close()) })
	return m
}

// newProgram loads code that may jump into the object's programs of its type.
func (r *rig) newProgram(kind ebpf.ProgramType, code asm.Instructions) *ebpf.Program {
	r.Helper()
	spec := &ebpf.ProgramSpec{Type: kind, License: "GPL", Instructions: code}
	if kind == ebpf.XDP {
		spec.AttachType, spec.Flags = ebpf.AttachXDP, unix.BPF_F_XDP_HAS_FRAGS
	}
	prog, err := ebpf.NewProgram(spec)
	must(r, err)
	r.Cleanup(func() { must(r, prog.Close()) })
	return prog
}

// xdpIfindex is where XDP sends by the next hop of the tests: not where frames come from.
const xdpIfindex = 2

// nextHop is the next hop of the tests, with all that XDP has to know.
func nextHop(mtu uint16) Nexthop {
	return Nexthop{Ifindex: 1, Mtu: mtu, XdpIfindex: xdpIfindex, Dmac: gatewayMAC, Smac: ourMAC}
}

// leaving is a packet as a skin lets it out: forwarded, by TC with the addresses of the
// last link, which the kernel replaces; by XDP with those of the next.
func (r *rig) leaving(s segment, e Entry) want {
	r.Helper()
	o, w := forwarded(s, e), want{action: redirect, reason: bpfReasonREASON_FORWARDED}
	if r.set.xdp {
		var hop Nexthop
		must(r, r.tables.Nexthops.Lookup(uint32(e.Nexthop()), &hop))
		o.dstMAC, o.srcMAC = hop.Dmac, hop.Smac
		if hop.VlanProto != 0 {
			o.tags = []vlan{{Port(hop.VlanProto), Port(hop.VlanId)}}
		}
		if hop.XdpIfindex == 1 {
			w.action = r.back()
		}
	}
	w.frame = o.frame()
	return w
}

// unfinished is the packet with its pseudo header's sum alone in the checksum, as one
// that never was on a wire.
func (s segment) unfinished() segment {
	s.wrong = 0
	tcp := s.tcp()
	s.wrong = binary.BigEndian.Uint16(tcp[16:]) ^ s.pseudoSum(len(tcp))
	return s
}

// leaves reports whether XDP leaves the packet to TC for its checksum, whoever it is
// for; it then judges that.
func (r *rig) leaves(program string, s segment) bool {
	r.Helper()
	if !r.set.xdp || s.wrong != s.unfinished().wrong {
		return false
	}
	r.expect(program, s.frame(), pass(bpfReasonREASON_LEFT_CHECKSUM))
	return true
}
