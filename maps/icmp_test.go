// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// icmpCapture is how much of an ICMP error the engine gets: IP, ICMP, and the IP and
// TCP headers it quotes.
const icmpCapture = 40 + 8 + 40 + 60

// icmpError is an ICMP error in the making.
type icmpError struct {
	segment          // the link, addresses, TOS and TTL of the packet; no TCP
	kind, code uint8 // of ICMP
	rest       uint32
	quote      []byte
	outer      func([]byte) []byte // changes the finished packet; nil: does not
}

// icmpError is a router's good one about the packet that answers leg's: with the 8
// bytes of TCP that it must quote.
func (f family) icmpError(leg Leg) icmpError {
	e := icmpError{segment: f.legSegment(leg, 0), kind: 3, code: 4, rest: 1400}
	quoted := f.legSegment(leg, ack)
	quoted.src, quoted.dst, quoted.payload = quoted.dst, quoted.src, []byte("data")
	e.quote = quoted.packet()[:28]
	if !f.is4() {
		e.kind, e.code, e.quote = 2, 0, quoted.packet()[:48]
	}
	e.src = netip.AddrPortFrom(e.src.Addr().Next(), 0) // the router
	return e
}

func (e icmpError) packet() []byte {
	b := binary.BigEndian.AppendUint32([]byte{e.kind, e.code, 0, 0}, e.rest)
	b = append(b, e.quote...)
	var p []byte
	if e.src.Addr().Is4() {
		binary.BigEndian.PutUint16(b[2:], ^uint16(sum16(0, b)))
		p = e.ip4(unix.IPPROTO_ICMP, b)
	} else {
		pseudo := slices.Concat(e.src.Addr().AsSlice(), e.dst.Addr().AsSlice())
		pseudo = append(pseudo, 0, 0, byte(len(b)>>8), byte(len(b)), 0, 0, 0, unix.IPPROTO_ICMPV6)
		binary.BigEndian.PutUint16(b[2:], ^uint16(sum16(sum16(0, pseudo), b)))
		p = e.ip6(unix.IPPROTO_ICMPV6, b)
	}
	if e.outer != nil {
		p = e.outer(p)
	}
	return p
}

func (e icmpError) frame() []byte { return e.onLink(e.packet()) }

// event is what the engine has to be told of the error.
func (e icmpError) event(leg Leg, worker int) want {
	p := e.packet()
	return told(bpfReasonREASON_ICMP, event{
		Kind: EventICMP, Leg: leg, Worker: worker, Ifindex: 1, Length: uint32(len(p)),
		MAC: e.srcMAC, Data: p[:min(len(p), icmpCapture)],
	})
}

func notTCP() want { return pass(bpfReasonREASON_NOT_TCP) }

// put overwrites bytes of a packet.
func put(at int, with ...byte) func([]byte) []byte {
	return func(p []byte) []byte {
		p = slices.Clone(p)
		copy(p[at:], with)
		return p
	}
}

// withIPOptions puts 4 bytes of options into an IPv4 header: who overlooks them reads
// there what is behind them.
func withIPOptions(p []byte) []byte {
	p = slices.Insert(slices.Clone(p), 20, p[20:24]...)
	p[0]++
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	return p
}

// withExtension puts an extension header of 8 bytes into an IPv6 packet.
func withExtension(kind byte) func([]byte) []byte {
	return func(p []byte) []byte {
		p = slices.Insert(slices.Clone(p), 40, p[6], 0, 0, 0, 0, 0, 0, 0)
		p[6] = kind
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
		return p
	}
}

// newICMPRig has no path: what is found is found by its flow.
func newICMPRig(t testing.TB, set settings) *rig {
	t.Helper()
	r := newRig(t, set)
	r.listen(UnknownFlowReset)
	r.hop(nexthopMTU)
	return r
}

// bindICMP binds a flow whose worker is not its port's.
func (r *rig) bindICMP(f family, leg Leg) Entry {
	r.Helper()
	return r.bind(f, leg, func(e *Entry) { e.Flow.Control = FlowControl(nexthopIndex, 0, icmpWorker) })
}

const (
	icmpWorkers = 3 // port 20345 is worker 0's
	icmpWorker  = 2
)

