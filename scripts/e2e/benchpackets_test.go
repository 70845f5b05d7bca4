// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"snilb/scripts/testbed"
	"snilb/userspace/bench"
)

// The clients of the packet generator, which no kernel owns.
var packetSources = map[bool]netip.Prefix{
	false: netip.MustParsePrefix("10.64.0.0/20"),
	true:  netip.MustParsePrefix("2001:db8:64::/64"),
}

// routePacketSources leads them to the client, and has the load balancer take frames of XDP: a veth does so with GRO.
func routePacketSources(tb testing.TB, bed *testbed.Bed) {
	tb.Helper()
	h, err := bed.LB.Netlink()
	check(tb, err)
	defer h.Close()
	for v6, p := range packetSources {
		gateway := bed.Clients4[0]
		if v6 {
			gateway = bed.Clients6[0]
		}
		to := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
		check(tb, h.RouteAdd(&netlink.Route{Dst: to, Gw: gateway.AsSlice()}))
	}
	for _, dev := range []string{"eth0", "eth1"} {
		check(tb, bed.LB.Offload(dev, true, testbed.GRO))
	}
}

// check is must for benchmarks too.
func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// packetBackends are all addresses of the backends.
func packetBackends(bed *testbed.Bed) (all []netip.AddrPort) {
	for i := range bed.Backends4 {
		all = append(all, at(bed, i+1, false, 443), at(bed, i+1, true, 443))
	}
	return all
}

// servePackets runs the responder in a namespace until the test ends. It returns what tells its thread's CPU time.
func servePackets(tb testing.TB, ns *testbed.NS, cpu int, s bench.PacketServer) (used func() time.Duration) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	thread, ended := make(chan int, 1), make(chan error, 1)
	go func() {
		ended <- ns.Do(func() error {
			pin(tb, cpu)
			thread <- unix.Gettid()
			return bench.ServePackets(ctx, s)
		})
	}()
	tb.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			tb.Errorf("responder: %v", err)
		}
	})
	tid := <-thread
	time.Sleep(200 * time.Millisecond)
	return func() time.Duration { return threadTime(tb, tid) }
}

// sendPackets runs the generator at the client, and returns the CPU time of its thread too.
func sendPackets(tb testing.TB, bed *testbed.Bed, cpu int, l bench.Load, xdp bool) (r *bench.Result, used time.Duration) {
	tb.Helper()
	o := bench.PacketOptions{Interface: "eth0", Sources: packetSources[l.Target.Addr().Is6()], XDP: xdp}
	ended := make(chan error)
	go func() {
		ended <- bed.Client.Do(func() (err error) {
			pin(tb, cpu)
			before := threadTime(tb, unix.Gettid())
			r, err = bench.Packets(context.Background(), l, o)
			used = threadTime(tb, unix.Gettid()) - before
			return err
		})
	}()
	check(tb, <-ended)
	return r, used
}

// pin keeps the calling thread on a CPU, -1 where it is.
func pin(tb testing.TB, cpu int) {
	if cpu < 0 {
		return
	}
	runtime.LockOSThread() // for good: the thread ends with its goroutine
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		tb.Error(err)
	}
}

// threadTime is the CPU time that a thread of this process has used, with what the kernel did in its name.
func threadTime(tb testing.TB, tid int) time.Duration {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/schedstat", tid))
	if err != nil {
		tb.Error(err)
	}
	var ns int64
	_, _ = fmt.Sscan(string(raw), &ns)
	return time.Duration(ns)
}

// packetLoad is some thousand connections, with hellos of one segment or of two.
func packetLoad(tb testing.TB, target netip.AddrPort, layout string) bench.Load {
	tb.Helper()
	names := bench.Names{List: []string{"a.example.com", "b.example.com", "x.w.example.com"}}
	hellos, err := bench.NewHellos(bench.HelloOptions{Layout: layout, Names: names})
	check(tb, err)
	return bench.Load{
		Target: target, Rate: 2000, Concurrency: 2000, Duration: time.Second, Timeout: 15 * time.Second, Hellos: hellos, Reply: 1,
	}
}

// wantPackets says that no attempt failed, and that most of those that were due succeeded in time: a machine that is busy may
// begin late.
func wantPackets(t *testing.T, r *bench.Result, want uint64) {
	t.Helper()
	if r.Failed() > 0 || r.Successes < want*7/10 {
		t.Errorf("of %d attempts %d succeeded, failures %v; want %d", r.Attempts, r.Successes, r.Failures, want)
	}
}

// eachLine runs a test by packet sockets and by XDP, and each by both families.
func eachLine(t *testing.T, test func(t *testing.T, v6, xdp bool)) {
	for _, xdp := range []bool{false, true} {
		t.Run(fmt.Sprintf("xdp=%t", xdp), func(t *testing.T) {
			families(t, func(t *testing.T, v6 bool) { test(t, v6, xdp) })
		})
	}
}

