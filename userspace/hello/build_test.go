// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"testing"
	"time"
)

// wire is a ClientHello before its lengths are computed: tests change one part
// of a good one. Parts that carry their own inner lengths are plain bytes.
type wire struct {
	record      byte
	version     uint16 // of the records
	typ         byte
	legacy      uint16
	session     []byte
	suites      []byte
	compression []byte
	exts        []ext
	noExts      bool // leave out the block, not just its content
	tail        []byte
	lengthOff   int // added to the message length
}

type ext struct {
	typ  uint16
	data []byte
}

func good() wire {
	return wire{
		record: 22, version: 0x0301, typ: 1, legacy: 0x0303,
		session:     bytes.Repeat([]byte{7}, 32),
		suites:      []byte{0x1a, 0x1a, 0x13, 0x01, 0xc0, 0x2f},
		compression: []byte{0},
		exts: []ext{
			{0x2a2a, nil},
			sni("www.example.com"),
			{10, u16(4, 0x3a3a, 29)},
			alpn("h2", "http/1.1"),
			{43, []byte{6, 0x4a, 0x4a, 3, 4, 3, 3}},
			{0x5a5a, []byte{0}},
		},
	}
}

// with returns the good hello's extensions with e in place of its own kind, or
// at the end.
func (w wire) with(e ext) wire {
	w.exts = slices.Clone(w.exts)
	for i := range w.exts {
		if w.exts[i].typ == e.typ {
			w.exts[i] = e
			return w
		}
	}
	w.exts = append(w.exts, e)
	return w
}

func (w wire) message() []byte {
	b := binary.BigEndian.AppendUint16(nil, w.legacy)
	b = append(b, bytes.Repeat([]byte{0x55}, 32)...)
	b = append(append(b, byte(len(w.session))), w.session...)
	b = append(b, vec16(w.suites)...)
	b = append(append(b, byte(len(w.compression))), w.compression...)
	if !w.noExts {
		var all []byte
		for _, e := range w.exts {
			all = append(append(all, u16(int(e.typ))...), vec16(e.data)...)
		}
		b = append(b, vec16(all)...)
	}
	b = append(b, w.tail...)
	n := len(b) + w.lengthOff
	return append([]byte{w.typ, byte(n >> 16), byte(n >> 8), byte(n)}, b...)
}

// stream puts the message into records of at most size bytes.
func (w wire) stream(size int) []byte {
	var out []byte
	for chunk := range slices.Chunk(w.message(), size) {
		out = append(out, w.record, byte(w.version>>8), byte(w.version))
		out = append(out, vec16(chunk)...)
	}
	return out
}

func (w wire) bytes() []byte { return w.stream(maxRecord) }

// padded makes the message exactly n bytes long, by the padding extension.
func (w wire) padded(n int) wire {
	short := n - len(w.with(ext{21, nil}).message())
	return w.with(ext{21, make([]byte, short)})
}

func u16(values ...int) []byte {
	var b []byte
	for _, v := range values {
		b = binary.BigEndian.AppendUint16(b, uint16(v))
	}
	return b
}

func vec16(b []byte) []byte { return append(u16(len(b)), b...) }

func sni(host string) ext { return ext{0, vec16(append([]byte{0}, vec16([]byte(host))...))} }

func alpn(protocols ...string) ext {
	var b []byte
	for _, p := range protocols {
		b = append(append(b, byte(len(p))), p...)
	}
	return ext{16, vec16(b)}
}

// refragment cuts the records of stream into records of at most size bytes.
func refragment(stream []byte, size int) []byte {
	var message []byte
	for len(stream) > 0 {
		n := 5 + int(binary.BigEndian.Uint16(stream[3:]))
		message, stream = append(message, stream[5:n]...), stream[n:]
	}
	var out []byte
	for chunk := range slices.Chunk(message, size) {
		out = append(append(out, 22, 3, 1), vec16(chunk)...)
	}
	return out
}

// capture returns what a crypto/tls client sends first.
func capture(tb testing.TB, config *tls.Config) []byte {
	tb.Helper()
	conn := &memoryConn{}
	if err := tls.Client(conn, config).Handshake(); err == nil {
		tb.Fatal("the client finished without a server")
	}
	if len(conn.written) == 0 {
		tb.Fatal("the client sent nothing")
	}
	return conn.written
}

// memoryConn reads from memory, then EOF, and records what is written.
type memoryConn struct {
	in      bytes.Reader
	written []byte
}

func (c *memoryConn) Read(b []byte) (int, error) {
	n, err := c.in.Read(b)
	if err != nil {
		return n, io.EOF
	}
	return n, nil
}

func (c *memoryConn) Write(b []byte) (int, error) {
	c.written = append(c.written, b...)
	return len(b), nil
}

func (c *memoryConn) Close() error                     { return nil }
func (c *memoryConn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (c *memoryConn) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (c *memoryConn) SetDeadline(time.Time) error      { return nil }
func (c *memoryConn) SetReadDeadline(time.Time) error  { return nil }
func (c *memoryConn) SetWriteDeadline(time.Time) error { return nil }