// Which types are errors: unreachable and too big, with every code. A time that is
// exceeded or a bad header is nobody's to be told, echoes and neighbours are not ours.
func TestICMPTypes(t *testing.T) {
	r := newICMPRig(t, settings{workers: icmpWorkers})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		before := r.bindICMP(f, leg)
		for kind := range 256 {
			isError := f.is4() && kind == 3 || !f.is4() && (kind == 1 || kind == 2)
			codes := []uint8{0, 4}
			if isError {
				codes = []uint8{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 255}
			}
			for _, code := range codes {
				e := f.icmpError(leg)
				e.kind, e.code = uint8(kind), code
				w := notTCP()
				if isError {
					w = e.event(leg, icmpWorker)
				}
				r.expect(program(leg), e.frame(), w)
			}
		}
		r.untouched(f, leg, before)
	})
}

// A quote of any length: from 8 bytes of TCP on it is told, and so much of it that
// all its headers are there.
func TestICMPQuoteLength(t *testing.T) {
	r := newICMPRig(t, settings{workers: icmpWorkers})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		r.bindICMP(f, leg)
		e := f.icmpError(leg)
		least := len(e.quote)
		long := append(slices.Clone(e.quote), bytes.Repeat([]byte("headers and data "), 90)...)
		for n := 0; n < len(long); n += 1 + n/150*20 {
			e.quote = long[:n]
			w := notTCP()
			if n >= least {
				w = e.event(leg, icmpWorker)
			}
			r.expect(program(leg), e.frame(), w)
			// Nothing behind the packet is part of it.
			e.padding = long[n:]
			r.expect(program(leg), e.frame(), w)
			e.padding = nil
		}
	})
}

// One thing about a good error changed at a time. good: it is told all the same.
type icmpCase struct {
	name   string
	change func(*icmpError)
	reason Reason // OK: told
}

func quoteCase(name string, change func([]byte) []byte, reason Reason) icmpCase {
	return icmpCase{name, func(e *icmpError) { e.quote = change(e.quote) }, reason}
}

func outerCase(name string, change func([]byte) []byte, reason Reason) icmpCase {
	return icmpCase{name, func(e *icmpError) { e.outer = change }, reason}
}

const (
	isTold   = bpfReasonREASON_OK
	isNotTCP = bpfReasonREASON_NOT_TCP
)

