// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func (f family) legSegment(leg Leg, flags uint16) segment {
	if leg == LegClient {
		return f.clientSegment(flags)
	}
	return f.backendSegment(flags)
}

func (f family) tuple(leg Leg) Tuple {
	if leg == LegClient {
		return Tuple{Src: f.client, Dst: f.vip}
	}
	return Tuple{Src: f.backend, Dst: f.source}
}

func (f family) to(leg Leg) Tuple {
	if leg == LegClient {
		return Tuple{Src: f.source, Dst: f.backend}
	}
	return Tuple{Src: f.vip, Dst: f.client}
}

func program(leg Leg) string {
	if leg == LegClient {
		return ProgramClient
	}
	return ProgramBackend
}

// hop sets the next hop that entries leave by.
func (r *rig) hop(mtu uint16) {
	r.Helper()
	must(r, r.tables.Nexthops.Put(uint32(nexthopIndex), nextHop(mtu)))
}

// lastAck is where the other side's segments stand, on this one's leg.
const lastAck = 0x11223344 + 0x10203040

// entry is one direction with offsets that are easy to tell apart.
func (f family) entry(leg Leg) Entry {
	return Entry{
		Flow: Flow{
			Seq: 0x10203040, Ack: 0xf0e0d0c0, Tsval: 0x01010101, Tsecr: 0xfefefeff,
			LastAck: lastAck,
			Control: FlowControl(nexthopIndex, 0, 0), Generation: 0x1234, Id: 0x5678,
		},
		To: f.to(leg),
	}
}

// bind inserts f.entry, changed, until the test ends.
func (r *rig) bind(f family, leg Leg, change func(*Entry)) Entry {
	r.Helper()
	e := f.entry(leg)
	if change != nil {
		change(&e)
	}
	must(r, r.tables.InsertFlow(leg, f.tuple(leg), &e))
	r.Cleanup(func() { must(r, r.tables.DeleteFlow(leg, f.tuple(leg))) })
	return r.entry(f, leg)
}

func (r *rig) entry(f family, leg Leg) Entry {
	r.Helper()
	e, err := r.tables.LookupFlow(leg, f.tuple(leg))
	must(r, err)
	return e
}

// forwarded is the model of the rewrite.
func forwarded(s segment, e Entry) segment {
	o := s
	o.tags = nil
	o.src, o.dst = e.To.Src, e.To.Dst
	o.ttl--
	o.seq += e.Flow.Seq
	if s.flags&ack != 0 {
		o.ack += e.Flow.Ack
	}
	if s.flags&syn == 0 {
		o.window = shifted(s.window, int(e.Flow.Control>>16&31)-14)
	}
	o.options = translated(s.options, e.Flow, s.flags&ack != 0)
	return o
}

func shifted(window uint16, shift int) uint16 {
	w := uint64(window)
	for ; shift > 0; shift-- {
		w *= 2
	}
	for ; shift < 0; shift++ {
		w /= 2
	}
	return uint16(min(w, 65535))
}

// translated is the model of the options' rewrite: it stops where it can no longer
// follow.
func translated(options []byte, f Flow, hasAck bool) []byte {
	b := slices.Clone(options)
	add := func(at int, delta uint32) {
		binary.BigEndian.PutUint32(b[at:], binary.BigEndian.Uint32(b[at:])+delta)
	}
	for at := 0; at < len(b) && b[at] != optEOL; {
		if b[at] == optNOP {
			at++
			continue
		}
		if at+2 > len(b) || b[at+1] < 2 || at+int(b[at+1]) > len(b) {
			break
		}
		size := int(b[at+1])
		switch {
		case b[at] == optTS && size == 10:
			add(at+2, f.Tsval)
			if hasAck {
				add(at+6, f.Tsecr)
			}
		case b[at] == optSack && (size == 10 || size == 18 || size == 26 || size == 34):
			for edge := at + 2; edge < at+size; edge += 4 {
				add(edge, f.Ack)
			}
		}
		at += size
	}
	return b
}

