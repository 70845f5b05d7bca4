// SPDX-License-Identifier: Apache-2.0

//go:build kernels

// Only where VLAN devices are sure to exist: in the machines of `make test-kernels`.

package e2e

import (
	"slices"
	"testing"

	"snilb/scripts/testbed"
)

// TestVLAN serves clients behind one VLAN by backends behind another. snilb is attached to the VLAN's device, or to the
// one below it, which is the only place for XDP.
func TestVLAN(t *testing.T) {
	for _, c := range []struct {
		iface string
		modes []string
	}{
		{"eth0.100", []string{"tc"}},
		{"eth0", []string{"tc", "xdp", "xdp-generic"}},
	} {
		if !slices.Contains(c.modes, *mode) {
			continue
		}
		t.Run(c.iface, func(t *testing.T) {
			bed := newBed(t, testbed.Options{VLANs: true})
			startBackends(t, bed)
			if *mode == "xdp-generic" { // which leaves what a device has yet to sum to TC
				must(t, bed.Client.Offload("eth0", false, testbed.TxChecksum))
			}
			bed.Uplinks = []string{c.iface + "=" + *mode}
			// Not the common mode: that would be asked of the backends' interface too, a VLAN's device.
			d := attach(t, bed, siteRoutes(bed), "--mode", "tc")
			families(t, func(t *testing.T, v6 bool) {
				got, err := curl(t, bed, vip(bed, v6), "a.example.com")
				wantBody(t, got, err, "b1", "a.example.com")
			})
			wantAnswers(t, d)
		})
	}
}

// wantAnswers looks that both clients' SYNs were answered by the program of this mode, and not by the one behind it.
func wantAnswers(t *testing.T, d *daemon) {
	t.Helper()
	role := "client"
	if *mode != "tc" {
		role = "xdp"
	}
	c := d.counters()
	for _, i := range c.Interfaces {
		if i.Role == role && i.Packets["answer/syn"] >= 2 {
			return
		}
	}
	t.Errorf("the %s program answered no two SYNs: %+v", role, c.Interfaces)
}
