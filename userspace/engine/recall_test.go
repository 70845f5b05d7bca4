// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
	"snilb/userspace/pool"
)

const twoPools = `
listen: ":443"
pools:
  p: {backends: ["192.0.2.11:443", "[2001:db8::11]:443"]}
  q: {backends: ["192.0.2.12:443"]}
routes:
  - {sni: a.example.com, pool: p}
  - {sni: b.example.com, pool: q}
`

// announces is what the kernel's table says to clients.
func (k *kernel) announces() announcement {
	k.t.Helper()
	live, err := k.tables.Live()
	must(k.t, err)
	return announcement{live.Mss4, live.Mss6, live.Flags & (maps.LiveNoSACK | maps.LiveNoTimestamps)}
}

// learns has a backend answer a SYN that offered all.
func (d *daemon) learns(backend string, said packet.Options) {
	d.t.Helper()
	d.peers.learn(netip.MustParseAddrPort(backend), &packet.Options{SACKPermitted: true, HasTimestamps: true}, &said)
	must(d.t, d.beat())
}

// TestPeersOutliveDaemon: no client is promised what a backend is known not to have, because another daemon has begun.
func TestPeersOutliveDaemon(t *testing.T) {
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	d := k.journaled(path, twoPools)
	d.learns("192.0.2.12:443", packet.Options{MSS: 1300, SACKPermitted: true})
	d.journal.step() // into the file that there is
	want := announcement{1300, 1440, maps.LiveNoTimestamps}
	if got := k.announces(); got != want {
		t.Fatalf("announced: %v, want %v", got, want)
	}
	for range 2 { // the second one by what the first one wrote anew
		d = k.journaled(path, twoPools)
		if got := k.announces(); got != want {
			t.Errorf("another daemon announces %v, want %v", got, want)
		}
		if n := len(d.peers.byAddr); n != 1 {
			t.Errorf("%d backends are known, want 1", n)
		}
	}
	d.learns("192.0.2.12:443", packet.Options{MSS: 1460, SACKPermitted: true, HasTimestamps: true})
	d.journal.step()
	k.journaled(path, twoPools)
	if got, want := k.announces(), (announcement{1460, 1440, 0}); got != want {
		t.Errorf("announced: %v, want %v: the last that was learned", got, want)
	}
	// Nobody keeps what is known of a backend that has gone.
	d = k.journaled(path, "listen: \":443\""+poolAndRoute)
	if n := len(d.peers.byAddr); n != 0 {
		t.Errorf("%d backends are known, want none", n)
	}
}

// TestPeersWithoutJournal: what is announced stays, until those are heard of whom it could be true, or the configuration changes.
func TestPeersWithoutJournal(t *testing.T) {
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	want, all := announcement{1300, 1440, maps.LiveNoTimestamps}, announcement{1460, 1440, 0}
	lacking := packet.Options{MSS: 1300, SACKPermitted: true}
	for name, lose := range map[string]func(){
		"none":    func() { must(t, os.Remove(path)) },
		"another": func() { must(t, os.WriteFile(path, []byte("x"), 0o600)) },
		"cut off": func() { must(t, os.Truncate(path, 120)) },
	} {
		d := k.journaled(path, twoPools)
		if got := k.announces(); got != all {
			t.Fatalf("%s: at first announced: %v, want %v", name, got, all)
		}
		d.learns("192.0.2.12:443", lacking)
		d.journal.step()
		lose()
		for range 2 { // the second one by the journal of the first
			d = k.journaled(path, twoPools)
			if got := k.announces(); got != want {
				t.Errorf("%s: announced: %v, want %v", name, got, want)
			}
		}
		has := packet.Options{MSS: 1460, SACKPermitted: true, HasTimestamps: true}
		d.learns("192.0.2.11:443", has)
		d.learns("[2001:db8::11]:443", has)
		if got := k.announces(); got != want {
			t.Errorf("%s: announced: %v, want %v while one was not heard", name, got, want)
		}
		must(t, d.Reload(planAfter(t, twoPools, d.Plan())))
		if got := k.announces(); got != all {
			t.Errorf("%s: announced after a reload: %v, want %v", name, got, all)
		}
		d.journal.step()
		must(t, os.Remove(path))
	}
}

// TestListenersOutliveDaemon: what is queued of a listener is not taken for another's by the next daemon, whatever it listens to.
func TestListenersOutliveDaemon(t *testing.T) {
	k, path := newKernel(t, 1, 100), filepath.Join(t.TempDir(), "flows")
	start := func(listen string) *Plan {
		d := k.journaled(path, "listen: "+listen+poolAndRoute)
		return d.Plan()
	}
	first := start(`["192.0.2.1:443", "192.0.2.2:443"]`)
	one, two := first.idOf(t, "192.0.2.1:443"), first.idOf(t, "192.0.2.2:443")
	second := start(`["192.0.2.3:443", "192.0.2.2:443"]`)
	if id := second.idOf(t, "192.0.2.2:443"); id != two {
		t.Errorf("listener 2 had id %d, and has %d", two, id)
	}
	if id := second.idOf(t, "192.0.2.3:443"); id == one || id == two {
		t.Errorf("a new listener got id %d, which was another's", id)
	}
	third := start(`":443"`)
	if id := start(`["192.0.2.7:443", ":443"]`).idOfAny(443); id != third.idOfAny(443) {
		t.Errorf("the listener to every address had id %d, and has %d", third.idOfAny(443), id)
	}
	fourth := start(`["192.0.2.9:443"]`)
	if id := fourth.idOf(t, "192.0.2.9:443"); id <= second.lastID || id == third.lastID {
		t.Errorf("a new listener got the id %d, which was another's", id)
	}
}

func (p *Plan) idOfAny(port uint16) uint16 { return p.ids[netip.AddrPortFrom(netip.Addr{}, port)] }

// TestFirstPlanFull: a journal that holds all ids does not keep a daemon from starting.
func TestFirstPlanFull(t *testing.T) {
	backends, listeners := make(map[pool.Identity]uint16), make(map[netip.AddrPort]uint16)
	for id := 1; id <= config.MaxBackends; id++ {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(id >> 8), byte(id)}), 443)
		backends[pool.Identity{Pool: "p", Addr: addr}], listeners[addr] = uint16(id), uint16(id)
	}
	for name, known := range map[string]Known{"backends": {backends: backends}, "listeners": {listeners: listeners}} {
		p := firstPlan(t, twoPools, known)
		if p.pools.Backend(1) == nil || p.listeners[1] == nil {
			t.Errorf("all ids of %s are known: the ids of the plan are not its own", name)
		}
	}
}
