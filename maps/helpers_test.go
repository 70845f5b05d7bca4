// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"errors"
	"os"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/cilium/ebpf/rlimit"
	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What a TC program can say.
const (
	next     = -1
	shot     = 2
	redirect = 7
)

// needRoot skips where the kernel cannot be asked; where tests must run it fails.
func needRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" || os.Getenv("SNILB_REQUIRE") == "1" {
		tb.Fatal("these tests must run as root here")
	}
	tb.Skip("needs root: network namespaces and BPF")
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// netns is a thread in a network namespace of its own and on one CPU: the programs
// choose some rings by it. The thread ends with the test, and the namespace with it.
type netns struct {
	calls chan func()
}

func newNetns(tb testing.TB) *netns {
	tb.Helper()
	needRoot(tb)
	ns := &netns{calls: make(chan func())}
	ready := make(chan error)
	go ns.serve(ready)
	must(tb, <-ready)
	tb.Cleanup(func() { close(ns.calls) })
	return ns
}

func (ns *netns) serve(ready chan<- error) {
	runtime.LockOSThread() // never unlocked: the thread must not be used again
	err := unix.Unshare(unix.CLONE_NEWNET)
	var all unix.CPUSet
	if err == nil {
		err = unix.SchedGetaffinity(0, &all)
	}
	for cpu := 0; err == nil && cpu < 1024; cpu++ {
		if all.IsSet(cpu) {
			var one unix.CPUSet
			one.Set(cpu)
			err = unix.SchedSetaffinity(0, &one)
			break
		}
	}
	if err == nil {
		var lo netlink.Link
		if lo, err = netlink.LinkByName("lo"); err == nil {
			err = netlink.LinkSetUp(lo)
		}
	}
	ready <- err
	for call := range ns.calls {
		call()
	}
}

// do runs fn in the namespace.
func (ns *netns) do(fn func()) {
	done := make(chan struct{})
	ns.calls <- func() {
		defer close(done)
		fn()
	}
	<-done
}

// try runs fn in the namespace and fails the test with its error.
func (ns *netns) try(tb testing.TB, fn func() error) {
	tb.Helper()
	var err error
	ns.do(func() { err = fn() })
	must(tb, err)
}

// skbuff is the kernel's struct __sk_buff as far as a program run takes it.
type skbuff struct {
	Len, PktType, Mark, QueueMapping, Protocol, VlanPresent, VlanTCI, VlanProto uint32
	Priority, IngressIfindex, Ifindex, TCIndex                                  uint32
	Cb                                                                          [5]uint32
	Hash, TCClassid, Data, DataEnd, NapiID, Family, RemoteIP4, LocalIP4         uint32
	RemoteIP6, LocalIP6                                                         [4]uint32
	RemotePort, LocalPort, DataMeta                                             uint32
	FlowKeys, Tstamp                                                            uint64
	WireLen, GSOSegs                                                            uint32
	Sk                                                                          uint64
	GSOSize, Pad                                                                uint32
}

// settings are a rig's; the zero value of a field is the default.
type settings struct {
	workers    uint32
	ringSize   int
	ringBusy   uint64
	onDead     uint8
	deadAfter  time.Duration
	noCsumIPv6 bool // as on a kernel without BPF_F_IPV6
	flows      int  // room in the flow tables; 1024
	xdp        bool // the XDP object, whose program stands for both of TC's
	// Of XDP only.
	redirectBack, backendsOnly bool
}

// rig is the programs, loaded, with their tables, and a clock that stands in the
// middle of cookie slot `slot`.
type rig struct {
	testing.TB
	ns       *netns
	coll     *ebpf.Collection
	tables   *Tables
	readers  []*ringbuf.Reader
	set      settings
	live     Live
	age      time.Duration // of the daemon's last beat; negative: it is draining
	clock    uint64        // when it was set
	slot     uint64
	total    *uint64 // program runs so far
	rationed bool    // a test sets the allowances of events itself
	cramped  int32   // bytes less room in front of a frame, of XDP
}