var icmpCases = map[string][]icmpCase{
	"v4": {
		quoteCase("options in the quote", withIPOptions, isNotTCP),
		quoteCase("quoted header too short", put(0, 0x44), isNotTCP),
		quoteCase("IPv6 quoted", put(0, 0x65), isNotTCP),
		quoteCase("version 0 quoted", put(0, 0x05), isNotTCP),
		quoteCase("UDP quoted", put(9, 17), isNotTCP),
		quoteCase("ICMP quoted", put(9, 1), isNotTCP),
		quoteCase("quote of a later fragment", put(6, 0, 1), isNotTCP),
		quoteCase("quote of a middle fragment", put(6, 0x20, 185), isNotTCP),
		quoteCase("quote of the largest offset", put(6, 0x1f, 0xff), isNotTCP),
		quoteCase("quote of the first fragment", put(6, 0x20, 0), isTold),
		quoteCase("quote without DF", put(6, 0, 0), isTold),
		quoteCase("quoted TTL 0", put(8, 0), isTold),
		quoteCase("quoted TOS", put(1, 0xff), isTold),
		quoteCase("quoted length 0", put(2, 0, 0), isTold),
		quoteCase("quoted checksum", put(10, 1, 2), isTold),
		outerCase("IP options", withIPOptions, bpfReasonREASON_IP_OPTIONS),
		outerCase("first fragment", put(6, 0x20, 0), bpfReasonREASON_FRAGMENT),
		outerCase("later fragment", put(6, 0, 1), bpfReasonREASON_FRAGMENT),
		outerCase("header too short", put(0, 0x44), bpfReasonREASON_MALFORMED),
		outerCase("length over the frame", put(2, 0, 57), bpfReasonREASON_MALFORMED),
		outerCase("length 65535", put(2, 0xff, 0xff), bpfReasonREASON_MALFORMED),
		outerCase("length within the quoted ports", put(2, 0, 55), isNotTCP),
		outerCase("length within the quoted header", put(2, 0, 30), isNotTCP),
		outerCase("length within ICMP", put(2, 0, 21), isNotTCP),
		outerCase("length within IP", put(2, 0, 19), isNotTCP),
		outerCase("length 0", put(2, 0, 0), isNotTCP),
		outerCase("ICMPv6", put(9, 58), isNotTCP),
		outerCase("UDP", put(9, 17), isNotTCP),
		outerCase("wrong checksum", put(22, 0x55), isTold), // the engine's to judge
	},
	"v6": {
		quoteCase("hop-by-hop options in the quote", put(6, 0), isNotTCP),
		quoteCase("destination options in the quote", put(6, 60), isNotTCP),
		quoteCase("fragment header in the quote", put(6, 44), isNotTCP),
		quoteCase("IPv4 quoted", put(0, 0x45), isNotTCP),
		quoteCase("version 0 quoted", put(0, 0x05), isNotTCP),
		quoteCase("UDP quoted", put(6, 17), isNotTCP),
		quoteCase("ICMPv6 quoted", put(6, 58), isNotTCP),
		quoteCase("quoted hop limit 0", put(7, 0), isTold),
		quoteCase("quoted class and label", put(0, 0x6f, 0xff, 0xff, 0xff), isTold),
		quoteCase("quoted length 0", put(4, 0, 0), isTold),
		outerCase("hop-by-hop options", withExtension(0), bpfReasonREASON_EXTENSION_HEADER),
		outerCase("routing header", withExtension(43), bpfReasonREASON_EXTENSION_HEADER),
		outerCase("destination options", withExtension(60), bpfReasonREASON_EXTENSION_HEADER),
		outerCase("fragment", withExtension(44), bpfReasonREASON_FRAGMENT),
		outerCase("length over the frame", put(4, 0, 57), bpfReasonREASON_MALFORMED),
		outerCase("length 65535", put(4, 0xff, 0xff), bpfReasonREASON_MALFORMED),
		outerCase("length within the quoted ports", put(4, 0, 55), isNotTCP),
		outerCase("length within the quoted header", put(4, 0, 20), isNotTCP),
		outerCase("length within ICMP", put(4, 0, 1), isNotTCP),
		outerCase("length 0", put(4, 0, 0), isNotTCP),
		outerCase("ICMP of IPv4", put(6, 1), isNotTCP),
		outerCase("UDP", put(6, 17), isNotTCP),
		outerCase("wrong checksum", put(42, 0x55), isTold),
	},
	"both": {
		{"good", func(*icmpError) {}, isTold},
		{"802.1Q", func(e *icmpError) { e.tags = []vlan{{0x8100, 0x2014}} }, isTold},
		{"802.1ad", func(e *icmpError) { e.tags = []vlan{{0x88a8, 1}} }, isTold},
		{"two tags", func(e *icmpError) { e.tags = []vlan{{0x88a8, 1}, {0x8100, 2}} }, bpfReasonREASON_VLAN_STACKED},
		{"padding", func(e *icmpError) { e.padding = []byte("padding") }, isTold},
		{"padding and a tag", func(e *icmpError) { e.tags, e.padding = []vlan{{0x8100, 1}}, []byte("p") }, isTold},
		{"TTL 1", func(e *icmpError) { e.ttl = 1 }, isTold},
		{"TOS", func(e *icmpError) { e.tos = 0xff }, isTold},
		{"MTU 0", func(e *icmpError) { e.rest = 0 }, isTold},
		{"any MTU", func(e *icmpError) { e.rest = 0xffffffff }, isTold},
		{"from another link address", func(e *icmpError) { e.srcMAC = mac{2, 9, 8, 7, 6, 5} }, isTold},
		{"from the far end", func(e *icmpError) { e.src = netip.AddrPortFrom(e.src.Addr().Prev(), 0) }, isTold},
		{"to a group", func(e *icmpError) { e.dstMAC[0] |= 1 }, bpfReasonREASON_NOT_OURS},
	},
}

func TestICMPFields(t *testing.T) {
	r := newICMPRig(t, settings{workers: icmpWorkers})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		before := r.bindICMP(f, leg)
		for _, c := range append(icmpCases[f.name], icmpCases["both"]...) {
			t.Run(c.name, func(t *testing.T) {
				e := f.icmpError(leg)
				c.change(&e)
				w := pass(c.reason)
				if c.reason == isTold {
					w = e.event(leg, icmpWorker)
				}
				r := r.with(t)
				r.expect(program(leg), e.frame(), w)
			})
		}
		r.with(t).untouched(f, leg, before)
		must(t, r.tables.DeleteFlow(leg, f.tuple(leg)))
	})
}

