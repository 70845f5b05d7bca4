// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// shape says which part of a hello a fuzzer's bytes stand for. Lengths around
// that part are right, so that mutations reach the inner grammar too.
type shape uint8

const (
	shapeStream shape = iota
	shapeMessageBody
	shapeExtensions
	shapeServerName
	shapeHost
	shapeALPN
	shapes
)

func (s shape) stream(data []byte, record int) []byte {
	w := good()
	switch s % shapes {
	case shapeStream:
		return data
	case shapeMessageBody:
		data = data[:min(len(data), 1<<15)]
		n := len(data)
		message := append([]byte{1, byte(n >> 16), byte(n >> 8), byte(n)}, data...)
		return refragment(append([]byte{22, 3, 1}, vec16(message)...), record)
	case shapeExtensions:
		w.noExts, w.tail = true, vec16(data[:min(len(data), 1<<15)])
	case shapeServerName:
		w = w.with(ext{0, data[:min(len(data), 1<<15)]})
	case shapeHost:
		w = w.with(sni(string(data[:min(len(data), 1<<10)])))
	case shapeALPN:
		w = w.with(ext{16, data[:min(len(data), 1<<15)]})
	}
	return w.stream(record)
}

func seed(f *testing.F) {
	for name := range clients {
		stream := capture(f, clients[name].config)
		f.Add(uint8(shapeStream), uint16(0), stream)
		f.Add(uint8(shapeStream), uint16(0), refragment(stream, 300))
		f.Add(uint8(shapeMessageBody), uint16(100), stream[9:])
	}
	f.Add(uint8(shapeStream), uint16(0), goodV2())
	f.Add(uint8(shapeStream), uint16(0), []byte("GET / HTTP/1.1\r\n\r\n"))
	for name := range rejects {
		w := good()
		rejects[name].change(&w)
		if m := w.message(); len(m) < 4096 {
			f.Add(uint8(shapeStream), uint16(0), w.bytes())
			f.Add(uint8(shapeMessageBody), uint16(500), m[4:])
		}
	}
	var all []byte
	for _, e := range good().exts {
		all = append(append(all, u16(int(e.typ))...), vec16(e.data)...)
	}
	f.Add(uint8(shapeExtensions), uint16(1), all)
	f.Add(uint8(shapeServerName), uint16(30), sni("a.example").data)
	f.Add(uint8(shapeALPN), uint16(9), alpn("h2", "\x0a\x0a", "x").data)
	for _, host := range []string{"A.b", "a.", "[::1]", "1.2.3.4", "fe80::1%x", "a..b", "a_b-c"} {
		f.Add(uint8(shapeHost), uint16(1000), []byte(host))
	}
}

// FuzzParse wants an answer that is final, about the bytes it names, and
// well-formed.
func FuzzParse(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, s uint8, record uint16, data []byte) {
		stream := shape(s).stream(data, 1+int(record))
		before := bytes.Clone(stream)
		h, err := Parse(stream)
		if !bytes.Equal(before, stream) {
			t.Fatal("the stream was written to")
		}
		checkKind(t, stream, h, err)
		if err != nil {
			checkFinal(t, stream, err)
			return
		}
		if h.Size <= 0 || h.Size > min(len(stream), MaxSize) || len(h.ALPN) > MaxALPN {
			t.Fatalf("out of bounds: %+v", h)
		}
		checkName(t, h.ServerName)
		if again, err := Parse(stream[:h.Size]); err != nil || !cmp.Equal(h, again) {
			t.Fatalf("alone it gives %+v, %v, first %+v", again, err, h)
		}
		for n := 0; n < h.Size; n += 1 + h.Size/200 {
			if _, err := Parse(stream[:n]); !errors.Is(err, ErrNeedMore) {
				t.Fatalf("%d of %d bytes: %v", n, h.Size, err)
			}
		}
	})
}

