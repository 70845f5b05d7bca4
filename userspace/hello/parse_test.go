// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// rejects maps the name of a case to a change that makes the good hello bad.
var rejects = map[string]struct {
	change func(*wire)
	want   error
	reason string
}{
	"alert record":          {func(w *wire) { w.record = 21 }, ErrNotTLS, ""},
	"record version 2":      {func(w *wire) { w.version = 0x0201 }, ErrNotTLS, ""},
	"server hello":          {func(w *wire) { w.typ = 2 }, ErrNotTLS, ""},
	"legacy version 2":      {func(w *wire) { w.legacy = 0x0200 }, ErrMalformed, "version is not"},
	"session of 33":         {func(w *wire) { w.session = make([]byte, 33) }, ErrMalformed, "session id"},
	"no suites":             {func(w *wire) { w.suites = nil }, ErrMalformed, "cipher suites"},
	"odd suites":            {func(w *wire) { w.suites = w.suites[1:] }, ErrMalformed, "cipher suites"},
	"no compression":        {func(w *wire) { w.compression = nil }, ErrMalformed, "compression"},
	"byte after extensions": {func(w *wire) { w.tail = []byte{0} }, ErrMalformed, "do not end"},
	"half an extension":     {func(w *wire) { w.noExts, w.tail = true, vec16([]byte{0, 0, 0}) }, ErrMalformed, "inside an extension"},
	"one byte for a block":  {func(w *wire) { w.noExts, w.tail = true, []byte{0} }, ErrMalformed, "do not end"},
	"message ends early":    {func(w *wire) { w.lengthOff = -1 }, ErrMalformed, "more than the hello"},
	"message over 16 KiB":   {func(w *wire) { w.lengthOff = MaxMessage }, ErrTooLong, "16 KiB"},
	"empty message":         {func(w *wire) { w.lengthOff = 4 - len(w.message()) }, ErrMalformed, "more than the hello"},

	"two server_name":   {func(w *wire) { w.exts = append(w.exts, sni("b.example.com")) }, ErrMalformed, "twice"},
	"two equal":         {func(w *wire) { w.exts = append(w.exts, sni("www.example.com")) }, ErrMalformed, "twice"},
	"two GREASE alike":  {func(w *wire) { w.exts = append(w.exts, ext{0x2a2a, nil}) }, ErrMalformed, "twice"},
	"two among many":    {func(w *wire) { w.exts = append(w.exts, many(1000)...); w.exts = append(w.exts, many(1)...) }, ErrMalformed, "twice"},
	"psk is not last":   {func(w *wire) { w.exts = append([]ext{{41, nil}}, w.exts...) }, ErrMalformed, "pre_shared_key"},
	"versions empty":    {func(w *wire) { *w = w.with(ext{43, []byte{0}}) }, ErrMalformed, "supported_versions"},
	"versions odd":      {func(w *wire) { *w = w.with(ext{43, []byte{3, 3, 4, 3}}) }, ErrMalformed, "supported_versions"},
	"versions and more": {func(w *wire) { *w = w.with(ext{43, []byte{2, 3, 4, 3}}) }, ErrMalformed, "supported_versions"},

	"sni without content": {func(w *wire) { *w = w.with(ext{0, nil}) }, ErrMalformed, "of server_name"},
	"sni list empty":      {func(w *wire) { *w = w.with(ext{0, u16(0)}) }, ErrMalformed, "of server_name"},
	"sni list short":      {func(w *wire) { e := sni("a.b"); e.data[1]--; *w = w.with(e) }, ErrMalformed, "of server_name"},
	"sni list long":       {func(w *wire) { e := sni("a.b"); e.data[1]++; *w = w.with(e) }, ErrMalformed, "of server_name"},
	"sni name short":      {func(w *wire) { e := sni("a.b"); e.data[4]--; *w = w.with(e) }, ErrMalformed, "of a name"},
	"sni name long":       {func(w *wire) { e := sni("a.b"); e.data[4]++; *w = w.with(e) }, ErrMalformed, "of a name"},
	"sni name empty":      {func(w *wire) { *w = w.with(sni("")) }, ErrMalformed, "of a name"},
	"two host names":      {func(w *wire) { *w = w.with(ext{0, vec16([]byte("\x00\x00\x01a\x00\x00\x01b"))}) }, ErrMalformed, "two host names"},
	"bad name":            {func(w *wire) { *w = w.with(sni("a\x00b")) }, ErrMalformed, "no name has"},

	"alpn without content": {func(w *wire) { *w = w.with(ext{16, nil}) }, ErrMalformed, "protocol list"},
	"alpn list empty":      {func(w *wire) { *w = w.with(alpn()) }, ErrMalformed, "protocol list"},
	"alpn list short":      {func(w *wire) { e := alpn("h2"); e.data[1]--; *w = w.with(e) }, ErrMalformed, "protocol list"},
	"alpn entry empty":     {func(w *wire) { *w = w.with(alpn("h2", "", "x")) }, ErrMalformed, "of a protocol"},
	"alpn entry long":      {func(w *wire) { e := alpn("h2"); e.data[2]++; *w = w.with(e) }, ErrMalformed, "of a protocol"},
	"alpn all empty":       {func(w *wire) { *w = w.with(alpn(make([]string, 16000)...)) }, ErrMalformed, "of a protocol"},
	"alpn of 65":           {func(w *wire) { *w = w.with(alpn(strings.Split(strings.Repeat("x", 65), "")...)) }, ErrMalformed, "64 protocols"},
}

