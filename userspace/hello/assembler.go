// SPDX-License-Identifier: Apache-2.0

package hello

// maxFragments bounds the pieces that an Assembler holds apart: with every
// other segment lost, eight take up a hello of 16 segments, where the usual
// first flight of a client is ten.
const maxFragments = 8

// Assembler puts the TCP payload of one client together by sequence number.
// The zero value is ready for use. It is not safe for concurrent use.
//
// Segments come in any order, repeated and overlapping. The client's initial
// sequence number is not known, so the stream starts at the lowest number seen
// so far and a late segment may move the start down.
//
// Of two segments that disagree about a byte the first one counts. Intrusion
// detection must guess which copy the receiver kept; here no guess is needed,
// because what is parsed is also what is replayed to the backend.
//
// It keeps at most [MaxSize] bytes from the start on, in buffers that may be
// twice that size if they grew by single bytes.
type Assembler struct {
	// Sorted by position, neither overlapping nor touching: what touches is
	// merged. Inline, so that a hello in one segment costs its buffer alone.
	frags [maxFragments]fragment
	n     int
}

type fragment struct {
	seq  uint32 // of data[0]
	data []byte // never empty
}

// Add takes one segment and copies what is new of it. added counts the bytes
// that were missing before.
//
// Bytes at MaxSize and above, counted from the start, are left out, also when
// a lower segment moves the start away from them; the client sends them again,
// for nothing beyond the first gap was ever acknowledged. Likewise a lower
// segment displaces the highest piece when there are too many.
//
// Returns ErrTooLong when the segment lies wholly outside MaxSize on either
// side of the start, ErrScattered when it would be one piece too many and the
// highest. Either way nothing has changed and later segments may be added.
func (a *Assembler) Add(seq uint32, payload []byte) (added int, err error) {
	if len(payload) == 0 {
		return 0, nil
	}
	if a.n == 0 {
		a.frags[0] = fragment{seq, exactly(payload[:min(len(payload), MaxSize)])}
		a.n = 1
		return len(a.frags[0].data), nil
	}
	off := a.offset(seq)
	if off >= MaxSize || off < -MaxSize {
		return 0, &Error{Kind: ErrTooLong, Reason: "a segment far from the others"}
	}
	p := payload[:min(len(payload), MaxSize-max(off, 0))]
	i, j := a.touching(off, off+len(p))
	if i < j {
		return a.merge(seq, p, i, j), nil
	}
	if err := a.insert(i, seq, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Start returns the lowest sequence number seen so far, 0 before the first
// segment.
func (a *Assembler) Start() uint32 { return a.frags[0].seq }

// Bytes returns what is contiguous from Start on. The slice is valid until the
// next call of Add or Reset and must not be written to.
func (a *Assembler) Bytes() []byte { return a.frags[0].data }

// Skip takes the first byte off, which turned out not to belong to the stream:
// Start moves up by one, or to the next piece when that was all.
func (a *Assembler) Skip() {
	if a.n == 0 {
		return
	}
	first := &a.frags[0]
	if len(first.data) == 1 {
		a.remove(0, 1)
		return
	}
	first.seq, first.data = first.seq+1, first.data[1:]
}

// Held returns the bytes of memory in buffers, gaps not counted and spare
// capacity included. The Assembler itself, about 260 bytes, is not in it.
func (a *Assembler) Held() int {
	held := 0
	for _, f := range a.frags[:a.n] {
		held += cap(f.data)
	}
	return held
}

// Reset lets go of everything.
func (a *Assembler) Reset() { *a = Assembler{} }

// offset returns the position of seq relative to Start. Sequence numbers wrap
// (RFC 9293, section 3.4): nearer than 2^31 the sign of the difference tells
// before from after.
func (a *Assembler) offset(seq uint32) int { return int(int32(seq - a.frags[0].seq)) }

// touching returns the range [i, j) of fragments that overlap or adjoin the
// positions from lo to hi. When empty, i is where a fragment would go.
func (a *Assembler) touching(lo, hi int) (i, j int) {
	for i < a.n && a.offset(a.frags[i].seq)+len(a.frags[i].data) < lo {
		i++
	}
	for j = i; j < a.n && a.offset(a.frags[j].seq) <= hi; {
		j++
	}
	return i, j
}

// merge joins p with fragments i to j-1, all of which it touches, and returns
// how many bytes of p were missing.
func (a *Assembler) merge(seq uint32, p []byte, i, j int) int {
	before := 0
	for _, f := range a.frags[i:j] {
		before += len(f.data)
	}
	joined := fragment{seq: seq}
	next := i
	if first := a.frags[i]; int32(seq-first.seq) >= 0 {
		joined, next = first, i+1 // appending to it is amortised growth
	} else {
		joined.data = make([]byte, 0, len(p)+before)
	}
	// at is where in p the joined bytes end; past len(p) nothing is missing.
	at := func() int { return int(int32(joined.seq + uint32(len(joined.data)) - seq)) }
	for ; next < j; next++ {
		f := a.frags[next]
		joined.data = append(joined.data, p[at():int(int32(f.seq-seq))]...)
		joined.data = append(joined.data, f.data...)
	}
	if tail := at(); tail < len(p) {
		joined.data = append(joined.data, p[tail:]...)
	}
	added := len(joined.data) - before
	a.frags[i] = joined
	a.remove(i+1, j)
	a.trim()
	return added
}

// insert makes p a fragment of its own at index i.
func (a *Assembler) insert(i int, seq uint32, p []byte) error {
	if a.n == maxFragments {
		if i == a.n {
			return &Error{Kind: ErrScattered, Reason: "a ninth piece above all others"}
		}
		a.remove(a.n-1, a.n)
	}
	copy(a.frags[i+1:], a.frags[i:a.n])
	a.frags[i] = fragment{seq, exactly(p)}
	a.n++
	a.trim()
	return nil
}

// remove drops fragments i to j-1.
func (a *Assembler) remove(i, j int) {
	copy(a.frags[i:], a.frags[j:a.n])
	clear(a.frags[a.n-(j-i) : a.n])
	a.n -= j - i
}

// trim drops what a lower start has left beyond MaxSize.
func (a *Assembler) trim() {
	for last := a.n - 1; last >= 0; last-- {
		f := &a.frags[last]
		room := MaxSize - a.offset(f.seq)
		if room >= len(f.data) {
			return
		}
		if room > 0 {
			// A copy: kept capacity would add up, segment by segment.
			f.data = exactly(f.data[:room])
			return
		}
		a.remove(last, last+1)
	}
}

// exactly returns a copy of b without the spare capacity of bytes.Clone, so
// that Held is what came in.
func exactly(b []byte) []byte { return append(make([]byte, 0, len(b)), b...) }