// accounted is the model of what an entry remembers of a packet; other is the other direction's, if there is one.
func accounted(e Entry, other *Entry, s segment, packets int) Entry {
	e.Flow.Bytes += uint64(len(s.payload))
	e.Flow.Packets += uint32(packets)
	if behind := e.Flow.LastAck - s.ack; s.flags&(ack|rst) == ack && behind > 16<<20 {
		e.Flow.LastAck = s.ack
		e.Flow.Control |= FlowConfirmed
	}
	if s.flags&syn != 0 {
		e.Flow.Control |= FlowSYN
	}
	if !ends(e, other, s) {
		return e
	}
	if s.flags&fin != 0 {
		e.Flow.Control |= FlowFIN
	}
	if s.flags&rst != 0 {
		e.Flow.Control |= FlowRST
	}
	return e
}

// ends is the model of which FINs and RSTs are believed.
func ends(e Entry, other *Entry, s segment) bool {
	if other == nil || s.seq == 0 && other.Has(FlowSYN) {
		return true
	}
	ahead := int32(s.seq + uint32(len(s.payload)) + e.Flow.Seq - other.Flow.LastAck)
	most := uint64(1 << 30)
	if s.flags&rst != 0 {
		most = 16 << 20
	}
	return ahead >= -1 && int64(ahead) <= int64(min(e.Flow.Bytes, most))+64<<10
}

// other is the entry of the other direction, nil if there is none.
func (r *rig) other(leg Leg, e Entry) *Entry {
	r.Helper()
	other, err := r.tables.LookupFlow(1-leg, e.To.Reverse())
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	must(r, err)
	return &other
}

// expectForward feeds a packet of a bound flow and compares frame, events and entry
// with the models.
func (r *rig) expectForward(f family, leg Leg, s segment, ctx skbuff) {
	r.Helper()
	e := r.entry(f, leg)
	if r.leaves(program(leg), s) {
		r.untouched(f, leg, e)
		return
	}
	packets := max(1, int(ctx.GSOSegs))
	if ctx.GSOSegs == 0 && ctx.GSOSize > 0 {
		packets = max(1, (len(s.payload)+int(ctx.GSOSize)-1)/int(ctx.GSOSize))
	}
	after := accounted(e, r.other(leg, e), s, packets)
	w := r.leaving(s, e)
	if new := after.Flow.Control &^ e.Flow.Control; new&(FlowFIN|FlowRST) != 0 {
		closing := eventOf(s, EventClosing, headersOnly)
		closing.Leg = leg
		closing.Worker = int(e.Flow.Control >> 21 & 63)
		w.events = []event{closing}
	}
	before := monotonic(r)
	r.expectSkb(program(leg), s.frame(), ctx, w)
	got := r.entry(f, leg)
	if got.Flow.LastSeen < uint32(before>>20) || got.Flow.LastSeen > uint32(monotonic(r)>>20) {
		r.Errorf("last seen %d, not now", got.Flow.LastSeen)
	}
	r.sameEntry(got, after)
}

func (r *rig) sameEntry(got, want Entry) {
	r.Helper()
	got.Flow.LastSeen = want.Flow.LastSeen // that is judged elsewhere
	if got == want {
		return
	}
	opts := cmp.Options{
		cmpopts.IgnoreFields(Flow{}, "_"), cmpopts.EquateComparable(Tuple{}),
	}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		r.Errorf("entry (-want +got):\n%s", diff)
	}
}

var legs = map[string]Leg{"client": LegClient, "backend": LegBackend}

// bothLegs runs a test for each family and leg.
func bothLegs(t *testing.T, test func(t *testing.T, f family, leg Leg)) {
	bothFamilies(t, func(t *testing.T, f family) {
		for name, leg := range legs {
			t.Run(name, func(t *testing.T) { test(t, f, leg) })
		}
	})
}

func newFlowRig(t testing.TB, set settings) *rig {
	t.Helper()
	r := newRig(t, set)
	r.listen(UnknownFlowReset)
	r.connect()
	r.hop(nexthopMTU)
	return r
}

