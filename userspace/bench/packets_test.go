// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"snilb/userspace/packet"
)

// fakeLine is one end of a cable without a kernel. What is sent must be right to the last bit.
type fakeLine struct {
	t    *testing.T
	buf  [2048]byte
	in   [][]byte
	sent int
	to   func(frame []byte)
}

func (f *fakeLine) room() []byte             { return f.buf[:] }
func (f *fakeLine) flush() error             { return nil }
func (f *fakeLine) wait(time.Duration) error { return nil }

func (f *fakeLine) send(n int) {
	frame := slices.Clone(f.buf[:n])
	if _, err := packet.Parse(frame[ethernetHeader:]); err != nil {
		f.t.Fatalf("sent %x: %v", frame, err)
	}
	f.sent++
	f.to(frame)
}

func (f *fakeLine) receive(most int, take func([]byte)) (n int) {
	for n < most && len(f.in) > 0 {
		frame := f.in[0]
		f.in = f.in[1:]
		take(frame)
		n++
	}
	return n
}

func (f *fakeLine) deliver(frame []byte) { f.in = append(f.in, frame) }

// segment is a frame's.
func segment(t *testing.T, frame []byte) packet.Segment {
	t.Helper()
	s, err := packet.Parse(frame[ethernetHeader:])
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var epoch = time.Date(2024, 2, 29, 0, 0, 0, 0, time.UTC).UnixNano()

var families = map[string]struct {
	target  netip.AddrPort
	sources netip.Prefix
}{
	"IPv4": {netip.MustParseAddrPort("192.0.2.1:443"), netip.MustParsePrefix("10.64.0.0/28")},
	"IPv6": {netip.MustParseAddrPort("[2001:db8::1]:443"), netip.MustParsePrefix("2001:db8:64::/64")},
}

func eachFamily(t *testing.T, fn func(t *testing.T, l Load, sources netip.Prefix)) {
	for name, f := range families {
		t.Run(name, func(t *testing.T) {
			fn(t, Load{Target: f.target, Concurrency: 8, Timeout: 20 * time.Second, Reply: 1}, f.sources)
		})
	}
}

func packetHellos(t *testing.T, o HelloOptions) *Hellos {
	t.Helper()
	if o.Layout == "" {
		o.Layout = "go-classic"
	}
	o.Names.List = []string{"a.example.com", "b.example.com"}
	h, err := NewHellos(o)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// table is a client and a server, or whatever the test has in its place, on a cable.
type table struct {
	t          *testing.T
	now        int64
	client     *client
	server     *server
	cend, send *fakeLine
	rec        *recorder
}

func newTable(t *testing.T, l Load, sources netip.Prefix, reply int) *table {
	t.Helper()
	if l.Hellos == nil {
		l.Hellos = packetHellos(t, HelloOptions{})
	}
	p, err := newPairs(sources)
	if err != nil {
		t.Fatal(err)
	}
	b := &table{t: t, now: epoch, cend: &fakeLine{t: t}, send: &fakeLine{t: t}, rec: newRecorder()}
	b.cend.to, b.send.to = b.send.deliver, b.cend.deliver
	mss := 1440
	if b.client, err = newClient(&l, p, mss, hop{}, b.cend, b.rec.part(0), epoch); err != nil {
		t.Fatal(err)
	}
	b.server = newServer([]netip.AddrPort{l.Target}, answer(reply), mss, b.send, [2]uint64{1, 0x9e3779b97f4a7c15}, epoch)
	return b
}

// run lets that much time pass, a millisecond a step.
func (b *table) run(d time.Duration) {
	b.t.Helper()
	for end := b.now + int64(d); b.now < end; b.now += int64(time.Millisecond) {
		b.client.step(b.now)
		if _, err := b.server.step(b.now); err != nil || b.client.err != nil {
			b.t.Fatal(err, b.client.err)
		}
	}
}

// end begins nothing more and waits until all is over; then no state may be left.
func (b *table) end(within time.Duration) *Result {
	b.t.Helper()
	b.client.stopped = true
	b.run(within)
	for i := range b.server.slab {
		if b.server.slab[i].state != free {
			b.t.Errorf("session left: %+v", b.server.slab[i])
		}
	}
	for i := range b.client.conns {
		if b.client.conns[i].state != free {
			b.t.Errorf("connection left: %+v", b.client.conns[i])
		}
	}
	if b.client.used != 0 || b.client.running != 0 {
		b.t.Errorf("left: %d slots, %d attempts", b.client.used, b.client.running)
	}
	return b.rec.result("connections", "packets", b.client.target)
}

// wantAll says that all attempts were successes.
func wantAll(t *testing.T, r *Result) {
	t.Helper()
	if r.Attempts == 0 || r.Successes != r.Attempts || len(r.Failures) > 0 {
		t.Errorf("%d attempts, %d successes, failures %v", r.Attempts, r.Successes, r.Failures)
	}
}

func TestPacketConnections(t *testing.T) {
	for name, c := range map[string]struct {
		hello HelloOptions
		reply int
	}{
		"one segment":  {HelloOptions{}, 1},
		"two segments": {HelloOptions{Layout: "go"}, 1},
		"tiny":         {HelloOptions{SegmentBytes: 7}, 1},
		"records":      {HelloOptions{RecordBytes: 3, SegmentBytes: 101}, 77},
		"long answer":  {HelloOptions{}, 60000},
	} {
		t.Run(name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
				l.Hellos, l.Reply = packetHellos(t, c.hello), c.reply
				b := newTable(t, l, sources, c.reply)
				longest := 0
				b.cend.to = func(frame []byte) {
					longest = max(longest, len(segment(t, frame).Payload))
					b.send.deliver(frame)
				}
				b.run(100 * time.Millisecond)
				r := b.end(time.Second)
				wantAll(t, r)
				if want := c.hello.SegmentBytes; want > 0 && longest != want || longest > 1440-timestampBytes {
					t.Errorf("a segment of %d bytes, want %d", longest, want)
				}
				// Nothing was lost, so nothing may wait for a timer.
				if r.Latency.Max > 100e3 {
					t.Errorf("%+v", *r.Latency)
				}
				if r.Bytes != r.Successes*uint64(c.reply) {
					t.Errorf("%d bytes for %d replies of %d", r.Bytes, r.Successes, c.reply)
				}
				if name == "one segment" && (b.cend.sent != 3*int(r.Attempts) || b.send.sent != b.cend.sent) {
					t.Errorf("%d connections took %d packets, and %d back: want 3 each", r.Attempts, b.cend.sent, b.send.sent)
				}
			})
		})
	}
}

