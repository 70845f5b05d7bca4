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
	for i, step := range []struct {
		backend       string
		offered, said packet.Options
		news          bool
		want          announcement
	}{
		{"192.0.2.1:443", all, all, true, announcement{1460, 1440, 0}},
		{"192.0.2.1:443", all, all, false, announcement{1460, 1440, 0}},
		{"192.0.2.1:443", all, bare, true, announcement{1460, 1440, 0}},  // one of two
		{"192.0.2.2:443", bare, bare, true, announcement{1460, 1440, 0}}, // was offered nothing
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
		news := p.learn(addr(step.backend), &step.offered, &step.said)
		if got := p.announcement(pools, 1460, 1440); got != step.want || news != step.news {
			t.Errorf("step %d: news %v, announced %s", i, news, fmt.Sprint(got))
		}
	}
}