// One field of a good packet changed at a time.
func TestFlowFields(t *testing.T) {
	changes := map[string]func(*segment){
		"good":                 func(*segment) {},
		"data":                 func(s *segment) { s.payload = []byte("12345678") },
		"odd data":             func(s *segment) { s.payload = []byte("123") },
		"data, padding":        func(s *segment) { s.payload, s.padding = []byte("1"), []byte{9, 9, 9} },
		"the MTU":              func(s *segment) { s.payload = make([]byte, nexthopMTU-len(s.packet())) },
		"seq wraps":            func(s *segment) { s.seq = 0xffffffff },
		"ack wraps":            func(s *segment) { s.ack = 0xffffffff },
		"seq 0":                func(s *segment) { s.seq = 0 },
		"ack 0":                func(s *segment) { s.ack = 0 },
		"urgent":               func(s *segment) { s.flags |= urg; s.urgent = 0x1234 },
		"urgent without URG":   func(s *segment) { s.urgent = 0x1234 },
		"ECN and reserved":     func(s *segment) { s.flags |= ece | cwr | ae | reservedFlags },
		"FIN":                  func(s *segment) { s.flags |= fin },
		"FIN without ACK":      func(s *segment) { s.flags = fin },
		"RST":                  func(s *segment) { s.flags = rst },
		"RST with ACK":         func(s *segment) { s.flags |= rst },
		"FIN and RST":          func(s *segment) { s.flags |= fin | rst },
		"long FIN":             func(s *segment) { s.flags |= fin; s.payload = make([]byte, 999) },
		"TTL 2":                func(s *segment) { s.ttl = 2 },
		"TTL 255":              func(s *segment) { s.ttl = 255 },
		"window 0":             func(s *segment) { s.window = 0 },
		"window 65535":         func(s *segment) { s.window = 65535 },
		"802.1Q":               func(s *segment) { s.tags = []vlan{{0x8100, 0x2014}} },
		"802.1ad":              func(s *segment) { s.tags = []vlan{{0x88a8, 1}} },
		"802.1Q with options":  func(s *segment) { s.tags = []vlan{{0x8100, 1}}; s.options = timestamps(0) },
		"no DSCP":              func(s *segment) { s.tos = 0 },
		"congestion":           func(s *segment) { s.tos = 3 },
		"timestamps":           func(s *segment) { s.options = timestamps(0) },
		"timestamps, no ACK":   func(s *segment) { s.options, s.flags = timestamps(0), rst },
		"other timestamps":     func(s *segment) { s.options = timestamps(4) },
		"other ones, no ACK":   func(s *segment) { s.options, s.flags = timestamps(4), rst },
		"timestamps and data":  func(s *segment) { s.options, s.payload = timestamps(0), []byte("odd") },
		"nearly all the MTU":   func(s *segment) { s.options = timestamps(0); s.payload = make([]byte, nexthopMTU-len(s.packet())) },
		"timestamps and 802.1": func(s *segment) { s.options, s.tags = timestamps(1), []vlan{{0x8100, 2}} },
	}
	for _, noCsumIPv6 := range []bool{false, true} {
		skins(t, newFlowRig, settings{noCsumIPv6: noCsumIPv6}, func(t *testing.T, r *rig) {
			bothLegs(t, func(t *testing.T, f family, leg Leg) {
				for name, change := range changes {
					t.Run(name, func(t *testing.T) {
						r := r.with(t)
						r.bind(f, leg, nil)
						s := f.legSegment(leg, ack)
						change(&s)
						r.expectForward(f, leg, s, skbuff{})
						r.expectForward(f, leg, s, skbuff{})
					})
				}
			})
		})
	}
}

// timestamps are the option behind `at` NOPs, and NOPs up to a whole word.
func timestamps(at int) []byte {
	b := bytes.Repeat([]byte{optNOP}, at)
	b = append(b, optTS, 10, 0xff, 0xff, 0xff, 0xf0, 0xff, 0xff, 0xff, 0xf1)
	for len(b)%4 != 0 {
		b = append(b, optNOP)
	}
	if at == 0 {
		return append([]byte{optNOP, optNOP}, b[:10]...)
	}
	return b
}