// TestPacketLoss loses, doubles and reorders in both directions: no attempt may fail of it.
func TestPacketLoss(t *testing.T) {
	eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
		l.Hellos, l.Reply = packetHellos(t, HelloOptions{Layout: "go", SegmentBytes: 400}), 5000
		b := newTable(t, l, sources, 5000)
		random := rand.New(rand.NewPCG(1, 2))
		bad := func(to *fakeLine) func([]byte) {
			var late []byte
			return func(frame []byte) {
				switch x := random.Float64(); {
				case x < 0.1:
					return
				case x < 0.15:
					to.deliver(slices.Clone(frame))
				case x < 0.2 && late == nil:
					late = frame
					return
				}
				to.deliver(frame)
				if late != nil {
					to.deliver(late)
					late = nil
				}
			}
		}
		lossy := bad(b.send)
		b.send.to, b.cend.to = bad(b.cend), func(frame []byte) {
			if s := segment(t, frame); s.Has(packet.RST | packet.ACK) {
				t.Error("a connection was not closed but reset")
			}
			lossy(frame)
		}
		b.run(10 * time.Second)
		r := b.end(60 * time.Second)
		wantAll(t, r)
		if r.Attempts < 50 {
			t.Errorf("%d attempts only", r.Attempts)
		}
	})
}

// peerAnswers puts a peer that answers each segment by at most one of its own in the place of the server.
func (b *table) peerAnswers(fn func(s packet.Segment) *packet.Segment) {
	b.cend.to = func(frame []byte) {
		s := segment(b.t, frame)
		if a := fn(s); a != nil {
			a.Src, a.Dst = s.Dst, s.Src
			put(b.send, &hop{}, a, nil, 0)
		}
	}
}

