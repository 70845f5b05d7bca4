// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	be "encoding/binary"
	"net/netip"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// TestLossSACK loses packets on one leg at a time, moves data one way and reads from both wires what was said: every SACK block
// on one leg is about bytes that its receiver has sent there and that are above the cumulative ACK, and stands on the other leg
// at the same place of the stream, where the same bytes were.
func TestLossSACK(t *testing.T) {
	bed := wired(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	const size = 5 << 20
	families(t, func(t *testing.T, v6 bool) {
		for leg, wire := range map[string]*testbed.Wire{"client": bed.ClientWire, "backend": bed.BackendWire} {
			for way, move := range map[string]func(*testing.T, *testbed.Bed, netip.AddrPort, string, int64){
				"download": downloadSize, "upload": uploadSize,
			} {
				t.Run(leg+"/"+way, func(t *testing.T) {
					wire.Impair(testbed.Impairment{Drop: 0.02})
					defer wire.Impair(testbed.Impairment{})
					// A wire that stands still on a busy machine lets a timer run out, behind which a whole window is repeated.
					helped := false
					for try := 0; try < 3 && !helped; try++ {
						bed.ClientWire.Record()
						bed.BackendWire.Record()
						move(t, bed, vip(bed, v6), "a.example.com", size)
						bed.ClientWire.Settle(100 * time.Millisecond)
						bed.BackendWire.Settle(100 * time.Millisecond)
						client, backend := streamsOf(bed.ClientWire.Recorded(), toLB), streamsOf(bed.BackendWire.Recorded(), fromLB)
						helped = checkSACK(t, client, backend, way == "download")
					}
					if !helped {
						t.Error("SACK did not help, three times")
					}
				})
			}
		}
	})
}

// said is a segment in terms of its streams: offsets of the first byte, of what is acknowledged, and of the SACK blocks.
type said struct {
	fromClient bool
	carried    bool
	at, ack    int
	bytes      int
	end        int // with its FIN
	sum        uint32
	blocks     [][2]int
}

// streamsOf turns a wire's record of one connection into offsets. opened is the direction of its SYN. The last SYN counts, as
// that of an earlier attempt was given up.
func streamsOf(frames []testbed.Frame, opened testbed.Direction) []said {
	var port uint16
	var base [2]uint32 // the first byte's number, by direction
	for _, f := range frames {
		switch {
		case isSYN(f):
			port, base[opened] = f.Src.Port(), f.Seq+1
		case isSYNACK(f) && f.Dst.Port() == port:
			base[1-opened] = f.Seq + 1
		}
	}
	var all []said
	for _, f := range frames {
		if f.Has(testbed.SYN) || f.Direction == opened && f.Src.Port() != port || f.Direction != opened && f.Dst.Port() != port {
			continue
		}
		s := said{
			fromClient: f.Direction == opened, carried: f.Fate != testbed.Dropped,
			at: int(int32(f.Seq - base[f.Direction])), ack: int(int32(f.Ack - base[1-f.Direction])), bytes: f.Bytes, sum: f.Sum,
		}
		if s.end = s.at + s.bytes; isFIN(f) {
			s.end++
		}
		option, _ := f.Option(testbed.OptSACK)
		for ; len(option) >= 8; option = option[8:] {
			left, right := be.BigEndian.Uint32(option), be.BigEndian.Uint32(option[4:])
			s.blocks = append(s.blocks, [2]int{int(int32(left - base[1-f.Direction])), int(int32(right - base[1-f.Direction]))})
		}
		all = append(all, s)
	}
	return all
}

// checkSACK compares what was said on the two legs of a connection whose data went down, to the client, or up. Returns whether
// little more was repeated than lost.
func checkSACK(t *testing.T, client, backend []said, down bool) (helped bool) {
	t.Helper()
	onClient, onBackend := checkLeg(t, "client", client, !down), checkLeg(t, "backend", backend, !down)
	from, to := onClient, onBackend // SACKs go the other way than data
	if !down {
		from, to = onBackend, onClient
	}
	if len(from.blocks) == 0 || len(to.blocks) == 0 {
		t.Fatalf("ACKs with SACK: %d on the client's leg, %d on the backend's: nothing was shown", len(onClient.blocks), len(onBackend.blocks))
	}
	for key := range to.blocks {
		if _, ok := from.blocks[key]; !ok {
			t.Errorf("said behind the balancer and never before it: %v", key)
		}
	}
	for key, carried := range from.blocks {
		if _, ok := to.blocks[key]; carried && !ok {
			t.Errorf("said before the balancer and not behind it: %v", key)
		}
	}
	for at, sums := range onClient.sums {
		if other, ok := onBackend.sums[at]; ok && other != sums {
			t.Errorf("bytes %v have another CRC on the other leg: %#x, %#x", at, sums, other)
		}
	}
	t.Logf("ACKs with SACK: %d before, %d behind; segments repeated: %d and %d, lost: %d and %d",
		len(from.blocks), len(to.blocks), onClient.resent, onBackend.resent, onClient.lost, onBackend.lost)
	return min(onClient.resent, onBackend.resent) <= 3*max(onClient.lost, onBackend.lost)+50
}

// sackACK is an ACK and its blocks.
type sackACK struct {
	ack    int
	blocks [4][2]int
}

// legFacts is what a leg has shown.
type legFacts struct {
	blocks       map[sackACK]bool  // whether the wire carried it
	sums         map[[2]int]uint32 // by offset and length
	resent, lost int
}

// checkLeg looks at every ACK with SACK that answers the data of one side.
func checkLeg(t *testing.T, name string, frames []said, dataFromClient bool) legFacts {
	t.Helper()
	facts := legFacts{blocks: map[sackACK]bool{}, sums: map[[2]int]uint32{}}
	sent := 0 // end of the highest data so far
	wrong := 0
	for _, f := range frames {
		if f.fromClient == dataFromClient {
			if f.bytes > 0 && f.at < sent {
				facts.resent++
			}
			if f.bytes > 0 && !f.carried {
				facts.lost++
			}
			if f.bytes > 0 {
				facts.sums[[2]int{f.at, f.bytes}] = f.sum
			}
			sent = max(sent, f.end)
			continue
		}
		if len(f.blocks) == 0 {
			continue
		}
		key := sackACK{ack: f.ack}
		copy(key.blocks[:], f.blocks)
		facts.blocks[key] = facts.blocks[key] || f.carried
		for i, b := range f.blocks {
			// RFC 2883: the first block may be below the ACK, or within the second: then it tells of a duplicate.
			duplicate := i == 0 && (b[1] <= f.ack || len(f.blocks) > 1 && b[0] >= f.blocks[1][0] && b[1] <= f.blocks[1][1])
			if b[0] < 0 || b[0] >= b[1] || b[1] > sent || !duplicate && b[0] <= f.ack {
				wrong++
				if wrong <= 5 {
					t.Errorf("%s leg: block %v with ACK %d, when %d bytes were sent", name, b, f.ack, sent)
				}
			}
		}
	}
	return facts
}
