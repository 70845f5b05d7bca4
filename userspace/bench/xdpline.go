// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"snilb/userspace/ringbuf"
)

// The memory that is shared with the programs: two words, then the frames to send, each behind a word with its length.
const (
	sharedNext   = 0 // the frame that is sent next
	sharedAsleep = 4 // whether the taker waits
	sharedFrames = 64
	xdpStride    = 2048
	xdpRoom      = xdpStride - 8
	xdpBatch     = 256 // frames written before they are sent
	xdpReused    = 64  // pages that a run takes
	sharedSize   = sharedFrames + xdpBatch*xdpStride
	// Below this, to set up a run of frames costs more than it spares.
	xdpWorth = 12
)

// From linux/bpf.h.
const (
	xdpDrop         = 1
	xdpPass         = 2
	ringNoWakeup    = 1
	ringForceWakeup = 2
	liveFrames      = 1 << 1 // BPF_F_TEST_XDP_LIVE_FRAMES
)

// xdpLine is a line by XDP. What comes is copied to a ring buffer before the kernel has made a packet of it; what goes is
// frames that the kernel makes of shared memory and hands to the driver many at a time. A few frames go by the ring's
// socket.
type xdpLine struct {
	few *ring

	shared  *ebpf.Map
	memory  []byte
	records *ebpf.Map
	reader  *ringbuf.Reader
	prog    *ebpf.Program
	link    link.Link
	poll    [1]unix.PollFd

	queued int
	run    testRun
	seed   [ethernetHeader]byte // what a frame is before it is written
}

// testRun is the part of union bpf_attr for BPF_PROG_TEST_RUN.
type testRun struct {
	program, result       uint32
	sizeIn, sizeOut       uint32
	in, out               uint64
	repeat, duration      uint32
	contextIn, contextOut uint32
	context, contextTo    uint64
	flags, cpu, batch     uint32
	_                     uint32
}

func openXDPLine(device *net.Interface, matches []match, capture, size int) (_ *xdpLine, err error) {
	if device.MTU+ethernetHeader > xdpRoom {
		return nil, fmt.Errorf("an MTU of %d on %s: XDP is for %d at most", device.MTU, device.Name, xdpRoom-ethernetHeader)
	}
	x := &xdpLine{}
	defer func() {
		if err != nil {
			_ = x.close()
		}
	}()
	if x.few, err = openRing(device, nil, 0, 0); err != nil {
		return nil, err
	}
	if err := x.openMaps(size); err != nil {
		return nil, fmt.Errorf("maps for XDP: %w", err)
	}
	if x.prog, err = x.program(device.Index, matches, capture); err != nil {
		return nil, fmt.Errorf("load an XDP program: %w", err)
	}
	x.link, err = link.AttachXDP(link.XDPOptions{Program: x.prog, Interface: device.Index, Flags: link.XDPDriverMode})
	if err != nil {
		return nil, fmt.Errorf("attach XDP to %s, whose driver may lack it or which may have another program: %w; without XDP it goes too, slower",
			device.Name, err)
	}
	x.run = testRun{
		program: uint32(x.prog.FD()), sizeIn: ethernetHeader, in: uint64(uintptr(unsafe.Pointer(&x.seed[0]))),
		flags: liveFrames, batch: xdpReused,
	}
	return x, nil
}

func (x *xdpLine) openMaps(size int) (err error) {
	x.shared, err = ebpf.NewMap(&ebpf.MapSpec{
		Type: ebpf.Array, KeySize: 4, ValueSize: sharedSize, MaxEntries: 1, Flags: unix.BPF_F_MMAPABLE,
	})
	if err != nil {
		return err
	}
	page := os.Getpagesize()
	whole := (sharedSize + page - 1) / page * page
	if x.memory, err = unix.Mmap(x.shared.FD(), 0, whole, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	if x.records, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(size)}); err != nil {
		return err
	}
	x.poll[0] = unix.PollFd{Fd: int32(x.records.FD()), Events: unix.POLLIN}
	x.reader, err = ringbuf.NewReader(x.records)
	return err
}

