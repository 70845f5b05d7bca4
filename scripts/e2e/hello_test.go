// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// shapes are ways in which the segments of a write may arrive.
var shapes = map[string]func([]testbed.Segment) []testbed.Segment{
	"in-order": nil,
	"swapped": func(s []testbed.Segment) []testbed.Segment {
		slices.Reverse(s)
		return s
	},
	"twice": func(s []testbed.Segment) []testbed.Segment {
		return slices.Concat(s, s)
	},
	"first-repeated": func(s []testbed.Segment) []testbed.Segment {
		return slices.Concat(s[:1], s)
	},
	"overlapping": func(s []testbed.Segment) []testbed.Segment {
		return slices.Concat(overlap(s), s[len(s)-1:])
	},
}

// overlap prolongs each segment by the first bytes of the next.
func overlap(s []testbed.Segment) []testbed.Segment {
	out := slices.Clone(s)
	for i := range len(out) - 1 {
		next := s[i+1].Payload
		out[i].Payload = slices.Concat(s[i].Payload, next[:min(20, len(next))])
	}
	return out
}

// rawClient asks over a connection spoken by hand, its writes cut and ordered by shape.
func rawClient(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string, shape func([]testbed.Segment) []testbed.Segment) (string, error) {
	t.Helper()
	r, err := bed.Raw(target)
	must(t, err)
	defer func() { _ = r.Close() }()
	synAck, err := r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
	if err != nil {
		return "", err
	}
	if synAck.BadChecksum {
		t.Error("SYN-ACK with a bad checksum")
	}
	r.Shape = shape
	sent := &counter{Conn: r}
	c := handshake(t, sent, &tls.Config{ServerName: name})
	if n := sent.out.Load(); n <= uint64(r.MSS) {
		t.Errorf("the hello fit into one segment: %d bytes", n)
	}
	body, err := whoami(c)
	_ = r.Send(r.Bare(testbed.RST)) // nothing more is wanted of this connection
	return body, err
}

// classic is a hello from before the post-quantum key shares: it fits into any segment.
func classic(name string) *tls.Config {
	return &tls.Config{ServerName: name, CurvePreferences: []tls.CurveID{tls.X25519}}
}

// TestPostQuantum is a hello of two segments, as every current browser sends it.
func TestPostQuantum(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		t.Run("kernel-client", func(t *testing.T) {
			got, err := goClient(t, bed, vip(bed, v6), "a.example.com")
			wantBody(t, got, err, "b1", "a.example.com")
		})
		for name, shape := range shapes {
			t.Run(name, func(t *testing.T) {
				got, err := rawClient(t, bed, vip(bed, v6), "a.example.com", shape)
				wantBody(t, got, err, "b1", "a.example.com")
			})
		}
	})
}

// TestHelloInPieces writes the hello a few bytes at a time, and so with acknowledgements of the engine's between.
func TestHelloInPieces(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		for _, cut := range []struct {
			size  int
			pause time.Duration
		}{{1, 0}, {1, time.Millisecond}, {100, 60 * time.Millisecond}, {700, 0}} {
			t.Run(fmt.Sprintf("%d-bytes-%s", cut.size, cut.pause), func(t *testing.T) {
				var c net.Conn
				c, err := dialTCP(t, bed, vip(bed, v6))
				must(t, err)
				split := &splitter{Conn: c, size: cut.size, pause: cut.pause}
				got, err := whoami(handshake(t, split, classic("b.example.com")))
				wantBody(t, got, err, "b2", "b.example.com")
			})
		}
	})
}
