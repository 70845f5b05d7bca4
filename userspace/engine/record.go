// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bufio"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"net/netip"
	"os"
)

// The journal begins with a line of its version and one of the boot it is of. Records follow:
//
//	bytes  what
//	2      length of the body
//	4      CRC-32C of the body
//	1      kind
//	4      number
//	...    the fields of the kind
//
// Numbers are little-endian. An address is its length (0: none, 4 or 16), itself and the port; a text is its length in two bytes and itself.
// A flow's takes some 70 bytes with IPv4 and 90 with IPv6, by its name: 380 at most.
const journalVersion = "snilb journal 1\n"

// Kinds of records.
const (
	recordBackend  = 1 + iota // number: an id in clients' entries; what it means
	recordRoute               // number: an id in backends' entries; what it means
	recordWay                 // number: what flows' records mean by it from here on
	recordFlow                // number: of its way
	recordPeer                // number: 0
	recordListener            // number: a listener's id in events; with port 0: the last one that was given
)

// record is one of any kind.
type record struct {
	kind   byte
	number uint32

	id         uint16         // of a way's backend
	pool, name string         // of a backend or way
	backend    netip.AddrPort // of a backend, way or peer, or a listener's
	route      string         // of a route or way

	connection
	origin          netip.AddrPort // not valid if it is the client
	generation, mss uint16
	cookie          uint32
	bound           int64
	outlived        [2]bool
	sni             string

	peer peer
}

const (
	recordHeader = 6
	maxText      = 255 // of bytes; what is longer is cut: no server name is, and no name of a pool, backend or route should be
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// append adds the record to b.
func (r *record) append(b []byte) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0, 0, 0, r.kind)
	b = binary.LittleEndian.AppendUint32(b, r.number)
	switch r.kind {
	case recordBackend:
		b = appendAddr(appendText(appendText(b, r.pool), r.name), r.backend)
	case recordRoute:
		b = appendText(b, r.route)
	case recordWay:
		b = binary.LittleEndian.AppendUint16(b, r.id)
		b = appendText(appendAddr(appendText(appendText(b, r.pool), r.name), r.backend), r.route)
	case recordFlow:
		b = appendAddr(appendAddr(appendAddr(b, r.client), r.listener), r.origin)
		b = binary.LittleEndian.AppendUint16(b, r.generation)
		b = binary.LittleEndian.AppendUint16(b, r.mss)
		b = binary.LittleEndian.AppendUint32(b, r.cookie)
		b = binary.LittleEndian.AppendUint64(b, uint64(r.bound))
		b = appendText(append(b, flag(r.outlived[0])|flag(r.outlived[1])<<1), r.sni)
	case recordListener:
		b = appendAddr(b, r.backend)
	case recordPeer:
		b = binary.LittleEndian.AppendUint16(appendAddr(b, r.backend), r.peer.mss)
		b = append(b, flag(r.peer.noSACK)|flag(r.peer.noTimestamps)<<1|flag(r.peer.guessed)<<2)
	}
	body := b[start+recordHeader:]
	binary.LittleEndian.PutUint16(b[start:], uint16(len(body)))
	binary.LittleEndian.PutUint32(b[start+2:], crc32.Checksum(body, castagnoli))
	return b
}

func flag(set bool) byte {
	if set {
		return 1
	}
	return 0
}

func appendText(b []byte, s string) []byte {
	s = s[:min(len(s), maxText)]
	return append(binary.LittleEndian.AppendUint16(b, uint16(len(s))), s...)
}

func appendAddr(b []byte, a netip.AddrPort) []byte {
	addr := a.Addr().AsSlice()
	b = append(append(b, byte(len(addr))), addr...)
	return binary.LittleEndian.AppendUint16(b, a.Port())
}

// parse reads a body. Returns false if it is none.
func (r *record) parse(body []byte) bool {
	f := fields{rest: body}
	*r = record{kind: f.byte(), number: f.u32()}
	switch r.kind {
	case recordBackend:
		r.pool, r.name, r.backend = f.text(), f.text(), f.addr()
	case recordRoute:
		r.route = f.text()
	case recordWay:
		r.id, r.pool, r.name, r.backend, r.route = f.u16(), f.text(), f.text(), f.addr(), f.text()
	case recordFlow:
		r.client, r.listener, r.origin = f.addr(), f.addr(), f.addr()
		r.generation, r.mss, r.cookie, r.bound = f.u16(), f.u16(), f.u32(), int64(f.u64())
		outlived := f.byte()
		r.outlived = [2]bool{outlived&1 != 0, outlived&2 != 0}
		r.sni = f.text()
	case recordListener:
		r.backend = f.addr()
	case recordPeer:
		r.backend, r.peer.mss = f.addr(), f.u16()
		lacks := f.byte()
		r.peer.noSACK, r.peer.noTimestamps, r.peer.guessed = lacks&1 != 0, lacks&2 != 0, lacks&4 != 0
	default:
		return false
	}
	return !f.short && len(f.rest) == 0
}

// fields reads a record's fields one after the other; short when there was less than asked for, or nonsense.
type fields struct {
	rest  []byte
	short bool
}

func (f *fields) take(n int) []byte {
	if n > len(f.rest) {
		f.short, f.rest = true, nil
		return make([]byte, n)
	}
	some := f.rest[:n]
	f.rest = f.rest[n:]
	return some
}

func (f *fields) byte() byte   { return f.take(1)[0] }
func (f *fields) u16() uint16  { return binary.LittleEndian.Uint16(f.take(2)) }
func (f *fields) u32() uint32  { return binary.LittleEndian.Uint32(f.take(4)) }
func (f *fields) u64() uint64  { return binary.LittleEndian.Uint64(f.take(8)) }
func (f *fields) text() string { return string(f.take(int(f.u16()))) }

func (f *fields) addr() netip.AddrPort {
	length := int(f.byte())
	addr, ok := netip.AddrFromSlice(f.take(length))
	f.short = f.short || !ok && length != 0
	return netip.AddrPortFrom(addr, f.u16()) // of no address as well: a listener to every one is told by its port
}

// journalReader reads records until the end, or where the file is torn.
type journalReader struct {
	file *os.File
	in   *bufio.Reader
	body [1 << 16]byte
	torn bool
}

var errOtherJournal = errors.New("the journal is of another boot, or another version")

// openJournal returns an error that is fs.ErrNotExist if there is none, and errOtherJournal if what it says is of no use.
func openJournal(path, boot string) (*journalReader, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	r := &journalReader{file: file, in: bufio.NewReaderSize(file, 1<<16)}
	if !r.begins(boot) {
		return nil, errors.Join(errOtherJournal, file.Close())
	}
	return r, nil
}

func journalStart(boot string) string { return journalVersion + boot + "\n" }

func (r *journalReader) begins(boot string) bool {
	start := make([]byte, len(journalStart(boot)))
	_, err := io.ReadFull(r.in, start)
	return err == nil && string(start) == journalStart(boot)
}

// next reads the next record. Returns false at the end, of whichever kind.
func (r *journalReader) next(into *record) bool {
	var header [recordHeader]byte
	if _, err := io.ReadFull(r.in, header[:]); err != nil {
		r.torn = !errors.Is(err, io.EOF)
		return false
	}
	body := r.body[:binary.LittleEndian.Uint16(header[:])]
	_, err := io.ReadFull(r.in, body)
	r.torn = err != nil || crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(header[2:]) || !into.parse(body)
	return !r.torn
}

func (r *journalReader) Close() error { return r.file.Close() }
