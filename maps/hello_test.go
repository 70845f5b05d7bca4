// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var helloSays = cookieFields{class: 6, wscale: 7, sack: true}

// hello is a good first segment of a client's data: its ACK number carries a cookie
// of the current slot.
func (r *rig) hello(f family) segment {
	s := f.clientSegment(ack | psh)
	s.ack = helloSays.make(r.live.Keys, r.slot, s.src, s.dst) + 1
	s.payload = []byte("\x16\x03\x01\x00\x05hello")
	return s
}

// eventOf is what the engine has to be told of a packet on lo.
func eventOf(s segment, kind EventKind, limit int) event {
	p := s.packet()
	e := event{Kind: kind, Ifindex: 1, Length: uint32(len(p)), MAC: s.srcMAC, Data: p[:min(len(p), limit)]}
	switch kind {
	case EventHello, EventUnknown, EventClosed:
		e.Listener = listenerID
	case EventBackend:
		e.Leg = LegBackend
	}
	return e
}

func told(reason Reason, e event) want {
	return want{action: shot, reason: reason, events: []event{e}}
}

// headersOnly is what the engine gets of a packet it only has to answer.
const headersOnly = 100

func hello(s segment) want {
	return told(bpfReasonREASON_HELLO, eventOf(s, EventHello, EventData))
}

// closed is what a client sends that has our alert and the FIN behind it.
func closed(s segment) want {
	return told(bpfReasonREASON_HELLO, eventOf(s, EventClosed, EventData))
}

func unknown(s segment) want {
	return told(bpfReasonREASON_UNKNOWN_RESET, eventOf(s, EventUnknown, headersOnly))
}

