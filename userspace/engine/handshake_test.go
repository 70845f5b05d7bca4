// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
)

// desk is one worker without a kernel: segments go in by hand, frames come out, time moves as the test says.
type desk struct {
	*worker
	t   testing.TB
	out frames
	log strings.Builder
}

const someRoutes = `
listen: ":443"
pools:
  p: {backends: ["192.0.2.11:443"]}
routes: [{sni: a.example.com, pool: p}]
`

func newDesk(t *testing.T, settings string) *desk {
	t.Helper()
	return newDeskOf(t, settings+someRoutes)
}

func newDeskOf(t testing.TB, routes string) *desk {
	t.Helper()
	c, err := config.Parse("test", []byte("version: 1\n"+routes))
	if err != nil {
		t.Fatal(err)
	}
	plan, err := NewPlan(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{t: t}
	e := &Engine{o: Options{
		NextHop: func(netip.Addr) (Hop, error) {
			return Hop{Index: 1, MTU: 1500, Source: netip.MustParseAddr("192.0.2.1")}, nil
		},
		SourcePortFirst: 10000, SourcePortLast: 10099, SourcePortsOwn: [2]uint16{10000, 10099},
		Log: slog.New(slog.NewTextHandler(&d.log, nil)),
	}, clock: newClock(), owned: noted{}}
	e.plan.Store(plan)
	d.worker = newWorker(e, 0, &d.out)
	e.workers = []*worker{d.worker}
	d.now = int64(time.Hour)
	d.timers.tick, d.flowTimers.tick = 0, 0
	return d
}

// noted is what a desk has for the next daemon.
type noted map[maps.Tuple]maps.OwnedHello

func (n noted) OwnHello(client maps.Tuple, h *maps.OwnedHello) error {
	n[client] = *h
	return nil
}

func (n noted) DisownHello(client maps.Tuple) error {
	delete(n, client)
	return nil
}

// full has no room.
type full struct{ noted }

func (full) OwnHello(maps.Tuple, *maps.OwnedHello) error { return errors.New("no room") }

func (d *desk) wantLog(text string) {
	d.t.Helper()
	if !strings.Contains(d.log.String(), text) {
		d.t.Errorf("the log does not say %q: %s", text, d.log.String())
	}
}

// client makes segments of one connection.
type client struct {
	addr netip.AddrPort
	iss  uint32
}

func newClient(n int) client {
	return client{netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(n >> 8), byte(n)}), 40000), 1000}
}

// sends is payload at an offset from the initial sequence number: the stream begins at 1.
func (d *desk) sends(c client, offset int, payload []byte, flags uint8) {
	d.clientSegment(1, &packet.Segment{
		Src: c.addr, Dst: netip.MustParseAddrPort("203.0.113.1:443"), Seq: c.iss + uint32(offset), Ack: 5001,
		Flags: packet.ACK | flags, Window: 1000, Payload: payload,
	})
}

func (d *desk) handshake(c client) *handshake {
	return d.handshakes[connection{c.addr, netip.MustParseAddrPort("203.0.113.1:443")}]
}

// passes moves the clock, with all timers on the way, and counts these.
func (d *desk) passes(wait time.Duration) (fired int) {
	for end := d.now + int64(wait); ; d.now = min(d.now+1<<20, end) { // a quarter of a tick
		for h, ok := d.timers.due(d.now); ok; h, ok = d.timers.due(d.now) {
			h.expire(d.worker)
			fired++
		}
		if d.now == end {
			return fired
		}
	}
}

// last is the last segment sent, and forgets all.
func (d *desk) last() packet.Segment {
	d.t.Helper()
	if len(d.out) == 0 {
		return packet.Segment{}
	}
	s, err := packet.Parse(d.out[len(d.out)-1][14:])
	if err != nil {
		d.t.Fatal(err)
	}
	d.out = nil
	return s
}

// wantLast compares flags and acknowledgment number, 0 flags being silence.
func (d *desk) wantLast(what string, flags uint8, ack uint32) {
	d.t.Helper()
	if s := d.last(); s.Flags != flags || s.Ack != ack {
		d.t.Errorf("%s: answer with flags %#x, ack %d, want flags %#x, ack %d", what, s.Flags, s.Ack, flags, ack)
	}
}

