// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// A judge that fails on good packets, or passes bad ones, would spoil every test built on it: so it is held against a
// library that was written by others.

func segments() map[string]Segment {
	v4 := Segment{
		Src: netip.MustParseAddrPort("198.51.100.60:1234"), Dst: netip.MustParseAddrPort("198.51.100.1:443"),
		Seq: 0xfffffff0, Ack: 7, Flags: ACK | PSH, Window: 501, Urgent: 3, TTL: 64, TOS: 0x10,
		Options: append([]byte{optNOP, optNOP}, Timestamps(1, 2)...), Payload: []byte("odd"),
	}
	v6 := v4
	v6.Src, v6.Dst = netip.MustParseAddrPort("[2001:db8:1::60]:1234"), netip.MustParseAddrPort("[2001:db8:1::1]:443")
	syn := v4
	syn.Flags, syn.Ack, syn.Options, syn.Payload = SYN|ECE|CWR|AE, 0, LinuxSYN(9), []byte{}
	return map[string]Segment{"v4": v4, "v6": v6, "syn": syn}
}

func TestSegmentRoundTrip(t *testing.T) {
	for name, want := range segments() {
		t.Run(name, func(t *testing.T) {
			got, err := ParseSegment(want.Marshal())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
				t.Errorf("not what was written (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSegmentAgainstGopacket(t *testing.T) {
	for name, s := range segments() {
		t.Run(name, func(t *testing.T) {
			b := s.Marshal()
			first := gopacket.Decoder(layers.LayerTypeIPv4)
			if s.Src.Addr().Is6() {
				first = layers.LayerTypeIPv6
			}
			p := gopacket.NewPacket(b, first, gopacket.Default)
			tcp, ok := p.TransportLayer().(*layers.TCP)
			if !ok || p.ErrorLayer() != nil {
				t.Fatalf("gopacket does not read it: %v", p)
			}
			if tcp.Seq != s.Seq || tcp.Ack != s.Ack || tcp.Window != s.Window || tcp.NS != s.Has(AE) || tcp.SYN != s.Has(SYN) {
				t.Errorf("gopacket reads %+v, written was %s", tcp, s)
			}
			was := tcp.Checksum
			if err := tcp.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
				t.Fatal(err)
			}
			out := gopacket.NewSerializeBuffer()
			err := gopacket.SerializeLayers(out, gopacket.SerializeOptions{ComputeChecksums: true}, tcp, gopacket.Payload(tcp.Payload))
			if err != nil || tcp.Checksum != was {
				t.Errorf("checksum %#04x, gopacket's %#04x (%v)", was, tcp.Checksum, err)
			}
		})
	}
}

func TestSegmentBad(t *testing.T) {
	for name, s := range segments() {
		t.Run(name, func(t *testing.T) {
			s.BadChecksum = true
			got, err := ParseSegment(s.Marshal())
			if err != nil || !got.BadChecksum {
				t.Errorf("a bad checksum went unseen: %v", err)
			}
			s.BadChecksum = false
			whole := s.Marshal()
			for n := range len(whole) {
				if _, err := ParseSegment(whole[:n]); err == nil {
					t.Errorf("accepted after %d of %d bytes", n, len(whole))
				}
			}
		})
	}
}

func TestSegmentOption(t *testing.T) {
	s := Segment{Options: []byte{optNOP, OptMSS, 4, 5, 0xb4, optEnd, OptWScale, 3, 7}}
	if mss, ok := s.Option(OptMSS); !ok || len(mss) != 2 || mss[0] != 5 || mss[1] != 0xb4 {
		t.Errorf("MSS option reads %x, %t", mss, ok)
	}
	if _, ok := s.Option(OptWScale); ok {
		t.Error("an option behind the end of the list was read")
	}
	for _, broken := range [][]byte{{OptMSS}, {OptMSS, 0}, {OptMSS, 1}, {OptMSS, 4, 1}} {
		if _, ok := (Segment{Options: broken}).Option(OptMSS); ok {
			t.Errorf("option area %x was read", broken)
		}
	}
}
