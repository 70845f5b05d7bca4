// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"testing"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
	"snilb/userspace/pool"
)

// What is announced is what every pool can keep, by what its backends have said.
func TestPeers(t *testing.T) {
	c, err := config.Parse("test", []byte(`version: 1
listen: ":443"
no_match: pool:a
not_tls: pool:b
pools:
  a: {backends: [192.0.2.1:443, 192.0.2.2:443, "[2001:db8::1]:443"]}
  b: {backends: ["192.0.2.3:443"]}
`))
	if err != nil {
		t.Fatal(err)
	}
	pools, err := pool.Build(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddrPort
	all := packet.Options{MSS: 1460, SACKPermitted: true, HasTimestamps: true}
	bare := packet.Options{MSS: 1460}
	small := packet.Options{MSS: 1240, SACKPermitted: true, HasTimestamps: true}
	var p peers
	p.announce(pools, 1460, 1440)
	for i, step := range []struct {
		backend       string
		offered, said packet.Options
		may           bool
		want          announcement
	}{
		{"192.0.2.1:443", all, all, false, announcement{1460, 1440, 0}},
		{"192.0.2.1:443", all, all, false, announcement{1460, 1440, 0}},
		{"192.0.2.1:443", all, bare, true, announcement{1460, 1440, 0}},   // one of two
		{"192.0.2.2:443", bare, bare, false, announcement{1460, 1440, 0}}, // was offered nothing
		{"192.0.2.2:443", all, bare, true, announcement{1460, 1440, maps.LiveNoSACK | maps.LiveNoTimestamps}},
		{"192.0.2.1:443", bare, bare, false, announcement{1460, 1440, maps.LiveNoSACK | maps.LiveNoTimestamps}}, // says nothing new
		{"192.0.2.2:443", all, packet.Options{MSS: 1460, SACKPermitted: true}, true, announcement{1460, 1440, maps.LiveNoTimestamps}},
		{"192.0.2.2:443", all, all, true, announcement{1460, 1440, 0}},
		{"192.0.2.3:443", all, small, true, announcement{1240, 1440, 0}},
		{"192.0.2.3:443", all, packet.Options{MSS: 900, SACKPermitted: true, HasTimestamps: true}, true, announcement{leastAnnounced, 1440, 0}},
		{"[2001:db8::1]:443", all, packet.Options{SACKPermitted: true, HasTimestamps: true}, true, announcement{leastAnnounced, 1220, 0}},
		{"[2001:db8::1]:443", all, bare, true, announcement{leastAnnounced, 1440, maps.LiveNoSACK | maps.LiveNoTimestamps}}, // the only one of its family
		{"192.0.2.99:443", all, bare, true, announcement{leastAnnounced, 1440, maps.LiveNoSACK | maps.LiveNoTimestamps}},    // of no pool any more
	} {
		may := p.learn(addr(step.backend), &step.offered, &step.said)
		if p.changes(pools, 1460, 1440) && !may {
			t.Errorf("step %d changes what is announced, and nobody looks", i)
		}
		if got := p.announce(pools, 1460, 1440); got != step.want || may != step.may {
			t.Errorf("step %d: may change it %v, announced %s", i, may, fmt.Sprint(got))
		}
	}
}

// TestAnnounceOnlyChanges: not every backend's first SYN-ACK has the kernel told, only what it must hear of.
func TestAnnounceOnlyChanges(t *testing.T) {
	k := newKernel(t, 1, 100)
	d := k.start(firstPlan(t, journalRoutes, Known{}), nil)
	zero, live := uint32(0), maps.Live{}
	beaten := func(mss uint16, port int) uint64 {
		live.Beat = 1
		must(t, k.tables.Control.Put(&zero, &live))
		d.bindsWith(packet.Options{MSS: mss}, fmt.Sprintf("203.0.113.7:%d", port), "a.example.com", "")
		var now maps.Live
		must(t, k.tables.Control.Lookup(&zero, &now))
		return now.Beat
	}
	if beaten(1460, 1001) != 1 {
		t.Error("the kernel was told what it knows")
	}
	if len(d.peers.byAddr) != 1 {
		t.Errorf("%d backends are known, want one", len(d.peers.byAddr))
	}
	for i, mss := range []uint16{1300, 1350, 1460} {
		if beaten(mss, 1002+i) == 1 {
			t.Errorf("the kernel was not told of the MSS %d", mss)
		}
	}
	if beaten(1460, 1010) != 1 {
		t.Error("the kernel was told what it knows")
	}
}

// TestAnnounceOddBackend: one backend of several may be odd, and that is nothing to tell.
func TestAnnounceOddBackend(t *testing.T) {
	k := newKernel(t, 1, 100)
	d := k.start(firstPlan(t, "listen: \":443\"\nno_match: pool:p\npools: {p: {backends: [\"192.0.2.11:443\", \"192.0.2.12:443\"]}}\n", Known{}), nil)
	for i, backend := range []string{"192.0.2.11:443", "192.0.2.12:443"} {
		must(t, k.tables.SetLive(&maps.Live{Beat: 1}))
		d.peers.learn(netip.MustParseAddrPort(backend), &packet.Options{HasTimestamps: true}, &packet.Options{MSS: 1460})
		must(t, d.announce())
		live, err := k.tables.Live()
		must(t, err)
		if told := live.Beat != 1; told != (i == 1) {
			t.Errorf("%d of two backends have no timestamps: the kernel was told %v", i+1, told)
		}
	}
}