const (
	testSlot        = 0x0675bcd1
	portFirst       = 20000
	portLast        = 20999
	mss4, mss6      = 1460, 1440
	aliveFor        = 10 * time.Second
	defaultRing     = 1 << 16
	nexthopIndex    = 7
	nexthopMTU      = 1500
	listenerID      = 3
	eventsPerWindow = 128
	allowanceShift  = 26
)

func newRig(tb testing.TB, set settings) *rig {
	tb.Helper()
	ns := newNetns(tb)
	if set.workers == 0 {
		set.workers = 1
	}
	if set.ringSize == 0 {
		set.ringSize = defaultRing
	}
	if set.ringBusy == 0 {
		set.ringBusy = uint64(set.ringSize)
	}
	if set.deadAfter == 0 {
		set.deadAfter = aliveFor
	}
	must(tb, rlimit.RemoveMemlock())
	r := &rig{TB: tb, ns: ns, set: set, slot: testSlot, total: new(uint64)}
	r.load()
	r.makeRings()
	for i := range r.live.Keys {
		r.live.Keys[i] = CookieKey{K0: 0x0706050403020100 + uint64(i), K1: 0x0f0e0d0c0b0a0908 - uint64(i)}
	}
	r.live.Mss4, r.live.Mss6 = mss4, mss6
	r.setClock()
	tb.Cleanup(func() {
		r.checkTotal()
		r.coll.Close()
	})
	return r
}

// with is the same rig for a subtest.
func (r *rig) with(tb testing.TB) *rig {
	c := *r
	c.TB = tb
	return &c
}

func (s settings) variables() map[string]any {
	return map[string]any{
		VarWorkers:         s.workers,
		VarSourcePortFirst: uint16(portFirst),
		VarSourcePortLast:  uint16(portLast),
		VarDeadAfter:       uint64(s.deadAfter),
		VarOnDead:          s.onDead,
		VarRingBusy:        s.ringBusy,
		VarHasCsumIPv6:     !s.noCsumIPv6,
		VarRedirectBack:    s.redirectBack,
		VarFacesClients:    !s.backendsOnly,
	}
}

func testSpec(tb testing.TB, set settings) *ebpf.CollectionSpec {
	tb.Helper()
	read := Spec
	if set.xdp {
		read = SpecXDP
	}
	spec, err := read()
	must(tb, err)
	for name, value := range set.variables() {
		must(tb, spec.Variables[name].Set(value))
	}
	for _, name := range []string{bpfMapFlows4, bpfMapFlows6, bpfMapListeners, bpfMapPaths} {
		spec.Maps[name].MaxEntries = 1024
	}
	if set.flows > 0 {
		spec.Maps[bpfMapFlows4].MaxEntries = uint32(set.flows)
		spec.Maps[bpfMapFlows6].MaxEntries = uint32(set.flows)
	}
	spec.Maps[bpfMapRings].InnerMap.MaxEntries = uint32(set.ringSize)
	return spec
}

func (r *rig) load() {
	r.Helper()
	var err error
	r.coll, err = ebpf.NewCollection(testSpec(r, r.set))
	must(r, err)
	m := r.coll.Maps
	r.tables = &Tables{
		Flows4: m[bpfMapFlows4], Flows6: m[bpfMapFlows6], Listeners: m[bpfMapListeners],
		ListenerPorts: m[bpfMapListenerPorts], Paths: m[bpfMapPaths], Nexthops: m[bpfMapNexthops],
		Control: m[bpfMapControl], Rings: m[bpfMapRings], Counters: m[bpfMapCounters],
	}
}

func (r *rig) makeRings() {
	r.Helper()
	for i := range 2 * r.set.workers {
		index := i % r.set.workers
		if i >= r.set.workers {
			index += MaxWorkers // its quiet ring
		}
		ring, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(r.set.ringSize)})
		must(r, err)
		must(r, r.tables.Rings.Put(index, ring))
		reader, err := ringbuf.NewReader(ring)
		must(r, err)
		reader.SetDeadline(time.Now())
		r.readers = append(r.readers, reader)
		r.Cleanup(func() {
			must(r, reader.Close())
			must(r, ring.Close())
		})
	}
}

