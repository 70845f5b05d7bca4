// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"snilb/maps"
	"snilb/userspace/packet"
)

// away has no route to some addresses, and counts who asks.
type away struct {
	all   map[netip.Addr]bool
	asked int
}

func (d *desk) away(addrs ...string) *away {
	a, find := &away{all: make(map[netip.Addr]bool)}, d.e.o.NextHop
	for _, addr := range addrs {
		a.all[netip.MustParseAddr(addr)] = true
	}
	d.e.o.NextHop = func(to netip.Addr) (Hop, error) {
		if a.all[to] {
			a.asked++
			return Hop{}, errors.New("no route")
		}
		return find(to)
	}
	return a
}

// TestRouteComesBack has no route to any backend for a moment: the client does not notice.
func TestRouteComesBack(t *testing.T) {
	d, c := newDesk(t, ""), newClient(1)
	away := d.away("192.0.2.11")
	d.sends(c, 1, clientHello(t), packet.PSH)
	d.passes(1200 * time.Millisecond)
	d.wantLast("without a route", 0, 0)
	d.wantState(c, paused, c.iss+1, 0)
	if f := d.handshake(c).status(d.now); f.State != "connecting" {
		t.Errorf("state %s, want connecting", f.State)
	}
	away.all = nil
	d.passes(maxPause)
	if s := d.last(); s.Flags != packet.SYN || s.Dst != netip.MustParseAddrPort("192.0.2.11:443") {
		t.Errorf("with a route: flags %#x to %s, want a SYN to the backend", s.Flags, s.Dst)
	}
}

// TestNoRoute has none for the whole time: no_backend says what happens in the end, and until then the kernel is asked a few times.
func TestNoRoute(t *testing.T) {
	d, c := newDesk(t, "timeouts: {connect: 3s}\n"), newClient(1)
	away := d.away("192.0.2.11")
	hello := clientHello(t)
	d.sends(c, 1, hello, packet.PSH)
	d.passes(2900 * time.Millisecond)
	d.wantLast("within timeouts.connect", 0, 0)
	d.passes(200 * time.Millisecond)
	d.wantLast("behind it", packet.RST|packet.ACK, c.iss+1+uint32(len(hello)))
	if away.asked < 4 || away.asked > 6 {
		t.Errorf("%d attempts in 3 s, want at the beginning, after 0.25, 0.75, 1.75 and 2.75 s", away.asked)
	}
	d.wantLog("no route to a backend")
}

// TestRouteAwayOther goes to the backend that can be reached, at once.
func TestRouteAwayOther(t *testing.T) {
	d, c := newDeskOf(t, `
listen: ":443"
pools:
  p: {backends: ["192.0.2.11:443", "192.0.2.12:443"], balance: round_robin}
routes: [{sni: a.example.com, pool: p}]
`), newClient(1)
	d.away("192.0.2.11")
	hello := clientHello(t)
	for range 2 { // one of them is the first one's turn
		c.addr = netip.AddrPortFrom(c.addr.Addr(), c.addr.Port()+1)
		d.sends(c, 1, hello, packet.PSH)
		if s := d.last(); s.Flags != packet.SYN || s.Dst != netip.MustParseAddrPort("192.0.2.12:443") {
			t.Errorf("flags %#x to %s, want a SYN to the other backend", s.Flags, s.Dst)
		}
	}
}

// TestNoRouteToClient gives up once the route to the client was away for the whole time, and not before.
func TestNoRouteToClient(t *testing.T) {
	d, c := newDesk(t, "timeouts: {connect: 3s}\n"), newClient(1)
	away := d.away(c.addr.Addr().String())
	hello := clientHello(t)
	d.sends(c, 1, hello, packet.PSH)
	d.last()
	away.asked = 0
	h := d.handshake(c)
	d.backendSegment(&packet.Segment{
		Src: h.attempt.backend.Addr, Dst: h.attempt.local.AddrPort, Seq: 9000, Ack: h.attempt.isn + 1,
		Flags: packet.SYN | packet.ACK, Window: 1000, Options: packet.Options{MSS: 1460},
	})
	d.passes(2900 * time.Millisecond)
	d.wantLast("within timeouts.connect", 0, 0)
	if away.asked < 4 || away.asked > 6 {
		t.Errorf("asked %d times in 3 s", away.asked)
	}
	d.passes(200 * time.Millisecond)
	if s := d.last(); s.Dst != h.attempt.backend.Addr || s.Flags != packet.RST|packet.ACK {
		t.Errorf("behind it: flags %#x to %s, want the backend reset", s.Flags, s.Dst)
	}
	away.all = nil
	d.sends(c, 1, hello, packet.PSH)
	d.wantLast("the client, once it can be reached and repeats", packet.RST|packet.ACK, c.iss+1+uint32(len(hello)))
}

// TestClientPortComesFree has a client's port speak to the only backend already, with source: client: it is served once that
// connection is over.
func TestClientPortComesFree(t *testing.T) {
	k := newKernel(t, 1, 10)
	d := k.start(firstPlan(t, kernelRoutes, Known{}), nil)
	c := newClient(1)
	other := maps.Tuple{Src: netip.MustParseAddrPort("192.0.2.12:443"), Dst: c.addr}
	must(t, k.tables.InsertFlow(maps.LegBackend, other, &maps.Entry{To: other}))
	w := d.workers[0]
	w.now = d.clock.now()
	d.hears(&packet.Segment{
		Src: c.addr, Dst: netip.MustParseAddrPort("203.0.113.1:443"), Seq: c.iss + 1, Ack: 5001,
		Flags: packet.ACK | packet.PSH, Window: 1000, Payload: helloOf("b.example.com"),
	})
	if all, _ := d.segments(0); len(all) != 0 {
		t.Fatalf("in use: %+v, want silence", all)
	}
	must(t, k.tables.DeleteFlow(maps.LegBackend, other))
	w.now += int64(maxPause)
	for h, ok := w.timers.due(w.now); ok; h, ok = w.timers.due(w.now) {
		h.expire(w)
	}
	if all, _ := d.segments(0); len(all) != 1 || all[0].Flags != packet.SYN || all[0].Src != c.addr {
		t.Errorf("free: %+v, want a SYN from the client's own", all)
	}
}