// Option layouts of live connections, and what must be left alone.
var flowOptions = map[string]string{
	"timestamp, 1 SACK block":          "0101080a01020304050607080101050a0000100000002000",
	"timestamp, 2 SACK blocks":         "0101080a01020304050607080101051200001000000020000000300000004000",
	"timestamp, 3 SACK blocks":         "0101080a01020304050607080101051a000010000000200000003000000040000000500000006000",
	"timestamp, no SACK block":         "0101080a010203040506070801010502",
	"timestamp, half a SACK block":     "0101080a01020304050607080101050600001000",
	"timestamp, SACK block and a half": "0101080a01020304050607080101050e000010000000200000003000",
	"timestamp, SACK too long":         "0101080a01020304050607080101051a0000100000002000",
	"timestamp, SACK too short":        "0101080a01020304050607080101050a00001000000020000000300000004000",
	"none":                             "",
	"usual timestamps":                 "0101080affffffffffffffff",
	"timestamps first":                 "080affffffff00000001" + "0101",
	"timestamps at 1":                  "01080affffffff0000000101",
	"timestamps at 3":                  "010101080affffffff00000001" + "010101",
	"timestamps at 30":                 "010101010101010101010101010101010101010101010101010101010101080a0102030405060708",
	"timestamps twice":                 "0101080a01020304050607080101080a1112131415161718",
	"timestamps of size 9":             "010108090102030405060701",
	"usual, but 12 more":               "0101080a0102030405060708" + "010101010101010101010101",
	"one SACK block":                   "0101050a0000000100000002",
	"one, odd":                         "01050affffffff0000000201",
	"two SACK blocks":                  "01010512000000010000000200000003ffffffff",
	"two, odd":                         "010101051200000001000000020000000300000004010101",
	"three SACK blocks":                "0101051a000000010000000200000003000000040000000500000006",
	"three with timestamps":            "0101080a01020304050607080101051a" + "000000010000000200000003000000040000000500000006",
	"three, timestamps behind":         "051a" + "000000010000000200000003000000040000000500000006" + "0101" + "080a0102030405060708" + "0101",
	"four SACK blocks":                 "01010522" + "0000000100000002000000030000000400000005000000060000000700000008",
	"four, first":                      "0522" + "00000001000000020000000300000004000000050000000600000007ffffffff" + "0101",
	"four, odd":                        "010101" + "0522" + "0000000100000002000000030000000400000005000000060000000700000008" + "010101",
	"D-SACK":                           "01010512" + "11223300" + "11223344" + "11223340" + "11223360",
	"SACK of size 2":                   "0502010105020101",
	"SACK of size 12":                  "050c0102030405060708090a",
	"SACK of size 9":                   "0509010203040506070001010101"[:24],
	"MD5":                              "0101" + "1312" + "0102030405060708090a0b0c0d0e0f10",
	"MD5 that looks like SACK":         "0101" + "1312" + "050a0102030405060708080a01020304",
	"TCP-AO":                           "1d100102030405060708090a0b0c0d0e",
	"MPTCP data":                       "1e140004" + "01020304050607080102030405060708",
	"unknown":                          "fd04beef",
	"EOL, then timestamps":             "00010101080a01020304050607080101",
	"size 0, then timestamps":          "fd000101080a01020304050607080101",
	"size 1, then timestamps":          "fd010101080a01020304050607080101",
	"too long, then timestamps":        "fd200101080a01020304050607080101",
	"timestamps cut by the end":        "01010101010101080a010203",
	"SACK cut by the end":              "01010101" + "0512" + "0102030405060708090a",
	"a kind in the last byte":          "01010108",
	"timestamps, then malformed":       "080a0102030405060708" + "0801",
	"MSS and window scale":             "020405b403030701",
	"40 bytes of NOP":                  "01010101010101010101010101010101010101010101010101010101010101010101010101010101",
	"usual ones behind MSS":            "020405b40101080a0102030405060708",
	"SACK edge that wraps":             "0101050a" + "0f1f2f3f" + "0f1f2f40",
	"usual kind, different sizes":      "0101080a01020304050607080101080901020304050607010101",
}