// monotonic is the clock of the programs.
func monotonic(tb testing.TB) uint64 {
	tb.Helper()
	var ts unix.Timespec
	must(tb, unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts))
	return uint64(ts.Nano())
}

// setClock says that the daemon is alive, or as old as r.age, and puts the wall clock in
// the middle of r.slot: 8 s to both sides.
func (r *rig) setClock() {
	r.Helper()
	now := monotonic(r)
	r.clock = now
	if r.live.Beat = 0; r.age >= 0 {
		r.live.Beat = now - min(now-1, uint64(r.age))
	}
	r.live.WallOffset = r.slot*CookieSlotNanoseconds + CookieSlotNanoseconds/2 - now
	must(r, r.tables.SetLive(&r.live))
}

// silent ages the daemon's last beat until the test ends.
func (r *rig) silent(age time.Duration) {
	r.Helper()
	r.age = age
	r.setClock()
	r.Cleanup(func() {
		r.age = 0
		r.setClock()
	})
}

func (r *rig) counters() CounterSet {
	r.Helper()
	c, err := r.tables.Packets(0)
	must(r, err)
	return c
}

// checkTotal proves that no packet left a program uncounted.
func (r *rig) checkTotal() {
	r.Helper()
	if sum := sumOf(r.counters()); sum != *r.total {
		r.Errorf("counters sum up to %d after %d packets", sum, *r.total)
	}
}

func sumOf(c CounterSet) (sum uint64) {
	for _, n := range c.Packets {
		sum += n
	}
	return sum
}

// event is one ring record.
type event struct {
	Kind     EventKind
	Leg      Leg
	Worker   int
	Listener uint16
	Ifindex  uint32
	Length   uint32
	MTU      uint16
	MAC      mac
	Data     []byte // from the IP header on
}

// events takes what is in the rings and checks the parts that no case names: the
// time, the count of bytes, the padding.
func (r *rig) events(after uint64) []event {
	r.Helper()
	var all []event
	for i, reader := range r.readers {
		for reader.AvailableBytes() > 0 {
			rec, err := reader.Read()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				continue
			}
			must(r, err)
			e := r.event(rec.RawSample, i%int(r.set.workers), after)
			if quiet := i >= int(r.set.workers); quiet != (e.Kind == EventClosing) {
				r.Errorf("%+v is in the wrong ring of its worker", e)
			}
			all = append(all, e)
		}
	}
	return all
}

func (r *rig) event(raw []byte, worker int, after uint64) event {
	r.Helper()
	var h EventHeader
	n, err := binary.Decode(raw, binary.NativeEndian, &h)
	must(r, err)
	data := raw[n:]
	if n != 32 || int(h.Captured) > len(data) {
		r.Fatalf("event of %d bytes captured in a record of %d", h.Captured, len(raw))
	}
	// A record is as long as its header says, filled up to eight bytes.
	if len(data)-int(h.Captured) > 7 {
		r.Errorf("%d bytes follow an event of %d", len(data), h.Captured)
	}
	if now := monotonic(r); h.Time < after || h.Time > now {
		r.Errorf("event is from %d, not between %d and %d", h.Time, after, now)
	}
	if h.Pad != [2]uint8{} {
		r.Errorf("event padding is %x", h.Pad)
	}
	return event{
		Kind: EventKind(h.Kind), Leg: Leg(h.Leg), Worker: worker, Listener: h.Listener,
		Ifindex: h.Ifindex, Length: h.Length, MTU: h.Mtu, MAC: h.Mac, Data: data[:h.Captured],
	}
}

// want is the whole outcome of one packet.
type want struct {
	action int
	reason Reason
	frame  []byte // nil: as it came in
	events []event
}

// fits reports whether an action of the table of reasons is what the case wants.
func (w want) fits(a Action) bool {
	switch a {
	case ActionPass:
		return w.action == next && len(w.events) == 0
	case ActionEngine:
		return w.action == shot && len(w.events) == 1
	case ActionDrop:
		return w.action == shot && len(w.events) == 0
	default:
		return w.sent()
	}
}

// sent reports whether the case wants the frame to leave.
func (w want) sent() bool { return w.action == redirect || w.action == transmit }