func synACK(s packet.Segment) *packet.Segment {
	return &packet.Segment{Seq: 1000, Ack: s.Seq + 1, Flags: packet.SYN | packet.ACK, Window: 1 << 14,
		Options: packet.Options{MSS: 1460, HasTimestamps: true, TSVal: 77, TSEcr: s.Options.TSVal}}
}

func TestPacketFailures(t *testing.T) {
	for want, peer := range map[Failure]func(s packet.Segment) *packet.Segment{
		Refused: func(s packet.Segment) *packet.Segment {
			return &packet.Segment{Ack: s.Seq + 1, Flags: packet.RST | packet.ACK}
		},
		Reset: func(s packet.Segment) *packet.Segment {
			if s.Has(packet.SYN) {
				return synACK(s)
			}
			return &packet.Segment{Seq: s.Ack, Flags: packet.RST}
		},
		Closed: func(s packet.Segment) *packet.Segment {
			switch {
			case s.Has(packet.SYN):
				return synACK(s)
			case s.Has(packet.FIN):
				return &packet.Segment{Seq: s.Ack, Ack: s.End(), Flags: packet.ACK}
			}
			return &packet.Segment{Seq: s.Ack, Ack: s.End(), Flags: packet.FIN | packet.ACK}
		},
		Timeout: func(s packet.Segment) *packet.Segment {
			if s.Has(packet.SYN) {
				return synACK(s)
			}
			return nil
		},
	} {
		t.Run(want.String(), func(t *testing.T) {
			eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
				l.Timeout = 2 * time.Second
				b := newTable(t, l, sources, 1)
				b.peerAnswers(peer)
				b.run(20 * time.Millisecond)
				r := b.end(5 * time.Second)
				if r.Attempts == 0 || r.Failures[want.String()] != r.Attempts || r.Successes != 0 {
					t.Errorf("%d attempts: %v", r.Attempts, r.Failures)
				}
			})
		})
	}
}

// TestPacketForged is RSTs that do not fit: they end nothing.
func TestPacketForged(t *testing.T) {
	eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
		b := newTable(t, l, sources, 1)
		honest := b.cend.to
		b.cend.to = func(frame []byte) {
			s := segment(t, frame)
			forged := packet.Segment{Src: s.Dst, Dst: s.Src, Seq: s.Ack + 100000, Ack: s.Seq, Flags: packet.RST | packet.ACK}
			put(b.send, &hop{}, &forged, nil, 0)
			honest(frame)
		}
		b.run(100 * time.Millisecond)
		wantAll(t, b.end(time.Second))
	})
}

// TestPacketOrder has the second half of an answer come first: it is not the answer yet.
func TestPacketOrder(t *testing.T) {
	eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
		l.Concurrency, l.Reply = 1, 20
		b := newTable(t, l, sources, 1)
		var hello, last packet.Segment
		b.peerAnswers(func(s packet.Segment) *packet.Segment {
			last = s
			switch {
			case s.Has(packet.SYN):
				return synACK(s)
			case len(s.Payload) > 0:
				hello = s
			}
			return nil
		})
		give := func(offset uint32, n int, flags uint8) {
			a := packet.Segment{Src: hello.Dst, Dst: hello.Src, Seq: 1001 + offset, Ack: hello.End(), Flags: packet.ACK | flags,
				Payload: make([]byte, n)}
			b.cend.deliver(a.Append(make([]byte, ethernetHeader)))
			b.client.stopped = true
			b.run(2 * time.Millisecond)
		}
		b.run(3 * time.Millisecond)
		for i, step := range []struct {
			offset, ack uint32
			n, running  int
			flags       uint8
		}{
			{10, 1001, 10, 1, packet.FIN}, {0, 1006, 5, 1, 0}, {0, 1011, 10, 1, 0}, {0, 1011, 5, 1, 0}, {8, 1022, 12, 0, packet.FIN},
		} {
			give(step.offset, step.n, step.flags)
			if last.Ack != step.ack || b.client.running != step.running {
				t.Errorf("step %d: acknowledged %d, want %d; running %d, want %d", i, last.Ack, step.ack, b.client.running, step.running)
			}
		}
		a := packet.Segment{Src: hello.Dst, Dst: hello.Src, Seq: 1022, Ack: last.End(), Flags: packet.ACK}
		b.cend.deliver(a.Append(make([]byte, ethernetHeader)))
		if r := b.end(10 * time.Millisecond); r.Bytes != 20 {
			t.Errorf("%d bytes", r.Bytes)
		}
	})
}

