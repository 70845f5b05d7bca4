// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	be "encoding/binary"
	"testing"

	"snilb/scripts/testbed"
)

// agreements are the stacks, and interfaces that take less than the other end of their link gives.
func agreements() map[string]func(*testing.T, *testbed.NS) {
	all := map[string]func(*testing.T, *testbed.NS){
		"mtu-1280": func(t *testing.T, ns *testbed.NS) { must(t, ns.SetMTU("eth0", 1280)) },
	}
	for name, keys := range stacks {
		all[name] = func(t *testing.T, ns *testbed.NS) { setAll(t, ns, keys) }
	}
	return all
}

// TestStacksAgreed reads from both wires what such clients and backends are told: a stack that is told too much mostly works
// all the same, if it is Linux.
func TestStacksAgreed(t *testing.T) {
	for name, odd := range agreements() {
		for side, ns := range map[string]func(*testbed.Bed) *testbed.NS{
			"client":  func(b *testbed.Bed) *testbed.NS { return b.Client },
			"backend": func(b *testbed.Bed) *testbed.NS { return b.Backend },
		} {
			t.Run(side+"/"+name, func(t *testing.T) {
				bed := wired(t, testbed.Options{})
				odd(t, ns(bed))
				startBackends(t, bed)
				d := attach(t, bed, siteRoutes(bed))
				families(t, func(t *testing.T, v6 bool) { agree(t, bed, v6) })
				// Hellos of two segments are replayed as such: only who was told too late sends what must be cut.
				if c := d.counters(); c.packets("engine/too_big") > 0 && name != "mtu-1280" {
					t.Errorf("%d packets were cut", c.packets("engine/too_big"))
				}
			})
		}
	}
}

// agree makes a connection by which the backend becomes known, and those that follow.
func agree(t *testing.T, bed *testbed.Bed, v6 bool) {
	t.Helper()
	for i, move := range []func(){
		func() { _ = request(t, bed, v6) }, // may fail, as TestStacksBackend says
		func() { downloadSize(t, bed, vip(bed, v6), "a.example.com", 100<<10) },
		func() { uploadSize(t, bed, vip(bed, v6), "a.example.com", 100<<10) },
	} {
		bed.ClientWire.Record()
		bed.BackendWire.Record()
		move()
		if checkAgreed(t, bed, v6, i > 0); t.Failed() {
			return // the transfers may take for ever
		}
	}
}

// negotiated are the options that a SYN-ACK may only have if the SYN has them.
var negotiated = map[string]byte{"SACK": testbed.OptSACKOK, "timestamps": testbed.OptTimestamps, "window scaling": testbed.OptWScale}

// checkAgreed looks at the connection that both wires have recorded. known says that its backend has been spoken to before.
func checkAgreed(t *testing.T, bed *testbed.Bed, v6, known bool) (client, backend terms) {
	t.Helper()
	client = termsOf(t, bed.ClientWire.Recorded(), toLB, v6)
	backend = termsOf(t, bed.BackendWire.Recorded(), fromLB, v6)
	for name, kind := range negotiated {
		promised, asked := has(client.synAck, kind), has(backend.syn, kind)
		if promised != asked {
			t.Errorf("%s: promised to the client %t, asked of the backend %t", name, promised, asked)
		}
		// Windows are translated; what else the backend does not have was promised for it.
		if known && kind != testbed.OptWScale && promised && !has(backend.synAck, kind) {
			t.Errorf("%s: promised to the client, and the backend has none", name)
		}
	}
	for _, leg := range []struct {
		name string
		terms
	}{{"client", client}, {"backend", backend}} {
		leg.check(t, leg.name)
	}
	if told, takes := backend.mss(backend.syn), client.mss(client.syn); told > takes {
		t.Errorf("the backend was told of an MSS of %d, the client takes %d", told, takes)
	}
	if told, takes := client.mss(client.synAck), backend.mss(backend.synAck); known && told > takes {
		t.Errorf("the client was told of an MSS of %d, the backend takes %d", told, takes)
	}
	return client, backend
}

// terms is what one leg's connection has agreed on, and its segments behind that.
type terms struct {
	syn, synAck testbed.Segment
	frames      []testbed.Frame
	v6          bool
}