func TestFlowOptions(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothLegs(t, func(t *testing.T, f family, leg Leg) {
			for name, text := range flowOptions {
				for flagsName, flags := range map[string]uint16{"ACK": ack, "RST": rst, "SYN": syn} {
					t.Run(name+"/"+flagsName, func(t *testing.T) {
						r := r.with(t)
						r.bind(f, leg, nil)
						if leg == LegClient { // the connection lives: a SYN is forwarded
							r.bind(f, LegBackend, nil)
						}
						s := f.legSegment(leg, flags)
						options, err := hex.DecodeString(text)
						must(t, err)
						s.options = append(options, make([]byte, -len(options)&3)...)
						if leg == LegBackend && flags == syn {
							r.expect(ProgramBackend, s.frame(), backendEvent(s))
							return
						}
						r.expectForward(f, leg, s, skbuff{})
					})
				}
			}
		})
	})
}

// The model of the options, on examples that can be checked by eye.
func TestTranslatedModel(t *testing.T) {
	flow := Flow{Ack: 0x10, Tsval: 0x100, Tsecr: 0x1000}
	for in, want := range map[string]string{
		"0101080a0000000100000002": "0101080a0000010100001002",
		"050a000000010000000201ff": "050a000000110000001201ff",
		"1306050a0102030401010101": "1306050a0102030401010101",
		"00080a000000010000000201": "00080a000000010000000201",
	} {
		b, _ := hex.DecodeString(in)
		if got := hex.EncodeToString(translated(b, flow, true)); got != want {
			t.Errorf("%s became %s, want %s", in, got, want)
		}
	}
	b, _ := hex.DecodeString("0101080a0000000100000002")
	if got := hex.EncodeToString(translated(b, flow, false)); got != "0101080a0000010100000002" {
		t.Errorf("without ACK it became %s", got)
	}
}

// Every window shift, with windows at the clamp.
func TestFlowWindow(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothLegs(t, func(t *testing.T, f family, leg Leg) {
			for shift := -14; shift <= 14; shift++ {
				t.Run(fmt.Sprint(shift), func(t *testing.T) {
					r := r.with(t)
					r.bind(f, leg, func(e *Entry) { e.Flow.Control = FlowControl(nexthopIndex, shift, 0) })
					for _, window := range []uint16{0, 1, 2, 3, 15, 16, 255, 256, 4095, 16384, 32767, 32768, 65534, 65535} {
						for _, flags := range []uint16{ack, rst, ack | fin} {
							s := f.legSegment(leg, flags)
							s.window = window
							r.expectForward(f, leg, s, skbuff{})
						}
					}
				})
			}
		})
	})
}

// An entry counts what went by: acknowledgements that say nothing new confirm
// nothing.
func TestFlowAccount(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothLegs(t, func(t *testing.T, f family, leg Leg) {
			r := r.with(t)
			s := f.legSegment(leg, ack)
			r.bind(f, leg, func(e *Entry) {
				e.Flow.LastAck, e.Flow.Bytes, e.Flow.Packets = s.ack, 1<<32-1, 1<<32-1
			})
			r.expectForward(f, leg, s, skbuff{})
			if e := r.entry(f, leg); e.Has(FlowConfirmed) || e.Flow.Packets != 0 {
				t.Errorf("entry %+v", e)
			}
			s.payload = []byte("data")
			r.expectForward(f, leg, s, skbuff{})
			s.ack++
			r.expectForward(f, leg, s, skbuff{})
			if e := r.entry(f, leg); !e.Has(FlowConfirmed) || e.Flow.Bytes != 1<<32+7 {
				t.Errorf("entry %+v", e)
			}
		})
	})
}