// What a client with a valid cookie can send, and what becomes of it.
func TestHelloKinds(t *testing.T) {
	cases := []struct {
		name   string
		change func(*segment)
		want   func(segment) want
	}{
		{"data", func(*segment) {}, hello},
		{"one byte", func(s *segment) { s.payload = s.payload[:1] }, hello},
		{"data, no PSH", func(s *segment) { s.flags = ack }, hello},
		{"data and FIN", func(s *segment) { s.flags |= fin }, hello},
		{"data and URG", func(s *segment) { s.flags |= urg }, hello},
		{"data and ECE, CWR, AE", func(s *segment) { s.flags |= ece | cwr | ae }, hello},
		{"FIN alone", func(s *segment) { s.flags, s.payload = ack|fin, nil }, hello},
		{"RST", func(s *segment) { s.flags, s.payload = ack|rst, nil }, hello},
		{"RST and FIN", func(s *segment) { s.flags, s.payload = ack|rst|fin, nil }, hello},
		{"with options", func(s *segment) { s.options = []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8} }, hello},
		{"40 bytes of options", func(s *segment) { s.options = bytes.Repeat([]byte{1}, 40) }, hello},
		{"padding", func(s *segment) { s.padding = []byte("not captured") }, hello},
		{"802.1Q", func(s *segment) { s.tags = []vlan{{0x8100, 20}} }, hello},
		{"another sequence number", func(s *segment) { s.seq = 0xfffffffe }, hello},
		{"TTL 1", func(s *segment) { s.ttl = 1 }, hello},
		{"window 0", func(s *segment) { s.window = 0 }, hello},
		{"wrong checksum", func(s *segment) { s.wrong = 1 }, hello},

		{"ACK alone", func(s *segment) { s.payload = nil }, handshakeAck},
		{"ACK and PSH alone", func(s *segment) { s.flags, s.payload = ack|psh, nil }, handshakeAck},
		{"ACK alone, padded", func(s *segment) { s.payload, s.padding = nil, make([]byte, 6) }, handshakeAck},
		{"the ACK of our FIN", func(s *segment) { s.flags, s.payload, s.ack = ack, nil, s.ack+1 }, handshakeAck},

		{"the ACK of our alert", func(s *segment) { s.flags, s.payload, s.ack = ack, nil, s.ack+behindAlert }, handshakeAck},
		{"the same with PSH, URG", func(s *segment) { s.flags, s.payload, s.ack = ack|psh|urg, nil, s.ack+behindAlert }, handshakeAck},
		{"the same, padded", func(s *segment) { s.payload, s.padding, s.ack = nil, make([]byte, 6), s.ack+behindAlert }, handshakeAck},
		{"FIN behind our alert", func(s *segment) { s.flags, s.payload, s.ack = ack|fin, nil, s.ack+behindAlert }, closed},
		{"data and FIN behind our alert", func(s *segment) { s.flags, s.ack = ack|fin|psh, s.ack+behindAlert }, closed},
		{"data behind our alert", func(s *segment) { s.ack += behindAlert }, closed},

		{"ACK of the alert without our FIN", func(s *segment) { s.flags, s.payload, s.ack = ack, nil, s.ack+AlertLength }, unknown},
		{"FIN without the ACK of our FIN", func(s *segment) { s.flags, s.payload, s.ack = ack|fin, nil, s.ack+AlertLength }, unknown},
		{"ACK one behind our alert", func(s *segment) { s.flags, s.payload, s.ack = ack, nil, s.ack+behindAlert+1 }, unknown},
		{"FIN one behind our alert", func(s *segment) { s.flags, s.payload, s.ack = ack|fin, nil, s.ack+behindAlert+1 }, unknown},
		{"FIN behind our alert, no ACK", func(s *segment) { s.flags, s.payload, s.ack = fin, nil, s.ack+behindAlert }, unknown},
		{"SYN and ACK behind our alert", func(s *segment) { s.flags, s.payload, s.ack = syn|ack, nil, s.ack+behindAlert }, unknown},
		{"SYN and FIN behind our alert", func(s *segment) { s.flags, s.payload, s.ack = syn|ack|fin, nil, s.ack+behindAlert }, unknown},
		{"RST behind our alert", func(s *segment) { s.flags, s.payload, s.ack = ack|rst, nil, s.ack+behindAlert }, unknownDrop},
		{"RST and FIN behind our alert", func(s *segment) { s.flags, s.payload, s.ack = ack|rst|fin, nil, s.ack+behindAlert }, unknownDrop},

		{"data and FIN behind our FIN", func(s *segment) { s.flags, s.ack = ack|fin, s.ack+1 }, unknown},
		{"data behind our FIN", func(s *segment) { s.ack++ }, unknown},
		{"FIN behind our FIN", func(s *segment) { s.flags, s.payload, s.ack = ack|fin, nil, s.ack+1 }, unknown},
		{"ACK two behind", func(s *segment) { s.flags, s.payload, s.ack = ack, nil, s.ack+2 }, unknown},
		{"ACK of the cookie itself", func(s *segment) { s.flags, s.payload, s.ack = ack, nil, s.ack-1 }, unknown},
		{"no ACK flag", func(s *segment) { s.flags = psh }, unknown},
		{"no flag", func(s *segment) { s.flags = 0 }, unknown},
		{"FIN without ACK", func(s *segment) { s.flags = fin }, unknown},
		{"SYN and ACK", func(s *segment) { s.flags, s.payload = syn|ack, nil }, unknown},
		{"SYN and ACK with data", func(s *segment) { s.flags = syn | ack }, unknown},
		{"SYN and FIN", func(s *segment) { s.flags = syn | fin }, unknown},
		{"SYN and RST", func(s *segment) { s.flags = syn | rst }, unknownDrop},
		{"RST without ACK", func(s *segment) { s.flags, s.payload = rst, nil }, unknownDrop},
	}
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) {
					r := r.with(t)
					s := r.hello(f)
					c.change(&s)
					r.expect(ProgramClient, s.frame(), c.want(s))
				})
			}
		})
	})
}

// behindAlert is how much more than a handshake's a client acknowledges after the
// engine closed the connection with an alert and a FIN.
const behindAlert = AlertLength + 1