func pass(reason Reason) want { return want{action: next, reason: reason} }
func drop(reason Reason) want { return want{action: shot, reason: reason} }

// outcome runs a program over a frame, and checks all of what came of it but the
// output, which is returned.
func (r *rig) outcome(program string, in []byte, ctx skbuff, w want) []byte {
	r.Helper()
	if monotonic(r)-r.clock > uint64(time.Second/2) {
		r.setClock()
	}
	if a := Reasons[w.reason].Action; !w.fits(a) {
		r.Errorf("action %d and %d events are not %s", w.action, len(w.events), a)
	}
	before, start := r.counters(), monotonic(r)
	out, action := r.run(program, in, ctx)
	if action != w.action {
		r.Errorf("action is %d, want %d", action, w.action)
	}
	moved := r.counters()
	for i := range moved.Packets {
		moved.Packets[i] -= before.Packets[i]
	}
	expected := CounterSet{}
	expected.Packets[w.reason] = 1
	if moved != expected {
		r.Errorf("counted %s, want %s", counted(moved), counted(expected))
	}
	// cmp takes its time, and is only asked what is different.
	if got := r.events(start); !reflect.DeepEqual(got, w.events) {
		r.Errorf("events (-want +got):\n%s", cmp.Diff(w.events, got))
	}
	return out
}

func (r *rig) run(program string, in []byte, ctx skbuff) ([]byte, int) {
	r.Helper()
	*r.total++
	if r.set.xdp {
		return r.runXDP(in, ctx)
	}
	opts := ebpf.RunOptions{Data: in, DataOut: make([]byte, len(in)+256), Context: &ctx}
	var ret uint32
	r.ns.try(r, func() (err error) {
		ret, err = r.coll.Programs[program].Run(&opts)
		return err
	})
	return opts.DataOut, int(int32(ret))
}

// expect runs a program over a frame and judges the whole outcome.
func (r *rig) expect(program string, in []byte, w want) {
	r.Helper()
	r.expectSkb(program, in, skbuff{}, w)
}

func (r *rig) expectSkb(program string, in []byte, ctx skbuff, w want) {
	r.Helper()
	if !r.rationed {
		r.refill()
	}
	out := r.outcome(program, in, ctx, w)
	if w.frame == nil {
		w.frame = in
	}
	sameFrame(r, out, w.frame)
	if w.sent() {
		wellFormed(r, out)
	}
}

func counted(c CounterSet) string {
	var s []string
	for i, n := range c.Packets {
		if n != 0 {
			s = append(s, strings.Repeat(Reasons[i].Name+"/"+string(Reasons[i].Action)+" ", int(min(n, 3))))
		}
	}
	return strings.TrimSpace(strings.Join(s, ""))
}

// sameFrame compares two frames byte by byte, and shows them taken apart where
// they differ.
func sameFrame(tb testing.TB, got, want []byte) {
	tb.Helper()
	if string(got) == string(want) {
		return
	}
	at := 0
	for at < len(got) && at < len(want) && got[at] == want[at] {
		at++
	}
	tb.Errorf("frame differs from byte %d on\ngot  %x\nwant %x\ngot  %v\nwant %v", at, got, want, decoded(got), decoded(want))
}

func decoded(frame []byte) gopacket.Packet {
	return gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
}

// wellFormed holds a frame that leaves against a second reader's idea of TCP.
func wellFormed(tb testing.TB, frame []byte) {
	tb.Helper()
	p := decoded(frame)
	if e := p.ErrorLayer(); e != nil {
		tb.Errorf("decode %x: %v", frame, e.Error())
	}
	tcp, ok := p.TransportLayer().(*layers.TCP)
	if !ok {
		tb.Errorf("no TCP in %x", frame)
		return
	}
	must(tb, tcp.SetNetworkLayerForChecksum(p.NetworkLayer()))
	err, bad := p.VerifyChecksums()
	must(tb, err)
	for _, b := range bad {
		tb.Errorf("%v checksum is %#x, want %#x", b.Layer.LayerType(), b.Actual, b.Correct)
	}
}