// TestBenchPackets is the packet generator against the packet responder, with nothing but a router between them.
func TestBenchPackets(t *testing.T) {
	bed := newBed(t, testbed.Options{Forward: true})
	routePacketSources(t, bed)
	eachLine(t, func(t *testing.T, v6, xdp bool) {
		servePackets(t, bed.Backend, -1, bench.PacketServer{Interface: "eth0", Listen: packetBackends(bed), Reply: 1, XDP: xdp})
		for _, layout := range []string{"go-classic", "go"} {
			r, _ := sendPackets(t, bed, -1, packetLoad(t, at(bed, 1, v6, 443), layout), xdp)
			wantPackets(t, r, 2000)
		}
	})
}

// TestBenchPacketsBalanced has snilb between them: it must keep no flow of the connections.
func TestBenchPacketsBalanced(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	routePacketSources(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	eachLine(t, func(t *testing.T, v6, xdp bool) {
		servePackets(t, bed.Backend, -1, bench.PacketServer{Interface: "eth0", Listen: packetBackends(bed), Reply: 1, XDP: xdp})
		for _, layout := range []string{"go-classic", "go"} {
			r, _ := sendPackets(t, bed, -1, packetLoad(t, vip(bed, v6), layout), xdp)
			wantPackets(t, r, 2000)
		}
		d.noFlows(10 * time.Second)
	})
}

// TestBenchPacketsServers is the generator against TCP of the kernel, with a TLS server behind.
func TestBenchPacketsServers(t *testing.T) {
	for name, start := range map[string]func(*testing.T, *testbed.Bed){
		"nginx": nginxBackends,
		"go":    func(t *testing.T, bed *testbed.Bed) { startBackends(t, bed) },
	} {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, testbed.Options{Forward: true})
			routePacketSources(t, bed)
			start(t, bed)
			eachLine(t, func(t *testing.T, v6, xdp bool) {
				l := packetLoad(t, at(bed, 1, v6, 443), "go")
				l.Rate, l.Reply = 200, 500
				r, _ := sendPackets(t, bed, -1, l, xdp)
				wantPackets(t, r, 200)
				if r.Bytes < 500*r.Successes {
					t.Errorf("%d bytes of %d answers", r.Bytes, r.Successes)
				}
			})
		})
	}
}

