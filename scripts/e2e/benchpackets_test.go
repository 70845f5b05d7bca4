// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
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
var (
	packetSources4 = netip.MustParsePrefix("10.64.0.0/20")
	packetSources6 = netip.MustParsePrefix("2001:db8:64::/64")
)

func packetSources(v6 bool) netip.Prefix {
	if v6 {
		return packetSources6
	}
	return packetSources4
}

// routePacketSources leads the generator's addresses to the client.
func routePacketSources(tb testing.TB, bed *testbed.Bed) {
	tb.Helper()
	h, err := bed.LB.Netlink()
	if err != nil {
		tb.Fatal(err)
	}
	defer h.Close()
	for i, p := range []netip.Prefix{packetSources4, packetSources6} {
		gateway := []netip.Addr{bed.Clients4[0], bed.Clients6[0]}[i]
		to := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
		if err := h.RouteAdd(&netlink.Route{Dst: to, Gw: gateway.AsSlice()}); err != nil {
			tb.Fatal(err)
		}
	}
}

// servePackets runs the responder in a namespace until the test ends. It returns what tells its thread's CPU time.
func servePackets(tb testing.TB, ns *testbed.NS, cpu int, s bench.PacketServer) (used func() time.Duration) {
	tb.Helper()
	thread := make(chan int, 1)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
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

// BenchmarkPackets is generator against responder over one veth pair, each on a CPU of its own. Its metrics are connections a
// second, and CPU seconds per second of both threads:
//
//	go test ./scripts/e2e -run '^$' -bench '^BenchmarkPackets$' -benchtime 1x
func BenchmarkPackets(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		for _, layout := range []string{"go-classic", "go"} {
			for _, xdp := range []bool{false, true} {
				name := fmt.Sprintf("%s/v6=%t/xdp=%t", layout, v6, xdp)
				b.Run(name, func(b *testing.B) { benchmarkPackets(b, v6, layout, xdp) })
			}
		}
	}
}

func benchmarkPackets(b *testing.B, v6 bool, layout string, xdp bool) {
	bed, err := testbed.New(testbed.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = bed.Close() }()
	routePacketSources(b, bed)
	target := netip.AddrPortFrom(vip(bed, v6).Addr(), 443)
	served := servePackets(b, bed.LB, 1, bench.PacketServer{Interface: "eth0", Listen: []netip.AddrPort{target}, Reply: 1, XDP: xdp})
	hellos, err := bench.NewHellos(bench.HelloOptions{Layout: layout, Names: bench.Names{List: certNames}})
	if err != nil {
		b.Fatal(err)
	}
	load := bench.Load{
		Target: target, Concurrency: 4096, Duration: 3 * time.Second,
		Timeout: 5 * time.Second, Hellos: hellos, Reply: 1,
	}
	for b.Loop() {
		var client, server time.Duration
		ended := make(chan *bench.Result)
		go func() {
			var r *bench.Result
			err := bed.Client.Do(func() (err error) {
				pin(b, 0)
				before, beforeServer := threadTime(b, unix.Gettid()), served()
				r, err = bench.Packets(context.Background(), load, bench.PacketOptions{Interface: "eth0", Sources: packetSources(v6), XDP: xdp})
				client, server = threadTime(b, unix.Gettid())-before, served()-beforeServer
				return err
			})
			if err != nil {
				b.Error(err)
			}
			ended <- r
		}()
		r := <-ended
		if r == nil || r.Latency == nil {
			b.Fatalf("%+v", r)
		}
		b.Logf("%+v %+v", r.Failures, *r.Latency)
		b.ReportMetric(r.Rate, "conn/s")
		b.ReportMetric(float64(r.Successes)/client.Seconds(), "conn/client-cpu-s")
		b.ReportMetric(float64(r.Successes)/server.Seconds(), "conn/server-cpu-s")
	}
}
