// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"bytes"
	"crypto/tls"
	"errors"
	"math"
	"math/rand/v2"
	"testing"
)

// add adds stream[lo:hi] as of a stream that starts at base.
func add(t *testing.T, a *Assembler, base uint32, stream []byte, lo, hi, want int) {
	t.Helper()
	got, err := a.Add(base+uint32(lo), stream[lo:hi])
	if err != nil || got != want {
		t.Errorf("bytes %d to %d: added %d, %v, want %d", lo, hi, got, err, want)
	}
}

// bases are initial sequence numbers, some of which wrap inside a hello.
var bases = []uint32{0, 1, 1 << 31, 1<<31 - 100, math.MaxUint32, math.MaxUint32 - 100, math.MaxUint32 - 1500}

func TestAssembleTwoSegments(t *testing.T) {
	stream := capture(t, &tls.Config{ServerName: "pq.example.com"})
	for _, base := range bases {
		for cut := 1; cut < len(stream); cut += 13 {
			for _, swapped := range []bool{false, true} {
				var a Assembler
				if swapped {
					add(t, &a, base, stream, cut, len(stream), len(stream)-cut)
					add(t, &a, base, stream, 0, cut, cut)
				} else {
					add(t, &a, base, stream, 0, cut, cut)
					add(t, &a, base, stream, cut, len(stream), len(stream)-cut)
				}
				if a.Start() != base || !bytes.Equal(a.Bytes(), stream) {
					t.Fatalf("cut at %d, swapped %v: starts at %d", cut, swapped, a.Start())
				}
			}
		}
	}
}

// TestAssembleOverlaps goes through the ways in which a segment can lie to two
// fragments at 10-20 and 30-40.
func TestAssembleOverlaps(t *testing.T) {
	stream := good().bytes()
	for _, tc := range []struct{ lo, hi, added, start, contiguous int }{
		{12, 18, 0, 10, 10},  // inside
		{10, 20, 0, 10, 10},  // the same
		{20, 25, 5, 10, 15},  // adjoins
		{15, 25, 5, 10, 15},  // overlaps the end
		{20, 30, 10, 10, 30}, // fills the gap
		{15, 35, 10, 10, 30}, // fills it and overlaps both
		{15, 45, 15, 10, 35}, // and goes beyond
		{25, 35, 5, 10, 10},  // overlaps the second from below
		{25, 45, 10, 10, 10}, // covers the second
		{35, 50, 10, 10, 10}, // extends the second
		{22, 28, 6, 10, 10},  // in the gap, touching neither
		{45, 50, 5, 10, 10},  // above all
		{0, 5, 5, 0, 5},      // below all
		{0, 10, 10, 0, 20},   // adjoins from below
		{5, 15, 5, 5, 15},    // overlaps from below
		{5, 25, 10, 5, 20},   // covers the first
		{0, 50, 30, 0, 50},   // covers all
	} {
		for _, base := range bases {
			var a Assembler
			add(t, &a, base, stream, 10, 20, 10)
			add(t, &a, base, stream, 30, 40, 10)
			add(t, &a, base, stream, tc.lo, tc.hi, tc.added)
			if int(a.Start()-base) != tc.start || len(a.Bytes()) != tc.contiguous ||
				!bytes.Equal(a.Bytes(), stream[tc.start:tc.start+tc.contiguous]) {
				t.Errorf("%+v: %d bytes from %d", tc, len(a.Bytes()), a.Start()-base)
			}
		}
	}
}

func TestFirstCopyWins(t *testing.T) {
	var a Assembler
	for _, s := range []struct {
		seq  uint32
		data string
	}{{10, "aaa"}, {16, "bbb"}, {5, "cccccccccccccccc"}, {10, "ddd"}} {
		if _, err := a.Add(s.seq, []byte(s.data)); err != nil {
			t.Fatal(err)
		}
	}
	if got := string(a.Bytes()); got != "cccccaaacccbbbcc" {
		t.Errorf("got %q", got)
	}
}

func TestAddCopies(t *testing.T) {
	segment := []byte("abc")
	var a Assembler
	for _, seq := range []uint32{10, 20, 13, 16, 7} {
		if _, err := a.Add(seq, segment); err != nil {
			t.Fatal(err)
		}
		copy(segment, "xxx")
		copy(segment, "abc")
	}
	clear(segment)
	if got := string(a.Bytes()); got != "abcabcabcabc" {
		t.Errorf("got %q", got)
	}
}

func TestAssembleShuffled(t *testing.T) {
	stream := capture(t, &tls.Config{ServerName: "pq.example.com", NextProtos: []string{"h2"}})
	want, err := Parse(stream)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		var a Assembler
		base := bases[round%len(bases)]
		size := 100 + random.IntN(400)
		for attempts := 0; ; attempts++ {
			lo := random.IntN(len(stream))
			hi := min(len(stream), lo+size)
			_, err := a.Add(base+uint32(lo), stream[lo:hi])
			if err != nil && !errors.Is(err, ErrScattered) {
				t.Fatal(err)
			}
			h, err := Parse(a.Bytes())
			if err == nil {
				if h.ServerName != want.ServerName || a.Start() != base {
					t.Fatalf("got %+v at %d", h, a.Start())
				}
				break
			}
			if attempts > 100_000 {
				t.Fatal("never complete")
			}
		}
	}
}

