// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"snilb/scripts/testbed"
)

// TestPathMTU moves data through a small link behind routers, of which the sender, on the other leg, learns only by an ICMP
// message that quotes what it never sent. TestBedHop is the same without snilb.
func TestPathMTU(t *testing.T) {
	const size = 20 << 20
	for name, opts := range hops {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, opts)
			startBackends(t, bed)
			attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) {
				t.Run("download", func(t *testing.T) { downloadSize(t, bed, vip(bed, v6), "a.example.com", size) })
				t.Run("upload", func(t *testing.T) { uploadSize(t, bed, vip(bed, v6), "a.example.com", size) })
				wantBothTold(t, bed, opts, v6)
			})
		})
	}
}

// wantBothTold looks that the far host of the other leg has heard of the small link.
func wantBothTold(t *testing.T, bed *testbed.Bed, opts testbed.Options, v6 bool) {
	t.Helper()
	if opts.ClientHop != 0 && tooBig(t, bed.Backend, v6) == 0 {
		t.Error("the backend was never told of the client's small link")
	}
	if opts.BackendHop != 0 && tooBig(t, bed.Client, v6) == 0 {
		t.Error("the client was never told of the backend's small link")
	}
}

// TestShortQuote has a router that quotes no more than it must of the packet that was too big, the IP header and 8 bytes of
// TCP: the backend finds its connection by what snilb makes of it, and repeats the packet in smaller ones at once. A quote
// of a number that is not under way changes nothing.
func TestShortQuote(t *testing.T) {
	const mtu = 1300
	bed := newBed(t, testbed.Options{NoOffload: true})
	attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		serve(t, bed.Backend, at(bed, 1, v6, 443), func(c net.Conn) {
			defer func() { _ = c.Close() }()
			_, _ = c.Read(make([]byte, 4096))
			_, _ = c.Write(make([]byte, 4000))
			_, _ = c.Read(make([]byte, 1)) // until the end of the test
		})
		r, err := bed.Raw(vip(bed, v6))
		must(t, err)
		defer func() { _ = r.Close() }()
		_, err = r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
		must(t, err)
		must(t, r.Send(r.At(0, hello(t, classic("a.example.com")))))
		first := nextData(t, r)
		wrong := first
		wrong.Seq -= 1 << 24
		must(t, r.SendPacket(icmpTooBig(t, wrong, mtu)))
		if s, err := r.Recv(100 * time.Millisecond); err == nil && len(s.Payload) > 0 && s.Seq == first.Seq && len(s.Payload) < len(first.Payload) {
			t.Errorf("a quote of nothing under way cut %d bytes to %d", len(first.Payload), len(s.Payload))
		}
		must(t, r.SendPacket(icmpTooBig(t, first, mtu)))
		for deadline := time.Now().Add(5 * time.Second); ; {
			s := nextData(t, r)
			if size := len(s.Marshal()); s.Seq == first.Seq && size <= mtu && size < len(first.Marshal()) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("the backend still sends %d bytes", len(s.Marshal()))
			}
		}
		must(t, r.Send(r.Bare(testbed.RST)))
	})
}

// nextData waits for a segment with payload.
func nextData(t *testing.T, r *testbed.Raw) testbed.Segment {
	t.Helper()
	for {
		s, err := r.Recv(5 * time.Second)
		must(t, err)
		if len(s.Payload) > 0 {
			return s
		}
	}
}

// icmpTooBig is what a router on the way to the receiver of s says, with the shortest quote that is allowed (RFC 792).
func icmpTooBig(t *testing.T, s testbed.Segment, mtu uint16) []byte {
	t.Helper()
	var layer []gopacket.SerializableLayer
	quote := s.Marshal()
	if s.Src.Addr().Is4() {
		ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolICMPv4, SrcIP: s.Dst.Addr().AsSlice(), DstIP: s.Src.Addr().AsSlice()}
		layer = []gopacket.SerializableLayer{ip, &layers.ICMPv4{
			TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodeFragmentationNeeded), Seq: mtu,
		}, gopacket.Payload(quote[:20+8])}
	} else {
		ip := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolICMPv6, SrcIP: s.Dst.Addr().AsSlice(), DstIP: s.Src.Addr().AsSlice()}
		icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypePacketTooBig, 0)}
		must(t, icmp.SetNetworkLayerForChecksum(ip))
		layer = []gopacket.SerializableLayer{ip, icmp, gopacket.Payload(append([]byte{0, 0, byte(mtu >> 8), byte(mtu)}, quote[:40+8]...))}
	}
	out := gopacket.NewSerializeBuffer()
	must(t, gopacket.SerializeLayers(out, gopacket.SerializeOptions{ComputeChecksums: true, FixLengths: true}, layer...))
	return out.Bytes()
}

// TestTooBigOptions has a client send data that does not fit the backend's leg, with options that belong to a SYN: it is cut
// once, and the pieces fit.
func TestTooBigOptions(t *testing.T) {
	bed := newBed(t, testbed.Options{BackendMTU: 1280, NoOffload: true})
	got := make(chan int, 1)
	for _, v6 := range []bool{false, true} {
		serve(t, bed.Backend, at(bed, 1, v6, 443), func(c net.Conn) {
			defer func() { _ = c.Close() }()
			n, _ := io.Copy(io.Discard, c)
			got <- int(n)
		})
	}
	d := attach(t, bed, siteRoutes(bed))
	first := hello(t, classic("a.example.com"))
	families(t, func(t *testing.T, v6 bool) {
		before := d.counters()
		r, err := bed.Raw(vip(bed, v6))
		must(t, err)
		defer func() { _ = r.Close() }()
		_, err = r.Open(testbed.MSS(1460), 3*time.Second)
		must(t, err)
		must(t, r.Send(r.At(0, first)))
		d.waitFlows("one open", 3*time.Second, func(f []flow) bool {
			return slices.ContainsFunc(f, func(one flow) bool { return one.State == "open" })
		})
		big := r.At(len(first), make([]byte, 1400))
		big.Options = slices.Concat(testbed.MSS(1460), testbed.WScale(7), testbed.NOP(), testbed.SACKOK(), testbed.NOP(), testbed.NOP())
		must(t, r.Send(big))
		r.SndNxt += uint32(len(first) + 1400)
		must(t, r.CloseWrite())
		select {
		case n := <-got:
			if want := len(first) + 1400; n != want {
				t.Errorf("the backend has %d bytes of %d", n, want)
			}
		case <-time.After(3 * time.Second):
			t.Error("the backend never heard of the end")
		}
		after := d.counters()
		if n := after.packets("engine/too_big") - before.packets("engine/too_big"); n != 1 {
			t.Errorf("%d packets were cut", n)
		}
		must(t, r.Send(r.Bare(testbed.RST)))
	})
}
