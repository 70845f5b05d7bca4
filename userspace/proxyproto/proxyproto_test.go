// SPDX-License-Identifier: Apache-2.0

package proxyproto

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"net/netip"
	"strings"
	"testing"
)

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// binaryHeader is a version 2 header with its length filled in.
func binaryHeader(command, family byte, block string) string {
	b := append([]byte(opening2), command, family)
	b = binary.BigEndian.AppendUint16(b, uint16(len(block)))
	return string(b) + block
}

const (
	tcp4 = "\xc0\x00\x02\x02\xc0\x00\x02\x01\x9c\x40\x01\xbb" // 192.0.2.2:40000 to 192.0.2.1:443
	tcp6 = "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02" +
		"\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x9c\x40\x01\xbb"
)

var (
	own   = Header{}
	four  = Header{Source: addr("192.0.2.2:40000"), Destination: addr("192.0.2.1:443")}
	six   = Header{Source: addr("[2001:db8::2]:40000"), Destination: addr("[2001:db8::1]:443")}
	mixed = Header{Source: addr("192.0.2.2:40000"), Destination: addr("[2001:db8::1]:443")}
)

// summed is a header whose checksum record is right, or off by a bit.
func summed(off uint32) string {
	h := []byte(binaryHeader(proxy2, 0x11, tcp4+"\x04\x00\x01x\x03\x00\x04\x00\x00\x00\x00\x02\x00\x01a"))
	at := strings.Index(string(h), "\x03\x00\x04") + 3
	binary.BigEndian.PutUint32(h[at:], crc32.Checksum(h, crc32.MakeTable(crc32.Castagnoli))^off)
	return string(h)
}

var headers = map[string]struct {
	stream string
	want   Header
	err    error
}{
	"v1 TCP4":    {"PROXY TCP4 192.0.2.2 192.0.2.1 40000 443\r\n", four, nil},
	"v1 TCP6":    {"PROXY TCP6 2001:db8::2 2001:db8::1 40000 443\r\n", six, nil},
	"v1 mapped":  {"PROXY TCP6 ::ffff:192.0.2.2 2001:db8::1 40000 443\r\n", mixed, nil},
	"v1 UNKNOWN": {"PROXY UNKNOWN\r\n", own, nil},
	"v1 UNKNOWN, as long as may be": {
		"PROXY UNKNOWN " + strings.TrimSpace(strings.Repeat("ffff:", 8)) + "ffff " + strings.Repeat("f", 46) + "\r\n", own, nil,
	},
	"v1 too long":                {"PROXY UNKNOWN " + strings.Repeat("f", 120) + "\r\n", own, ErrMalformed},
	"v1 without CR":              {"PROXY TCP4 192.0.2.2 192.0.2.1 40000 443\n", own, ErrMalformed},
	"v1 UDP":                     {"PROXY UDP4 192.0.2.2 192.0.2.1 40000 443\r\n", own, ErrMalformed},
	"v1 port":                    {"PROXY TCP4 192.0.2.2 192.0.2.1 65536 443\r\n", own, ErrMalformed},
	"v1 family":                  {"PROXY TCP4 2001:db8::2 192.0.2.1 40000 443\r\n", own, ErrMalformed},
	"v1 two spaces":              {"PROXY  TCP4 192.0.2.2 192.0.2.1 40000 443\r\n", own, ErrMalformed},
	"v2 TCP4":                    {binaryHeader(proxy2, 0x11, tcp4), four, nil},
	"v2 TCP6":                    {binaryHeader(proxy2, 0x21, tcp6), six, nil},
	"v2 with additions":          {binaryHeader(proxy2, 0x11, tcp4+"\x02\x00\x03abc\x04\x00\x00"), four, nil},
	"v2 LOCAL":                   {binaryHeader(local2, 0x00, ""), own, nil},
	"v2 LOCAL, anything behind":  {binaryHeader(local2, 0x77, tcp4+"\x02"), own, nil},
	"v2 unspecified":             {binaryHeader(proxy2, 0x00, ""), own, nil},
	"v2 Unix":                    {binaryHeader(proxy2, 0x31, strings.Repeat("/", 216)), own, nil},
	"v2 UDP":                     {binaryHeader(proxy2, 0x12, tcp4), own, nil},
	"v2 family":                  {binaryHeader(proxy2, 0x13, tcp4), own, ErrMalformed},
	"v2 version":                 {binaryHeader(0x11, 0x11, tcp4), own, ErrMalformed},
	"v2 command":                 {binaryHeader(0x22, 0x11, tcp4), own, ErrMalformed},
	"v2 short":                   {binaryHeader(proxy2, 0x11, tcp4[1:]), own, ErrMalformed},
	"v2 cut addition":            {binaryHeader(proxy2, 0x11, tcp4+"\x02\x00\x03ab"), own, ErrMalformed},
	"v2 cut length":              {binaryHeader(proxy2, 0x21, tcp6+"\x02\x00"), own, ErrMalformed},
	"v2 largest":                 {binaryHeader(proxy2, 0x11, tcp4+"\x04\x0f\xf1"+strings.Repeat("x", 0xff1)), four, nil},
	"v2 too large":               {binaryHeader(proxy2, 0x11, tcp4+"\x04\x0f\xf2"+strings.Repeat("x", 0xff2)), own, ErrMalformed},
	"v2 checksum":                {summed(0), four, nil},
	"v2 wrong checksum":          {summed(1 << 9), own, ErrMalformed},
	"v2 checksum of three bytes": {binaryHeader(proxy2, 0x11, tcp4+"\x03\x00\x03abc"), own, ErrMalformed},
	"a hello":                    {"\x16\x03\x01\x02\x00\x01", own, ErrNone},
	"lower case":                 {"proxy TCP4 192.0.2.2 192.0.2.1 40000 443\r\n", own, ErrNone},
	"no space":                   {"PROXYTCP4 192.0.2.2 192.0.2.1 40000 443\r\n", own, ErrNone},
	"nearly v2":                  {"\r\n\r\n\x00\r\nQUIt\n\x21\x11\x00\x00", own, ErrNone},
}