func (x *xdpLine) close() error {
	var errs []error
	if x.link != nil {
		errs = append(errs, x.link.Close())
	}
	if x.prog != nil {
		errs = append(errs, x.prog.Close())
	}
	if x.memory != nil {
		errs = append(errs, unix.Munmap(x.memory))
	}
	if x.reader != nil {
		errs = append(errs, x.reader.Close())
	}
	for _, m := range []*ebpf.Map{x.shared, x.records} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	if x.few != nil {
		errs = append(errs, x.few.close())
	}
	return errors.Join(errs...)
}

// program both sends and receives. One alone that is only run would be put into the kernel's XDP dispatcher and taken out
// again by each run, which waits for RCU: tens of milliseconds. One that is attached is there already. A run's frames come
// from the loopback device.
func (x *xdpLine) program(ifindex int, matches []match, capture int) (*ebpf.Program, error) {
	const loopback = 1
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R0, asm.R6, 12, asm.Word), // ingress_ifindex
		asm.JEq.Imm(asm.R0, loopback, "send"),
	}
	code = append(code, x.receiver(matches, capture)...)
	code = append(code, x.sender(ifindex)...)
	return ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: code})
}

// sender makes a frame of the next one in the shared memory.
func (x *xdpLine) sender(ifindex int) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapValue(asm.R7, x.shared.FD(), 0).WithSymbol("send"),
		asm.LoadMem(asm.R8, asm.R7, sharedNext, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R8),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R7, sharedNext, asm.R1, asm.Word),
		asm.And.Imm(asm.R8, xdpBatch-1),
		asm.Mul.Imm(asm.R8, xdpStride),
		asm.Add.Reg(asm.R7, asm.R8),
		asm.LoadMem(asm.R9, asm.R7, sharedFrames, asm.Word),
		asm.JLT.Imm(asm.R9, ethernetHeader, "drop"),
		asm.JGT.Imm(asm.R9, xdpRoom, "drop"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.R9),
		asm.Sub.Imm(asm.R2, ethernetHeader),
		asm.FnXdpAdjustTail.Call(),
		asm.JNE.Imm(asm.R0, 0, "drop"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Reg(asm.R3, asm.R7),
		asm.Add.Imm(asm.R3, sharedFrames+8),
		asm.Mov.Reg(asm.R4, asm.R9),
		asm.FnXdpStoreBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, "drop"),
		asm.Mov.Imm(asm.R1, int32(ifindex)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),
		asm.Mov.Imm(asm.R0, xdpDrop).WithSymbol("drop"),
		asm.Return(),
	}
}

// receiver takes what matches, at most capture bytes of it, and lets the kernel have the rest.
func (x *xdpLine) receiver(matches []match, capture int) asm.Instructions {
	const header = -66 // on the stack: up to the ports of IPv6, and every address aligned
	load := func(n int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, 0),
			asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, header),
			asm.Mov.Imm(asm.R4, n), asm.FnXdpLoadBytes.Call(),
		}
	}
	code := load(ethernetHeader + header6 + 4)
	code = append(code, asm.JEq.Imm(asm.R0, 0, "match0"))
	code = append(code, load(ethernetHeader+header4+4)...) // shorter than any of IPv6
	code = append(code, asm.JNE.Imm(asm.R0, 0, "no"))
	fetch := func(at int32, size asm.Size) asm.Instructions {
		code := asm.Instructions{asm.LoadMem(asm.R0, asm.RFP, int16(header+at), size)}
		if size != asm.Byte {
			code = append(code, asm.HostTo(asm.BE, asm.R0, size))
		}
		return code
	}
	code = append(code, matchAny(matches, fetch)...)
	code = append(code, asm.Mov.Imm(asm.R0, xdpPass).WithSymbol("no"), asm.Return())
	return append(code, x.keep(capture)...)
}

