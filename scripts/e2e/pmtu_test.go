// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"snilb/scripts/testbed"
)

// TestPathMTU moves data through a small link behind routers, of which the sender, on the other leg, learns only by an ICMP
// message that quotes what it never sent. TestBedHop is the same without snilb.
func TestPathMTU(t *testing.T) {
	const size = 20 << 20
	for name, opts := range hops {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, opts)
			startBackends(t, bed)
			attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) {
				t.Run("download", func(t *testing.T) { downloadSize(t, bed, vip(bed, v6), "a.example.com", size) })
				t.Run("upload", func(t *testing.T) { uploadSize(t, bed, vip(bed, v6), "a.example.com", size) })
				wantBothTold(t, bed, opts, v6)
			})
		})
	}
}

// wantBothTold looks that the far host of the other leg has heard of the small link.
func wantBothTold(t *testing.T, bed *testbed.Bed, opts testbed.Options, v6 bool) {
	t.Helper()
	if opts.ClientHop != 0 && tooBig(t, bed.Backend, v6) == 0 {
		t.Error("the backend was never told of the client's small link")
	}
	if opts.BackendHop != 0 && tooBig(t, bed.Client, v6) == 0 {
		t.Error("the client was never told of the backend's small link")
	}
}