// TestBenchPacketsClients is the kernel's TCP against the responder: the answer, whole, and its end.
func TestBenchPacketsClients(t *testing.T) {
	bed := newBed(t, testbed.Options{Forward: true})
	routePacketSources(t, bed)
	const reply = 50000
	hello := hello(t, classic("a.example.com"))
	eachLine(t, func(t *testing.T, v6, xdp bool) {
		servePackets(t, bed.Backend, -1, bench.PacketServer{Interface: "eth0", Listen: packetBackends(bed), Reply: reply, XDP: xdp})
		for i := range 20 {
			c, err := bed.Client.DialContext(t.Context(), "tcp", at(bed, 1+i%3, v6, 443).String())
			must(t, err)
			must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
			for _, part := range [][]byte{hello[:3], hello[3:]} {
				_, err = c.Write(part)
				must(t, err)
			}
			got, err := io.ReadAll(c)
			if err != nil || len(got) != reply || got[0] != 22 {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			must(t, c.Close())
		}
	})
}

// TestBenchPacketsRefused is the generator against a closed port, and against nobody.
func TestBenchPacketsRefused(t *testing.T) {
	bed := newBed(t, testbed.Options{Forward: true})
	routePacketSources(t, bed)
	eachLine(t, func(t *testing.T, v6, xdp bool) {
		l := packetLoad(t, at(bed, 1, v6, 444), "go")
		l.Rate = 200
		r, _ := sendPackets(t, bed, -1, l, xdp)
		if r.Failures["refused"] < 150 || r.Failed() != r.Failures["refused"] || r.Successes > 0 {
			t.Errorf("%d attempts, %v", r.Attempts, r.Failures)
		}
	})
	l := packetLoad(t, netip.MustParseAddrPort("198.51.100.99:443"), "go")
	must(t, bed.Client.Do(func() error {
		if _, err := bench.Packets(t.Context(), l, bench.PacketOptions{Interface: "eth0", Sources: packetSources[false]}); err == nil {
			t.Error("no error without a neighbour")
		} else {
			t.Log(err)
		}
		return nil
	}))
}

// A cookie is guessed once in some million packets: a few may be, all are a fault.
const luckyGuesses = 2

// keptNothing looks at what snilb holds and has taken for hellos since before, of clients that never shook hands. seen is how
// many packets of them it has to have counted.
func (d *daemon) keptNothing(kind string, before counters, seen uint64) {
	d.t.Helper()
	now := d.counters()
	grown := func(names ...string) (n uint64) {
		for _, name := range names {
			n += now.packets(name) - before.packets(name)
		}
		return n
	}
	if n := grown("answer/syn", "engine/unknown_flow", "drop/unknown_flow", "drop/unknown_flow_limited"); n < seen {
		d.t.Errorf("%s: %d packets were answered, refused or dropped of %d", kind, n, seen)
	}
	if n := grown("engine/hello"); n > luckyGuesses {
		d.t.Errorf("%s: %d packets were taken for hellos", kind, n)
	}
	if e := now.Engine; e.Flows > 0 || e.HalfOpen > luckyGuesses || e.HelloBytes > 1000*luckyGuesses {
		d.t.Errorf("%s: %d flows, %d half open, %d bytes of hellos", kind, e.Flows, e.HalfOpen, e.HelloBytes)
	}
}

// TestBenchFlood counts what arrives of a flood, and that snilb keeps nothing of it: no flow, and nothing in the engine.
func TestBenchFlood(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	routePacketSources(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	eachLine(t, func(t *testing.T, v6, xdp bool) {
		for _, kind := range bench.FloodKinds {
			before, counted := received(t, bed.LB, "eth0"), d.counters()
			o := bench.FloodOptions{
				Target: vip(bed, v6), Interface: "eth0", Sources: packetSources[v6], Kind: kind, Rate: 5000,
				Duration: 500 * time.Millisecond, XDP: xdp,
			}
			var r *bench.Result
			must(t, bed.Client.Do(func() (err error) {
				r, err = bench.Flood(t.Context(), o)
				return err
			}))
			arrived := received(t, bed.LB, "eth0") - before
			if r.Attempts < 2000 || r.Attempts > 2600 || arrived < r.Attempts*95/100 {
				t.Errorf("%s: %d sent, %d arrived, want 2500", kind, r.Attempts, arrived)
			}
			d.keptNothing(kind, counted, r.Attempts*95/100)
		}
		d.noFlows(10 * time.Second)
	})
}

// BenchmarkPackets is generator against responder over one veth pair, each on a CPU of its own. CPU seconds count what the
// kernel does in the name of each, the way to the other's socket included.
//
//	go test ./scripts/e2e -run '^$' -bench '^BenchmarkPackets$' -benchtime 1x
func BenchmarkPackets(b *testing.B) {
	for _, layout := range []string{"go-classic", "go"} {
		for _, v6 := range []bool{false, true} {
			for _, xdp := range []bool{false, true} {
				name := fmt.Sprintf("%s/v6=%t/xdp=%t", layout, v6, xdp)
				b.Run(name, func(b *testing.B) { benchmarkPackets(b, v6, layout, xdp) })
			}
		}
	}
}

func benchmarkPackets(b *testing.B, v6 bool, layout string, xdp bool) {
	bed, err := testbed.New(testbed.Options{})
	check(b, err)
	b.Cleanup(func() { _ = bed.Close() })
	routePacketSources(b, bed)
	l := packetLoad(b, vip(bed, v6), layout)
	l.Rate, l.Concurrency, l.Duration = 0, 1024, 3*time.Second
	served := servePackets(b, bed.LB, 1, bench.PacketServer{Interface: "eth0", Listen: []netip.AddrPort{l.Target}, Reply: 1, XDP: xdp})
	for b.Loop() {
		before := served()
		r, client := sendPackets(b, bed, 0, l, xdp)
		server := served() - before
		if r.Latency == nil {
			b.Fatalf("%+v", r)
		}
		b.ReportMetric(r.Rate, "conn/s")
		b.ReportMetric(float64(r.Successes)/client.Seconds(), "conn/client-cpu-s")
		b.ReportMetric(float64(r.Successes)/server.Seconds(), "conn/server-cpu-s")
		b.ReportMetric(r.Latency.P50, "p50-us")
		b.ReportMetric(r.Latency.P99, "p99-us")
		b.ReportMetric(float64(r.Failed()), "failed")
	}
}

// BenchmarkFlood is how many packets a second leave, and arrive at a namespace that drops them.
//
//	go test ./scripts/e2e -run '^$' -bench '^BenchmarkFlood$' -benchtime 1x
func BenchmarkFlood(b *testing.B) {
	for _, xdp := range []bool{false, true} {
		b.Run(fmt.Sprintf("xdp=%t", xdp), func(b *testing.B) {
			bed, err := testbed.New(testbed.Options{})
			check(b, err)
			b.Cleanup(func() { _ = bed.Close() })
			routePacketSources(b, bed)
			o := bench.FloodOptions{
				Target: netip.AddrPortFrom(bed.Backends4[0], 443), Interface: "eth0", Sources: packetSources[false], Kind: "syn",
				Duration: 2 * time.Second, XDP: xdp,
			}
			for b.Loop() {
				check(b, bed.Client.Do(func() error {
					before := threadTime(b, unix.Gettid())
					r, err := bench.Flood(context.Background(), o)
					if err != nil {
						return err
					}
					b.ReportMetric(float64(r.Attempts)/r.Seconds, "packets/s")
					b.ReportMetric(float64(r.Attempts)/(threadTime(b, unix.Gettid())-before).Seconds(), "packets/cpu-s")
					return nil
				}))
			}
		})
	}
}