// many returns n different extensions of unknown types.
func many(n int) []ext {
	exts := make([]ext, n)
	for i := range exts {
		exts[i].typ = uint16(0x8000 + i)
	}
	return exts
}

func TestParseRejects(t *testing.T) {
	for name, tc := range rejects {
		t.Run(name, func(t *testing.T) {
			w := good()
			tc.change(&w)
			h, err := Parse(w.bytes())
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.reason) {
				t.Errorf("error is %v, want %v with %q", err, tc.want, tc.reason)
			}
			if diff := cmp.Diff(Hello{}, h); diff != "" {
				t.Errorf("an error came with a result: %s", diff)
			}
		})
	}
}

func TestParseAccepts(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*wire)
		want   func(*Hello)
	}{
		"as it is":           {func(*wire) {}, func(*Hello) {}},
		"SSL 3.0 record":     {func(w *wire) { w.version = 0x0300 }, func(*Hello) {}},
		"record version 3.4": {func(w *wire) { w.version = 0x0304 }, func(*Hello) {}},
		"no session":         {func(w *wire) { w.session = nil }, func(*Hello) {}},
		"no extensions":      {func(w *wire) { w.noExts = true }, func(h *Hello) { *h = Hello{Version: 0x0303} }},
		"empty extensions":   {func(w *wire) { w.exts = nil }, func(h *Hello) { *h = Hello{Version: 0x0303} }},
		"no sni":             {func(w *wire) { w.exts = w.exts[2:] }, func(h *Hello) { h.ServerName = "" }},
		"no versions":        {func(w *wire) { w.exts = w.exts[:4] }, func(h *Hello) { h.Version = 0x0303 }},
		"only GREASE versions": {func(w *wire) { *w = w.with(ext{43, []byte{2, 0x4a, 0x4a}}) },
			func(h *Hello) { h.Version = 0 }},
		"upper case":        {func(w *wire) { *w = w.with(sni("WWW.Example.COM")) }, func(*Hello) {}},
		"trailing dot":      {func(w *wire) { *w = w.with(sni("www.example.com.")) }, func(*Hello) {}},
		"address":           {func(w *wire) { *w = w.with(sni("192.0.2.1")) }, func(h *Hello) { h.ServerName = "" }},
		"other name type":   {func(w *wire) { *w = w.with(ext{0, vec16([]byte("\x01\x00\x01a"))}) }, func(h *Hello) { h.ServerName = "" }},
		"other type, host":  {func(w *wire) { *w = w.with(ext{0, vec16([]byte("\x01\x00\x01a\x00\x00\x01b"))}) }, func(h *Hello) { h.ServerName = "b" }},
		"GREASE protocol":   {func(w *wire) { *w = w.with(alpn("\xea\xea", "h3")) }, func(h *Hello) { h.ALPN = []string{"h3"} }},
		"only GREASE alpn":  {func(w *wire) { *w = w.with(alpn("\x0a\x0a")) }, func(h *Hello) { h.ALPN = nil }},
		"nearly GREASE":     {func(w *wire) { *w = w.with(alpn("\x0a\x1a", "\x0b\x0b")) }, func(h *Hello) { h.ALPN = []string{"\x0a\x1a", "\x0b\x0b"} }},
		"unknown protocols": {func(w *wire) { *w = w.with(alpn("acme-tls/1", "xmpp-client")) }, func(h *Hello) { h.ALPN = []string{"acme-tls/1", "xmpp-client"} }},
		"ech":               {func(w *wire) { *w = w.with(ext{0xfe0d, []byte{0, 1, 2}}) }, func(h *Hello) { h.ECH = true }},
		"psk last":          {func(w *wire) { *w = w.with(ext{41, nil}) }, func(*Hello) {}},
		"3000 extensions":   {func(w *wire) { w.exts = append(w.exts, many(3000)...) }, func(*Hello) {}},
		"16 KiB":            {func(w *wire) { *w = w.padded(MaxMessage) }, func(*Hello) {}},
	} {
		t.Run(name, func(t *testing.T) {
			w := good()
			tc.change(&w)
			want := Hello{ServerName: "www.example.com", ALPN: []string{"h2", "http/1.1"}, Version: 0x0304}
			tc.want(&want)
			want.Size = len(w.bytes())
			check(t, append(w.bytes(), "early data"...), want)
		})
	}
}

