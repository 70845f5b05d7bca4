// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	utls "github.com/refraction-networking/utls"
)

// HelloOptions describes ClientHellos.
type HelloOptions struct {
	// Layout is whose hello it looks like: one of [Layouts].
	Layout string
	// Names are the server names.
	Names Names
	// ALPN are the protocols offered. Empty leaves the layout's own.
	ALPN []string
	// RecordBytes splits the handshake message into TLS records of at most that many bytes each. 0: one record.
	RecordBytes int
	// SegmentBytes splits the stream into writes (sockets) or segments (packets) of at most that many bytes each. 0: one
	// write, or segments as large as the MSS.
	SegmentBytes int
}

// maker returns one hello as it goes over the wire. An empty name leaves the extension out.
type maker func(name string, alpn []string) ([]byte, error)

var makers = map[string]maker{
	"go":         goHello(nil),
	"go-classic": goHello([]tls.CurveID{tls.X25519}),
	"chrome":     browserHello(utls.HelloChrome_133),
	"firefox":    browserHello(utls.HelloFirefox_120),
	"safari":     browserHello(utls.HelloSafari_16_0),
	"android":    browserHello(utls.HelloAndroid_11_OkHttp),
}

// Layouts are the names of the layouts: "go" is crypto/tls as it comes (with the post-quantum share, two segments),
// "go-classic" the same without (one segment), the others what that client sends ("chrome" with the post-quantum share).
func Layouts() []string { return slices.Sorted(maps.Keys(makers)) }

// Hellos makes hellos. It is for many goroutines at once.
type Hellos struct {
	opts HelloOptions
	make maker

	mu   sync.Mutex
	made map[int][]byte // by index of the name
}

// NewHellos checks the options and makes one hello of the kind.
func NewHellos(opts HelloOptions) (*Hellos, error) {
	m, ok := makers[opts.Layout]
	if !ok {
		return nil, fmt.Errorf("no layout %q: one of %s", opts.Layout, strings.Join(Layouts(), ", "))
	}
	if err := opts.Names.check(); err != nil {
		return nil, err
	}
	if opts.RecordBytes < 0 || opts.RecordBytes > maxRecord || opts.SegmentBytes < 0 {
		return nil, fmt.Errorf("records of %d bytes, segments of %d: records up to %d, both not below 0",
			opts.RecordBytes, opts.SegmentBytes, maxRecord)
	}
	h := &Hellos{opts: opts, make: m, made: map[int][]byte{}}
	first := 0
	if len(opts.Names.List) == 0 {
		first = nameless
	}
	_, err := h.of(first)
	return h, err
}

// maxRecord is the most a record may hold (RFC 8446, section 5.1).
const maxRecord = 1 << 14

// of returns the hello for one name: always the same bytes, which nobody may change.
func (h *Hellos) of(index int) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if b, ok := h.made[index]; ok {
		return b, nil
	}
	name := ""
	if index != nameless {
		name = h.opts.Names.List[index]
	}
	b, err := h.make(name, h.opts.ALPN)
	if err == nil {
		b, err = splitRecords(b, h.opts.RecordBytes)
	}
	if err != nil {
		return nil, fmt.Errorf("make a %s hello for %q: %w", h.opts.Layout, name, err)
	}
	h.made[index] = b
	return b, nil
}

// source draws hellos. It belongs to one goroutine.
type source struct {
	hellos *Hellos
	picker *picker
	cache  map[int][]byte // spares the lock
}

func (h *Hellos) source(seed uint64) *source {
	return &source{hellos: h, picker: newPicker(h.opts.Names, seed), cache: map[int][]byte{}}
}

// next returns a hello that nobody may change. Hellos of one name are equal, their randoms too: no balancer cares, and
// making one costs more than sending it.
func (s *source) next() ([]byte, error) {
	i := s.picker.next()
	if b, ok := s.cache[i]; ok {
		return b, nil
	}
	b, err := s.hellos.of(i)
	if err == nil {
		s.cache[i] = b
	}
	return b, err
}

// splitRecords spreads the message of a one-record flight over records of at most size bytes.
func splitRecords(flight []byte, size int) ([]byte, error) {
	const header = 5
	if len(flight) < header || int(binary.BigEndian.Uint16(flight[3:])) != len(flight)-header {
		return nil, errors.New("not one TLS record")
	}
	if size == 0 {
		return flight, nil
	}
	var out []byte
	for part := range slices.Chunk(flight[header:], size) {
		out = append(out, flight[:3]...)
		out = binary.BigEndian.AppendUint16(out, uint16(len(part)))
		out = append(out, part...)
	}
	return out, nil
}

// goHello takes what crypto/tls writes first.
func goHello(curves []tls.CurveID) maker {
	return func(name string, alpn []string) ([]byte, error) {
		var sink firstWrite
		config := &tls.Config{ServerName: name, InsecureSkipVerify: name == "", NextProtos: alpn, CurvePreferences: curves}
		if err := tls.Client(&sink, config).Handshake(); len(sink.data) == 0 {
			return nil, err
		}
		return sink.data, nil
	}
}

// firstWrite is a connection that keeps what is written to it and ends at the first read.
type firstWrite struct {
	net.Conn
	data []byte
}

func (f *firstWrite) Write(b []byte) (int, error) {
	f.data = append(f.data, b...)
	return len(b), nil
}

func (f *firstWrite) Read([]byte) (int, error)         { return 0, io.EOF }
func (f *firstWrite) Close() error                     { return nil }
func (f *firstWrite) SetDeadline(time.Time) error      { return nil }
func (f *firstWrite) SetReadDeadline(time.Time) error  { return nil }
func (f *firstWrite) SetWriteDeadline(time.Time) error { return nil }

// browserHello builds the layout that uTLS keeps for a client.
func browserHello(id utls.ClientHelloID) maker {
	return func(name string, alpn []string) ([]byte, error) {
		spec, err := utls.UTLSIdToSpec(id)
		if err != nil {
			return nil, err
		}
		spec.Extensions = slices.DeleteFunc(spec.Extensions, func(e utls.TLSExtension) bool {
			_, isName := e.(*utls.SNIExtension)
			return isName && name == ""
		})
		for _, e := range spec.Extensions {
			if a, ok := e.(*utls.ALPNExtension); ok && len(alpn) > 0 {
				a.AlpnProtocols = alpn
			}
		}
		config := &utls.Config{ServerName: name, InsecureSkipVerify: name == ""}
		u := utls.UClient(&firstWrite{}, config, utls.HelloCustom)
		if err := u.ApplyPreset(&spec); err != nil {
			return nil, err
		}
		if err := u.BuildHandshakeState(); err != nil {
			return nil, err
		}
		raw := u.HandshakeState.Hello.Raw
		record := []byte{22, 3, 1, byte(len(raw) >> 8), byte(len(raw))}
		return bytes.Join([][]byte{record, raw}, nil), nil
	}
}