// Each header is parsed alone, with more behind it, and after each of its bytes.
func TestParse(t *testing.T) {
	for name, tt := range headers {
		length := len(tt.stream)
		if tt.err != nil {
			length = 0
		}
		for _, behind := range []string{"", "\x16\x03\x01"} {
			got, n, err := Parse([]byte(tt.stream + behind))
			if got != tt.want || n != length || !errors.Is(err, tt.err) {
				t.Errorf("%s: %+v, %d bytes, %v; want %+v, %d, %v", name, got, n, err, tt.want, length, tt.err)
			}
		}
		for cut := range len(tt.stream) {
			_, n, err := Parse([]byte(tt.stream[:cut]))
			if n != 0 || !errors.Is(err, ErrNeedMore) && (tt.err == nil || !errors.Is(err, tt.err)) {
				t.Errorf("%s, %d bytes of it: %d, %v", name, cut, n, err)
			}
		}
	}
}

// Nothing is waited for that will be refused: what is too long is so at once.
func TestBounds(t *testing.T) {
	for stream, want := range map[string]error{
		"PROXY " + strings.Repeat("f", 100):                        ErrNeedMore,
		"PROXY " + strings.Repeat("f", 101):                        ErrMalformed,
		binaryHeader(proxy2, 0x11, strings.Repeat("x", 4096))[:16]: ErrNeedMore,
		binaryHeader(proxy2, 0x11, strings.Repeat("x", 4097))[:16]: ErrMalformed,
		binaryHeader(local2, 0x00, strings.Repeat("x", 4097))[:16]: ErrMalformed,
	} {
		if _, n, err := Parse([]byte(stream)); n != 0 || !errors.Is(err, want) {
			t.Errorf("%d bytes, %q...: %v, want %v", len(stream), stream[:14], err, want)
		}
	}
}

func TestAppend(t *testing.T) {
	for name, tt := range map[string]struct {
		header  Header
		version byte
		want    string
	}{
		"v1 IPv4":  {four, 1, "PROXY TCP4 192.0.2.2 192.0.2.1 40000 443\r\n"},
		"v1 IPv6":  {six, 1, "PROXY TCP6 2001:db8::2 2001:db8::1 40000 443\r\n"},
		"v1 mixed": {mixed, 1, "PROXY TCP6 ::ffff:192.0.2.2 2001:db8::1 40000 443\r\n"},
		"v1 own":   {own, 1, "PROXY UNKNOWN\r\n"},
		"v2 IPv4":  {four, 2, binaryHeader(proxy2, 0x11, tcp4)},
		"v2 IPv6":  {six, 2, binaryHeader(proxy2, 0x21, tcp6)},
		"v2 own":   {own, 2, binaryHeader(local2, 0, "")},
		"v2 names": {
			Header{Source: four.Source, Destination: four.Destination, Authority: "a.example.com", ALPN: "h2"}, 2,
			binaryHeader(proxy2, 0x11, tcp4+"\x01\x00\x02h2\x02\x00\x0da.example.com"),
		},
		"v1 has no names": {Header{Source: four.Source, Destination: four.Destination, Authority: "a", ALPN: "h2"}, 1,
			"PROXY TCP4 192.0.2.2 192.0.2.1 40000 443\r\n"},
	} {
		got, err := tt.header.Append([]byte("before"), tt.version)
		if err != nil || string(got) != "before"+tt.want {
			t.Errorf("%s: %v\n%s, want\n%s", name, err, hex.Dump(got), hex.Dump([]byte("before"+tt.want)))
		}
	}
	long := Header{Authority: strings.Repeat("a", 1<<16)}
	if got, err := long.Append(nil, 2); err == nil || len(got) != 0 {
		t.Errorf("a name that does not fit: %d bytes, %v", len(got), err)
	}
}

// What is written is read back, and a verdict does not change when more comes.
func FuzzParse(f *testing.F) {
	for _, tt := range headers {
		f.Add([]byte(tt.stream), uint16(len(tt.stream)/2))
	}
	f.Fuzz(func(t *testing.T, stream []byte, cut uint16) {
		h, n, err := Parse(stream)
		if n < 0 || n > min(len(stream), MaxSize) || (n == 0) != (err != nil) {
			t.Fatalf("%d of %d bytes, %v", n, len(stream), err)
		}
		before := stream[:min(len(stream), int(cut))]
		if h2, n2, err2 := Parse(before); !errors.Is(err2, ErrNeedMore) && (h2 != h || n2 != n || !errors.Is(err2, err)) {
			t.Fatalf("%d bytes: %+v, %d, %v; %d bytes: %+v, %d, %v", len(before), h2, n2, err2, len(stream), h, n, err)
		}
		if err != nil {
			return
		}
		for version := byte(1); version <= 2; version++ {
			out, err := h.Append(nil, version)
			if err != nil {
				t.Fatalf("version %d of %+v: %v", version, h, err)
			}
			if again, n, err := Parse(out); err != nil || again != h || n != len(out) {
				t.Fatalf("version %d of %+v: read back as %+v, %d of %d bytes, %v", version, h, again, n, len(out), err)
			}
		}
	})
}
