// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

var (
	client4 = netip.MustParseAddrPort("192.0.2.7:40000")
	vip4    = netip.MustParseAddrPort("198.51.100.1:443")
	client6 = netip.MustParseAddrPort("[2001:db8::7]:40000")
	vip6    = netip.MustParseAddrPort("[2001:db8:1::1]:443")
)

func sample(src, dst netip.AddrPort) Segment {
	return Segment{
		Src: src, Dst: dst, Seq: 0xfffffff0, Ack: 77, Flags: ACK | PSH, Window: 501,
		Options: Options{HasTimestamps: true, TSVal: 9, TSEcr: 8},
		Payload: []byte("hello, odd length"),
	}
}

var equal = []cmp.Option{cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })}

func TestRoundTrip(t *testing.T) {
	syn := Options{MSS: 1460, SACKPermitted: true, HasTimestamps: true, TSVal: 5, HasWScale: true, WScale: 7}
	noTimestamps := syn
	noTimestamps.HasTimestamps, noTimestamps.TSVal = false, 0
	for name, change := range map[string]func(*Segment){
		"data":               func(*Segment) {},
		"no options":         func(s *Segment) { s.Options = Options{} },
		"syn":                func(s *Segment) { s.Flags, s.Payload, s.Options = SYN, nil, syn },
		"syn, no timestamps": func(s *Segment) { s.Flags, s.Payload, s.Options = SYN, nil, noTimestamps },
		"mss only":           func(s *Segment) { s.Options = Options{MSS: 536} },
	} {
		for _, ends := range [][2]netip.AddrPort{{client4, vip4}, {client6, vip6}} {
			s := sample(ends[0], ends[1])
			change(&s)
			got, err := Parse(s.Append(nil))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if len(s.Payload) == 0 {
				got.Payload, s.Payload = nil, nil
			}
			if d := cmp.Diff(s, got, equal...); d != "" {
				t.Errorf("%s: %s", name, d)
			}
		}
	}
}

// What we build must be what an independent library reads, checksums included.
func TestBuiltPacketsAreWellFormed(t *testing.T) {
	for _, ends := range [][2]netip.AddrPort{{client4, vip4}, {client6, vip6}} {
		s := sample(ends[0], ends[1])
		b := s.Append(nil)
		first := layers.LayerTypeIPv4
		if !ends[0].Addr().Is4() {
			first = layers.LayerTypeIPv6
		}
		p := gopacket.NewPacket(b, first, gopacket.Default)
		tcp, ok := p.TransportLayer().(*layers.TCP)
		if !ok || p.ErrorLayer() != nil {
			t.Fatalf("not TCP: %v", p.ErrorLayer())
		}
		if err := tcp.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
			t.Fatal(err)
		}
		out := gopacket.NewSerializeBuffer()
		opts := gopacket.SerializeOptions{ComputeChecksums: true, FixLengths: true}
		if err := gopacket.SerializePacket(out, opts, p); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), b) {
			t.Errorf("%v: differs from the library's:\n%x\n%x", ends, b, out.Bytes())
		}
	}
}

func TestChecksum(t *testing.T) {
	for _, ends := range [][2]netip.AddrPort{{client4, vip4}, {client6, vip6}} {
		s := sample(ends[0], ends[1])
		good := s.Append(nil)
		tcp := len(good) - headerTCP - 12 - len(s.Payload)

		bad := bytes.Clone(good)
		bad[len(bad)-1]++
		if _, err := Parse(bad); !errors.Is(err, ErrChecksum) {
			t.Errorf("a flipped byte: %v", err)
		}
		bare := bytes.Clone(good)
		sum := fold(pseudoSum(s.Src.Addr(), s.Dst.Addr(), len(good)-tcp))
		bare[tcp+16], bare[tcp+17] = byte(sum>>8), byte(sum)
		if _, err := Parse(bare); err != nil {
			t.Errorf("offloaded checksum: %v", err)
		}
		padded := append(bytes.Clone(good), 0, 0, 0)
		if got, err := Parse(padded); err != nil || len(got.Payload) != len(s.Payload) {
			t.Errorf("Ethernet padding: %v, payload %d", err, len(got.Payload))
		}
	}
}

func TestParseCut(t *testing.T) {
	s := sample(client4, vip4)
	whole := s.Append(nil)
	headers := len(whole) - len(s.Payload)
	for n := range whole {
		got, err := Parse(whole[:n])
		if n < headers {
			if err == nil {
				t.Fatalf("%d bytes parsed", n)
			}
			continue
		}
		if err != nil || got.Missing != len(whole)-n || got.End() != s.End() {
			t.Fatalf("%d bytes: %v, missing %d", n, err, got.Missing)
		}
	}
}

func FuzzParse(f *testing.F) {
	s4, s6 := sample(client4, vip4), sample(client6, vip6)
	f.Add(s4.Append(nil))
	f.Add(s6.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse(b)
		if err != nil {
			return
		}
		if s.Src.Addr().Is4() != s.Dst.Addr().Is4() {
			t.Fatal("mixed families")
		}
		if len(s.Payload) > len(b) || s.Missing < 0 {
			t.Fatalf("payload %d, missing %d of %d bytes", len(s.Payload), s.Missing, len(b))
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	s := sample(client4, vip4)
	s.Payload = make([]byte, 517)
	buf := make([]byte, 0, 2048)
	b.ReportAllocs()
	for b.Loop() {
		buf = s.Append(buf[:0])
	}
}

func BenchmarkParse(b *testing.B) {
	s := sample(client4, vip4)
	s.Payload = make([]byte, 517)
	buf := s.Append(nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(buf); err != nil {
			b.Fatal(err)
		}
	}
}