// termsOf finds the last connection in a wire's record. opened is the direction of its SYN.
func termsOf(t *testing.T, frames []testbed.Frame, opened testbed.Direction, v6 bool) terms {
	t.Helper()
	x := terms{v6: v6}
	for _, f := range frames {
		switch {
		case isSYN(f) && f.Direction == opened:
			x.syn, x.frames = f.Segment, nil
		case isSYNACK(f) && f.Dst == x.syn.Src:
			x.synAck = f.Segment
		case f.Src == x.syn.Src || f.Dst == x.syn.Src:
			x.frames = append(x.frames, f)
		}
	}
	if x.synAck.Ack != x.syn.Seq+1 || len(x.frames) == 0 {
		t.Fatalf("no handshake on the wire: %s, %s", x.syn, x.synAck)
	}
	return x
}

func has(s testbed.Segment, kind byte) bool {
	_, ok := s.Option(kind)
	return ok
}

func (x *terms) agreed(kind byte) bool { return has(x.syn, kind) && has(x.synAck, kind) }

// mss is the largest segment that the sender of a SYN or SYN-ACK takes, at least what every host does.
func (x *terms) mss(s testbed.Segment) int {
	least := 536
	if x.v6 {
		least = 1220
	}
	if option, _ := s.Option(testbed.OptMSS); len(option) == 2 {
		return max(least, int(be.BigEndian.Uint16(option)))
	}
	return least
}

// check looks at one leg by itself.
func (x *terms) check(t *testing.T, name string) {
	t.Helper()
	for option, kind := range negotiated {
		if has(x.synAck, kind) && !has(x.syn, kind) {
			t.Errorf("%s leg: nobody offered %s: %s, %s", name, option, x.syn, x.synAck)
		}
	}
	if rest := strange(x.synAck.Options); len(rest) > 0 {
		t.Errorf("%s leg: not what SYN-ACKs have: %x in %s", name, rest, x.synAck)
	}
	sent, _ := x.syn.Option(testbed.OptTimestamps)
	echoed, _ := x.synAck.Option(testbed.OptTimestamps)
	if x.agreed(testbed.OptTimestamps) && string(echoed[4:]) != string(sent[:4]) {
		t.Errorf("%s leg: the SYN's timestamp %x comes back as %x", name, sent[:4], echoed[4:])
	}
	if x.synAck.Has(testbed.ECE) || name == "backend" && x.syn.Has(testbed.ECE) {
		t.Errorf("%s leg: ECN is negotiated: %s, %s", name, x.syn, x.synAck)
	}
	for _, f := range x.frames {
		x.checkSegment(t, name, f)
	}
}

// strange is what is left of a SYN-ACK's options from the first on that is unknown or of the wrong size.
func strange(options []byte) []byte {
	sizes := map[byte]int{testbed.OptMSS: 4, testbed.OptWScale: 3, testbed.OptSACKOK: 2, testbed.OptTimestamps: 10}
	for len(options) > 0 {
		size := 1
		if options[0] != testbed.NOP()[0] {
			size = sizes[options[0]]
			if size == 0 || size > len(options) || int(options[1]) != size {
				return options
			}
		}
		options = options[size:]
	}
	return nil
}

func (x *terms) checkSegment(t *testing.T, name string, f testbed.Frame) {
	t.Helper()
	// RFC 7323 3.2: in every segment but a RST, or in none.
	if stamped := has(f.Segment, testbed.OptTimestamps); !f.Has(testbed.RST) && stamped != x.agreed(testbed.OptTimestamps) {
		t.Errorf("%s leg: timestamps %t, agreed %t: %s", name, stamped, !stamped, f.Segment)
	}
	if has(f.Segment, testbed.OptSACK) && !x.agreed(testbed.OptSACKOK) {
		t.Errorf("%s leg: SACK was not agreed on: %s", name, f.Segment)
	}
	if f.TOS&3 != 0 || f.Flags&(testbed.ECE|testbed.CWR) != 0 {
		t.Errorf("%s leg: ECN was not agreed on: TOS %#x, %s", name, f.TOS, f.Segment)
	}
	receiver := x.syn
	if f.Src == x.syn.Src {
		receiver = x.synAck
	}
	if size := f.Bytes + len(f.Options); f.Bytes > 0 && size > x.mss(receiver) {
		t.Errorf("%s leg: %d bytes and options, the receiver's MSS is %d: %s", name, size, x.mss(receiver), f.Segment)
	}
}
