// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"math/bits"
	"time"

	"snilb/userspace/packet"
)

// line is where frames leave and come. It belongs to one goroutine.
type line interface {
	// room is where the next frame is written.
	room() []byte
	// send queues the first n bytes of the room, and sends what is queued when that is a batch. A frame that does not go is
	// lost: whoever sent it repeats it.
	send(n int)
	// flush sends what is queued. Its error says that no frame can be sent any more.
	flush() error
	// receive hands over at most that many frames and says how many there were. A frame may be cut at its end and is the
	// taker's only during the call.
	receive(most int, take func(frame []byte)) int
	// wait returns when something has come, or after that time.
	wait(time.Duration) error
}

const (
	ethernetHeader = 14
	header4        = 20
	header6        = 40
	headerTCP      = 20
	// What timestamps take in each segment, the two NOPs before them included.
	timestampBytes = 12
)

// hop is the Ethernet way to a peer: its address, then ours, as they stand in a frame.
type hop [12]byte

// put sends a segment. Its payload comes apart from it, with its sum: that of a hello is known from the last time.
func put(l line, h *hop, s *packet.Segment, payload []byte, sum uint64) {
	b := l.room()
	copy(b, h[:])
	kind := uint16(0x0800)
	ip := header4
	if s.Src.Addr().Is6() {
		kind, ip = 0x86dd, header6
	}
	binary.BigEndian.PutUint16(b[12:], kind)
	b = s.Append(b[:ethernetHeader])
	if len(payload) > 0 {
		b = append(b, payload...)
		lengthen(b[ethernetHeader:], ip, len(payload), sum)
	}
	l.send(len(b))
}

// lengthen makes a packet's lengths and checksums count n bytes more, whose sum is given.
func lengthen(b []byte, ip, n int, sum uint64) {
	if ip == header4 {
		addTo(b[2:], uint64(n))
		subtractFrom(b[10:], uint64(n))
	} else {
		addTo(b[4:], uint64(n))
	}
	subtractFrom(b[ip+16:], uint64(n)+sum)
}

func addTo(field []byte, n uint64) {
	binary.BigEndian.PutUint16(field, binary.BigEndian.Uint16(field)+uint16(n))
}

// subtractFrom updates a checksum field for more that it covers (RFC 1624).
func subtractFrom(field []byte, sum uint64) {
	binary.BigEndian.PutUint16(field, ^fold(sum+uint64(^binary.BigEndian.Uint16(field))))
}

// sumOf is the one's complement sum of bytes that begin at an even offset of the segment, as 16 bits.
func sumOf(b []byte) uint64 {
	var sum, carry uint64
	for ; len(b) >= 8; b = b[8:] {
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b), carry)
	}
	var last [8]byte
	copy(last[:], b)
	sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(last[:]), carry)
	return uint64(fold(sum>>32 + sum&0xffffffff + carry))
}

func fold(sum uint64) uint16 {
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// flight is what one side says, ready to be cut into segments.
type flight struct {
	data []byte
	size int      // of the segments that sums are of
	sums []uint64 // by segment
}

// part is the segment that begins at an offset, of at most size bytes, and its sum.
func (f *flight) part(at, size int) ([]byte, uint64) {
	b := f.data[at:min(at+size, len(f.data))]
	if at%size != 0 { // something was acknowledged in part
		return b, sumOf(b)
	}
	if f.size != size {
		f.size, f.sums = size, f.sums[:0]
		for i := 0; i < len(f.data); i += size {
			f.sums = append(f.sums, sumOf(f.data[i:min(i+size, len(f.data))]))
		}
	}
	return b, f.sums[at/size]
}

// before compares sequence numbers.
func before(a, b uint32) bool { return int32(a-b) < 0 }

// The wheel's slots: 4 s in all, later times are looked at again.
const (
	wheelSlots = 1024
	wheelTick  = int64(4 * time.Millisecond)
	nowhere    = int32(-1)
)

// wheel holds at most one time for each index of a slab. Nothing in it allocates.
type wheel struct {
	heads [wheelSlots]int32
	links []wheelLink
	tick  int64 // the last that is over
}

type wheelLink struct {
	due              int64
	next, prev, slot int32
}

func newWheel(size int, now int64) *wheel {
	w := &wheel{links: make([]wheelLink, size), tick: now / wheelTick}
	for i := range w.heads {
		w.heads[i] = nowhere
	}
	for i := range w.links {
		w.links[i].slot = nowhere
	}
	return w
}

// set gives an index its time, in place of an earlier one.
func (w *wheel) set(i int32, due int64) {
	w.cancel(i)
	slot := int32(min(max(due/wheelTick, w.tick+1), w.tick+wheelSlots-1) % wheelSlots)
	head := w.heads[slot]
	w.links[i] = wheelLink{due: due, next: head, prev: nowhere, slot: slot}
	if head != nowhere {
		w.links[head].prev = i
	}
	w.heads[slot] = i
}

func (w *wheel) cancel(i int32) {
	l := &w.links[i]
	if l.slot == nowhere {
		return
	}
	if l.prev != nowhere {
		w.links[l.prev].next = l.next
	} else {
		w.heads[l.slot] = l.next
	}
	if l.next != nowhere {
		w.links[l.next].prev = l.prev
	}
	l.slot = nowhere
}

// expire calls fn for each index whose time has come, up to a tick late. fn may set and cancel.
func (w *wheel) expire(now int64, fn func(int32)) {
	last := now / wheelTick
	w.tick = max(w.tick, last-wheelSlots)
	for w.tick < last {
		w.tick++
		slot := w.tick % wheelSlots
		for w.heads[slot] != nowhere {
			i := w.heads[slot]
			if due := w.links[i].due; due > now {
				w.set(i, due)
				continue
			}
			w.cancel(i)
			fn(i)
		}
	}
}
