// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"snilb/userspace/config"
	"snilb/userspace/hello"
	"snilb/userspace/packet"
	"snilb/userspace/pool"
)

const proxyLine = "PROXY TCP4 203.0.113.7 203.0.113.1 1234 443\r\n"

// proxyHandshake is a handshake whose client has sent these bytes, from a number
// that wraps soon, and whose backend has answered the SYN.
func proxyHandshake(t *testing.T, sent string) (*handshake, *worker, *frames) {
	t.Helper()
	out := &frames{}
	w := newWorker(&Engine{owned: noted{}}, 0, out)
	w.e.plan.Store(&Plan{config: &config.Config{Limits: config.DefaultLimits}})
	c := connection{client: netip.MustParseAddrPort("192.0.2.2:40000"), listener: netip.MustParseAddrPort("192.0.2.1:443")}
	h := &handshake{connection: c, origin: c, plan: w.e.plan.Load(), cookie: 0x70000000, proxied: true}
	if _, err := h.hello.Add(0xfffffff0, []byte(sent)); err != nil {
		t.Fatal(err)
	}
	if err := h.readHeader(); err != nil {
		t.Fatal(err)
	}
	a := &h.attempt
	a.isn, a.ack = 0xffffff00, 0xffffff01
	a.peer = packet.Segment{Seq: 0x12345678, Options: packet.Options{MSS: 140}}
	a.hop.MTU = 1500
	a.local = local{netip.MustParseAddrPort("198.51.100.1:10000"), &ports{}}
	a.backend = &pool.Backend{Addr: netip.MustParseAddrPort("198.51.100.11:443")}
	return h, w, out
}

// payloads puts the payloads of frames together by their numbers, from seq on.
func payloads(t *testing.T, out frames, seq uint32) []byte {
	t.Helper()
	var all []byte
	for i, frame := range out {
		s, err := packet.Parse(frame[14:])
		if err != nil {
			t.Fatal(err)
		}
		if s.Seq != seq+uint32(len(all)) {
			t.Fatalf("frame %d is at %d, want %d", i, s.Seq, seq+uint32(len(all)))
		}
		if len(s.Payload) > 140 {
			t.Errorf("frame %d has %d bytes for an MSS of 140", i, len(s.Payload))
		}
		all = append(all, s.Payload...)
	}
	return all
}

// However the two headers stand against each other: the backend gets its own and
// then the stream, each byte at one number, whether pushed, replayed or rewritten.
func TestProxyNumbers(t *testing.T) {
	stream := slices.Repeat([]byte("hello"), 100)
	for name, c := range map[string]struct {
		in, out string
		acked   int // to the client
		ack     int // by the backend, counted from its first byte
		push    bool
	}{
		"none":                        {"", "", 0, 0, false},
		"in":                          {proxyLine, "", 0, 0, false},
		"in, half the header ACKed":   {proxyLine, "", 20, 0, false},
		"in, the header ACKed":        {proxyLine, "", len(proxyLine), 0, false},
		"in, one byte more":           {proxyLine, "", len(proxyLine) + 1, 0, true},
		"in, that byte delivered":     {proxyLine, "", len(proxyLine) + 1, 1, false},
		"out":                         {"", "PROXY out", 0, 0, true},
		"out, half of it":             {"", "PROXY out", 0, 5, true},
		"out, the header delivered":   {"", "PROXY out", 0, 9, false},
		"out, part of the hello":      {"", "PROXY out", 0, 100, false},
		"out, all":                    {"", "PROXY out", 0, 509, false},
		"out, bytes ACKed":            {"", "PROXY out", 50, 58, true},
		"out, bytes ACKed and there":  {"", "PROXY out", 50, 59, false},
		"both":                        {proxyLine, "PROXY out", 0, 9, false},
		"both, bytes ACKed":           {proxyLine, "PROXY out", len(proxyLine) + 300, 308, true},
		"both, bytes ACKed and there": {proxyLine, "PROXY out", len(proxyLine) + 300, 309, false},
	} {
		h, w, out := proxyHandshake(t, proxyLine+string(stream))
		if c.in == "" {
			h, w, out = proxyHandshakeOf(t, stream)
		}
		a := &h.attempt
		a.prefix, h.acked = []byte(c.out), c.acked
		a.ack += uint32(c.ack)
		if got := h.mustPush(); got != c.push {
			t.Errorf("%s: must push: %v, want %v", name, got, c.push)
		}
		h.push(w)
		want := append([]byte(c.out), stream...)
		if got := payloads(t, *out, a.ack); !bytes.Equal(got, want[c.ack:]) {
			t.Errorf("%s: pushed %q", name, got)
		}
		up, down := h.entries(w, Hop{})
		if got := h.hello.Start() + uint32(len(c.in)) + up.Flow.Seq; got != a.isn+1+uint32(len(c.out)) {
			t.Errorf("%s: the client's first byte comes to %d", name, got-a.isn)
		}
		if up.Flow.Seq != -down.Flow.Ack || up.Flow.Ack != -down.Flow.Seq || down.Flow.LastAck != a.ack {
			t.Errorf("%s: the entries disagree: %+v, %+v", name, up.Flow, down.Flow)
		}
		delivered := max(c.ack-len(c.out), 0)
		if up.Flow.Bytes != uint64(delivered) {
			t.Errorf("%s: %d bytes counted, want %d", name, up.Flow.Bytes, delivered)
		}
		*out = nil
		h.replayHello(w, 140)
		if got := payloads(t, *out, h.start()+uint32(delivered)); !bytes.Equal(got, stream[delivered:]) {
			t.Errorf("%s: replayed %q", name, got)
		}
	}
}

