// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// ip runs ip(8) in a namespace.
func ip(t *testing.T, ns *testbed.NS, args ...string) {
	t.Helper()
	if out, err := ns.Command(t.Context(), "ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// talkers send something over connections again and again, which must come back.
type talkers struct {
	t     *testing.T
	stop  context.CancelFunc
	all   sync.WaitGroup
	pings []atomic.Int64 // by connection
}

// talk begins, until end.
func talk(t *testing.T, conns []net.Conn) *talkers {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	k := &talkers{t: t, stop: stop, pings: make([]atomic.Int64, len(conns))}
	for i, c := range conns {
		k.all.Go(func() {
			for ctx.Err() == nil {
				if err := ping(c, fmt.Sprintf("ping %d of %d", k.pings[i].Load(), i)); err != nil {
					t.Errorf("connection %d from %s: %v", i, c.LocalAddr(), err)
					return
				}
				k.pings[i].Add(1)
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	t.Cleanup(k.end)
	return k
}

// goOn waits until each connection has brought something back that was sent later.
func (k *talkers) goOn() {
	k.t.Helper()
	deadline := time.Now().Add(clientTimeout)
	for i := range k.pings {
		for before := k.pings[i].Load(); k.pings[i].Load() < before+2; time.Sleep(5 * time.Millisecond) {
			if k.t.Failed() || time.Now().After(deadline) {
				k.t.Fatalf("connection %d does not go on", i)
			}
		}
	}
}

func (k *talkers) end() {
	k.stop()
	k.all.Wait()
}

// waitServed waits until a new connection works, in both families.
func waitServed(t *testing.T, bed *testbed.Bed) {
	t.Helper()
	for _, v6 := range []bool{false, true} {
		var err error
		for deadline := time.Now().Add(clientTimeout); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			var c net.Conn
			if c, err = tryTLS(t, bed, vip(bed, v6), "a.example.com"); err == nil {
				err = ping(c, "new")
				_ = c.Close()
				break
			}
		}
		if err != nil {
			t.Fatalf("no new connection is served: %v", err)
		}
	}
}

// TestLinkAgain deletes an interface and makes it again under its name, with open connections that never stop to send. They
// go on, and new ones are served.
func TestLinkAgain(t *testing.T) {
	for dev, side := range map[string]string{"eth0": "client", "eth1": "backend"} {
		t.Run(side, func(t *testing.T) {
			bed := echoBed(t, testbed.Options{}, nil)
			d := attach(t, bed, siteRoutes(bed), atOnce...)
			k := talk(t, openMany(t, bed, 40, "a.example.com"))
			for range 3 {
				must(t, bed.Unplug(dev))
				time.Sleep(300 * time.Millisecond)
				must(t, bed.Plug(dev))
				waitServed(t, bed)
				k.goOn()
			}
			k.end()
			d.stop(syscall.SIGTERM)
		})
	}
}

// TestLinkDown turns an interface off and on.
func TestLinkDown(t *testing.T) {
	for dev, side := range map[string]string{"eth0": "client", "eth1": "backend"} {
		t.Run(side, func(t *testing.T) {
			bed := echoBed(t, testbed.Options{}, nil)
			must(t, bed.LB.Sysctl("ipv6/conf/"+dev+"/keep_addr_on_down", "1"))
			attach(t, bed, siteRoutes(bed), atOnce...)
			k := talk(t, openMany(t, bed, 10, "a.example.com"))
			for range 3 {
				must(t, bed.LB.SetLink(dev, false))
				time.Sleep(300 * time.Millisecond)
				must(t, bed.LB.SetLink(dev, true))
				waitServed(t, bed)
				k.goOn()
			}
			k.end()
		})
	}
}

// TestLinkRenamed gives an attached interface another name: the programs stay on it, under the name it had.
func TestLinkRenamed(t *testing.T) {
	bed := echoBed(t, testbed.Options{}, nil)
	d := attach(t, bed, siteRoutes(bed), atOnce...)
	k := talk(t, openMany(t, bed, 4, "a.example.com"))
	rename := func(from, to string) {
		// Down, as old kernels want it, would take the IPv6 addresses away.
		ip(t, bed.LB, "link", "set", "dev", from, "name", to)
		time.Sleep(300 * time.Millisecond)
		waitServed(t, bed)
		k.goOn()
	}
	rename("eth0", "lan0")
	rename("lan0", "eth0")
	rename("eth0", "lan0")
	k.end()
	d.stop(syscall.SIGTERM)
}

// TestSourceMoves changes the address that the balancer has towards the backends: new connections come from the new one.
func TestSourceMoves(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed), atOnce...)
	families(t, func(t *testing.T, v6 bool) {
		from := func() netip.Addr {
			c := dialTLS(t, bed, vip(bed, v6), "a.example.com")
			defer func() { _ = c.Close() }()
			return seenFrom(t, c, "b1").Addr()
		}
		must(t, bed.LB.Sysctl("ipv4/conf/eth1/promote_secondaries", "1"))
		old := from()
		at, moved, bits := old, old.Next().Next(), "/24"
		if v6 {
			bits = "/64"
		}
		for _, to := range []netip.Addr{moved, old} {
			ip(t, bed.LB, "addr", "add", to.String()+bits, "dev", "eth1", "nodad")
			ip(t, bed.LB, "addr", "del", at.String()+bits, "dev", "eth1")
			at = to
			var got netip.Addr
			for deadline := time.Now().Add(clientTimeout); got != to && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
				got = from()
			}
			if got != to {
				t.Errorf("the backend sees %s, and the address is %s now", got, to)
			}
		}
	})
}

// TestRouteMoves moves the way to a backend to another interface and back, in the middle of connections, and the way of its
// answers too.
func TestRouteMoves(t *testing.T) {
	bed := echoBed(t, testbed.Options{}, nil)
	net4, net6, err := bed.SecondPath()
	must(t, err)
	d := attach(t, bed, siteRoutes(bed), atOnce...)
	k := talk(t, openMany(t, bed, 10, "a.example.com"))
	type way struct{ ours, theirs, gateway, back string }
	first := func(p netip.Prefix) (string, string) {
		one := p.Masked().Addr().Next()
		return one.String(), one.Next().String()
	}
	lb4, far4 := first(net4)
	lb6, far6 := first(net6)
	ways := []way{
		{bed.Backends4[0].String(), "192.0.2.1", far4, lb4},
		{bed.Backends6[0].String(), "2001:db8:2::1", far6, lb6},
	}
	for range 3 {
		for _, w := range ways {
			ip(t, bed.LB, "route", "add", w.ours, "via", w.gateway, "dev", "eth3")
			d.waitRoles("eth3", 1) // what comes there before is the stack's, which resets
			ip(t, bed.Backend, "route", "add", w.theirs, "via", w.back, "dev", "eth1")
		}
		waitServed(t, bed)
		waitMoved(t, bed)
		for _, w := range ways {
			ip(t, bed.LB, "route", "del", w.ours, "via", w.gateway, "dev", "eth3")
			ip(t, bed.Backend, "route", "del", w.theirs, "via", w.back, "dev", "eth1")
		}
		waitServed(t, bed)
		k.goOn()
	}
	k.end()
}

// waitMoved waits until open connections, which never stop to send, come to the backends by the second path alone.
func waitMoved(t *testing.T, bed *testbed.Bed) {
	t.Helper()
	for deadline := time.Now().Add(clientTimeout); ; {
		old, moved := received(t, bed.Backend, "eth0"), received(t, bed.Backend, "eth1")
		time.Sleep(200 * time.Millisecond)
		old, moved = received(t, bed.Backend, "eth0")-old, received(t, bed.Backend, "eth1")-moved
		if moved > 50 && old < 10 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d packets by the new way and %d by the old one: the open connections do not follow", moved, old)
		}
	}
}

// TestRouteAway takes the routes away, to all backends or to the client, while a client connects: it is served once they are back,
// and refused when they do not come back in time. Who has another pool to go to does not wait.
func TestRouteAway(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	const pause = 800 * time.Millisecond
	away := func(do string, addr netip.Addr) {
		if _, err := bed.LB.Command(t.Context(), "ip", "route", do, "unreachable", netip.PrefixFrom(addr, addr.BitLen()).String()).Output(); err != nil {
			t.Errorf("ip route %s %s: %v", do, addr, err)
		}
	}
	// Those who come before the daemon has heard of it do not count.
	ask := func(v6 bool, back func()) (took time.Duration, err error) {
		for err == nil && took < pause/2 {
			began := time.Now()
			timer := time.AfterFunc(pause, back)
			_, err = goClient(t, bed, vip(bed, v6), "a.example.com")
			took = time.Since(began)
			if !timer.Stop() {
				break
			}
		}
		return took, err
	}
	t.Run("back", func(t *testing.T) {
		d := attach(t, bed, siteRoutes(bed, "timeouts: {connect: 20s}"))
		families(t, func(t *testing.T, v6 bool) {
			c := dialTLS(t, bed, vip(bed, v6), "a.example.com")
			client := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
			must(t, c.Close())
			for result, addr := range map[string]netip.Addr{"unreachable": at(bed, 1, v6, 443).Addr(), "": client} {
				away("add", addr)
				took, err := ask(v6, func() { away("del", addr) })
				if err != nil || took < pause {
					t.Errorf("%s away for %s: %v after %s", addr, pause, err, took)
				}
				if result != "" && d.connects("", result) == 0 {
					t.Errorf("connects: %+v, want some %s", d.counters().Engine.Connects, result)
				}
			}
		})
		d.onlyConnects("ok", "unreachable")
		d.wantDecisions("no_backend/reset", 0)
	})
	t.Run("gone", func(t *testing.T) {
		attach(t, bed, siteRoutes(bed, "timeouts: {connect: 1s}"))
		families(t, func(t *testing.T, v6 bool) {
			addr := at(bed, 1, v6, 443).Addr()
			away("add", addr)
			defer away("del", addr)
			if took, err := ask(v6, func() {}); err == nil || took < time.Second || took > time.Second+failoverMargin {
				t.Errorf("%v after %s, want a reset after 1 s", err, took)
			}
		})
	})
	t.Run("spare", func(t *testing.T) {
		routes := failoverRoutes("connect: 20s", [][2]netip.AddrPort{both(bed, 1, 443)}, `no_backend: "pool:spare"`)
		attach(t, bed, strings.Replace(routes, "pools:\n", "pools:\n"+pool(bed, "spare", "", 2), 1))
		families(t, func(t *testing.T, v6 bool) {
			addr := at(bed, 1, v6, 443).Addr()
			away("add", addr)
			defer away("del", addr)
			askServed(t, bed, v6, failoverMargin)
		})
	})
}

// TestUplinkGoes has two uplinks in two modes. One is deleted: connections by the other one do not notice; it comes back,
// and they may move there.
func TestUplinkGoes(t *testing.T) {
	modes := []string{"tc", "xdp-generic"}
	if *mode != "tc" {
		modes = []string{*mode, "tc"}
	}
	bed := newBed(t, testbed.Options{Topology: testbed.TwoUplinks, NoOffload: *mode != "xdp"})
	for _, v6 := range []bool{false, true} {
		serveEcho(t, bed, at(bed, 1, v6, 443), nil)
	}
	d := start(t, bed, instanceName(), []string{"eth0=" + modes[0], "eth2=" + modes[1]}, siteRoutes(bed), atOnce...)
	d.waitReady()
	must(t, bed.UseUplink(0))
	var conns []net.Conn
	for range 4 {
		for _, extra := range []netip.Addr{bed.ExtraVIP4, bed.ExtraVIP6} {
			conns = append(conns, dialTLS(t, bed, netip.AddrPortFrom(extra, 443), "a.example.com"))
		}
	}
	k := talk(t, conns)
	for range 2 {
		must(t, bed.UseUplink(1))
		time.Sleep(200 * time.Millisecond)
		must(t, bed.UseUplink(0))
		time.Sleep(50 * time.Millisecond)
		must(t, bed.Unplug("eth2"))
		for range 20 { // none of them waits for the uplink
			for _, extra := range []netip.Addr{bed.ExtraVIP4, bed.ExtraVIP6} {
				c := dialTLS(t, bed, netip.AddrPortFrom(extra, 443), "a.example.com")
				must(t, ping(c, "by the other uplink"))
				must(t, c.Close())
			}
		}
		must(t, bed.Plug("eth2"))
		d.waitRoles("eth2", 2)
	}
	must(t, bed.UseUplink(1))
	k.goOn()
	k.end()
	d.stop(syscall.SIGTERM)
}

// waitRoles waits until an interface has that many programs or more.
func (d *daemon) waitRoles(dev string, want int) {
	d.t.Helper()
	for deadline := time.Now().Add(readyTimeout); ; time.Sleep(20 * time.Millisecond) {
		out, err := d.snilb("status", "--name", d.name, "-o", "jsonl")
		must(d.t, err)
		if strings.Count(out, `"name":"`+dev+`"`) >= want {
			return
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("%s has no programs again:\n%s", dev, out)
		}
	}
}

// TestNoInterface names an interface that is not there: an error that says so, and nothing left.
func TestNoInterface(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	d := start(t, bed, instanceName(), []string{"eth0", "eth7"}, siteRoutes(bed))
	select {
	case <-d.exited:
	case <-time.After(readyTimeout):
		t.Fatal("attached to an interface that is not there")
	}
	if code := d.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(d.stderr.String(), "eth7") {
		t.Errorf("exit code %d", code)
	}
	assertClean(t, bed, d.name)
}