func handshakeAck(segment) want { return drop(bpfReasonREASON_HANDSHAKE_ACK) }
func unknownDrop(segment) want  { return drop(bpfReasonREASON_UNKNOWN_DROP) }

// A cookie lives two slots more than its own.
func TestCookieAge(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			for age := int64(-5); age <= 9; age++ {
				r := r.with(t)
				s := r.hello(f)
				s.ack = helloSays.make(r.live.Keys, r.slot-uint64(age), s.src, s.dst) + 1
				w := unknown(s)
				if age >= 0 && age <= 2 {
					w = hello(s)
				}
				r.expect(ProgramClient, s.frame(), w)
				// The same behind a close by alert.
				s.ack, s.flags = s.ack+behindAlert, s.flags|fin
				if w = unknown(s); age >= 0 && age <= 2 {
					w = closed(s)
				}
				r.expect(ProgramClient, s.frame(), w)
				if t.Failed() {
					t.Fatalf("cookie made %d slots ago", age)
				}
			}
		})
	})
}

// Every option a cookie can carry is proved by it.
func TestCookieEveryOption(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			s := r.hello(f)
			for bits := range 256 {
				says := cookieFields{class: uint8(bits >> 5), wscale: uint8(bits >> 1 & 15), sack: bits&1 == 1}
				s.ack = says.make(r.live.Keys, r.slot, s.src, s.dst) + 1
				r.expect(ProgramClient, s.frame(), hello(s))
			}
		})
	})
}

// One bit of a cookie, of an address or of a port changed, or one key, is a forgery.
func TestCookieForged(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			for bit := range 32 {
				s := r.hello(f)
				made := s.ack
				if s.ack = (s.ack - 1) ^ 1<<bit + 1; s.ack == made+AlertLength+1 {
					continue // so a client acknowledges an alert and a FIN behind it
				}
				r.forged(s, fmt.Sprintf("cookie bit %d", bit))
			}
			for bit := range 16 {
				s := r.hello(f)
				s.src = netip.AddrPortFrom(s.src.Addr(), s.src.Port()^1<<bit)
				r.forged(s, fmt.Sprintf("source port bit %d", bit))
				s = r.hello(f)
				s.dst = netip.AddrPortFrom(s.dst.Addr(), s.dst.Port()^1<<bit)
				r.forged(s, fmt.Sprintf("destination port bit %d", bit))
			}
			for bit := range len(f.vip.Addr().AsSlice()) * 8 {
				s := r.hello(f)
				s.src = netip.AddrPortFrom(flipBit(s.src.Addr(), bit), s.src.Port())
				r.forged(s, fmt.Sprintf("source address bit %d", bit))
				s = r.hello(f)
				s.dst = netip.AddrPortFrom(flipBit(s.dst.Addr(), bit), s.dst.Port())
				r.forged(s, fmt.Sprintf("destination address bit %d", bit))
			}
			for k := range 128 {
				s := r.hello(f)
				keys := r.live.Keys
				if k < 64 {
					keys[r.slot%4].K0 ^= 1 << k
				} else {
					keys[r.slot%4].K1 ^= 1 << (k - 64)
				}
				s.ack = helloSays.make(keys, r.slot, s.src, s.dst) + 1
				r.forged(s, fmt.Sprintf("key bit %d", k))
			}
			s := r.hello(f)
			s.ack = helloSays.make(r.live.Keys, r.slot, s.dst, s.src) + 1
			r.forged(s, "source and destination swapped")
		})
	})
}

func flipBit(a netip.Addr, bit int) netip.Addr {
	b := a.AsSlice()
	b[bit/8] ^= 1 << (bit % 8)
	flipped, _ := netip.AddrFromSlice(b)
	return flipped
}