// A frame that ends before its packet does is malformed.
func TestICMPTruncated(t *testing.T) {
	r := newICMPRig(t, settings{workers: icmpWorkers})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		r.bindICMP(f, leg)
		for _, tag := range tagged {
			e := f.icmpError(leg)
			e.tags = tag.tags
			frame := e.frame()
			for n := e.l4(); n < len(frame); n++ {
				r.expect(program(leg), frame[:n], pass(bpfReasonREASON_MALFORMED))
			}
			r.expect(program(leg), frame, e.event(leg, icmpWorker))
		}
	})
}

// Whose packet is quoted: one that we sent on that leg, by all of its tuple.
func TestICMPWhose(t *testing.T) {
	r := newICMPRig(t, settings{workers: icmpWorkers})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		e, ip := f.icmpError(leg), len(f.icmpError(leg).quote)-8
		r.expect(program(leg), e.frame(), notTCP()) // of no flow
		before := r.bindICMP(f, leg)
		r.expect(program(leg), e.frame(), e.event(leg, icmpWorker))
		r.expect(program(1-leg), e.frame(), notTCP()) // from the other leg
		for at := ip - 2*len(f.vip.Addr().AsSlice()); at < ip+4; at++ {
			other := e
			other.quote = put(at, e.quote[at]^0x10)(e.quote)
			r.expect(program(leg), other.frame(), notTCP())
		}
		e.quote = f.legSegment(leg, ack).packet()[:ip+8] // what was sent to us
		r.expect(program(leg), e.frame(), notTCP())
		e.quote = put(ip+4, 1, 2, 3, 4)(f.icmpError(leg).quote) // any number: the engine's to judge
		r.expect(program(leg), e.frame(), e.event(leg, icmpWorker))
		r.untouched(f, leg, before)
	})
}

// A quote of no TCP is read no further, though its first words be the ports of a flow.
func TestICMPNoQuote(t *testing.T) {
	r := newICMPRig(t, settings{workers: icmpWorkers})
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		ports := f.icmpError(LegBackend).quote
		f.source = netip.AddrPortFrom(f.source.Addr(), binary.BigEndian.Uint16(ports))
		f.backend = netip.AddrPortFrom(f.backend.Addr(), binary.BigEndian.Uint16(ports[2:]))
		r.bindICMP(f, LegBackend)
		e := f.icmpError(LegBackend)
		e.src = f.backend
		r.expect(ProgramBackend, e.frame(), e.event(LegBackend, icmpWorker))
		protocol := 9
		if !f.is4() {
			protocol = 6
		}
		e.quote = put(protocol, 17)(e.quote)
		r.expect(ProgramBackend, e.frame(), notTCP())
	})
}

// The worker is the entry's, on any port, and of a pending entry too.
func TestICMPWorker(t *testing.T) {
	r := newICMPRig(t, settings{workers: 64, ringSize: 4096})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		for worker := range 64 {
			for _, state := range []uint32{0, FlowPending, FlowFIN, FlowRST | FlowConfirmed} {
				for _, port := range []uint16{sourcePort, portLast, portLast + 1} {
					f, r := f, r.with(t)
					f.source = netip.AddrPortFrom(f.source.Addr(), port)
					e := f.icmpError(leg)
					before := f.entry(leg)
					before.Flow.Control = FlowControl(0, 0, worker) | state
					must(t, r.tables.InsertFlow(leg, f.tuple(leg), &before))
					before = r.entry(f, leg)
					r.expect(program(leg), e.frame(), e.event(leg, worker))
					r.untouched(f, leg, before)
					must(t, r.tables.DeleteFlow(leg, f.tuple(leg)))
				}
			}
		}
	})
}

