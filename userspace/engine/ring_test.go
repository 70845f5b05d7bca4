// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
)

// producer writes records into a ring buffer map by a kernel program.
type producer struct {
	t    *testing.T
	ring *ebpf.Map
	prog *ebpf.Program
}

// recordSize is no multiple of the eight bytes that records are aligned to.
const recordSize = 197

// newProducer makes a ring of a page, and a program that writes the first bytes of its packet to it.
func newProducer(t *testing.T, flags int32) *producer {
	t.Helper()
	needRing(t)
	ring, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(os.Getpagesize())})
	if err != nil {
		t.Fatal(err)
	}
	const room = -(recordSize + 7) / 8 * 8
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, 0),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, room),
			asm.Mov.Imm(asm.R4, recordSize),
			asm.FnSkbLoadBytes.Call(),
			asm.LoadMapPtr(asm.R1, ring.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, room),
			asm.Mov.Imm(asm.R3, recordSize),
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
	return &producer{t, ring, prog}
}

// write writes a record of one byte over and over. Returns false when the ring is full.
func (p *producer) write(fill byte) bool { return p.put(bytes.Repeat([]byte{fill}, recordSize)) }

// put writes a record with that begin.
func (p *producer) put(data []byte) bool {
	ret, err := p.prog.Run(&ebpf.RunOptions{Data: append(bytes.Clone(data), make([]byte, recordSize-len(data))...)})
	if err != nil {
		p.t.Error(err)
	}
	return ret == 0
}