// What keeps a packet of a bound flow from leaving: it is dropped as it came, and
// does not count for the flow.
func TestFlowRefuses(t *testing.T) {
	hop := func(index uint16) func(*Entry) {
		return func(e *Entry) { e.Flow.Control = FlowControl(index, 0, 0) }
	}
	cases := []struct {
		name   string
		change func(*segment)
		entry  func(*Entry)
		ctx    skbuff
		reason Reason
	}{
		{"TTL 1", func(s *segment) { s.ttl = 1 }, nil, skbuff{}, bpfReasonREASON_TTL_EXPIRED},
		{"TTL 0", func(s *segment) { s.ttl = 0 }, nil, skbuff{}, bpfReasonREASON_TTL_EXPIRED},
		{"no flag, over the MTU", func(s *segment) { s.flags = 0; overMTU(s) }, nil, skbuff{}, bpfReasonREASON_JUNK},
		{"TTL 1, over the MTU", func(s *segment) { s.ttl = 1; overMTU(s) }, nil, skbuff{}, bpfReasonREASON_TTL_EXPIRED},
		{"no next hop", func(*segment) {}, hop(0), skbuff{}, bpfReasonREASON_NO_NEXTHOP},
		{"unset next hop", func(*segment) {}, hop(65535), skbuff{}, bpfReasonREASON_NO_NEXTHOP},
		{"no flag", func(s *segment) { s.flags = 0 }, nil, skbuff{}, bpfReasonREASON_JUNK},
		{"PSH alone", func(s *segment) { s.flags = psh }, nil, skbuff{}, bpfReasonREASON_JUNK},
		{"URG, ECE, CWR, AE", func(s *segment) { s.flags = urg | ece | cwr | ae }, nil, skbuff{}, bpfReasonREASON_JUNK},
	}
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothLegs(t, func(t *testing.T, f family, leg Leg) {
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) {
					r := r.with(t)
					before := r.bind(f, leg, c.entry)
					s := f.legSegment(leg, ack|fin)
					c.change(&s)
					r.expectSkb(program(leg), s.frame(), c.ctx, drop(c.reason))
					r.sameEntry(r.entry(f, leg), before)
				})
			}
		})
	})
}

// A super-packet counts as its segments, and its segments must fit the MTU, not it.
// Drivers for virtual machines leave the count of segments to the kernel: 0.
func TestFlowGSO(t *testing.T) {
	r := newFlowRig(t, settings{})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		for _, c := range []struct {
			segs, size uint32
			payload    int
		}{
			{3, 1400, 3500}, {2, 1000, 1500}, {5, 1000, 1500}, {4, 0, 100}, {0, 1400, 3500}, {0, 1000, 3000}, {0, 1000, 3001}, {0, 1000, 10}, {0, 1000, 0}, {1, 536, 500}, {1, 9000, 500},
		} {
			t.Run(fmt.Sprint(c), func(t *testing.T) {
				r := r.with(t)
				r.bind(f, leg, nil)
				s := f.legSegment(leg, ack)
				s.options, s.payload = timestamps(0), make([]byte, c.payload)
				r.expectForward(f, leg, s, skbuff{GSOSegs: c.segs, GSOSize: c.size})
			})
		}
	})
}

// An entry is found by all of its key: family, both ends, leg.
func TestFlowKey(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowDrop)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			r.bind(f, LegClient, nil)
			r.expectForward(f, LegClient, f.clientSegment(ack), skbuff{})
			s := f.clientSegment(ack)
			s.src = f.source
			r.expect(ProgramClient, s.frame(), drop(bpfReasonREASON_UNKNOWN_DROP))
			b := f.backendSegment(ack)
			r.expect(ProgramBackend, b.frame(), backendEvent(b))
		})
		// The same tuple on the other leg is another entry.
		f := families[0]
		f.backend, f.source = f.client, f.vip
		r.bind(f, LegBackend, nil)
		s := f.clientSegment(ack)
		r.expect(ProgramClient, s.frame(), drop(bpfReasonREASON_UNKNOWN_DROP))
	})
}