// TestPacketRetries looks at when a silent peer is asked again, and that the timestamps are the peer's.
func TestPacketRetries(t *testing.T) {
	eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
		l.Concurrency, l.Timeout = 1, 8*time.Second
		b := newTable(t, l, sources, 1)
		var syns, hellos []time.Duration
		b.peerAnswers(func(s packet.Segment) *packet.Segment {
			at := time.Duration(b.client.now - epoch).Round(10 * time.Millisecond)
			switch {
			case s.Has(packet.SYN):
				if o := s.Options; o.MSS != 1440 || !o.SACKPermitted || !o.HasTimestamps || !o.HasWScale {
					t.Errorf("options of the SYN: %+v", o)
				}
				if syns = append(syns, at); len(syns) == 3 {
					b.client.stopped = true
					return synACK(s)
				}
			case len(s.Payload) > 0:
				hellos = append(hellos, at)
				if !s.Options.HasTimestamps || s.Options.TSEcr != 77 || s.Ack != 1001 {
					t.Errorf("hello %+v", s)
				}
			}
			return nil
		})
		b.run(9 * time.Second)
		r := b.end(time.Second)
		if want := []time.Duration{0, 1e9, 3e9}; !slices.Equal(syns, want) {
			t.Errorf("SYNs at %v, want %v", syns, want)
		}
		want := []time.Duration{3e9, 32e8, 36e8, 44e8, 6e9}
		if len(hellos) < len(want) {
			t.Fatalf("hellos at %v, want %v", hellos, want)
		}
		for i, at := range want {
			if d := hellos[i] - at; d < 0 || d > 30*time.Millisecond { // a tick of the wheel each
				t.Errorf("hellos at %v, want %v", hellos, want)
			}
		}
		if r.Failures["timeout"] != 1 {
			t.Errorf("%v", r.Failures)
		}
	})
}

// TestPacketOpenLoop stalls the peer: the attempts that were due in the meantime count from when they were.
func TestPacketOpenLoop(t *testing.T) {
	eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
		l.Rate, l.Concurrency = 1000, 10
		b := newTable(t, l, sources, 1)
		b.run(500 * time.Millisecond)
		var held [][]byte
		b.cend.to = func(frame []byte) { held = append(held, frame) }
		b.run(300 * time.Millisecond)
		if n := b.client.running; n != l.Concurrency {
			t.Errorf("%d attempts at once, want %d", n, l.Concurrency)
		}
		b.cend.to = b.send.deliver
		for _, frame := range held {
			b.send.deliver(frame)
		}
		b.run(700 * time.Millisecond)
		r := b.end(2 * time.Second)
		wantAll(t, r)
		if r.Attempts < 1450 || r.Attempts > 1501 {
			t.Errorf("%d attempts in 1.5 s at 1000 a second", r.Attempts)
		}
		// 300 were due in the stall, 20 % of all, and waited up to 300 ms.
		if r.Latency.P50 > 5e3 || r.Latency.P90 < 100e3 || r.Latency.Max < 290e3 || r.Latency.Max > 320e3 {
			t.Errorf("%+v", *r.Latency)
		}
	})
}