// forged offers s to a listener on its destination, whatever that is.
func (r *rig) forged(s segment, what string) {
	r.Helper()
	must(r, r.tables.SetListeners(map[netip.AddrPort]Listener{
		s.dst: {Id: listenerID, UnknownFlow: UnknownFlowDrop},
	}))
	r.expect(ProgramClient, s.frame(), drop(bpfReasonREASON_UNKNOWN_DROP))
	if r.Failed() {
		r.Fatal(what)
	}
}

// A hello is captured whole as far as a program run can go; the larger ones come
// over a veth pair.
func TestHelloSizes(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			for size := 1; size < 3500; size += 1 + size/7 {
				s := r.hello(f)
				s.payload = bytes.Repeat([]byte("0123456789abcdefg"), 206)[:size]
				r.expect(ProgramClient, s.frame(), hello(s))
				s.ack += behindAlert
				r.expect(ProgramClient, s.frame(), closed(s))
			}
		})
	})
}

// A full ring loses the packet, and says so; it does no harm to what it holds.
func TestHelloRingFull(t *testing.T) {
	skins(t, newRig, settings{ringSize: 4096}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		r.connect()
		for _, f := range families {
			s := r.hello(f)
			s.payload = make([]byte, 800)
			var want []event
			for range 4 {
				if _, action := r.run(ProgramClient, s.frame(), skbuff{}); action != shot {
					t.Errorf("action is %d", action)
				}
				want = append(want, eventOf(s, EventHello, EventData))
			}
			for program, full := range map[string]segment{ProgramClient: s, ProgramBackend: f.backendSegment(syn | ack)} {
				full.payload = make([]byte, 800)
				before := r.counters().Packets[bpfReasonREASON_EVENT_LOST]
				_, action := r.run(program, full.frame(), skbuff{})
				if lost := r.counters().Packets[bpfReasonREASON_EVENT_LOST] - before; action != shot || lost != 1 {
					t.Errorf("%s: action is %d, %d lost", program, action, lost)
				}
			}
			if got := r.events(0); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("events are %v, want %v", got, want)
			}
		}
	})
}

// clientWorker is the model of client_worker, with the key 0.
func clientWorker(client netip.AddrPort, workers uint32) int {
	const factor = 0x9e3779b97f4a7c15
	addr := client.Addr().As16()
	h := binary.LittleEndian.Uint64(addr[:]) * factor
	h = (h ^ h>>32 ^ binary.LittleEndian.Uint64(addr[8:])) * factor
	h = (h ^ h>>32 ^ uint64(client.Port()>>8|client.Port()<<8)) * factor
	return int(h >> 32 * uint64(workers) >> 32)
}

// All segments of a hello reach one worker, and all workers are reached.
func TestHelloWorkers(t *testing.T) {
	for _, workers := range []uint32{1, 2, 3, 5, 64} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			skins(t, newRig, settings{workers: workers, ringSize: 4096}, func(t *testing.T, r *rig) {
				r.listen(UnknownFlowReset)
				seen := make(map[int]bool)
				for port := range uint16(200 + 4*workers) {
					for _, f := range families {
						f.client = netip.AddrPortFrom(f.client.Addr(), 1024+port)
						s := r.hello(f)
						w := hello(s)
						w.events[0].Worker = clientWorker(f.client, workers)
						seen[w.events[0].Worker] = true
						r.expect(ProgramClient, s.frame(), w)
						s.seq, s.flags = s.seq+10, s.flags|fin
						next := hello(s)
						next.events[0].Worker = w.events[0].Worker
						r.expect(ProgramClient, s.frame(), next)
						s.ack += behindAlert // its FIN after a close by alert
						next = closed(s)
						next.events[0].Worker = w.events[0].Worker
						r.expect(ProgramClient, s.frame(), next)
					}
				}
				if len(seen) != int(workers) {
					t.Errorf("%d of %d workers had a hello", len(seen), workers)
				}
			})
		})
	}
}

