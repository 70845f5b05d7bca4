// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/netip"
	"testing"

	"snilb/maps"
	"snilb/userspace/packet"
)

// What is cut since it was too big fits, whatever options it had: else the kernel hands it back again and again.
func TestTooBigFits(t *testing.T) {
	const mtu = 1280
	for src, dst := range map[string]string{"192.0.2.2:40000": "192.0.2.1:443", "[2001:db8::2]:40000": "[2001:db8::1]:443"} {
		for _, options := range []packet.Options{
			{},
			{HasTimestamps: true, TSVal: 1, TSEcr: 2},
			{MSS: 1460, SACKPermitted: true, HasWScale: true, WScale: 7, HasTimestamps: true},
		} {
			t.Run(fmt.Sprint(src, options), func(t *testing.T) {
				out := &frames{}
				w := &worker{e: &Engine{}, queue: out}
				w.e.o.NextHop = func(netip.Addr) (Hop, error) { return Hop{}, nil }
				s := packet.Segment{
					Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst),
					Flags: packet.ACK, Options: options, Payload: make([]byte, 3000),
				}
				w.tooBig(maps.LegClient, &s, 3052, mtu)
				pieces := (*out)[1:] // the first is the ICMP error
				if len(pieces) != 3 {
					t.Errorf("%d pieces", len(pieces))
				}
				for _, frame := range pieces {
					if got, err := packet.Parse(frame[14:]); err != nil || len(frame)-14 > mtu || got.Options.HasTimestamps != options.HasTimestamps {
						t.Errorf("%d bytes, options %+v, %v", len(frame)-14, got.Options, err)
					}
				}
			})
		}
	}
}