// TestPacketReuse uses up all pairs of one address: each once before any twice, with sequence numbers that grow.
func TestPacketReuse(t *testing.T) {
	l := Load{Target: families["IPv4"].target, Concurrency: 128, Timeout: time.Second, Reply: 1}
	b := newTable(t, l, netip.MustParsePrefix("10.64.0.1/32"), 1)
	last := map[netip.AddrPort]uint32{}
	var order []netip.AddrPort
	b.cend.to = func(frame []byte) {
		if s := segment(t, frame); s.Has(packet.SYN) {
			if iss, ok := last[s.Src]; ok {
				if gap := len(order) - slices.Index(order, s.Src); len(order) < portsEach || gap < portsEach {
					t.Fatalf("%v again after %d others", s.Src, gap)
				}
				if !before(iss+1<<16, s.Seq) { // longer than any hello
					t.Fatalf("%v: %d after %d", s.Src, s.Seq, iss)
				}
				b.client.stopped = true
			}
			last[s.Src] = s.Seq
			order = append(order, s.Src)
		}
		b.send.deliver(frame)
	}
	for !b.client.stopped {
		b.run(time.Millisecond)
	}
	wantAll(t, b.end(time.Second))
}

func TestPacketPairs(t *testing.T) {
	for _, c := range []struct {
		prefix      string
		first, last string
		total       uint64
	}{
		{"10.64.0.1/32", "10.64.0.1:1024", "10.64.0.1:65535", portsEach},
		{"10.64.0.0/31", "10.64.0.0:1024", "10.64.0.1:65535", 2 * portsEach},
		{"10.64.0.77/24", "10.64.0.1:1024", "10.64.0.254:65535", 254 * portsEach},
		{"10.0.0.0/8", "10.0.0.1:1024", "10.0.255.254:65535", 65534 * portsEach},
		{"2001:db8::/64", "[2001:db8::1]:1024", "[2001:db8::fffe]:65535", 65534 * portsEach},
		{"2001:db8::7/128", "[2001:db8::7]:1024", "[2001:db8::7]:65535", portsEach},
	} {
		p, err := newPairs(netip.MustParsePrefix(c.prefix))
		if err != nil || p.total() != c.total {
			t.Fatalf("%s: %d pairs, want %d, %v", c.prefix, p.total(), c.total, err)
		}
		if first, last := p.pair(0).String(), p.pair(uint32(c.total-1)).String(); first != c.first || last != c.last {
			t.Errorf("%s: %s to %s, want %s to %s", c.prefix, first, last, c.first, c.last)
		}
		for range 1000 {
			n := uint32(rand.Uint64N(c.total))
			if back, ok := p.number(p.pair(n)); !ok || back != n {
				t.Fatalf("%s: %d becomes %v becomes %d", c.prefix, n, p.pair(n), back)
			}
		}
		for _, other := range []string{"10.65.0.9:2000", "[2001:db9::1]:2000", "[2001:db8::ffff]:2000", "10.64.0.1:1023"} {
			if n, ok := p.number(netip.MustParseAddrPort(other)); ok && c.prefix != "10.0.0.0/8" {
				t.Errorf("%s: %s is number %d", c.prefix, other, n)
			}
		}
	}
	few, _ := newPairs(netip.MustParsePrefix("10.64.0.1/32"))
	if few.check(families["IPv4"].target, 40000) == nil || few.check(families["IPv6"].target, 1) == nil {
		t.Error("too few pairs, or those of another family, are taken")
	}
}

