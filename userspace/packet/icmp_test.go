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

var compareAddrs = cmp.Options{
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
}

func sampleErrors() map[string]ICMPError {
	quote4 := Quote{Src: vip4, Dst: client4, Seq: 0xfffffff0, Length: 1500}
	quote6 := Quote{Src: vip6, Dst: client6, Seq: 7, Length: 1500}
	router4, router6 := netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8:9::1")
	return map[string]ICMPError{
		"frag-needed":    {Src: router4, Dst: vip4.Addr(), TooBig: true, Code: 4, MTU: 1280, Quoted: quote4},
		"host":           {Src: router4, Dst: vip4.Addr(), Code: 1, Quoted: quote4},
		"admin":          {Src: router4, Dst: vip4.Addr(), Code: 13, Quoted: quote4},
		"packet-too-big": {Src: router6, Dst: vip6.Addr(), TooBig: true, MTU: 1400, Quoted: quote6},
		"no route":       {Src: router6, Dst: vip6.Addr(), Code: 0, Quoted: quote6},
		"port":           {Src: router6, Dst: vip6.Addr(), Code: 4, Quoted: quote6},
	}
}

func TestICMPRoundTrip(t *testing.T) {
	for name, want := range sampleErrors() {
		b := want.Append([]byte("before"))[len("before"):]
		for cut := range maximumQuoteTCP - quotedTCP + 1 {
			got, err := ParseICMP(b[:len(b)-cut])
			if err != nil {
				t.Fatalf("%s without the last %d bytes: %v", name, cut, err)
			}
			if d := cmp.Diff(want, got, compareAddrs); d != "" {
				t.Errorf("%s: %s", name, d)
			}
		}
		for n := range len(b) - (maximumQuoteTCP - quotedTCP) {
			if _, err := ParseICMP(b[:n]); err == nil {
				t.Fatalf("%s: %d bytes parsed", name, n)
			}
		}
	}
}

// What we build must be what an independent library reads, checksums included.
func TestBuiltICMPIsWellFormed(t *testing.T) {
	for name, e := range sampleErrors() {
		b := e.Append(nil)
		first := layers.LayerTypeIPv4
		if e.Dst.Is6() {
			first = layers.LayerTypeIPv6
		}
		p := gopacket.NewPacket(b, first, gopacket.Default)
		if p.ErrorLayer() != nil {
			t.Fatalf("%s: %v", name, p.ErrorLayer())
		}
		if l, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); ok {
			if err := l.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
				t.Fatal(err)
			}
		} else if p.Layer(layers.LayerTypeICMPv4) == nil {
			t.Fatalf("%s: no ICMP", name)
		}
		out := gopacket.NewSerializeBuffer()
		opts := gopacket.SerializeOptions{ComputeChecksums: true, FixLengths: true}
		if err := gopacket.SerializePacket(out, opts, p); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), b) {
			t.Errorf("%s: differs from the library's:\n%x\n%x", name, out.Bytes(), b)
		}
	}
}

func TestParseICMPRefuses(t *testing.T) {
	for name, e := range sampleErrors() {
		good := e.Append(nil)
		ip, icmp := header4, header4
		if e.Dst.Is6() {
			ip, icmp = header6, header6
		}
		quote := icmp + headerICMP
		for what, change := range map[string]func([]byte){
			"an echo request":      func(b []byte) { b[icmp] = 8 },
			"another protocol":     func(b []byte) { b[map[int]int{header4: 9, header6: 6}[ip]] = 17 },
			"a quoted UDP packet":  func(b []byte) { b[quote+map[int]int{header4: 9, header6: 6}[ip]] = 17 },
			"a quoted other thing": func(b []byte) { b[quote] = 0x75 },
		} {
			b := bytes.Clone(good)
			change(b)
			if _, err := ParseICMP(b); !errors.Is(err, ErrNotICMP) {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
		b := bytes.Clone(good)
		b[len(b)-1]++
		if _, err := ParseICMP(b); !errors.Is(err, ErrChecksum) {
			t.Errorf("%s, a flipped byte: %v", name, err)
		}
	}
}

func FuzzParseICMP(f *testing.F) {
	for _, e := range sampleErrors() {
		f.Add(e.Append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseICMP(b)
		if err != nil {
			return
		}
		if e.Quoted.Src.Addr().Is4() != e.Dst.Is4() || e.MTU < 0 {
			t.Fatalf("%+v", e)
		}
		_ = e.Append(nil)
	})
}