func check(t *testing.T, stream []byte, want Hello) {
	t.Helper()
	got, err := Parse(stream)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestRecordRules breaks the record layer of a hello in records of 50 bytes.
func TestRecordRules(t *testing.T) {
	const second = 5 + 50 // where the second record starts
	for name, tc := range map[string]struct {
		change func([]byte) []byte
		want   error
		reason string
	}{
		"whole":             {func(b []byte) []byte { return b }, nil, ""},
		"empty first":       {func(b []byte) []byte { return append([]byte{22, 3, 1, 0, 0}, b...) }, ErrMalformed, "zero-length"},
		"empty between":     {func(b []byte) []byte { return insert(b, second, 22, 3, 1, 0, 0) }, ErrMalformed, "zero-length"},
		"alert between":     {func(b []byte) []byte { return insert(b, second, 21, 3, 1, 0, 2, 1, 0) }, ErrMalformed, "another record type"},
		"data between":      {func(b []byte) []byte { b[second] = 23; return b }, ErrMalformed, "another record type"},
		"version between":   {func(b []byte) []byte { b[second+1] = 2; return b }, ErrMalformed, "version"},
		"only its type":     {func(b []byte) []byte { b[second] = 23; return b[:second+1] }, ErrMalformed, "another record type"},
		"record over limit": {func(b []byte) []byte { b[3], b[4] = 0x40, 1; return b }, ErrMalformed, "over 16 KiB"},
		"cut":               {func(b []byte) []byte { return b[:second+2] }, ErrNeedMore, ""},
		"more in the last":  {func(b []byte) []byte { return append(lengthen(b), 0) }, ErrMalformed, "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse(tc.change(good().stream(50)))
			if !errors.Is(err, tc.want) || err != nil && !strings.Contains(err.Error(), tc.reason) {
				t.Errorf("error is %v, want %v with %q", err, tc.want, tc.reason)
			}
		})
	}
}

func insert(b []byte, at int, what ...byte) []byte {
	return append(append(bytes.Clone(b[:at]), what...), b[at:]...)
}

