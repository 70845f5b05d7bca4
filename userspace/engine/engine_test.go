// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/packet"
)

// The decoder knows offsets that only bpf/abi.h can change.
func TestReadEventHeader(t *testing.T) {
	want := maps.EventHeader{
		Time: 1, Ifindex: 2, Length: 3, Captured: 4, Listener: 5, Kind: 6, Leg: 7, Mtu: 8,
	}
	raw := make([]byte, unsafe.Sizeof(want))
	*(*maps.EventHeader)(unsafe.Pointer(&raw[0])) = want
	if got := readEventHeader(raw); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// A tuple's numbers must rise from one use to the next, or a backend that holds
// it in TIME_WAIT refuses.
func TestNumbersRise(t *testing.T) {
	e := &Engine{secret: [16]byte{1}}
	source := netip.MustParseAddrPort("198.51.100.1:10000")
	backend := netip.MustParseAddrPort("198.51.100.11:443")
	isn, ts := e.numbers(0, source, backend)
	for _, later := range []time.Duration{time.Millisecond, time.Second, time.Minute} {
		isn2, ts2 := e.numbers(int64(later), source, backend)
		if int32(isn2-isn) <= 0 || int32(ts2-ts) <= 0 {
			t.Errorf("after %v: ISN %d to %d, TSval %d to %d", later, isn, isn2, ts, ts2)
		}
	}
	other, _ := e.numbers(0, netip.MustParseAddrPort("198.51.100.1:10001"), backend)
	if other == isn {
		t.Error("two tuples have the same ISN: it can be guessed (RFC 6528)")
	}
	e.secret[0]++
	if again, _ := e.numbers(0, source, backend); again == isn {
		t.Error("the ISN does not depend on the secret")
	}
}

func TestCookieOptions(t *testing.T) {
	for name, c := range map[string]struct {
		class, scale, sack uint32
		v4                 bool
		want               packet.Options
	}{
		"linux":       {6, 7, 1, true, packet.Options{MSS: 1460, HasWScale: true, WScale: 7, SACKPermitted: true}},
		"v6":          {7, 14, 0, false, packet.Options{MSS: 8940, HasWScale: true, WScale: 14}},
		"no options":  {0, 15, 0, true, packet.Options{MSS: 536}},
		"scale zero":  {0, 0, 0, true, packet.Options{MSS: 536, HasWScale: true}},
		"sack, no ws": {1, 15, 1, true, packet.Options{MSS: 1220, SACKPermitted: true}},
	} {
		cookie := 3<<30 | c.class<<27 | c.scale<<23 | c.sack<<22 | 0x2fffff
		if got := cookieOptions(cookie, c.v4); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
}

// Each slot has a key of its own, that nobody without the master knows; a slot
// that ends takes the key away that is no longer accepted, and no other.
func TestCookieKeysRotate(t *testing.T) {
	e, other := &Engine{o: Options{Secret: [32]byte{1}}}, &Engine{o: Options{Secret: [32]byte{2}}}
	seen := make(map[maps.CookieKey]uint64)
	for slot := uint64(1000); slot < 1100; slot++ {
		keys, next := e.cookieKeys(slot), e.cookieKeys(slot+1)
		for s := slot - 2; s <= slot+1; s++ {
			k := keys[s&3]
			if of, ok := seen[k]; ok && of != s {
				t.Fatalf("slots %d and %d have the same key", of, s)
			}
			seen[k] = s
			if k == other.cookieKeys(slot)[s&3] {
				t.Errorf("slot %d: the key does not depend on the master", s)
			}
			if kept := k == next[s&3]; kept != (s > slot-2) {
				t.Errorf("when slot %d ends, the key of slot %d is kept: %t", slot, s, kept)
			}
		}
	}
}

func TestShifts(t *testing.T) {
	scale := func(n int) packet.Options {
		if n < 0 {
			return packet.Options{}
		}
		return packet.Options{HasWScale: true, WScale: uint8(n)}
	}
	for _, c := range []struct {
		name                string
		client, backend     int // -1: no option
		toBackend, toClient int
	}{
		{"both as usual", 7, 7, 0, 0},
		{"backend scales more", 7, 9, 0, 2},
		{"backend scales less", 7, 2, 0, -5},
		{"client does not scale", -1, -1, 0, 0},
		{"backend does not scale", 8, -1, 8, -7},
	} {
		h := &handshake{options: scale(c.client)}
		h.attempt.peer.Options = scale(c.backend)
		up, down := h.shifts()
		if up != c.toBackend || down != c.toClient {
			t.Errorf("%s: shifts %d and %d, want %d and %d", c.name, up, down, c.toBackend, c.toClient)
		}
	}
}

type frames [][]byte

func (f *frames) Write(b []byte) (int, error) {
	*f = append(*f, bytes.Clone(b))
	return len(b), nil
}

// A replayed hello larger than a segment is cut, and only its end has PSH and FIN.
func TestReplayCuts(t *testing.T) {
	var out frames
	w := &worker{queue: &out}
	s := packet.Segment{
		Src: netip.MustParseAddrPort("192.0.2.2:40000"), Dst: netip.MustParseAddrPort("192.0.2.1:443"),
		Seq: 0xffffff00, Flags: packet.ACK | packet.PSH | packet.FIN, Payload: make([]byte, 2500),
	}
	for i := range s.Payload {
		s.Payload[i] = byte(i)
	}
	w.replay(maps.LegClient, s, 1000)
	var all []byte
	for i, frame := range out {
		if frame[3] != maps.TapReplayClient {
			t.Errorf("frame %d asks for %d", i, frame[3])
		}
		got, err := packet.Parse(frame[14:])
		if err != nil {
			t.Fatal(err)
		}
		if got.Seq != s.Seq+uint32(len(all)) {
			t.Errorf("frame %d: seq %d, want %d", i, got.Seq, s.Seq+uint32(len(all)))
		}
		if last := i == len(out)-1; got.Has(packet.FIN) != last || got.Has(packet.PSH) != last {
			t.Errorf("frame %d of %d: flags %#x", i, len(out), got.Flags)
		}
		all = append(all, got.Payload...)
	}
	if len(out) != 3 || !bytes.Equal(all, s.Payload) {
		t.Errorf("%d frames with %d bytes", len(out), len(all))
	}
	if kind := binary.BigEndian.Uint16(out[0][12:]); kind != 0x0800 {
		t.Errorf("ethertype %#x", kind)
	}
}

func TestSources(t *testing.T) {
	var s sources
	a, b := netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3")
	for i := range 3 {
		if got, want := s.enter(a, 2), i < 2; got != want {
			t.Errorf("hello %d of a limit of 2: %v, want %v", i+1, got, want)
		}
	}
	if !s.enter(b, 2) {
		t.Error("one address's hellos count for another")
	}
	s.leave(a)
	if !s.enter(a, 2) {
		t.Error("what left still counts")
	}
	s.leave(a)
	s.leave(a)
	s.leave(b)
	if len(s.count) != 0 {
		t.Errorf("%d addresses are remembered for nothing", len(s.count))
	}
}

func TestIdle(t *testing.T) {
	now := int64(100 * time.Second)
	stamp := func(at time.Duration) uint32 { return uint32(int64(at) >> 20) }
	if got := idle(now, stamp(98*time.Second)); got < 1990*time.Millisecond || got > 2010*time.Millisecond {
		t.Errorf("two seconds are %v", got)
	}
	if got := idle(now, stamp(101*time.Second)); got != 0 {
		t.Errorf("a stamp of the future is %v old", got)
	}
	if got := idle(1<<20, 0xffffffff); got != 2<<20 {
		t.Errorf("over the wrap: %v", got)
	}
}

// A RST behind both FINs, when each side has the other's, is the answer to a repetition that was late: the flow was closed, and is
// kept no longer for it.
func TestResetOfClosed(t *testing.T) {
	v := &way{timeouts: &config.Timeouts{Closing: time.Minute}}
	const fromClient, fromBackend = 1000, 7000 // behind the FINs
	for name, c := range map[string]struct {
		byClient, byBackend uint32 // last acknowledged
		fin                 [2]bool
		silent              time.Duration
		want                string
	}{
		"both":              {fromBackend, fromClient, [2]bool{true, true}, closedQuiet, "closed"},
		"both, too early":   {fromBackend, fromClient, [2]bool{true, true}, closedQuiet - 1, ""},
		"not the client's":  {fromBackend, fromClient - 1, [2]bool{true, true}, closedQuiet, ""},
		"not the backend's": {fromBackend - 1, fromClient, [2]bool{true, true}, resetQuiet, "reset"},
		"one FIN":           {fromBackend, fromClient, [2]bool{true, false}, closedQuiet, ""},
		"one FIN, later":    {fromBackend, fromClient, [2]bool{true, false}, resetQuiet, "reset"},
	} {
		f := &flow{closing: closing{reset: true, fin: c.fin, end: [2]uint32{fromClient, fromBackend}}}
		up, down := &maps.Entry{Flow: maps.Flow{LastAck: c.byClient, Control: maps.FlowConfirmed}}, &maps.Entry{Flow: maps.Flow{LastAck: c.byBackend}}
		if got := f.over(v, 0, up, down, c.silent); got != c.want {
			t.Errorf("%s: over for %q, want %q", name, got, c.want)
		}
	}
}

// A RST ends a flow only if its sender falls silent: one that goes on was not who sent it.
func TestOutliveReset(t *testing.T) {
	const now = int64(time.Hour)
	ago := func(d time.Duration) *maps.Entry {
		return &maps.Entry{Flow: maps.Flow{LastSeen: uint32((now - int64(d)) >> 20), Control: maps.FlowRST}}
	}
	for name, c := range map[string]struct {
		reset        time.Duration // ago
		client, back time.Duration // last seen ago
		by           maps.Leg
		alive        bool
	}{
		"silent":                {8 * time.Second, 8 * time.Second, 8 * time.Second, maps.LegClient, false},
		"answers what comes in": {8 * time.Second, 7 * time.Second, 7 * time.Second, maps.LegClient, false},
		"the other side sends":  {8 * time.Second, 8 * time.Second, time.Second, maps.LegClient, false},
		"goes on":               {8 * time.Second, time.Second, time.Second, maps.LegClient, true},
		"backend goes on":       {8 * time.Second, 8 * time.Second, time.Second, maps.LegBackend, true},
	} {
		f := &flow{closing: closing{reset: true, resetBy: uint8(c.by), resetAt: now - int64(c.reset)}}
		up, down := ago(c.client), ago(c.back)
		f.outliveReset(now, up, down)
		f.noticeEnds(&maps.Entry{}, &maps.Entry{})
		if alive := !f.closing.ended(); alive != c.alive || alive != f.outlived[c.by] {
			t.Errorf("%s: alive %v, want %v", name, alive, c.alive)
		}
		if !c.alive {
			continue
		}
		f.closing = closing{reset: true, resetBy: uint8(c.by), resetAt: now - int64(c.reset), fin: [2]bool{true, false}}
		if f.outliveReset(now, up, down); !f.closing.ended() || f.closing.reset {
			t.Errorf("%s: with a FIN of one side: %+v", name, f.closing)
		}
		f.closing = closing{}
		up.Flow.Control, down.Flow.Control = 0, 0
		mine := up
		if c.by == maps.LegBackend {
			mine = down
		}
		mine.Flow.Control = maps.FlowRST
		if f.noticeEnds(up, down); f.closing.ended() {
			t.Errorf("%s: the mark that stays in the entry counts again", name)
		}
	}
}