// Of a handshake of the engine's there is no flow yet: a path and a port of the range
// say that it is ours, and whose.
func TestICMPPath(t *testing.T) {
	r := newRig(t, settings{workers: icmpWorkers})
	r.listen(UnknownFlowReset)
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		e := f.icmpError(LegBackend)
		r.expect(ProgramBackend, e.frame(), notTCP())
		must(t, r.tables.AddPath(f.source.Addr(), f.backend, 1))
		for _, port := range []uint16{portFirst, portFirst + 1, sourcePort, portLast} {
			f.source = netip.AddrPortFrom(f.source.Addr(), port)
			e = f.icmpError(LegBackend)
			r.expect(ProgramBackend, e.frame(), e.event(LegBackend, int(port-portFirst)%icmpWorkers))
			r.expect(ProgramClient, e.frame(), notTCP())
		}
		for _, port := range []uint16{0, vipPort, portFirst - 1, portLast + 1, 65535} {
			f.source = netip.AddrPortFrom(f.source.Addr(), port)
			r.expect(ProgramBackend, f.icmpError(LegBackend).frame(), notTCP())
		}
		f.source = netip.AddrPortFrom(f.source.Addr(), sourcePort)
		ip := len(e.quote) - 8
		for at := ip - 2*len(f.vip.Addr().AsSlice()); at < ip; at++ { // another address of one end
			e = f.icmpError(LegBackend)
			e.quote[at] ^= 0x10
			r.expect(ProgramBackend, e.frame(), notTCP())
		}
		e = f.icmpError(LegBackend)
		e.quote[ip+3] ^= 1 // another backend's port
		r.expect(ProgramBackend, e.frame(), notTCP())
		// What the client's SYN-ACK met is nothing to us.
		r.expect(ProgramClient, f.icmpError(LegClient).frame(), notTCP())
		must(t, r.tables.DeletePath(f.source.Addr(), f.backend))
		r.expect(ProgramBackend, f.icmpError(LegBackend).frame(), notTCP())
	})
}

// Errors are rationed by the window and CPU; those that are not ours are not counted.
func TestICMPLimit(t *testing.T) {
	r := newICMPRig(t, settings{})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		before := r.bind(f, leg, nil)
		e, echo := f.icmpError(leg), f.icmpError(leg)
		echo.kind = 8
		r.inWindow(func(r *rig, window uint64) {
			r.allow(EventICMP, window, eventsPerWindow-1)
			r.expect(program(leg), echo.frame(), notTCP())
			r.expect(program(leg), e.frame(), e.event(leg, 0))
			r.expect(program(leg), e.frame(), drop(bpfReasonREASON_ICMP_LIMITED))
			r.expect(program(leg), echo.frame(), notTCP())
			r.allow(EventICMP, window-1, 1<<40)
			r.expect(program(leg), e.frame(), e.event(leg, 0))
		})
		r.untouched(f, leg, before)
	})
}

func TestICMPRingFull(t *testing.T) {
	r := newFlowRig(t, settings{ringSize: 8192})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		r.fill(f)
		r.bind(f, leg, nil)
		e := f.icmpError(leg)
		r.countedFull(program(leg), e.frame(), bpfReasonREASON_EVENT_LOST)
		r.events(0)
		r.expect(program(leg), e.frame(), e.event(leg, 0))
	})
}

// The engine's own ICMP goes out; there is none to replay.
func TestTapICMP(t *testing.T) {
	r := newICMPRig(t, settings{})
	bothLegs(t, func(t *testing.T, f family, leg Leg) {
		r := r.with(t)
		before := r.bind(f, leg, nil)
		for _, kind := range []uint8{1, 2, 3, 11} {
			e := f.icmpError(leg)
			e.kind, e.quote = kind, append(e.quote, make([]byte, 600)...)
			for request, index := range map[uint8]uint16{TapOutput: nexthopIndex, TapReplayClient: 0, TapReplayBackend: 0} {
				e.dstMAC = mac{0x02, 0, 0, request, byte(index >> 8), byte(index)}
				w := want{action: redirect, reason: bpfReasonREASON_ENGINE_OUTPUT}
				if request != TapOutput {
					w = drop(bpfReasonREASON_JUNK)
				}
				frame := e.frame()
				sameFrame(r, r.outcome(ProgramTap, frame, skbuff{}, w), frame)
			}
			e.dstMAC = mac{0x02, 0, 0, TapOutput, 0, nexthopIndex + 1}
			r.expect(ProgramTap, e.frame(), drop(bpfReasonREASON_NO_NEXTHOP))
		}
		r.untouched(f, leg, before)
	})
}