// proxyHandshakeOf is proxyHandshake for a client that need not send a header.
func proxyHandshakeOf(t *testing.T, stream []byte) (*handshake, *worker, *frames) {
	t.Helper()
	h, w, out := proxyHandshake(t, "PROXY UNKNOWN\r\n")
	h.proxied, h.skip = false, 0
	h.hello.Reset()
	if _, err := h.hello.Add(0xfffffff0, stream); err != nil {
		t.Fatal(err)
	}
	return h, w, out
}

// What a client is said to be decides; the tuple stays.
func TestProxyOrigin(t *testing.T) {
	h, _, _ := proxyHandshake(t, proxyLine+"rest")
	want := connection{client: netip.MustParseAddrPort("203.0.113.7:1234"), listener: netip.MustParseAddrPort("203.0.113.1:443")}
	if h.origin != want || h.client.String() != "192.0.2.2:40000" || string(h.stream()) != "rest" {
		t.Errorf("origin %v of %v, stream %q", h.origin, h.connection, h.stream())
	}
	h, _, _ = proxyHandshake(t, "PROXY UNKNOWN\r\n")
	if h.origin != h.connection {
		t.Errorf("UNKNOWN: origin %v of %v", h.origin, h.connection)
	}
	for sent, want := range map[string]error{
		"PROXY TCP4 ": hello.ErrNeedMore, "GET /": hello.ErrNotTLS, "\x16\x03\x01": hello.ErrNotTLS, "PROXY TCP5 \r\n": hello.ErrMalformed,
	} {
		h, _, _ := proxyHandshakeOf(t, []byte(sent))
		h.proxied = true
		if err := h.readHeader(); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", sent, err, want)
		}
	}
}

func TestProxyHeader(t *testing.T) {
	h, _, _ := proxyHandshake(t, proxyLine)
	h.sni, h.alpn = "a.example.com", "h2"
	pool := &pool.Pool{Config: &config.Pool{}}
	h.decision.pool = pool
	for version, want := range map[config.ProxyProtocol]string{
		config.NoProxy: "",
		config.ProxyV1: proxyLine,
		config.ProxyV2: "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x21\xcb\x00\x71\x07\xcb\x00\x71\x01\x04\xd2\x01\xbb" +
			"\x01\x00\x02h2\x02\x00\x0da.example.com",
	} {
		pool.Config.ProxyProtocol = version
		if got, err := h.header(); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", version, got, err)
		}
	}
}

// Once the name is read nothing may come before it: the backend would read another.
func TestSettledStart(t *testing.T) {
	h, w, _ := proxyHandshakeOf(t, []byte("hello"))
	h.phase = connecting
	for _, s := range []packet.Segment{
		{Seq: 0xfffffff0 - 3, Payload: []byte("xxx")},
		{Seq: 0xfffffff0 - 9, Payload: []byte("xxx")},
		{Seq: 0xfffffff0 - 1, Payload: []byte("xhello!")},
	} {
		h.add(w, &s)
	}
	if got := string(h.hello.Bytes()); got != "hello!" || h.hello.Start() != 0xfffffff0 {
		t.Errorf("%q from %d", got, h.hello.Start())
	}
	for name, tt := range map[string]struct {
		h    handshake
		want bool
	}{
		"new": {handshake{}, false}, "decided": {handshake{phase: connecting}, true},
		"ACKed": {handshake{acked: 1}, true}, "header": {handshake{skip: 1}, true},
	} {
		if got := tt.h.settled(); got != tt.want {
			t.Errorf("%s: settled %v", name, got)
		}
	}
}

// What the backend says before the bind reaches the client with an ACK that is the
// client's to understand, and what acknowledges the future is nothing.
func TestPushedKeeps(t *testing.T) {
	h, w, _ := proxyHandshakeOf(t, []byte("hello"))
	a := &h.attempt
	a.prefix, h.phase = []byte("PROXY out"), pushing
	first := a.isn + 1
	for _, s := range []packet.Segment{
		{Flags: packet.ACK, Ack: first},                                    // again the handshake's
		{Flags: packet.ACK, Ack: first + 4, Payload: []byte("early")},      // kept
		{Flags: packet.ACK | packet.FIN, Ack: first + 4},                   // kept
		{Flags: packet.ACK, Ack: first + 2},                                // older
		{Flags: packet.ACK, Ack: first + 15},                               // never sent
		{Flags: packet.ACK, Ack: first + 4, Payload: []byte{}, Missing: 9}, // not whole
	} {
		h.pushed(w, &s)
	}
	if len(a.pending) != 2 || string(a.pending[0].Payload) != "early" || a.ack != first+4 {
		t.Errorf("%d segments kept, ACK %d", len(a.pending), a.ack-first)
	}
	for range 2 * maxPending {
		h.pushed(w, &packet.Segment{Flags: packet.ACK, Ack: first + 4, Payload: []byte("more")})
	}
	if len(a.pending) != maxPending {
		t.Errorf("%d segments kept, want %d", len(a.pending), maxPending)
	}
}
