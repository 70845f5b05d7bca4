// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"snilb/maps"
	"snilb/scripts/testbed"
)

// manyBackends are as many as a million flows have ports towards.
const manyBackends = 40

// manyPool names backends that are nobody, at the second backend's side.
func manyPool(bed *testbed.Bed) (text string, addrs []netip.AddrPort) {
	a := at(bed, 2, false, 443).Addr().As4()
	var list []string
	for i := range manyBackends {
		a[3] = byte(100 + i)
		addr := netip.AddrPortFrom(netip.AddrFrom4(a), 443)
		addrs, list = append(addrs, addr), append(list, fmt.Sprintf("%q", addr))
	}
	return "  many: {backends: [" + strings.Join(list, ", ") + "]}\n", addrs
}

// fillFlows binds n flows behind the daemon's back that are like one that is there, of workers by turns.
func fillFlows(t *testing.T, bed *testbed.Bed, d *daemon, n, workers int, backends []netip.AddrPort) {
	t.Helper()
	h, err := bed.LB.Netlink()
	must(t, err)
	defer h.Close()
	sources := netip.MustParsePrefix("10.64.0.0/10")
	must(t, h.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: sources.Addr().AsSlice(), Mask: net.CIDRMask(sources.Bits(), 32)}, Gw: bed.Clients4[0].AsSlice()}))
	tables := &maps.Tables{Flows4: openPins(t, d.name, "flows4"), Flows6: openPins(t, d.name, "flows6")}
	tuples, entries := [2]maps.Tuple{}, [2]maps.Entry{}
	must(t, tables.Flows(func(leg maps.Leg, tuple maps.Tuple, e *maps.Entry) {
		if tuple.Src.Addr().Is4() && e.Has(maps.FlowConfirmed) { // the client's
			tuples[leg], entries[leg] = tuple, *e
		}
	}))
	var local netip.Addr
	must(t, tables.Flows(func(leg maps.Leg, tuple maps.Tuple, e *maps.Entry) {
		if leg == maps.LegBackend && e.To.Dst == tuples[maps.LegClient].Src {
			tuples[leg], entries[leg], local = tuple, *e, tuple.Dst.Addr()
		}
	}))
	if !local.IsValid() {
		t.Fatal("no flow to make others like")
	}
	const ports = 28000
	for i := range n {
		worker := i % workers
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(64 + i>>16), byte(i >> 8), byte(i)}), 40000)
		ours := netip.AddrPortFrom(local, uint16(32768+i%ports))
		backend := backends[i/ports]
		up, down := entries[maps.LegClient], entries[maps.LegBackend]
		for _, e := range []*maps.Entry{&up, &down} {
			e.Flow.Control, e.Flow.Generation = maps.FlowControl(e.Nexthop(), 0, worker), uint16(i)
		}
		up.Flow.Control |= maps.FlowConfirmed
		up.To = maps.Tuple{Src: ours, Dst: backend}
		down.To.Dst = client
		must(t, tables.InsertFlow(maps.LegBackend, up.To.Reverse(), &down))
		must(t, tables.InsertFlow(maps.LegClient, maps.Tuple{Src: client, Dst: tuples[maps.LegClient].Dst}, &up))
	}
}

// TestSurviveMany has daemons follow each other, by --on-exit keep and by a kill, where the tables hold so many flows that taking
// them over takes its time (a million: SNILB_FLOWS). No connection fails meanwhile.
func TestSurviveMany(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	const workers = 2
	text, backends := manyPool(bed)
	routes := strings.Replace(siteRoutes(bed), "routes:\n", text+"routes:\n  - {sni: many.example.com, pool: many}\n", 1)
	args := []string{"--on-exit", "keep", "--workers", fmt.Sprint(workers), "--dead-after", "30s"} // on a slow machine it takes more than 10 s
	d := attach(t, bed, routes, args...)
	old := openSurvivors(t, bed)
	old.wantAlive(t)
	many := times(t, "SNILB_FLOWS", 200_000)
	begin := time.Now()
	fillFlows(t, bed, d, many, workers, backends)
	t.Logf("filled in %s", time.Since(begin))
	l := startLoad(t, bed, "a.example.com")
	l.since(0, 10)
	for _, end := range []func(){func() { d.keep() }, func() { d.keep() }, func() { d.kill() }} {
		begin := time.Now()
		end()
		away := time.Now()
		d = d.again(routes, args...)
		ready := time.Now()
		if n := d.counters().Engine.Adopted; n < many+20 {
			t.Errorf("%d flows were taken over, there are %d", n, many+20)
		}
		old.wantAlive(t)
		l.since(l.asked.Load(), 10)
		t.Logf("ended in %s, the next one was ready after %s", away.Sub(begin), ready.Sub(away))
	}
	l.end()
	old.wantAlive(t)
	resident := func() int64 { return procField(t, fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid), "VmHWM:") >> 10 }
	begin, before := time.Now(), resident()
	old.wantListed(t, d)
	t.Logf("listed in %s; the daemon took %d MB at most, and %d before", time.Since(begin), resident(), before)
	old.close()
	begin = time.Now()
	d.kill()
	_, err := d.snilb("detach", "--all", "--name", d.name)
	must(t, err)
	t.Logf("detached in %s", time.Since(begin))
	assertClean(t, bed, d.name)
}