// TestPacketStateless looks that only a connection whose handshake was answered makes state: not SYNs, not made-up
// acknowledgments, not those of another SYN.
func TestPacketStateless(t *testing.T) {
	eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
		b := newTable(t, l, sources, 1)
		p, _ := newPairs(sources)
		hello, _ := packetHellos(t, HelloOptions{}).of(0)
		var cookie uint32
		b.send.to = func(frame []byte) {
			if s := segment(t, frame); s.Has(packet.SYN) && cookie == 0 {
				cookie = s.Seq
			}
		}
		give := func(n uint32, seq, ack uint32, flags uint8, payload []byte) int {
			s := packet.Segment{Src: p.pair(n), Dst: l.Target, Seq: seq, Ack: ack, Flags: flags, Payload: payload}
			b.send.deliver(s.Append(make([]byte, ethernetHeader)))
			if _, err := b.server.step(b.now); err != nil {
				t.Fatal(err)
			}
			sessions := 0
			for i := range b.server.slab {
				if b.server.slab[i].state != free {
					sessions++
				}
			}
			return sessions
		}
		give(5, 1000, 0, packet.SYN, nil)
		for what, sessions := range map[string]int{
			"SYN":                give(6, 1, 0, packet.SYN, nil),
			"bare":               give(5, 1001, cookie+1, packet.ACK, nil),
			"another's":          give(7, 1001, cookie+1, packet.ACK, hello),
			"of another SYN":     give(5, 1002, cookie+1, packet.ACK, hello),
			"made-up":            give(5, 1001, cookie+100, packet.ACK, hello),
			"RST":                give(5, 1001, cookie+1, packet.RST|packet.ACK, nil),
			"to another address": give(5, 1001, cookie+1, packet.SYN|packet.ACK, nil),
		} {
			if sessions != 0 {
				t.Errorf("%s made %d sessions", what, sessions)
			}
		}
		if n := give(5, 1001, cookie+1, packet.ACK, hello[:10]); n != 1 {
			t.Errorf("the true one made %d sessions", n)
		}
		b.now += 2 * idleLimit
		for range 4 { // the wheel's horizon is 4 s, a step
			b.now += 5e9
			_, _ = b.server.step(b.now)
		}
		if n := give(6, 1, 0, packet.SYN, nil); n != 0 {
			t.Errorf("%d sessions after the idle time", n)
		}
	})
}

// TestPacketBeyond acknowledges what was never sent: neither side takes its own for arrived.
func TestPacketBeyond(t *testing.T) {
	eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
		l.Concurrency = 1
		b := newTable(t, l, sources, 1)
		hellos, answers := 0, 0
		beyond := func(to *fakeLine, s packet.Segment) {
			a := packet.Segment{Src: s.Dst, Dst: s.Src, Seq: s.Ack, Ack: s.End() + 5000, Flags: packet.ACK}
			to.deliver(a.Append(make([]byte, ethernetHeader)))
		}
		b.cend.to = func(frame []byte) {
			s := segment(t, frame)
			if len(s.Payload) == 0 {
				b.send.deliver(frame)
			} else if hellos++; hellos < 3 {
				beyond(b.cend, s)
			} else {
				b.send.deliver(frame)
			}
		}
		b.send.to = func(frame []byte) {
			s := segment(t, frame)
			if len(s.Payload) == 0 {
				b.cend.deliver(frame)
			} else if answers++; answers < 3 {
				beyond(b.send, s)
			} else {
				b.cend.deliver(frame)
			}
		}
		b.run(10 * time.Millisecond)
		wantAll(t, b.end(4*time.Second))
	})
}

// TestPacketClosedWindow is a proxy of SYNs: its SYN-ACK closes the window, and opens it when it has the handshake's end.
func TestPacketClosedWindow(t *testing.T) {
	eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
		l.Concurrency = 1
		b := newTable(t, l, sources, 1)
		closed, early := false, 0
		honest := b.cend.to
		b.send.to = func(frame []byte) {
			s := segment(t, frame)
			if s.Has(packet.SYN) {
				closed, s.Window = true, 0
			}
			b.cend.deliver(s.Append(make([]byte, ethernetHeader)))
		}
		b.cend.to = func(frame []byte) {
			s := segment(t, frame)
			switch {
			case closed && len(s.Payload) > 0:
				early++
			case closed && s.Has(packet.ACK) && !s.Has(packet.FIN):
				closed = false
				a := packet.Segment{Src: s.Dst, Dst: s.Src, Seq: s.Ack, Ack: s.Seq, Flags: packet.ACK, Window: 1000}
				b.cend.deliver(a.Append(make([]byte, ethernetHeader)))
			}
			honest(frame)
		}
		b.run(50 * time.Millisecond)
		r := b.end(time.Second)
		wantAll(t, r)
		if early > 0 || r.Attempts < 5 || r.Latency.Max > 100_000 {
			t.Errorf("%d hellos into a closed window, %d attempts, latency %+v", early, r.Attempts, r.Latency)
		}
	})
}

