// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"snilb/userspace/config"
	"snilb/userspace/packet"
	"snilb/userspace/pool"
)

// planAfter makes a plan that follows another one.
func planAfter(t *testing.T, routes string, old *Plan) *Plan {
	t.Helper()
	c, err := config.Parse("test", []byte("version: 1\n"+routes))
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewPlan(c, old)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const poolAndRoute = "\npools: {p: {backends: [\"192.0.2.11:443\"]}}\nroutes: [{sni: a.example.com, pool: p}]\n"

func (p *Plan) idOf(t *testing.T, addr string) uint16 {
	t.Helper()
	for _, l := range p.config.Listeners {
		if l.Addr == netip.MustParseAddrPort(addr) {
			id := p.ListenerID(l)
			if p.listeners[id] != l {
				t.Errorf("listener %s has id %d, which is another's", addr, id)
			}
			return id
		}
	}
	t.Fatalf("no listener %s", addr)
	return 0
}

// A listener keeps its id wherever it comes to stand in the file, and nobody soon gets the one of a listener that has gone.
func TestListenerIDs(t *testing.T) {
	first := planAfter(t, `listen: ["192.0.2.1:443", "192.0.2.2:443"]`+poolAndRoute, nil)
	one, two := first.idOf(t, "192.0.2.1:443"), first.idOf(t, "192.0.2.2:443")
	if one == 0 || two == 0 || one == two {
		t.Fatalf("ids %d and %d", one, two)
	}
	second := planAfter(t, `listen: ["192.0.2.3:443", {name: other, address: "192.0.2.2:443"}]`+poolAndRoute, first)
	if id := second.idOf(t, "192.0.2.2:443"); id != two {
		t.Errorf("listener 2 had id %d, and has %d", two, id)
	}
	if id := second.idOf(t, "192.0.2.3:443"); id == one || id == two {
		t.Errorf("a new listener got id %d, which was another's", id)
	}
	third := planAfter(t, `listen: ["192.0.2.1:443", "192.0.2.2:443"]`+poolAndRoute, second)
	if id := third.idOf(t, "192.0.2.1:443"); id <= second.lastID {
		t.Errorf("a listener that is back got the used id %d", id)
	}
	third.lastID = 0xfffe
	last := planAfter(t, `listen: ["192.0.2.2:443", "192.0.2.4:443", "192.0.2.5:443"]`+poolAndRoute, third)
	if id := last.idOf(t, "192.0.2.4:443"); id != 0xffff {
		t.Errorf("id %d, want the largest", id)
	}
	if id := last.idOf(t, "192.0.2.5:443"); id == 0 || id == two || id == third.idOf(t, "192.0.2.1:443") {
		t.Errorf("after the largest came %d", id)
	}
}

// A connection is decided by the plan it began with, by which a later one may have other numbers for everything.
func TestReloadInHello(t *testing.T) {
	d := newDesk(t, "no_match: alert\n")
	first := helloOf("nobody.example.com")
	slow, quick := newClient(1), newClient(2)
	d.sends(slow, 1, first[:100], 0)
	old := d.e.plan.Load()
	d.e.plan.Store(planAfter(t, "listen: [\":8443\", \":443\"]\nno_match: drop"+poolAndRoute, old))
	if n := d.e.Unsettled(); n != 1 {
		t.Errorf("%d connections go by the old plan, want 1", n)
	}
	d.out = nil
	d.sends(slow, 101, first[100:], 0)
	if s := d.last(); !s.Has(packet.FIN) {
		t.Errorf("the old plan's alert did not come: flags %#x", s.Flags)
	}
	d.sends(quick, 1, first, 0)
	if s := d.last(); s.Flags != 0 {
		t.Errorf("the new plan drops: flags %#x", s.Flags)
	}
	if n := d.e.Unsettled(); n != 0 {
		t.Errorf("%d connections go by the old plan, and all are decided", n)
	}
}

// All that is still to be decided of it goes by that plan too: what is no hello, and where to go without a backend.
func TestReloadBeforeEnd(t *testing.T) {
	d := newDeskOf(t, `
listen: ":443"
not_tls: alert
pools:
  p: {backends: ["192.0.2.11:443"], no_backend: "pool:spare"}
  spare: {backends: ["192.0.2.12:443"]}
routes: [{sni: a.example.com, pool: p}]
`)
	d.e.o.NextHop = func(to netip.Addr) (Hop, error) {
		if to == netip.MustParseAddr("192.0.2.11") {
			return Hop{}, errors.New("no route")
		}
		return Hop{Index: 1, MTU: 1500, Source: netip.MustParseAddr("192.0.2.1")}, nil
	}
	whole := helloOf("a.example.com")
	plain, named := newClient(1), newClient(2)
	d.sends(plain, 1, []byte("GE"), 0)
	d.sends(named, 1, whole[:100], 0)
	d.e.plan.Store(planAfter(t, `listen: ":443"`+poolAndRoute, d.e.plan.Load()))
	d.out = nil
	d.sends(plain, 3, []byte("T / HTTP/1.1\r\nHost: a\r\n\r\n"), 0)
	if s := d.last(); !s.Has(packet.FIN) {
		t.Errorf("what is no hello: flags %#x, want the alert of the plan it began with", s.Flags)
	}
	d.sends(named, 101, whole[100:], 0)
	if h := d.handshake(named); h.attempt.backend == nil || h.attempt.backend.Addr != netip.MustParseAddrPort("192.0.2.12:443") {
		t.Errorf("without a backend: %+v, want the spare one of the plan it began with", h.attempt.backend)
	}
}

// What is queued of a listener that has gone is nobody's.
func TestReloadTakesListener(t *testing.T) {
	d := newDesk(t, "")
	d.e.plan.Store(planAfter(t, `listen: ":8443"`+poolAndRoute, d.e.plan.Load()))
	c := newClient(1)
	d.sends(c, 1, helloOf("a.example.com"), 0)
	if d.handshake(c) != nil || d.stats.staleEvents != 1 {
		t.Errorf("handshake %v, %d stale events", d.handshake(c), d.stats.staleEvents)
	}
}

// What is kept of backends goes with them, but for the ports that somebody has or that rest.
func TestReloadForgets(t *testing.T) {
	d := newDesk(t, "")
	d.e.clock = newClock()
	key := func(n byte) pathKey {
		return pathKey{netip.MustParseAddr("192.0.2.1"), netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, n}), 443), 0, 0}
	}
	now := d.e.clock.now()
	for n := byte(10); n < 14; n++ {
		p := d.portsTo(key(n))
		port, ok := p.take(now, unused)
		if !ok {
			t.Fatal("no port")
		}
		switch n {
		case 10, 11:
			p.give(now-int64(time.Hour), port, n == 11)
		case 12:
			p.give(now, port, true)
		}
		d.e.peers.learn(key(n).backend, &packet.Options{}, &packet.Options{})
	}
	kept := map[netip.AddrPort]bool{key(10).backend: true}
	d.forgetPaths(kept)
	for n, want := range map[byte]bool{10: true, 11: false, 12: true, 13: true} {
		if (d.paths[key(n)] != nil) != want {
			t.Errorf("ports of backend %d: kept %v", n, !want)
		}
	}
	d.e.peers.keep(kept)
	if len(d.e.peers.byAddr) != 1 {
		t.Errorf("peers: %v", d.e.peers.byAddr)
	}
}

// The kernel looks at all that backends send as long as anybody's connection has its client's own port.
func TestReloadSourceClient(t *testing.T) {
	d := newDesk(t, "")
	c := connection{netip.MustParseAddrPort("198.51.100.1:1000"), netip.MustParseAddrPort("203.0.113.1:443")}
	f := d.flows.add(c, c.client, way{backend: &pool.Backend{Addr: netip.MustParseAddrPort("192.0.2.11:443")}}, "", c.client)
	d.e.sourceClient.Store(true)
	if d.e.dropSourceClient(); !d.e.sourceClient.Load() {
		t.Error("dropped with a flow bound")
	}
	d.flows.remove(f)
	half := newClient(1)
	d.sends(half, 1, helloOf("a.example.com")[:100], 0)
	d.e.plan.Store(planAfter(t, `listen: ":443"`+poolAndRoute, d.e.plan.Load()))
	if d.e.dropSourceClient(); !d.e.sourceClient.Load() {
		t.Error("dropped with a connection that goes by an earlier plan")
	}
	d.drop(d.handshake(half))
	if d.e.dropSourceClient(); d.e.sourceClient.Load() {
		t.Error("kept for nobody")
	}
}