// lengthen adds one to the length of the last record of 50 bytes or less.
func lengthen(b []byte) []byte {
	b[len(b)/55*55+4]++
	return b
}

// TestFragmentedRecords cuts the message into records of every size, and into
// two at every offset.
func TestFragmentedRecords(t *testing.T) {
	w := good()
	want, err := Parse(w.bytes())
	if err != nil {
		t.Fatal(err)
	}
	for size := 1; size <= len(w.message()); size++ {
		stream := w.stream(size)
		want.Size = len(stream)
		check(t, append(stream, 1, 2, 3), want)
	}
	message := w.message()
	want.Size = len(message) + 2*recordHeader
	for cut := 1; cut < len(message); cut++ {
		stream := append([]byte{22, 3, 1}, vec16(message[:cut])...)
		stream = append(append(stream, 22, 3, 3), vec16(message[cut:])...)
		check(t, stream, want)
	}
}

// TestTruncated wants ErrNeedMore, and nothing besides, from every beginning.
func TestTruncated(t *testing.T) {
	for _, stream := range [][]byte{good().bytes(), good().stream(1), good().stream(7), goodV2()} {
		for n := range stream {
			if h, err := Parse(stream[:n]); !errors.Is(err, ErrNeedMore) || !cmp.Equal(h, Hello{}) {
				t.Fatalf("%d of %d bytes: %+v, %v", n, len(stream), h, err)
			}
		}
		if _, err := Parse(stream); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLimits(t *testing.T) {
	// Records of this size bring a message of MaxMessage close to MaxSize.
	fits := good().padded(MaxMessage).stream(11)
	if len(fits) > MaxSize || len(fits) < MaxSize-1000 {
		t.Fatalf("the case does not test the limit: %d bytes", len(fits))
	}
	if _, err := Parse(fits); err != nil {
		t.Error(err)
	}
	for name, stream := range map[string][]byte{
		"records over 24 KiB":  good().padded(MaxMessage).stream(10),
		"message of 16385":     good().padded(MaxMessage + 1).bytes(),
		"known from the start": good().padded(MaxMessage + 1).bytes()[:9],
		"one byte over":        good().padded(7022).stream(2),
		"4097 records":         good().padded(4097).stream(1),
	} {
		if _, err := Parse(stream); !errors.Is(err, ErrTooLong) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, stream := range [][]byte{good().padded(4096).stream(1), good().padded(7021).stream(2)} {
		check(t, stream, Hello{
			ServerName: "www.example.com", ALPN: []string{"h2", "http/1.1"}, Version: 0x0304, Size: MaxSize,
		})
	}
}

// TestBoundedHeap wants no hello to cost more memory than a few times its own.
func TestBoundedHeap(t *testing.T) {
	for name, w := range map[string]wire{
		"many protocols":  good().with(alpn(strings.Split(strings.Repeat("x", 8000), "")...)),
		"long protocols":  good().with(alpn(strings.Split(strings.Repeat(strings.Repeat("x", 200)+",", 64)[:64*201-1], ",")...)),
		"many extensions": {record: 22, version: 0x0301, typ: 1, legacy: 0x0303, suites: u16(1), compression: []byte{0}, exts: many(4000)},
	} {
		stream := w.bytes()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _ = Parse(stream)
		runtime.ReadMemStats(&after)
		if got := after.TotalAlloc - before.TotalAlloc; got > MaxMessage+4096 {
			t.Errorf("%s: %d bytes of heap", name, got)
		}
	}
}

// TestResultSharesNothing overwrites the stream after parsing it.
func TestResultSharesNothing(t *testing.T) {
	stream := good().with(alpn("h2", "private")).bytes()
	h, err := Parse(stream)
	if err != nil {
		t.Fatal(err)
	}
	before := fmt.Sprint(h)
	clear(stream)
	if after := fmt.Sprint(h); after != before {
		t.Errorf("%s became %s", before, after)
	}
}