// Errors whose headers lie in fragments, and with tags beside the frame.
func TestDeviceICMP(t *testing.T) {
	r := newFlowRig(t, settings{})
	w := r.newWires(false, false)
	bothFamilies(t, func(t *testing.T, f family) {
		r := r.with(t)
		r.bind(f, LegClient, nil)
		e := f.icmpError(LegClient)
		e.quote = append(e.quote, bytes.Repeat([]byte("x1"), 4000)...)
		for linear := uint16(14); linear < 200; linear += 4 {
			r.send(w.client, vnetHeader{HdrLen: linear}, e.frame(), bpfReasonREASON_ICMP)
			r.sameEvents(w.client, e.event(LegClient, 0).events[0])
		}
		e.tags = []vlan{{0x8100, 20}}
		r.send(w.client, vnetHeader{}, e.frame(), bpfReasonREASON_ICMP)
		r.sameEvents(w.client, e.event(LegClient, 0).events[0])
		for _, tags := range [][]vlan{{{0x8100, 20}, {0x8100, 21}}, {{0x88a8, 20}, {0x8100, 21}, {0x8100, 22}}} {
			e.tags = tags
			r.send(w.client, vnetHeader{}, e.frame(), bpfReasonREASON_VLAN_STACKED)
		}
		e.tags = nil
		for n := 14; n < e.l4()+8+len(f.icmpError(LegClient).quote); n++ {
			r.send(w.client, vnetHeader{}, e.frame()[:n], bpfReasonREASON_MALFORMED)
		}
	})
}

// Any damage: the program goes on, nothing is written, and what is counted is what was
// done.
func TestICMPRandom(t *testing.T) {
	r := newFlowRig(t, settings{workers: icmpWorkers})
	random := rand.New(rand.NewPCG(7, 8))
	seen := make(map[Reason]int)
	for _, f := range families {
		for _, leg := range legs {
			r.bindICMP(f, leg)
		}
	}
	for range randomRuns {
		r.refill()
		f, leg := families[random.IntN(2)], Leg(random.IntN(2))
		frame := damaged(random, f.icmpError(leg))
		seen[r.anyICMP(program(leg), frame)]++
		if t.Failed() {
			t.Fatalf("frame was %x", frame)
		}
	}
	for _, reason := range []Reason{bpfReasonREASON_ICMP, isNotTCP, bpfReasonREASON_MALFORMED, bpfReasonREASON_IP_OPTIONS, bpfReasonREASON_FRAGMENT, bpfReasonREASON_EXTENSION_HEADER} {
		if seen[reason] == 0 {
			t.Errorf("no frame was %s", Reasons[reason].Name)
		}
	}
}

// damaged is the error with a few bytes changed, cut or made longer.
func damaged(random *rand.Rand, e icmpError) []byte {
	if random.IntN(4) == 0 {
		e.tags = []vlan{{0x8100, uint16(random.Uint32())}}
	}
	e.quote = append(e.quote, make([]byte, random.IntN(200))...)
	frame, start := e.frame(), e.l3()
	for range random.IntN(5) {
		at := start + random.IntN(min(len(frame)-start, 100))
		switch random.IntN(3) {
		case 0:
			frame[at] = byte(random.Uint32())
		case 1:
			frame[at] ^= 1 << random.IntN(8)
		default:
			frame[at] = []byte{0, 1, 2, 3, 6, 17, 44, 58, 0x45, 0x46, 0x60, 0xff}[random.IntN(12)]
		}
	}
	switch random.IntN(4) {
	case 0:
		frame = frame[:e.l4()+random.IntN(len(frame)-e.l4())]
	case 1:
		frame = append(frame, make([]byte, random.IntN(64))...)
	}
	return frame
}

// anyICMP runs a program over a frame of any kind, and returns the reason it counted.
func (r *rig) anyICMP(program string, frame []byte) Reason {
	r.Helper()
	before, start := r.counters(), monotonic(r)
	out, action := r.run(program, frame, skbuff{})
	sameFrame(r, out, frame)
	var reason Reason
	n := uint64(0)
	for i, after := range r.counters().Packets {
		if after != before.Packets[i] {
			reason, n = Reason(i), n+after-before.Packets[i]
		}
	}
	events := r.events(start)
	wantAction, wantEvents := shot, 0
	switch Reasons[reason].Action {
	case ActionPass:
		wantAction = next
	case ActionEngine:
		wantEvents = 1
	case ActionDrop:
	default:
		r.Errorf("an ICMP error came to %s", Reasons[reason].Action)
	}
	if n != 1 || action != wantAction || len(events) != wantEvents || reason == bpfReasonREASON_EVENT_LOST {
		r.Errorf("%d counted, the last as %s; action %d, events %s", n, Reasons[reason].Name, action, fmt.Sprint(events))
	}
	for _, e := range events {
		if !bytes.Contains(frame, e.Data) || len(e.Data) != min(int(e.Length), icmpCapture) {
			r.Errorf("event %+v", e)
		}
	}
	return reason
}