func TestWindow(t *testing.T) {
	full := make([]byte, 2*MaxSize)
	for _, base := range bases {
		var a Assembler
		add(t, &a, base, full, 100, 110, 10)
		for _, far := range []int{100 + MaxSize, 100 - MaxSize - 1, 100 + 1<<30, 100 - 1<<30, 100 + math.MinInt32} {
			if n, err := a.Add(base+uint32(far), full[:10]); n != 0 || !errors.Is(err, ErrTooLong) {
				t.Errorf("offset %d: %d, %v", far-100, n, err)
			}
		}
		if len(a.Bytes()) != 10 || a.Held() != 10 {
			t.Error("a refused segment has left something")
		}
		add(t, &a, base, full, 100+MaxSize-1, 100+MaxSize+9, 1) // what fits of it
		add(t, &a, base, full, 95, 100, 5)                      // moves the window away
		if a.n != 1 || len(a.Bytes()) != 15 {
			t.Errorf("%d fragments, %d bytes", a.n, len(a.Bytes()))
		}
		add(t, &a, base, full, 94, 2*MaxSize, MaxSize-15)
		if len(a.Bytes()) != MaxSize {
			t.Errorf("%d bytes", len(a.Bytes()))
		}
		add(t, &a, base, full, 84, 94, 10)
		if len(a.Bytes()) != MaxSize || a.Start() != base+84 {
			t.Errorf("%d bytes from %d", len(a.Bytes()), a.Start()-base)
		}
		add(t, &a, base, full, 50, 60, 10) // leaves a gap, and 34 bytes outside
		if a.n != 2 || len(a.frags[1].data) != MaxSize-34 || a.Held() != MaxSize-24 {
			t.Errorf("%d fragments, %d bytes held", a.n, a.Held())
		}
		if n, err := a.Add(base+50-MaxSize, full[:10]); n != 10 || err != nil || a.n != 1 {
			t.Errorf("as low as may be: %d, %v, %d fragments", n, err, a.n)
		}
		a.Reset()
		add(t, &a, base, full, 0, 2*MaxSize, MaxSize)
		if a.Held() != MaxSize {
			t.Errorf("%d bytes held", a.Held())
		}
	}
}

// TestScattered fills the pieces and wants the first segment to find room even
// so: it is the one that a client repeats.
func TestScattered(t *testing.T) {
	stream := good().bytes()
	var a Assembler
	for i := range maxFragments {
		add(t, &a, 9, stream, 10+2*i, 11+2*i, 1)
	}
	if n, err := a.Add(9+100, stream[100:101]); n != 0 || !errors.Is(err, ErrScattered) {
		t.Errorf("one more above: %d, %v", n, err)
	}
	add(t, &a, 9, stream, 0, 5, 5)
	if a.n != maxFragments || a.Start() != 9 || len(a.Bytes()) != 5 {
		t.Errorf("%d fragments, %d bytes from %d", a.n, len(a.Bytes()), a.Start())
	}
	for i, f := range a.frags[1:] { // the highest had to go
		if f.seq != uint32(9+10+2*i) {
			t.Errorf("fragment %d is at %d", i+1, f.seq)
		}
	}
	add(t, &a, 9, stream, 0, len(stream), len(stream)-5-(maxFragments-1))
	if !bytes.Equal(a.Bytes(), stream) || a.n != 1 {
		t.Error("not whole")
	}
	for _, f := range a.frags[a.n:] {
		if f.data != nil {
			t.Error("a dropped buffer is still held")
		}
	}
}

func TestZeroAssembler(t *testing.T) {
	var a Assembler
	if n, err := a.Add(5, nil); n != 0 || err != nil {
		t.Error(n, err)
	}
	if a.Start() != 0 || a.Bytes() != nil || a.Held() != 0 {
		t.Error("the zero value holds something")
	}
	add(t, &a, 0, []byte("abc"), 0, 3, 3)
	if a.Held() != 3 {
		t.Errorf("%d bytes held for 3", a.Held())
	}
	a.Reset()
	if a.Bytes() != nil || a.Held() != 0 {
		t.Error("Reset has left something")
	}
}

// TestCrumbs parses after each byte of the largest hello, from either end.
func TestCrumbs(t *testing.T) {
	stream := good().padded(4096).stream(1)
	for name, index := range map[string]func(int) int{
		"upward":   func(i int) int { return i },
		"downward": func(i int) int { return len(stream) - 1 - i },
	} {
		var a Assembler
		for i := range stream {
			k := index(i)
			add(t, &a, math.MaxUint32-9, stream, k, k+1, 1)
			if _, err := Parse(a.Bytes()); (err == nil) != (i == len(stream)-1) {
				t.Fatalf("%s: after %d bytes: %v", name, i+1, err)
			}
		}
		if a.Held() > 2*MaxSize {
			t.Errorf("%s: %d bytes held", name, a.Held())
		}
	}
}

func TestSkip(t *testing.T) {
	var a Assembler
	a.Skip() // of nothing
	for _, base := range bases {
		a.Reset()
		add(t, &a, base, []byte("x"), 0, 1, 1)
		a.Skip()
		if a.Held() != 0 || len(a.Bytes()) != 0 {
			t.Fatalf("after the only byte %q is left", a.Bytes())
		}
		add(t, &a, base, []byte("xhello.world"), 0, 6, 6)
		add(t, &a, base, []byte("xhello.world"), 7, 12, 5)
		a.Skip()
		if a.Start() != base+1 || string(a.Bytes()) != "hello" {
			t.Errorf("from %d: starts at %d with %q", base, a.Start(), a.Bytes())
		}
		add(t, &a, base, []byte("xhello.world"), 6, 7, 1)
		if string(a.Bytes()) != "hello.world" {
			t.Errorf("from %d: %q", base, a.Bytes())
		}
		a.Reset()
		add(t, &a, base, []byte("xhello.world"), 0, 1, 1)
		add(t, &a, base, []byte("xhello.world"), 7, 12, 5)
		a.Skip()
		if a.Start() != base+7 || string(a.Bytes()) != "world" {
			t.Errorf("from %d: behind the gap at %d is %q", base, a.Start(), a.Bytes())
		}
	}
}