func TestSegmentSize(t *testing.T) {
	for _, c := range []struct {
		mss, wanted int
		peer        packet.Options
		want        uint16
	}{
		{1440, 0, packet.Options{MSS: 1460}, 1440},
		{1460, 0, packet.Options{MSS: 1440, HasTimestamps: true}, 1428},
		{1460, 100, packet.Options{MSS: 1440}, 100},
		{1460, 0, packet.Options{}, 536},
		{1460, 0, packet.Options{MSS: 1, HasTimestamps: true}, 76},
	} {
		if got := segmentSize(c.mss, &c.peer, c.wanted); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

// TestPacketWild throws frames at both that nobody honest sends.
func TestPacketWild(t *testing.T) {
	eachFamily(t, func(t *testing.T, l Load, sources netip.Prefix) {
		l.Timeout = 500 * time.Millisecond
		b := newTable(t, l, sources, 3)
		random := rand.New(rand.NewPCG(3, 4))
		wild := func(to *fakeLine) func([]byte) {
			return func(frame []byte) {
				to.deliver(frame)
				s := segment(t, frame)
				s.Flags = uint8(random.Uint32()) & 0x1f
				s.Seq += random.Uint32N(4000) - 2000
				s.Ack += random.Uint32N(4000) - 2000
				s.Options.MSS, s.Options.HasWScale, s.Options.WScale = uint16(random.Uint32()), true, 14
				s.Payload = slices.Clone(s.Payload[:random.IntN(len(s.Payload)+1)])
				for i := range s.Payload {
					s.Payload[i] ^= byte(random.Uint32() & random.Uint32() & random.Uint32())
				}
				odd := s.Append(make([]byte, ethernetHeader))
				to.deliver(odd)
				to.deliver(odd[:random.IntN(len(odd)+1)])
			}
		}
		b.cend.to, b.send.to = wild(b.send), wild(b.cend)
		b.run(2 * time.Second)
		b.cend.to, b.send.to = b.send.deliver, b.cend.deliver
		r := b.end(30 * time.Second)
		if r.Attempts < 100 || r.Successes+r.Failed() != r.Attempts {
			t.Errorf("%d attempts, %d successes, %v", r.Attempts, r.Successes, r.Failures)
		}
	})
}

// TestPacketNoHello is clients that close without one.
func TestPacketNoHello(t *testing.T) {
	l := Load{Target: families["IPv4"].target, Concurrency: 1, Timeout: time.Second, Reply: 1}
	b := newTable(t, l, families["IPv4"].sources, 50)
	var got []packet.Segment
	b.send.to = func(frame []byte) { got = append(got, segment(t, frame)) }
	give := func(seq, ack uint32, flags uint8, payload string) packet.Segment {
		s := packet.Segment{Src: netip.MustParseAddrPort("10.64.0.1:2000"), Dst: l.Target, Seq: seq, Ack: ack, Flags: flags,
			Payload: []byte(payload)}
		b.send.deliver(s.Append(make([]byte, ethernetHeader)))
		got = append(got, packet.Segment{})
		if _, err := b.server.step(b.now); err != nil {
			t.Fatal(err)
		}
		return got[len(got)-1]
	}
	syn := give(999, 0, packet.SYN, "")
	if f := give(1000, syn.Seq+1, packet.FIN|packet.ACK, ""); !f.Has(packet.FIN|packet.ACK) || f.Seq != syn.Seq+1 || f.Ack != 1001 {
		t.Errorf("FIN is answered by %+v", f)
	}
	give(1001, syn.Seq+2, packet.ACK, "")
	syn = give(5000, 0, packet.SYN, "")
	if f := give(5001, syn.Seq+1, packet.ACK, "GET / HTTP/1.1\r\n"); !f.Has(packet.RST) {
		t.Errorf("HTTP is answered by %+v", f)
	}
	b.end(time.Second)
}

func TestHelloReader(t *testing.T) {
	for _, records := range []int{0, 1, 3, 100} {
		hello, err := packetHellos(t, HelloOptions{RecordBytes: records}).of(0)
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range []int{1, 2, 5, 64, len(hello)} {
			var r helloReader
			for part := range slices.Chunk(hello[:len(hello)-1], step) {
				if got := r.feed(part); got != helloMore {
					t.Fatalf("records of %d, step %d: %d before the end", records, step, got)
				}
			}
			if got := r.feed(hello[len(hello)-1:]); got != helloWhole {
				t.Errorf("records of %d, step %d: %d at the end", records, step, got)
			}
		}
	}
	for name, b := range map[string][]byte{
		"alert":       {21, 3, 1, 0, 2, 2, 40},
		"version":     {22, 2, 1, 0, 2},
		"empty":       {22, 3, 1, 0, 0},
		"record long": {22, 3, 1, 0xff, 0xff},
		"hello long":  {22, 3, 1, 1, 0, 1, 1, 0, 1},
		"ServerHello": {22, 3, 1, 1, 0, 2},
	} {
		if got := new(helloReader).feed(b); got != helloBad {
			t.Errorf("%s: %d", name, got)
		}
	}
}

func TestFlight(t *testing.T) {
	data := make([]byte, 5001)
	for i := range data {
		data[i] = byte(i * 7)
	}
	f := flight{data: data}
	for _, size := range []int{1, 7, 88, 1460, 5001, 9000} {
		for _, at := range []int{0, size, 3 * size, 13} {
			if at >= len(data) {
				continue
			}
			b, sum := f.part(at, size)
			want := data[at:min(at+size, len(data))]
			plain := uint64(0)
			for i, x := range want {
				plain += uint64(x) << (8 * uint(1-i%2))
			}
			if !bytes.Equal(b, want) || fold(sum) != fold(plain) {
				t.Errorf("size %d at %d: %d bytes, sum %#x, want %#x", size, at, len(b), sum, fold(plain))
			}
		}
	}
}

func TestWheel(t *testing.T) {
	const n = 500
	random := rand.New(rand.NewPCG(5, 6))
	w, due := newWheel(n, epoch), map[int32]int64{}
	for i := range int32(n) {
		due[i] = epoch + random.Int64N(20e9)
		w.set(i, epoch+random.Int64N(20e9))
		w.set(i, due[i])
	}
	for i := range int32(50) {
		w.cancel(i)
		delete(due, i)
	}
	for now := epoch; now < epoch+int64(21e9); now += 3e6 {
		w.expire(now, func(i int32) {
			if late := now - due[i]; late < 0 || late > 2*wheelTick {
				t.Fatalf("%d is %v late", i, time.Duration(late))
			}
			delete(due, i)
		})
	}
	if len(due) > 0 {
		t.Errorf("%d never expired", len(due))
	}
}

// TestPacketAllocations: a connection costs none.
func TestPacketAllocations(t *testing.T) {
	l := Load{Target: families["IPv4"].target, Concurrency: 64, Timeout: time.Second, Reply: 1}
	b := newTable(t, l, families["IPv4"].sources, 1)
	b.cend.to, b.send.to = func([]byte) {}, func([]byte) {}
	ends := [2]*allocFree{{}, {}}
	ends[0].peer, ends[1].peer = ends[1], ends[0]
	b.client.line, b.server.line = ends[0], ends[1]
	b.run(50 * time.Millisecond)
	if n := testing.AllocsPerRun(100, func() { b.run(time.Millisecond) }); n > 0 {
		t.Errorf("%v allocations in a turn", n)
	}
	if r := b.rec.result("", "", l.Target); r.Successes < 1000 {
		t.Errorf("%d successes", r.Successes)
	}
}

// allocFree is a fakeLine that looks at nothing.
type allocFree struct {
	peer   *allocFree
	buf    [2048]byte
	frames [1024][2048]byte
	length [1024]int
	n      int
}

func (f *allocFree) room() []byte             { return f.buf[:] }
func (f *allocFree) flush() error             { return nil }
func (f *allocFree) wait(time.Duration) error { return nil }

func (f *allocFree) send(n int) {
	p := f.peer
	copy(p.frames[p.n][:], f.buf[:n])
	p.length[p.n] = n
	p.n++
}

func (f *allocFree) receive(_ int, take func([]byte)) int {
	n := f.n
	f.n = 0
	for i := range n {
		take(f.frames[i][:f.length[i]])
	}
	return n
}