func checkKind(t *testing.T, stream []byte, h Hello, err error) {
	if err != nil && !cmp.Equal(h, Hello{}) {
		t.Fatalf("a result with %v: %+v", err, h)
	}
	if like := LooksLike(stream); errors.Is(like, ErrNotTLS) != errors.Is(err, ErrNotTLS) {
		t.Fatalf("LooksLike says %v, Parse %v", like, err)
	}
	if Plaintext(stream) && !errors.Is(err, ErrNotTLS) {
		t.Fatalf("plaintext, but Parse says %v", err)
	}
	known := []error{nil, ErrNeedMore, ErrNotTLS, ErrMalformed, ErrTooLong}
	if !slices.ContainsFunc(known, func(k error) bool { return errors.Is(err, k) }) {
		t.Fatalf("an unknown error: %v", err)
	}
}

// checkFinal wants each beginning of a bad stream to have the same verdict or
// none yet, and MaxSize bytes to be enough for one.
func checkFinal(t *testing.T, stream []byte, err error) {
	if errors.Is(err, ErrNeedMore) {
		if len(stream) >= MaxSize {
			t.Fatal("MaxSize bytes are not enough")
		}
		return
	}
	step := 1 + len(stream)/200
	for n := 0; n < len(stream); n += step {
		_, early := Parse(stream[:n])
		if !errors.Is(early, ErrNeedMore) && early.Error() != err.Error() {
			t.Fatalf("%d bytes: %v, %d bytes: %v", n, early, len(stream), err)
		}
	}
}

func checkName(t *testing.T, name string) {
	if name == "" {
		return
	}
	if len(name) > 255 || name != strings.ToLower(name) || strings.Contains("."+name+".", "..") {
		t.Fatalf("bad name %q", name)
	}
	if strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" {
		t.Fatalf("bad name %q", name)
	}
	if _, err := netip.ParseAddr(name); err == nil {
		t.Fatalf("an address as name: %q", name)
	}
}

// FuzzAgainstCryptoTLS wants the same name and protocols wherever crypto/tls
// and Parse both take a hello.
func FuzzAgainstCryptoTLS(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, s uint8, record uint16, data []byte) {
		stream := shape(s).stream(data, 1+int(record))
		h, err := Parse(stream)
		if err != nil {
			return
		}
		info := serverSees(stream)
		if info == nil {
			return // it is stricter: trailing dots, SSLv2, other extensions
		}
		if want := asRouted(info.ServerName); h.ServerName != want {
			t.Errorf("name is %q, crypto/tls has %q", h.ServerName, info.ServerName)
		}
		var protocols []string
		for _, p := range info.SupportedProtos {
			if len(p) != 2 || p[0] != p[1] || p[0]%16 != 10 {
				protocols = append(protocols, p)
			}
		}
		if diff := cmp.Diff(protocols, h.ALPN); diff != "" {
			t.Error(diff)
		}
	})
}

var errSeen = errors.New("seen")

// serverSees returns what a crypto/tls server makes of stream, nil if it
// refuses it.
func serverSees(stream []byte) (seen *tls.ClientHelloInfo) {
	conn := &memoryConn{}
	conn.in.Reset(stream)
	server := tls.Server(conn, &tls.Config{
		GetConfigForClient: func(info *tls.ClientHelloInfo) (*tls.Config, error) {
			seen = info
			return nil, errSeen
		},
	})
	if err := server.Handshake(); !errors.Is(err, errSeen) {
		return nil
	}
	return seen
}

// asRouted is a second opinion on canonical, for names that it takes.
func asRouted(name string) string {
	bare := name
	if strings.HasPrefix(bare, "[") && strings.HasSuffix(bare, "]") {
		bare = bare[1 : len(bare)-1]
	}
	if _, err := netip.ParseAddr(bare); err == nil {
		return ""
	}
	return strings.ToLower(name)
}