func openRing(t *testing.T, m *ebpf.Map) *ring {
	t.Helper()
	r, err := newRing(m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.unmap(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// TestRing reads what was written, over many turns of the ring, in portions up to a full ring.
func TestRing(t *testing.T) {
	p := newProducer(t, 0)
	r := openRing(t, p.ring)
	var next, read byte
	for portion := range 100 {
		for range portion % 25 {
			if !p.write(next) {
				break
			}
			next++
		}
		for record := r.next(); record != nil; record = r.next() {
			if want := bytes.Repeat([]byte{read}, recordSize); !bytes.Equal(record, want) {
				t.Fatalf("record %d is %x", read, record)
			}
			read++
			r.done()
		}
		if read != next || r.hasData() {
			t.Fatalf("%d read of %d written", read, next)
		}
	}
	if read == 0 {
		t.Fatal("nothing was read")
	}
}

// TestRingIsFull sees that a record's place is only free again after done, and that a second reader goes on where the
// first one ended.
func TestRingIsFull(t *testing.T) {
	p := newProducer(t, 0)
	first := openRing(t, p.ring)
	written := 0
	for p.write(byte(written)) {
		written++
	}
	if first.next() == nil || p.write(99) {
		t.Error("the place of a record that is being read was given away")
	}
	first.done()
	if !p.write(byte(written)) {
		t.Error("the place of a record that was read is not free")
	}
	second := openRing(t, p.ring)
	for want := 1; want <= written; want++ {
		if record := second.next(); record == nil || record[0] != byte(want) {
			t.Fatalf("record %d is %v", want, record)
		}
	}
	if second.next() != nil {
		t.Error("more was read than written")
	}
}

func TestRingIsNoRing(t *testing.T) {
	needRing(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	if _, err := newRing(m); err == nil {
		t.Error("an array was taken for a ring")
	}
}

// needRing skips without root, which CI has.
func needRing(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

func TestWaiter(t *testing.T) {
	for name, polite := range map[string]bool{"awake": false, "polite": true} {
		t.Run(name, func(t *testing.T) { testWaiter(t, polite) })
	}
}

// testWaiter waits for a record, which comes at once or when the thread is given up, for a time, and for the end.
func testWaiter(t *testing.T, polite bool) {
	const long = time.Minute
	p := newProducer(t, 0)
	r := openRing(t, p.ring)
	w, err := newWaiter(p.ring)
	if err != nil {
		t.Fatal(err)
	}
	w.polite = polite
	defer func() {
		if err := w.free(); err != nil {
			t.Error(err)
		}
	}()
	for _, after := range []time.Duration{0, awake / 5, 4 * awake} {
		begun := time.Now()
		var writer sync.WaitGroup
		writer.Go(func() {
			time.Sleep(after)
			p.write(1)
		})
		for !r.hasData() { // a signal may end a wait early
			if err := w.wait(long); err != nil {
				t.Fatal(err)
			}
			if time.Since(begun) > long/2 {
				t.Fatalf("a record after %v woke nobody", after)
			}
		}
		writer.Wait()
		r.next()
		r.done()
	}
	for _, d := range []time.Duration{-time.Second, 0, awake / 5, awake, 20 * awake} {
		waits := 0
		for end := time.Now().Add(d); waits == 0 || time.Until(end) > 0; waits++ {
			if err := w.wait(time.Until(end)); err != nil {
				t.Fatal(err)
			}
		}
		if waits > 8 { // more than signals end early
			t.Errorf("%d waits took %v", waits, d)
		}
	}
	// What is there already ends a wait at once.
	p.write(2)
	begun := time.Now()
	for range 400 {
		if err := w.wait(awake); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begun); took > 400*awake/2 {
		t.Errorf("400 waits for what was there took %v", took)
	}
	r.next()
	r.done()
	var closer sync.WaitGroup
	closer.Go(func() {
		time.Sleep(4 * awake)
		if err := w.close(); err != nil {
			t.Error(err)
		}
	})
	defer closer.Wait()
	for !w.closed.Load() {
		if err := w.wait(long); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.wait(long); err != nil {
		t.Fatal(err)
	}
}

// TestWaiterIsQuiet is not woken by what goes into a quiet ring.
func TestWaiterIsQuiet(t *testing.T) {
	const noWakeup = 1 // BPF_RB_NO_WAKEUP
	p := newProducer(t, noWakeup)
	r := openRing(t, p.ring)
	if p.write(7); !r.hasData() {
		t.Fatal("a quiet record is not there")
	}
	if record := r.next(); record == nil || record[0] != 7 {
		t.Fatalf("record %v", record)
	}
}

// TestWaiterLetsCollect has garbage collected while workers wait: with all of the runtime's places taken by waits that it
// knows nothing of, a collection must not take longer than a wait.
func TestWaiterLetsCollect(t *testing.T) {
	p := newProducer(t, 0)
	var waiters []*waiter
	done := make(chan error)
	for range runtime.GOMAXPROCS(0) {
		w, err := newWaiter(p.ring)
		if err != nil {
			t.Fatal(err)
		}
		waiters = append(waiters, w)
		go func() {
			var err error
			for err == nil && !w.closed.Load() {
				err = w.wait(awake)
			}
			done <- err
		}()
	}
	begun := time.Now()
	for range 10 {
		runtime.GC()
	}
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("ten collections took %v", took)
	}
	for _, w := range waiters {
		if err := w.close(); err != nil {
			t.Error(err)
		}
	}
	for _, w := range waiters {
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := w.free(); err != nil {
			t.Error(err)
		}
	}
}

// TestEndsAreHeardFirst has the RST of a connection wait in the quiet ring when the hello of a new one from the same port
// is dealt with: it is the old one's.
func TestEndsAreHeardFirst(t *testing.T) {
	d := newDesk(t, "")
	p := newProducer(t, 0)
	d.quiet = openRing(t, p.ring)
	c := newClient(1)
	vip := netip.MustParseAddrPort("203.0.113.1:443")
	old := &flow{connection: connection{c.addr, vip}, cookie: 1, timeouts: &config.Timeouts{Closing: time.Minute}}
	old.owner = old
	d.flows[old.connection] = old
	rst := packet.Segment{Src: c.addr, Dst: vip, Seq: 5, Flags: packet.RST}
	frame := rst.Append(nil)
	var header bytes.Buffer
	err := binary.Write(&header, binary.NativeEndian, maps.EventHeader{
		Time: uint64(d.e.clock.now()), Kind: uint8(maps.EventClosing), Leg: uint8(maps.LegClient),
		Length: uint32(len(frame)), Captured: uint16(len(frame)),
	})
	if err != nil || !p.put(append(header.Bytes(), frame...)) {
		t.Fatal("the RST is not in the ring", err)
	}
	d.sends(c, 1, []byte{22, 3, 1}, packet.PSH)
	if old.closing == nil || !old.closing.reset {
		t.Errorf("the old connection's RST was not heard before the new one: %+v", old.closing)
	}
}
