// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// No snilb in this file either: wires and hops do what the tests that use them rely on.

// wired is a bed with a wire in each leg.
func wired(t *testing.T, opts testbed.Options) *testbed.Bed {
	t.Helper()
	opts.Wires = true
	return newBed(t, opts)
}

// throughWire sends numbered segments through the client's wire and returns them as the backend's wire saw them.
func throughWire(t *testing.T, bed *testbed.Bed, v6 bool, n int, i testbed.Impairment) (sent, got []testbed.Frame) {
	t.Helper()
	r, err := bed.Raw(at(bed, 1, v6, 443))
	must(t, err)
	defer func() { _ = r.Close() }()
	must(t, r.Send(testbed.Segment{})) // for the neighbour entries on the way
	time.Sleep(50 * time.Millisecond)
	bed.ClientWire.ImpairOne(testbed.ToLB, i)
	defer bed.ClientWire.Impair(testbed.Impairment{})
	bed.ClientWire.Record()
	bed.BackendWire.Record()
	for seq := range n {
		must(t, r.Send(testbed.Segment{Seq: uint32(seq), Flags: testbed.ACK}))
		if seq%50 == 0 {
			time.Sleep(time.Millisecond) // no queue on the way overflows
		}
	}
	late := 400 * time.Millisecond
	if i.Filter != nil {
		late = time.Second // an echo is by 300 ms
	}
	time.Sleep(i.Delay + i.Jitter + late)
	return toward(bed.ClientWire.Recorded(), testbed.ToLB), toward(bed.BackendWire.Recorded(), testbed.FromLB)
}

func toward(frames []testbed.Frame, d testbed.Direction) []testbed.Frame {
	return slices.DeleteFunc(frames, func(f testbed.Frame) bool { return f.Direction != d })
}

// TestBedWire measures each impairment.
func TestBedWire(t *testing.T) {
	bed := wired(t, testbed.Options{Forward: true})
	const n = 2000
	families(t, func(t *testing.T, v6 bool) {
		t.Run("none", func(t *testing.T) {
			_, got := throughWire(t, bed, v6, n, testbed.Impairment{})
			if len(got) != n || late(got) != 0 {
				t.Errorf("of %d arrived %d, out of order %d", n, len(got), late(got))
			}
		})
		t.Run("drop", func(t *testing.T) {
			_, got := throughWire(t, bed, v6, n, testbed.Impairment{Drop: 0.1})
			if lost := n - len(got); lost < n*7/100 || lost > n*13/100 {
				t.Errorf("lost %d of %d, want about 10 %%", lost, n)
			}
		})
		t.Run("duplicate", func(t *testing.T) {
			_, got := throughWire(t, bed, v6, n, testbed.Impairment{Duplicate: 0.1})
			if more := len(got) - n; more < n*7/100 || more > n*13/100 {
				t.Errorf("%d more than %d, want about 10 %%", more, n)
			}
		})
		t.Run("reorder", func(t *testing.T) {
			_, got := throughWire(t, bed, v6, n, testbed.Impairment{Reorder: 0.1})
			if l := late(got); len(got) != n || l < n*6/100 || l > n*13/100 {
				t.Errorf("arrived %d of %d, late %d, want all, and about 10 %% late", len(got), n, l)
			}
		})
		t.Run("filter", func(t *testing.T) {
			_, got := throughWire(t, bed, v6, 10, testbed.Impairment{Filter: func(f testbed.Frame) testbed.Fate {
				switch f.Seq {
				case 3:
					return testbed.Dropped
				case 5:
					return testbed.Doubled
				case 7:
					return testbed.Echoed
				}
				return testbed.Carried
			}})
			if want := []uint32{0, 1, 2, 4, 5, 5, 6, 7, 8, 9, 7}; !slices.Equal(seqs(got), want) {
				t.Errorf("arrived %v, want %v", seqs(got), want)
			}
		})
		t.Run("delay", func(t *testing.T) {
			i := testbed.Impairment{Delay: 30 * time.Millisecond, Jitter: 10 * time.Millisecond}
			sent, got := throughWire(t, bed, v6, n, i)
			if len(sent) != n || len(got) != n || late(got) != 0 {
				t.Fatalf("of %d arrived %d, out of order %d", len(sent), len(got), late(got))
			}
			for k := range got {
				if d := got[k].At.Sub(sent[k].At); d < i.Delay || d > time.Second {
					t.Fatalf("segment %d took %s, want %s and up to %s more", k, d, i.Delay, i.Jitter)
				}
			}
		})
		t.Run("disorder", func(t *testing.T) {
			_, got := throughWire(t, bed, v6, n, testbed.Impairment{Jitter: 10 * time.Millisecond, Disorder: true})
			if l := late(got); len(got) != n || l < n/10 {
				t.Errorf("arrived %d of %d, late %d, want all, and many late", len(got), n, l)
			}
		})
	})
}