// FuzzAssembler compares with a model that has a byte and a flag per position.
// Each step of the script is four bytes: position, two of length, filler.
func FuzzAssembler(f *testing.F) {
	f.Add(uint32(0), []byte{10, 0, 5, 1, 5, 0, 20, 2})
	f.Add(uint32(1<<32-5), []byte{200, 0, 5, 1, 100, 0, 100, 2, 1, 1, 200, 3})
	f.Add(uint32(1<<31), []byte{255, 90, 5, 1, 0, 90, 100, 2, 128, 1, 200, 3})
	f.Add(uint32(7), bytes.Repeat([]byte{9, 0, 1, 1, 7, 0, 1, 1, 5, 0, 1, 1, 3, 0, 1, 1}, 3))
	f.Add(uint32(7), []byte{1, 0, 1, 4, 3, 0, 1, 4, 5, 0, 1, 4, 7, 0, 1, 4, 9, 0, 1, 4, 11, 0, 1, 4, 13, 0, 1, 4, 15, 0, 1, 4, 17, 0, 1, 4, 0, 0, 1, 4})
	f.Fuzz(func(t *testing.T, base uint32, script []byte) {
		var a Assembler
		m := model{}
		for step := 0; len(script) >= 4 && step < 64; script, step = script[4:], step+1 {
			pos := int(script[0]) * (1 + int(script[3]&3)*61) // fine and coarse
			length := (int(script[1])<<8 | int(script[2])) % (MaxSize + MaxSize/4)
			payload := bytes.Repeat(script[3:4], length)
			want, wantErr := m.add(pos, payload)
			got, err := a.Add(base+uint32(pos), payload)
			if got != want || !errors.Is(err, wantErr) {
				t.Fatalf("added %d, %v, want %d, %v", got, err, want, wantErr)
			}
			m.compare(t, &a, base)
		}
	})
}

// reach is beyond every position that FuzzAssembler can make.
const reach = 255*(1+3*61) + 2*MaxSize

type model struct {
	have  [reach]bool
	bytes [reach]byte
	start int
	any   bool
}

// add keeps the first byte of each position, then applies the limits.
func (m *model) add(pos int, payload []byte) (int, error) {
	if len(payload) == 0 {
		return 0, nil
	}
	if !m.any {
		m.start, m.any = pos, true
	}
	if d := pos - m.start; d >= MaxSize || d < -MaxSize {
		return 0, ErrTooLong
	}
	start := min(pos, m.start)
	added := 0
	for i, b := range payload {
		if p := pos + i; !m.have[p] && p < start+MaxSize {
			m.have[p], m.bytes[p] = true, b
			added++
		}
	}
	if runs := m.runs(); len(runs) > maxFragments {
		highest := runs[len(runs)-1]
		clear(m.have[highest:])
		if highest == pos {
			return 0, ErrScattered
		}
	}
	m.start = start
	clear(m.have[start+MaxSize:])
	return added, nil
}

// runs returns the first position of each contiguous run, in order.
func (m *model) runs() []int {
	var starts []int
	before := false
	for p, have := range &m.have {
		if have && !before {
			starts = append(starts, p)
		}
		before = have
	}
	return starts
}

func (m *model) compare(t *testing.T, a *Assembler, base uint32) {
	end := m.start
	for m.have[end] {
		end++
	}
	if want := m.bytes[m.start:end]; !bytes.Equal(a.Bytes(), want) {
		t.Fatalf("%d bytes, want %d, or others", len(a.Bytes()), len(want))
	}
	if m.any && a.Start() != base+uint32(m.start) {
		t.Fatalf("starts at %d, want %d", a.Start()-base, m.start)
	}
	if held := a.Held(); held > 2*MaxSize+2048 {
		t.Fatalf("%d bytes held", held)
	}
	if a.n != len(m.runs()) {
		t.Fatalf("%d fragments, want %d", a.n, len(m.runs()))
	}
}