func (d *desk) wantState(c client, want phase, start uint32, acked int) {
	d.t.Helper()
	h := d.handshake(c)
	if h == nil {
		d.t.Fatal("the connection is forgotten")
		return // which the linter does not know
	}
	if h.phase != want || h.hello.Start() != start || h.acked != acked {
		d.t.Errorf("phase %d, start %d, %d bytes acknowledged, want %d, %d, %d", h.phase, h.hello.Start(), h.acked, want, start, acked)
	}
}

func clientHello(t *testing.T) []byte {
	t.Helper()
	return helloOf("a.example.com")
}

func helloOf(name string) []byte {
	rec := &recorder{}
	_ = tls.Client(rec, &tls.Config{ServerName: name}).Handshake() // ends at the first read
	return rec.sent
}

type recorder struct {
	net.Conn
	sent []byte
}

func (r *recorder) Write(p []byte) (int, error) { r.sent = append(r.sent, p...); return len(p), nil }
func (r *recorder) Read([]byte) (int, error)    { return 0, io.EOF }
func (r *recorder) Close() error                { return nil }

// A probe is a byte below the stream. It is answered, and is no part of what follows, in whatever pieces that comes.
func TestProbeBeforeHello(t *testing.T) {
	whole := clientHello(t)
	for name, piece := range map[string]int{"at once": len(whole), "in two": 700, "by bytes": 1} {
		for _, pause := range []time.Duration{0, 3 * time.Second} {
			t.Run(name+" after "+pause.String(), func(t *testing.T) {
				d, c := newDesk(t, ""), newClient(1)
				d.sends(c, 0, []byte{0}, packet.PSH)
				d.passes(pause)
				if pause > 0 {
					d.wantLast("first probe", packet.ACK, c.iss+1)
					d.sends(c, 0, []byte{0}, packet.PSH)
					d.wantLast("second probe", packet.ACK, c.iss+1)
				}
				for at := 0; at < len(whole); at += piece {
					d.sends(c, 1+at, whole[at:min(at+piece, len(whole))], 0)
					if at == 10 {
						d.sends(c, 0, []byte{0}, packet.PSH) // late, or repeated by the network
					}
				}
				d.wantState(c, connecting, c.iss+1, 0)
				if got := string(d.handshake(c).hello.Bytes()); got != string(whole) {
					t.Errorf("the hello is not what was sent: %d bytes, want %d", len(got), len(whole))
				}
				d.sends(c, 0, []byte{0}, packet.PSH)
				d.wantState(c, connecting, c.iss+1, 0)
			})
		}
	}
}

// The hello has its whole time, however late the probe was.
func TestProbeTime(t *testing.T) {
	d, c := newDesk(t, "timeouts: {hello: 2s}\n"), newClient(1)
	whole := clientHello(t)
	d.sends(c, 0, []byte{0}, 0)
	d.passes(1900 * time.Millisecond)
	d.sends(c, 1, whole[:700], 0)
	d.passes(1900 * time.Millisecond)
	d.sends(c, 701, whole[700:], 0)
	d.wantState(c, connecting, c.iss+1, 700)
}

// A byte that nothing follows gets what not_tls says, at the hello's timeout.
func TestLoneByte(t *testing.T) {
	d, c := newDesk(t, "timeouts: {hello: 2s}\n"), newClient(1)
	d.sends(c, 1, []byte("S"), packet.PSH)
	d.passes(1900 * time.Millisecond)
	d.wantLast("within the timeout", packet.ACK, c.iss+2)
	d.passes(200 * time.Millisecond)
	d.wantLast("after it", packet.RST|packet.ACK, c.iss+2)
	if n := d.stats.hellos[helloNotTLS]; n != 1 || d.stats.hellos[helloTimeout] != 0 {
		t.Errorf("not_tls counts %d, timeout %d", n, d.stats.hellos[helloTimeout])
	}

	d = newDesk(t, "not_tls: \"pool:p\"\n")
	d.sends(c, 1, []byte("S"), packet.PSH)
	d.passes(6 * time.Second)
	if d.stats.decisions[decisionKey{"", "p", "not_tls/pool"}] != 1 || len(d.handshakes) > 1 {
		t.Errorf("decisions: %v", d.stats.decisions)
	}

	// One that is a lost byte's second must not be acknowledged while the first may come.
	d = newDesk(t, "")
	whole := clientHello(t)
	d.sends(c, 2, whole[1:2], 0)
	d.passes(900 * time.Millisecond)
	d.wantLast("the second byte of a hello", 0, 0)
	d.sends(c, 1, whole[:1], 0)
	d.sends(c, 3, whole[2:], 0)
	d.wantState(c, connecting, c.iss+1, 0)
}