func seqs(frames []testbed.Frame) []uint32 {
	var all []uint32
	for _, f := range frames {
		all = append(all, f.Seq)
	}
	return all
}

// late counts the frames that came behind one with a higher number.
func late(frames []testbed.Frame) int {
	var highest uint32
	n := 0
	for _, f := range frames {
		if f.Seq < highest {
			n++
		}
		highest = max(highest, f.Seq)
	}
	return n
}

// TestBedWireBulk moves 100 MB through two wires, which lose nothing of it by themselves.
func TestBedWireBulk(t *testing.T) {
	bed := wired(t, testbed.Options{Forward: true})
	startBackends(t, bed)
	families(t, func(t *testing.T, v6 bool) {
		t.Run("download", func(t *testing.T) { download(t, bed, at(bed, 1, v6, 443), "a.example.com") })
		t.Run("upload", func(t *testing.T) { upload(t, bed, at(bed, 1, v6, 443), "a.example.com") })
	})
	for _, ns := range []*testbed.NS{bed.Client, bed.Backend} {
		if n := snmp(t, ns, "Tcp: RetransSegs"); n > 100 { // of 300000: a late ACK may cost a few
			t.Errorf("%s had to repeat %d segments", ns.Name, n)
		}
	}
}

// hops are the beds with a small link in a leg.
var hops = map[string]testbed.Options{
	"client-hop":  {ClientHop: 1280, NoOffload: true},
	"backend-hop": {BackendHop: 1280, NoOffload: true},
	"both":        {ClientHop: 1280, BackendHop: 1400},
}

// TestBedHop moves data through a small link, of which both ends learn by ICMP alone: a segment that fits the leg must not
// get through, in either direction, and a transfer must all the same.
func TestBedHop(t *testing.T) {
	for name, opts := range hops {
		t.Run(name, func(t *testing.T) {
			opts.Forward = true
			bed := newBed(t, opts)
			startBackends(t, bed)
			families(t, func(t *testing.T, v6 bool) {
				download(t, bed, at(bed, 1, v6, 443), "a.example.com")
				upload(t, bed, at(bed, 1, v6, 443), "a.example.com")
				for _, ns := range []*testbed.NS{bed.Client, bed.Backend} {
					if tooBig(t, ns, v6) == 0 {
						t.Errorf("%s was never told that a packet is too big", ns.Name)
					}
				}
			})
		})
	}
}

// tooBig counts the ICMP messages of that kind that a namespace got.
func tooBig(t *testing.T, ns *testbed.NS, v6 bool) int {
	t.Helper()
	if v6 {
		return snmp(t, ns, "Icmp6InPktTooBigs")
	}
	return snmp(t, ns, "IcmpMsg: InType3")
}

// snmp reads a counter of a namespace.
func snmp(t *testing.T, ns *testbed.NS, key string) int {
	t.Helper()
	file := "/proc/net/snmp"
	if !strings.Contains(key, ": ") {
		file = "/proc/net/snmp6"
	}
	out, err := ns.Command(t.Context(), "cat", file).Output()
	must(t, err)
	return counted(string(out), key)
}

// counted reads a counter of /proc/net/snmp6, or of the pair of lines that /proc/net/snmp has for a group ("Group: Name ").
func counted(text, key string) (n int) {
	group, name, inPairs := strings.Cut(strings.TrimSpace(key), ": ")
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		fields := strings.Fields(line)
		switch {
		case !inPairs && len(fields) == 2 && fields[0] == key:
			n, _ = strconv.Atoi(fields[1])
			return n
		case inPairs && strings.HasPrefix(line, group+": ") && i+1 < len(lines):
			if at := slices.Index(fields, name); at > 0 {
				n, _ = strconv.Atoi(strings.Fields(lines[i+1])[at])
				return n
			}
		}
	}
	return 0
}
