// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"slices"
	"strings"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// TestSynAck offers options and flags that snilb does not speak: the answer may promise nothing that the backend, who hears
// of this connection later, would have to keep.
func TestSynAck(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	mptcp := []byte{30, 12, 0x01, 0x81, 1, 2, 3, 4, 5, 6, 7, 8}
	fastOpen := []byte{34, 2}
	unknown := []byte{99, 4, 0xaa, 0xbb}
	families(t, func(t *testing.T, v6 bool) {
		for name, options := range map[string][]byte{
			"linux":     testbed.LinuxSYN(1000),
			"mptcp":     slices.Concat(mptcp, testbed.LinuxSYN(1000)),
			"fast-open": slices.Concat(testbed.LinuxSYN(1000), fastOpen, testbed.NOP(), testbed.NOP()),
			"unknown":   slices.Concat(unknown, testbed.MSS(1400), testbed.WScale(2), testbed.NOP()),
			"none":      nil,
			"after-end": slices.Concat(testbed.MSS(1400), []byte{0, 0x42, 0x42, 0x42}),
		} {
			t.Run(name, func(t *testing.T) { checkSynAck(t, bed, v6, options) })
		}
	})
}

func checkSynAck(t *testing.T, bed *testbed.Bed, v6 bool, options []byte) {
	t.Helper()
	r, err := bed.Raw(vip(bed, v6))
	must(t, err)
	defer func() { _ = r.Close() }()
	syn := testbed.Segment{
		Seq: r.ISS, Window: r.Window, Options: options, TOS: 1,
		Flags:   testbed.SYN | testbed.ECE | testbed.CWR | testbed.AE,
		Payload: []byte("not before the handshake"),
	}
	must(t, r.Send(syn))
	got, err := r.Recv(3 * time.Second)
	must(t, err)
	if got.Flags != testbed.SYN|testbed.ACK || got.Ack != r.ISS+1 || got.BadChecksum || got.Window == 0 || got.TOS&3 != 0 {
		t.Errorf("SYN-ACK: %s (TOS %#x, bad checksum %t)", got, got.TOS, got.BadChecksum)
	}
	if len(got.Payload) > 0 {
		t.Errorf("SYN-ACK with %d bytes of the SYN's", len(got.Payload))
	}
	for _, kind := range []byte{30, 34, 99} {
		if _, ok := got.Option(kind); ok {
			t.Errorf("SYN-ACK repeats option %d: %s", kind, got)
		}
	}
	for _, kind := range []byte{testbed.OptMSS, testbed.OptWScale} {
		_, asked := syn.Option(kind)
		if _, ok := got.Option(kind); ok != asked {
			t.Errorf("option %d: offered %t, answered %t: %s", kind, asked, ok, got)
		}
	}
}

// TestUnknownFlow sends data of a connection that nobody knows.
func TestUnknownFlow(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	for _, word := range []string{"reset", "drop", "pass"} {
		t.Run(word, func(t *testing.T) {
			attach(t, bed, siteRoutes(bed, "unknown_flow: "+word))
			families(t, func(t *testing.T, v6 bool) { stray(t, bed, v6, word) })
		})
	}
}

func stray(t *testing.T, bed *testbed.Bed, v6 bool, word string) {
	t.Helper()
	r, err := bed.Raw(vip(bed, v6))
	must(t, err)
	defer func() { _ = r.Close() }()
	r.RcvNxt = 0x12345678
	must(t, r.Send(r.At(100, []byte(strings.Repeat("x", 50)))))
	if word == "drop" {
		must(t, r.Quiet(time.Second))
		return
	}
	got, err := r.Recv(3 * time.Second) // with pass it is the stack that refuses
	must(t, err)
	if !got.Has(testbed.RST) || got.Seq != r.RcvNxt || got.BadChecksum {
		t.Errorf("answer %s, want RST with seq %d", got, r.RcvNxt)
	}
}