// The engine's own ACK may be lost: a client that repeats what was acknowledged waits for it, Nagle holding the rest back.
func TestAckAgain(t *testing.T) {
	d, c := newDesk(t, ""), newClient(1)
	whole := clientHello(t)
	d.sends(c, 1, whole[:700], 0)
	d.passes(100 * time.Millisecond)
	d.wantLast("first part", packet.ACK, c.iss+701)
	d.sends(c, 1, whole[:700], 0)
	d.wantLast("first part again", packet.ACK, c.iss+701)
	d.sends(c, 700, whole[699:700], 0)
	d.wantLast("a probe in the middle", packet.ACK, c.iss+701)
}

// What is counted is at least what the heap has, however little each client sends.
func TestHandshakeMemory(t *testing.T) {
	const clients = 20000
	d := newDesk(t, "")
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for n := range clients {
		d.sends(newClient(n), 1, []byte{22}, 0)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	heap, counted := int64(after.HeapAlloc-before.HeapAlloc)/clients, d.e.held.Load()/clients
	t.Logf("%d bytes of heap a handshake, %d counted", heap, counted)
	if len(d.handshakes) != clients || heap > counted || counted > 2*heap+1024 {
		t.Errorf("%d handshakes take %d bytes each, %d are counted", len(d.handshakes), heap, counted)
	}
	if looks := d.passes(10 * time.Second); looks > 2*clients {
		t.Errorf("%d clients that wait woke the worker %d times", clients, looks)
	}
	if n := d.e.held.Load(); n != 0 || len(d.handshakes) != maxRefused || d.refused != maxRefused || len(d.e.sources.count) != 0 {
		t.Errorf("after the timeout %d bytes, %d handshakes of which %d are over, %d sources are left", n, len(d.handshakes), d.refused, len(d.e.sources.count))
	}
	d.passes(refusedFor)
	if n := d.e.held.Load(); n != 0 || d.refused != 0 || len(d.handshakes) != 0 || d.timers.next() != 0 {
		t.Errorf("after the timeout %d bytes, %d handshakes, %d sources, a timer for %d are left", n, len(d.handshakes), len(d.e.sources.count), d.timers.next())
	}
	runtime.KeepAlive(d)
}

// Bytes that start no hello wait for what may be missing before them, until the client repeats them: TCP repeats from the
// first byte that was not acknowledged, save for one probe of the last.
func TestLateFirstSegment(t *testing.T) {
	whole := clientHello(t)
	d, c := newDesk(t, ""), newClient(1)
	for range 5 { // copies that the network makes
		d.sends(c, 101, whole[100:], 0)
	}
	d.passes(200 * time.Millisecond)
	for range 2 { // a probe, and its copy
		d.sends(c, 101, whole[100:], 0)
	}
	d.passes(4 * time.Second)
	d.wantLast("the second segment", 0, 0)
	d.sends(c, 1, whole[:100], 0)
	d.wantState(c, connecting, c.iss+1, 0)

	d = newDesk(t, "")
	for _, want := range []uint8{0, 0, packet.RST | packet.ACK} {
		d.passes(200 * time.Millisecond)
		d.sends(c, 1, whole[100:], 0)
		ack := uint32(0)
		if want != 0 {
			ack = c.iss + 1 + uint32(len(whole)-100)
		}
		d.wantLast("no hello", want, ack)
	}

	d = newDesk(t, "")
	d.sends(c, 1, whole[100:], 0)
	d.passes(6 * time.Second)
	d.wantLast("no hello until the timeout", packet.RST|packet.ACK, c.iss+1+uint32(len(whole)-100))
	if d.stats.hellos[helloNotTLS] != 1 {
		t.Errorf("counted as %v", d.stats.hellos)
	}
}

// What follows a reset is reset again, and is not judged by itself: the rest of a refused hello must not be taken for
// bytes that are no TLS, and find a pool.
func TestAfterReset(t *testing.T) {
	d, c := newDesk(t, ""), newClient(1)
	whole := clientHello(t)
	whole = append(whole, make([]byte, 1000)...)
	copy(whole, "\x16\x03\x01\x01\x00\x01\x00\x00\x01") // a hello that is none
	d.sends(c, 1, whole[:600], 0)
	d.wantLast("a broken hello", packet.RST|packet.ACK, c.iss+601)
	for range 2 {
		d.sends(c, 601, whole[600:], 0)
		d.wantLast("what follows", packet.RST|packet.ACK, c.iss+1+uint32(len(whole)))
	}
	d.passes(4 * time.Second)
	if n := len(d.stats.decisions); n != 1 {
		t.Errorf("decisions: %v", d.stats.decisions)
	}
	d.passes(refusedFor)
	if len(d.handshakes) != 0 || d.refused != 0 {
		t.Errorf("%d handshakes are left", len(d.handshakes))
	}
}

// Neither new clients nor the hellos of those that are in get beyond hello_memory by more than one hello.
func TestMemoryLimit(t *testing.T) {
	const limit = 64 << 10
	record := append([]byte{22, 3, 1, 0x3f, 0xff, 1, 0, 0x3f, 0xfb}, make([]byte, 16<<10)...)
	d := newDesk(t, "limits: {hello_memory: 64KiB}\n")
	for n := range 40 {
		d.sends(newClient(n), 1, record[:9], 0)
	}
	in := len(d.handshakes)
	if in < 20 || in == 40 {
		t.Fatalf("%d clients got in", in)
	}
	d.passes(4 * time.Second)
	for n := range 40 {
		for at := 9; at < 12000; at += 1000 {
			d.sends(newClient(n), 1+at, record[at:at+1000], 0)
		}
		// Pieces apart count as well.
		d.sends(newClient(n), 1+14000, record[14000:15000], 0)
		if held := d.e.held.Load(); held > limit+(16<<10)+handshakeMemory {
			t.Fatalf("client %d: %d bytes held", n, held)
		}
	}
	if d.stats.hellos[helloMemory] == 0 || strings.Count(d.log.String(), "hello memory is full") != 2 {
		t.Errorf("counted %d, logged:\n%s", d.stats.hellos[helloMemory], d.log.String())
	}
	d.passes(2 * time.Second)
	if n := d.e.held.Load(); n != 0 {
		t.Errorf("%d bytes are held for nobody", n)
	}
	d.last()
	d.sends(newClient(50), 1, clientHello(t), 0)
	d.wantState(newClient(50), connecting, newClient(50).iss+1, 0)
}

// A connection that is only remembered to stay silent keeps no bytes, and gets none.
func TestDropKeepsNothing(t *testing.T) {
	d, c := newDesk(t, "not_tls: drop\n"), newClient(1)
	d.sends(c, 1, []byte("GET / HTTP/1.1\r\n\r\n"), 0)
	d.sends(c, 1, make([]byte, 20000), 0)
	if n := d.e.held.Load(); n != 0 || len(d.out) != 0 {
		t.Errorf("%d bytes held, %d frames sent", n, len(d.out))
	}
	d.sends(c, 19, nil, packet.RST)
	if n := d.e.held.Load(); n != 0 {
		t.Errorf("%d bytes held after the client's RST", n)
	}
}

// A FIN or RST whose event was lost is found in the entry.
func TestNoticeEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		up, down      uint32
		closing, want closing
	}{
		"open":            {0, 0, closing{}, closing{}},
		"confirmed":       {maps.FlowConfirmed, maps.FlowConfirmed, closing{}, closing{}},
		"heard":           {maps.FlowFIN, 0, closing{fin: [2]bool{true, false}}, closing{fin: [2]bool{true, false}}},
		"client's FIN":    {maps.FlowFIN, 0, closing{}, closing{fin: [2]bool{true, false}, unheard: [2]bool{true, false}}},
		"backend's FIN":   {0, maps.FlowFIN, closing{}, closing{fin: [2]bool{false, true}, unheard: [2]bool{false, true}, backendFirst: true}},
		"one of two FINs": {maps.FlowFIN, maps.FlowFIN, closing{fin: [2]bool{true, false}}, closing{fin: [2]bool{true, true}, unheard: [2]bool{false, true}}},
		"RST":             {maps.FlowRST, 0, closing{}, closing{reset: true, unheard: [2]bool{true, false}}},
		"RST after a FIN": {maps.FlowFIN | maps.FlowRST, 0, closing{fin: [2]bool{true, false}}, closing{fin: [2]bool{true, false}, reset: true, unheard: [2]bool{true, false}}},
	} {
		f := &flow{closing: tc.closing}
		f.noticeEnds(&maps.Entry{Flow: maps.Flow{Control: tc.up}}, &maps.Entry{Flow: maps.Flow{Control: tc.down}})
		if f.closing != tc.want {
			t.Errorf("%s: got %+v, want %+v", name, f.closing, tc.want)
		}
	}
}