// The engine is told where a packet came in.
func TestHelloInterface(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		var index int
		r.ns.try(t, func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.Index = "eth0", 4711
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0-far"}); err != nil {
				return err
			}
			l, err := netlink.LinkByName("eth0")
			if err == nil {
				index = l.Attrs().Index
			}
			return err
		})
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			s := r.hello(f)
			s.srcMAC = mac{0xfe, 1, 2, 3, 4, 5}
			w := hello(s)
			w.events[0].Ifindex = uint32(index)
			r.expectSkb(ProgramClient, s.frame(), skbuff{Ifindex: uint32(index)}, w)
		})
	})
}

// What a listener does with packets of connections nobody knows.
func TestUnknownFlow(t *testing.T) {
	flags := map[string]uint16{
		"ACK": ack, "data": ack | psh, "FIN": ack | fin, "SYN-ACK": syn | ack, "none": 0, "no ACK": psh,
		"RST": rst, "RST-ACK": rst | ack, "RST-SYN": rst | syn,
	}
	policies := map[string]uint8{"reset": UnknownFlowReset, "pass": UnknownFlowPass, "drop": UnknownFlowDrop}
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			for policyName, policy := range policies {
				r.with(t).listen(policy)
				for flagsName, bits := range flags {
					for _, size := range []int{0, 3, 59, 1000} {
						t.Run(fmt.Sprint(policyName, "/", flagsName, "/", size), func(t *testing.T) {
							s := f.clientSegment(bits)
							s.payload = make([]byte, size)
							r.with(t).expect(ProgramClient, s.frame(), unknownWant(s, policy))
						})
					}
				}
			}
		})
	})
}

func unknownWant(s segment, policy uint8) want {
	switch {
	case policy == UnknownFlowPass:
		return pass(bpfReasonREASON_UNKNOWN_PASS)
	case policy == UnknownFlowDrop || s.flags&rst != 0:
		return drop(bpfReasonREASON_UNKNOWN_DROP)
	default:
		return unknown(s)
	}
}

// refill gives all events of the window back.
func (r *rig) refill() {
	r.Helper()
	for _, kind := range []EventKind{EventUnknown, EventICMP, EventTooBig} {
		r.use(kind, 0, 0)
	}
}

// allow writes how many rationed events of a kind this window has seen, on every CPU.
func (r *rig) allow(kind EventKind, window, used uint64) {
	r.Helper()
	r.rationed = true
	r.use(kind, window, used)
}

func (r *rig) use(kind EventKind, window, used uint64) {
	r.Helper()
	cpus, err := ebpf.PossibleCPU()
	must(r, err)
	all := make([]bpfAllowance, cpus)
	for i := range all {
		all[i] = bpfAllowance{Window: window, Used: used}
	}
	must(r, r.coll.Maps[bpfMapAllowance].Put(uint32(kind), all))
}

// wholeWindow waits until there is time for a few packets within one window of the
// allowance, and returns it.
func (r *rig) wholeWindow() uint64 {
	r.Helper()
	for monotonic(r)&(1<<allowanceShift-1) > 1<<(allowanceShift-2) {
		time.Sleep(5 * time.Millisecond)
	}
	return monotonic(r) >> allowanceShift
}

// inWindow feeds packets within one window of the allowance, and all of them again if the machine was too slow for that.
func (r *rig) inWindow(feed func(r *rig, window uint64)) {
	r.Helper()
	for range 100 {
		window, said := r.wholeWindow(), &unsaid{TB: r.TB}
		feed(r.with(said), window)
		if monotonic(r)>>allowanceShift == window {
			for _, text := range said.errors {
				r.Error(text)
			}
			return
		}
	}
	r.Error("no window was long enough")
}

// unsaid keeps errors for later.
type unsaid struct {
	testing.TB
	errors []string
}

func (u *unsaid) Error(args ...any) { u.errors = append(u.errors, fmt.Sprint(args...)) }

func (u *unsaid) Errorf(format string, args ...any) {
	u.errors = append(u.errors, fmt.Sprintf(format, args...))
}