// keep copies the frame to the ring buffer, behind a word with its length.
func (x *xdpLine) keep(capture int) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapPtr(asm.R1, x.records.FD()).WithSymbol("yes"),
		asm.Mov.Imm(asm.R2, int32(8+capture)),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnRingbufReserve.Call(),
		asm.JEq.Imm(asm.R0, 0, "lost"),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.LoadMem(asm.R8, asm.R6, 4, asm.Word), // data_end
		asm.LoadMem(asm.R1, asm.R6, 0, asm.Word), // data
		asm.Sub.Reg(asm.R8, asm.R1),
		asm.JGE.Imm(asm.R8, ethernetHeader, "long"),
		asm.Mov.Imm(asm.R8, ethernetHeader),
		asm.JLE.Imm(asm.R8, int32(capture), "fits").WithSymbol("long"),
		asm.Mov.Imm(asm.R8, int32(capture)),
		asm.StoreMem(asm.R7, 0, asm.R8, asm.Word).WithSymbol("fits"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Reg(asm.R3, asm.R7),
		asm.Add.Imm(asm.R3, 8),
		asm.Mov.Reg(asm.R4, asm.R8),
		asm.FnXdpLoadBytes.Call(),
		asm.LoadMapValue(asm.R1, x.shared.FD(), sharedAsleep),
		asm.LoadMem(asm.R3, asm.R1, 0, asm.Word),
		asm.Mov.Imm(asm.R2, ringNoWakeup),
		asm.JEq.Imm(asm.R3, 0, "submit"),
		asm.Mov.Imm(asm.R2, ringForceWakeup), // an interrupt, so once is enough
		asm.Mov.Imm(asm.R3, 0),
		asm.StoreMem(asm.R1, 0, asm.R3, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R7).WithSymbol("submit"),
		asm.FnRingbufSubmit.Call(),
		asm.Mov.Imm(asm.R0, xdpDrop).WithSymbol("lost"),
		asm.Return(),
	}
}

func (x *xdpLine) word(at int) *uint32 { return (*uint32)(unsafe.Pointer(&x.memory[at])) }

func (x *xdpLine) room() []byte {
	at := sharedFrames + x.queued*xdpStride + 8
	return x.memory[at : at+xdpRoom : at+xdpRoom]
}

func (x *xdpLine) send(n int) {
	*x.word(sharedFrames + x.queued*xdpStride) = uint32(n)
	if x.queued++; x.queued == xdpBatch {
		_ = x.flush() // what is wrong now is wrong at the next flush too
	}
}

func (x *xdpLine) flush() error {
	n := x.queued
	x.queued = 0
	if n < xdpWorth {
		return x.sendFew(n)
	}
	*x.word(sharedNext) = 0
	// A signal, of which the Go runtime has many, ends a run before all are sent.
	for next := x.word(sharedNext); ; {
		run := x.run
		run.repeat = uint32(n) - *next
		_, _, errno := unix.RawSyscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&run)), unsafe.Sizeof(run))
		switch {
		case errno != 0 && errno != unix.EINTR:
			return fmt.Errorf("send frames by XDP: %w", errno)
		case errno == 0 || *next >= uint32(n):
			return nil
		}
	}
}

func (x *xdpLine) sendFew(n int) error {
	for i := range n {
		at := sharedFrames + i*xdpStride
		x.few.send(copy(x.few.room(), x.memory[at+8:][:*x.word(at)]))
	}
	return x.few.flush()
}

func (x *xdpLine) receive(most int, take func(frame []byte)) (n int) {
	for ; n < most; n++ {
		record := x.reader.Next()
		if record == nil {
			break
		}
		take(record[8:][:binary.NativeEndian.Uint32(record)])
	}
	x.reader.Done()
	return n
}

// wait may miss a frame that comes just when the taker goes to sleep, until the next one or the end of the time.
func (x *xdpLine) wait(d time.Duration) error {
	atomic.StoreUint32(x.word(sharedAsleep), 1)
	defer atomic.StoreUint32(x.word(sharedAsleep), 0)
	return ppoll(x.poll[:], d)
}