// A wrong checksum stays as wrong as it was: the far end is its judge.
func TestFlowWrongChecksum(t *testing.T) {
	skins(t, newFlowRig, settings{}, func(t *testing.T, r *rig) {
		bothLegs(t, func(t *testing.T, f family, leg Leg) {
			r := r.with(t)
			e := r.bind(f, leg, nil)
			for _, options := range [][]byte{nil, timestamps(0), timestamps(3)} {
				s := f.legSegment(leg, ack)
				s.options, s.payload, s.wrong = options, []byte("data"), 0x0100
				in := s.frame()
				s.wrong = 0
				w := r.leaving(s, e)
				out, right := r.outcome(program(leg), in, skbuff{}, w), w.frame
				at := s.l4() + 16
				sameFrame(t, append(out[:at:at], out[at+2:]...), append(right[:at:at], right[at+2:]...))
				if bytes.Equal(out[at:at+2], right[at:at+2]) {
					t.Error("a wrong checksum was repaired")
				}
			}
		})
	})
}

// Anything the wire and the engine can say, against the model. Flows of the backend leg
// have any port, and some are pending.
func TestFlowRandom(t *testing.T) {
	skins(t, newFlowRig, settings{workers: 2}, func(t *testing.T, r *rig) {
		r.live.Flags = LiveSourceClient
		r.setClock()
		random := rand.New(rand.NewPCG(5, 6))
		sometimes := func() uint16 { return uint16(random.IntN(8) / 7) }
		for i := range randomRuns {
			f, leg := families[random.IntN(2)], Leg(random.IntN(2))
			f.source = netip.AddrPortFrom(f.source.Addr(), uint16(random.Uint32()))
			e := f.entry(leg)
			e.Flow = Flow{
				Bytes: random.Uint64(), Seq: random.Uint32(), Ack: random.Uint32(), Tsval: random.Uint32(), Tsecr: random.Uint32(),
				LastAck: random.Uint32(), Packets: random.Uint32(), Generation: uint16(i), Id: uint16(random.Uint32()),
				Control: FlowControl(nexthopIndex, random.IntN(29)-14, random.IntN(2)),
			}
			if r.set.xdp {
				r.setHop(func(h *Nexthop) {
					h.XdpIfindex = 1 + random.Uint32N(2)
					h.VlanProto, h.VlanId = Port([]uint16{0, 0x8100, 0x88a8}[random.IntN(3)]), Port(uint16(random.Uint32()))
				})
			}
			pending := leg == LegBackend && random.IntN(4) == 0
			if pending {
				e.Flow.Control |= FlowPending
			}
			must(t, r.tables.InsertFlow(leg, f.tuple(leg), &e))
			back, near := f.entry(1-leg), uint32(0)
			if random.IntN(2) == 0 {
				back.Flow.LastAck, back.To = random.Uint32(), f.tuple(leg).Reverse()
				near = back.Flow.LastAck - e.Flow.Seq
				must(t, r.tables.InsertFlow(1-leg, e.To.Reverse(), &back))
			}
			for range 1 + random.IntN(3) {
				s := f.legSegment(leg, ack|sometimes()*fin|sometimes()*rst|uint16(random.Uint32())&(psh|urg|ece|cwr|ae|reservedFlags))
				if random.IntN(8) == 0 {
					s.flags = rst
				}
				s.options, s.payload = randomOptions(random), make([]byte, random.IntN(1400))
				for i := range s.payload {
					s.payload[i] = byte(random.Uint32())
				}
				s.seq, s.ack, s.window, s.urgent = random.Uint32(), random.Uint32(), uint16(random.Uint32()), uint16(random.Uint32())
				if near != 0 && random.IntN(2) == 0 {
					s.seq = near + random.Uint32N(64<<20) - 16<<20
				}
				s.tos, s.ttl, s.id, s.flowLabel = uint8(random.Uint32()), 2+uint8(random.IntN(254)), uint16(random.Uint32()), random.Uint32()>>12
				if sometimes() == 1 {
					s.tags = []vlan{{0x8100, uint16(random.Uint32())}}
				}
				if r.set.xdp && random.IntN(16) == 0 {
					s = s.unfinished()
				}
				if pending {
					r.expectPending(f, s)
				} else {
					r.expectForward(f, leg, s, skbuff{})
				}
				if t.Failed() {
					t.Fatalf("packet was %x, entry %+v", s.frame(), e)
				}
			}
			must(t, r.tables.DeleteFlow(leg, f.tuple(leg)))
			must(t, r.tables.DeleteFlow(1-leg, e.To.Reverse()))
		}
	})
}