// Resets are rationed by the window and CPU.
func TestUnknownLimit(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		r.listen(UnknownFlowReset)
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			s := f.clientSegment(ack)
			r.inWindow(func(r *rig, window uint64) {
				r.allow(EventUnknown, window, eventsPerWindow-1)
				r.expect(ProgramClient, s.frame(), unknown(s))
				r.expect(ProgramClient, s.frame(), drop(bpfReasonREASON_UNKNOWN_LIMITED))
				r.expect(ProgramClient, s.frame(), drop(bpfReasonREASON_UNKNOWN_LIMITED))
				h := r.hello(f) // a valid cookie is not rationed
				r.expect(ProgramClient, h.frame(), hello(h))
				r.allow(EventUnknown, window-1, 1<<40)
				r.expect(ProgramClient, s.frame(), unknown(s))
			})
		})
	})
}

// A connection that a socket of this node has is not ours, even where the cookie is
// valid; a listening socket has none.
func TestSocketOwns(t *testing.T) {
	skins(t, newRig, settings{}, func(t *testing.T, r *rig) {
		bothFamilies(t, func(t *testing.T, f family) {
			r := r.with(t)
			r.ns.try(t, func() error { return addLoopback(f.client.Addr(), f.vip.Addr()) })
			client, server := r.connection(f)
			f.client, f.vip = client, server
			must(t, r.tables.SetListeners(map[netip.AddrPort]Listener{server: {Id: listenerID}}))
			r.live.Flags = LiveSockets
			r.setClock()
			for _, flags := range []uint16{ack, ack | psh, ack | fin, rst, ack | rst, syn, syn | ack, 0} {
				s := r.hello(f)
				s.flags = flags
				r.expect(ProgramClient, s.frame(), pass(bpfReasonREASON_SOCKET))
				s.ack ^= 1 << 5
				r.expect(ProgramClient, s.frame(), pass(bpfReasonREASON_SOCKET))
			}
			// Where no socket can be none is looked for, but by what is no SYN.
			r.live.Flags = 0
			r.setClock()
			s := r.hello(f)
			r.expect(ProgramClient, s.frame(), pass(bpfReasonREASON_SOCKET))
			s.flags, s.payload = syn, nil
			r.expectAnswer(s)
			f.client = netip.AddrPortFrom(client.Addr(), client.Port()^1)
			s = r.hello(f)
			r.expect(ProgramClient, s.frame(), hello(s))
			s.ack ^= 1 << 5
			r.expect(ProgramClient, s.frame(), unknown(s))
		})
	})
}

func addLoopback(addrs ...netip.Addr) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, a := range addrs {
		ones := a.BitLen()
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(ones, ones)}}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(lo, addr); err != nil {
			return err
		}
		if err := waitLocal(a); err != nil {
			return err
		}
	}
	return nil
}

// waitLocal waits for an address's route, which the kernel adds later for IPv6.
func waitLocal(a netip.Addr) error {
	for range 500 {
		routes, err := netlink.RouteGet(a.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("no local route to %v", a)
}

// connection makes a real one, open until the test ends.
func (r *rig) connection(f family) (client, server netip.AddrPort) {
	r.Helper()
	var l net.Listener
	var a, b net.Conn
	r.ns.try(r, func() (err error) {
		if l, err = net.Listen("tcp", f.vip.String()); err != nil {
			return err
		}
		from := net.TCPAddrFromAddrPort(netip.AddrPortFrom(f.client.Addr(), 0))
		a, err = (&net.Dialer{LocalAddr: from, Timeout: 5 * time.Second}).Dial("tcp", f.vip.String())
		return err
	})
	b, err := l.Accept()
	must(r, err)
	r.Cleanup(func() {
		must(r, a.Close())
		must(r, b.Close())
		must(r, l.Close())
	})
	return a.LocalAddr().(*net.TCPAddr).AddrPort(), f.vip
}
