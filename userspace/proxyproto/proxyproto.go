// SPDX-License-Identifier: Apache-2.0

// Package proxyproto reads and writes the header of the PROXY protocol, by which
// a proxy tells a server whom it speaks for: the version in text (1) and the
// binary one (2).
//
// It works on bytes that are there: it does no I/O, never waits, and holds no more
// than one header of [MaxSize] bytes.
package proxyproto

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"

	lib "github.com/pires/go-proxyproto"
)

// MaxSize bounds a header. The format allows 16+65535 bytes; what is sent are
// addresses, names and at most a client's certificate.
const MaxSize = 16 + 4096

// Verdicts on a stream. Any but ErrNeedMore is final: more bytes do not change it.
var (
	// ErrNeedMore means that the bytes so far are a proper beginning.
	ErrNeedMore = errors.New("incomplete PROXY header")
	// ErrNone means that the stream begins with something else.
	ErrNone = errors.New("no PROXY header")
	// ErrMalformed means that a header begins well and goes wrong.
	ErrMalformed = errors.New("malformed PROXY header")
)

// Header is what a header says. With zero addresses it speaks of no connection but
// its own (LOCAL, or UNKNOWN in version 1), as for the health checks of a proxy.
type Header struct {
	// Source is the client, Destination what it connected to. IPv4 written as
	// IPv6 is read as IPv4, so one may differ from the other in its family.
	Source, Destination netip.AddrPort
	// Authority is the name the client asked for, ALPN the protocol agreed on.
	// Version 2 has room for them, if they are not empty. Parse leaves them out.
	Authority, ALPN string
}

const (
	limit1     = 107 // of a version 1 header, by its specification
	prefix2    = 16  // of a version 2 header: all up to its length
	opening1   = "PROXY "
	opening2   = "\r\n\r\n\x00\r\nQUIT\n"
	local2     = 0x20
	proxy2     = 0x21
	unspec2    = 0x00
	typeCRC32C = 3
)

// Parse reads the header at the start of stream and returns its length.
func Parse(stream []byte) (Header, int, error) {
	switch {
	case begins(stream, opening1):
		return parse1(stream)
	case begins(stream, opening2):
		return parse2(stream)
	}
	return Header{}, 0, ErrNone
}

// begins reports whether stream can begin with opening, as far as it goes.
func begins(stream []byte, opening string) bool {
	n := min(len(stream), len(opening))
	return string(stream[:n]) == opening[:n]
}

func parse1(stream []byte) (Header, int, error) {
	end := bytes.IndexByte(stream[:min(len(stream), limit1)], '\n') + 1
	switch {
	case end == 0 && len(stream) < limit1:
		return Header{}, 0, ErrNeedMore
	case end == 0:
		return Header{}, 0, ErrMalformed
	}
	return read(stream[:end])
}

func parse2(stream []byte) (Header, int, error) {
	if len(stream) < prefix2 {
		return Header{}, 0, ErrNeedMore
	}
	command, family := stream[12], stream[13]
	size := prefix2 + int(binary.BigEndian.Uint16(stream[14:]))
	switch {
	case command != local2 && command != proxy2, size > MaxSize:
		return Header{}, 0, ErrMalformed
	case len(stream) < size:
		return Header{}, 0, ErrNeedMore
	case command == local2, family == unspec2:
		// What follows is to be skipped, whatever it is. The library refuses
		// an unspecified family; real proxies send it for clients that came
		// by a Unix socket.
		return Header{}, size, nil
	}
	h, n, err := read(stream[:size])
	if err == nil && !additionsOK(stream[:size], prefix2+addressSize(family)) {
		return Header{}, 0, ErrMalformed
	}
	return h, n, err
}

// read leaves one whole header to the library.
func read(whole []byte) (Header, int, error) {
	h, err := lib.Read(bufio.NewReaderSize(bytes.NewReader(whole), limit1+1))
	if err != nil {
		return Header{}, 0, ErrMalformed
	}
	source, destination, ok := h.TCPAddrs()
	if !ok {
		// Not TCP over IP: the connection's own addresses are the best there are.
		return Header{}, len(whole), nil
	}
	return Header{Source: addrPort(source), Destination: addrPort(destination)}, len(whole), nil
}

func addrPort(a *net.TCPAddr) netip.AddrPort {
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// addressSize is how many bytes the addresses of a family take up.
func addressSize(family byte) int {
	switch family >> 4 {
	case 1:
		return 12
	case 2:
		return 36
	}
	return 216
}

// additionsOK looks at the type-length-value records that begin at offset at: they
// must fill the header, and its checksum, if there is one, must be right.
func additionsOK(header []byte, at int) bool {
	for at < len(header) {
		if len(header)-at < 3 {
			return false
		}
		kind, value := header[at], at+3
		size := int(binary.BigEndian.Uint16(header[at+1:]))
		if at = value + size; at > len(header) {
			return false
		}
		if kind == typeCRC32C && (size != 4 || !checksumOK(header, value)) {
			return false
		}
	}
	return true
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksumOK compares the CRC32C at offset at with that of the header, in which
// its own place counts as zeros.
func checksumOK(header []byte, at int) bool {
	sum := crc32.Update(0, castagnoli, header[:at])
	sum = crc32.Update(sum, castagnoli, make([]byte, 4))
	sum = crc32.Update(sum, castagnoli, header[at+4:])
	return sum == binary.BigEndian.Uint32(header[at:])
}

// Append writes h behind b in version 1 or 2.
func (h *Header) Append(b []byte, version byte) ([]byte, error) {
	out := lib.HeaderProxyFromAddrs(version, net.TCPAddrFromAddrPort(h.Source), net.TCPAddrFromAddrPort(h.Destination))
	var additions []lib.TLV
	if h.ALPN != "" {
		additions = append(additions, lib.TLV{Type: lib.PP2_TYPE_ALPN, Value: []byte(h.ALPN)})
	}
	if h.Authority != "" {
		additions = append(additions, lib.TLV{Type: lib.PP2_TYPE_AUTHORITY, Value: []byte(h.Authority)})
	}
	if err := out.SetTLVs(additions); err != nil {
		return b, fmt.Errorf("write a PROXY header: %w", err)
	}
	raw, err := out.Format()
	if err != nil {
		return b, fmt.Errorf("write a PROXY header: %w", err)
	}
	return append(b, raw...), nil
}