// What a backend sends before the bind is held as well.
func TestPendingIsCounted(t *testing.T) {
	d, c := newDesk(t, "limits: {hello_memory: 32KiB}\n"), newClient(1)
	d.sends(c, 1, clientHello(t), 0)
	h := d.handshake(c)
	h.phase, h.acked, h.attempt.ack = pushing, 100, h.attempt.isn+1
	before := d.e.held.Load()
	for range maxPending {
		d.backendSegment(&packet.Segment{
			Src: h.attempt.backend.Addr, Dst: h.attempt.local.AddrPort, Seq: 1, Ack: h.attempt.isn + 1,
			Flags: packet.ACK, Payload: make([]byte, 16000),
		})
	}
	if held := d.e.held.Load(); held < before+32000 || held > 32<<10+17000 {
		t.Errorf("%d bytes held, %d before the backend sent 16 times 16000", held, before)
	}
	d.drop(h)
	if n := d.e.held.Load(); n != 0 {
		t.Errorf("%d bytes are held for nobody", n)
	}
}

// A client that only looks whether the port is open is answered, also from the port of a connection that is over and not yet
// forgotten: with another cookie, or in the same slot with the same one.
func TestCloseAnew(t *testing.T) {
	for name, routes := range map[string]string{"in its hello": "a.example.com", "refused": "x.example.com"} {
		for ack, what := range map[uint32]string{5001: "the same cookie", 6001: "another cookie"} {
			d := newDesk(t, "")
			c := newClient(1)
			first := helloOf(routes)
			if name == "in its hello" {
				first = first[:100]
			}
			d.sends(c, 1, first, 0)
			if d.handshake(c) == nil {
				t.Fatalf("%s: no handshake is remembered", name)
			}
			d.out = nil
			d.clientSegment(1, &packet.Segment{
				Src: c.addr, Dst: netip.MustParseAddrPort("203.0.113.1:443"), Seq: c.iss + 1 + 1<<20, Ack: ack,
				Flags: packet.ACK | packet.FIN, Window: 1000,
			})
			if s := d.last(); s.Flags != packet.FIN|packet.ACK || s.Ack != c.iss+2+1<<20 || s.Seq != ack {
				t.Errorf("%s, %s: answered by flags %#x, seq %d, ack %d", name, what, s.Flags, s.Seq, s.Ack)
			}
			if d.handshake(c) != nil {
				t.Errorf("%s, %s: a handshake is kept for it", name, what)
			}
		}
	}
}

// TestBoundNow has a handshake become a flow some time after the hello: the flow is as old as that, so that who lists both at once
// tells them apart, and its client has all of timeouts.unconfirmed.
func TestBoundNow(t *testing.T) {
	d, c := newDesk(t, ""), newClient(1)
	d.sends(c, 1, clientHello(t), packet.PSH)
	h := d.handshake(c)
	d.passes(500 * time.Millisecond)
	if f := h.settle(d.worker); f.bound != d.now || f.bound <= h.progress {
		t.Errorf("bound at %d, the last of the hello came at %d, and it is %d", f.bound, h.progress, d.now)
	}
}
