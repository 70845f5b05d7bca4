// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// match is one kind of TCP packets: zero fields match all.
type match struct {
	src, dst         netip.Prefix
	srcPort, dstPort uint16
}

const (
	tcxPass = 0 // TCX_PASS
	tcxDrop = 2 // TCX_DROP
	// What a filter answers to take all of a packet.
	wholePacket = 1 << 18
)

// tap takes the packets that match off the kernel: a filter for the socket that is to see them, and a tcx program by which
// the kernel, after the socket has seen them, drops them. It would answer by RST or ICMP, and forward them.
type tap struct {
	filter *ebpf.Program
	drop   *ebpf.Program
	link   link.Link
}

func openTap(ifindex int, matches []match) (_ *tap, err error) {
	t := &tap{}
	defer func() {
		if err != nil {
			_ = t.close()
		}
	}()
	if t.filter, err = matcher(ebpf.SocketFilter, matches, wholePacket, 0); err != nil {
		return nil, fmt.Errorf("load a socket filter: %w", err)
	}
	if t.drop, err = matcher(ebpf.SchedCLS, matches, tcxDrop, tcxPass); err != nil {
		return nil, fmt.Errorf("load a tcx program: %w", err)
	}
	t.link, err = link.AttachTCX(link.TCXOptions{
		Interface: ifindex, Program: t.drop, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
	})
	if err != nil {
		return nil, fmt.Errorf("attach a tcx program, without which the kernel answers our peers itself (it needs root and Linux 6.6): %w", err)
	}
	return t, nil
}

func (t *tap) close() error {
	var errs []error
	if t.link != nil {
		errs = append(errs, t.link.Close())
	}
	for _, p := range []*ebpf.Program{t.filter, t.drop} {
		if p != nil {
			errs = append(errs, p.Close())
		}
	}
	return errors.Join(errs...)
}

// matcher is a program that returns yes for packets that match, else no. Packets too short to say end the program with 0,
// which is no.
func matcher(kind ebpf.ProgramType, matches []match, yes, no int32) (*ebpf.Program, error) {
	code := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	code = append(code, matchAny(matches, func(at int32, size asm.Size) asm.Instructions {
		return asm.Instructions{asm.LoadAbs(at, size)}
	})...)
	code = append(code,
		asm.Mov.Imm(asm.R0, no).WithSymbol("no"), asm.Return(),
		asm.Mov.Imm(asm.R0, yes).WithSymbol("yes"), asm.Return())
	return ebpf.NewProgram(&ebpf.ProgramSpec{Type: kind, License: "GPL", Instructions: code})
}

// fetch loads a number that stands somewhere in the frame to R0.
type fetch func(at int32, size asm.Size) asm.Instructions

// matchAny jumps to "yes" for TCP without IP options or extensions that matches, else to "no".
func matchAny(matches []match, load fetch) (code asm.Instructions) {
	for i, m := range matches {
		next := fmt.Sprint("match", i+1)
		if i+1 == len(matches) {
			next = "no"
		}
		part := m.instructions(next, load)
		part[0] = part[0].WithSymbol(fmt.Sprint("match", i))
		code = append(code, part...)
	}
	return code
}

// instructions jump to yes, or to next.
func (m *match) instructions(next string, load fetch) (code asm.Instructions) {
	kind, ip, protocol, src := uint32(0x0800), int32(header4), int32(9), int32(12)
	if m.dst.Addr().Is6() {
		kind, ip, protocol, src = 0x86dd, header6, 6, 8
	}
	want := func(at int32, size asm.Size, value uint32) {
		code = append(append(code, load(at, size)...), asm.JNE.Imm32(asm.R0, int32(value), next))
	}
	want(12, asm.Half, kind)
	want(ethernetHeader+protocol, asm.Byte, 6)
	if ip == header4 {
		want(ethernetHeader, asm.Byte, 0x45)
	}
	for i, p := range [...]netip.Prefix{m.src, m.dst} {
		at := ethernetHeader + src + int32(i*m.dst.Addr().BitLen()/8)
		code = append(code, prefixTest(at, p, next, load)...)
	}
	for i, port := range [...]uint16{m.srcPort, m.dstPort} {
		if port != 0 {
			want(ethernetHeader+ip+int32(i)*2, asm.Half, uint32(port))
		}
	}
	return append(code, asm.Ja.Label("yes"))
}

// prefixTest compares an address in the packet, word by word.
func prefixTest(at int32, p netip.Prefix, next string, load fetch) (code asm.Instructions) {
	if !p.IsValid() {
		return nil
	}
	raw := p.Masked().Addr().AsSlice()
	for i := 0; i*32 < p.Bits(); i++ {
		code = append(code, load(at+int32(i)*4, asm.Word)...)
		if rest := p.Bits() - i*32; rest < 32 {
			code = append(code, asm.RSh.Imm32(asm.R0, int32(32-rest)), asm.LSh.Imm32(asm.R0, int32(32-rest)))
		}
		code = append(code, asm.JNE.Imm32(asm.R0, int32(binary.BigEndian.Uint32(raw[i*4:])), next))
	}
	return code
}
