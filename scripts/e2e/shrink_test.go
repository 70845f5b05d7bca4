// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// forgetPMTU makes both hosts forget what ICMP told them before.
func forgetPMTU(t *testing.T, bed *testbed.Bed) {
	t.Helper()
	for _, ns := range []*testbed.NS{bed.Client, bed.Backend} {
		for _, family := range []string{"-4", "-6"} {
			if out, err := ns.Command(t.Context(), "ip", family, "route", "flush", "cache").CombinedOutput(); err != nil {
				t.Fatalf("ip route: %v\n%s", err, out)
			}
		}
	}
}

// keepAlive is a client that keeps its connection from one request to the next, and a count of those it made.
func keepAlive(bed *testbed.Bed, target netip.AddrPort, name string) (*http.Client, *atomic.Int64) {
	client, dials := httpClient(bed, target, &tls.Config{ServerName: name}), &atomic.Int64{}
	transport := client.Transport.(*http.Transport)
	transport.DisableKeepAlives = false
	dial := transport.DialContext
	transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials.Add(1)
		return dial(ctx, network, addr)
	}
	return client, dials
}

// waitFullMSS waits until clients are promised whole packets again: what a link bore a moment ago may still be announced.
func waitFullMSS(t *testing.T, bed *testbed.Bed, target netip.AddrPort) {
	t.Helper()
	const full = 1500 - 40 - 20 - 12 // IPv6, TCP, timestamps
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		conn, err := bed.Client.DialContext(t.Context(), "tcp", target.String())
		must(t, err)
		info := tcpInfo(t, conn)
		must(t, conn.Close())
		if info.Snd_mss >= full {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after 10 s clients are still promised %d bytes", info.Snd_mss)
		}
	}
}

// TestShrinkingLink lowers the MTU of the balancer's own link to one side while connections are open, which were promised
// more. Their senders are told by ICMP; those that never hear of it are slow and do not stall.
func TestShrinkingLink(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		name, size := "told", int64(8<<20)
		if deaf {
			name, size = "deaf", 300_000
		}
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, testbed.Options{NoOffload: true})
			startBackends(t, bed)
			if deaf {
				// Whoever stands behind such a firewall is never told of a smaller MTU.
				for _, ns := range []*testbed.NS{bed.Client, bed.Backend} {
					filter(t, ns, "input", "icmp type destination-unreachable drop",
						"icmpv6 type { packet-too-big, destination-unreachable } drop")
				}
			}
			d := attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) {
				for dev, transfer := range map[string]func(*testing.T, *http.Client, int64){"eth1": uploadBy, "eth0": downloadBy} {
					t.Run(dev, func(t *testing.T) {
						forgetPMTU(t, bed)
						waitFullMSS(t, bed, vip(bed, v6))
						client, dials := keepAlive(bed, vip(bed, v6), "a.example.com")
						defer client.CloseIdleConnections()
						downloadBy(t, client, 100)
						before := d.counters().Engine.Events["too_big"]
						must(t, bed.LB.SetMTU(dev, 1280))
						for range 50 { // the daemon hears of it a moment later
							time.Sleep(100 * time.Millisecond)
							transfer(t, client, size)
							if d.counters().Engine.Events["too_big"] > before {
								break
							}
						}
						must(t, bed.LB.SetMTU(dev, 1500))
						if dials.Load() != 1 {
							t.Errorf("%d connections: the first one did not last", dials.Load())
						}
						switch cut := d.counters().Engine.Events["too_big"] - before; {
						case cut == 0:
							t.Error("no packet was too big: the test shows nothing")
						case !deaf && cut > 200: // a window or two until the sender has heard
							t.Errorf("%d packets were too big: their sender was not told", cut)
						}
					})
				}
			})
		})
	}
}
