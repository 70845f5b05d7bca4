// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"snilb/maps"
)

func addr(s string) netip.Addr         { return netip.MustParseAddr(s) }
func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// run follows the network until the test ends.
func run(t *testing.T, i *Instance) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- i.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-ended)
	})
}

// eventually waits for what Run does some time after a change.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("never happened: " + what)
}

func nextHop(t *testing.T, i *Instance, dst string) NextHop {
	t.Helper()
	h, err := i.NextHop(addr(dst))
	must(t, err)
	return h
}

func entry(t *testing.T, i *Instance, index uint16) maps.Nexthop {
	t.Helper()
	var value maps.Nexthop
	key := uint32(index)
	must(t, i.Tables().Nexthops.Lookup(&key, &value))
	return value
}

func TestNextHop(t *testing.T) {
	newNetns(t)
	eth0 := addVeth(t, "eth0", "10.9.0.1/24", "fd00:9::1/64").Attrs().Index
	routeVia(t, "192.0.2.0/24", "10.9.0.254")
	routeVia(t, "2001:db8::/64", "fd00:9::fe")
	i := load(t, testOptions(t, "eth0"))

	onLink := nextHop(t, i, "10.9.0.2")
	if onLink.Index == 0 || onLink.Ifindex != eth0 || onLink.MTU != 1500 || onLink.Source != addr("10.9.0.1") {
		t.Errorf("on-link: %+v", onLink)
	}
	if got := entry(t, i, onLink.Index); got != (maps.Nexthop{Ifindex: uint32(eth0), Mtu: 1500, Family: unix.AF_INET}) {
		t.Errorf("on-link entry: %+v", got)
	}
	if other := nextHop(t, i, "::ffff:10.9.0.3"); other != onLink {
		t.Errorf("two peers of one link: %+v and %+v", onLink, other)
	}
	via := nextHop(t, i, "192.0.2.7")
	if via.Index == onLink.Index || nextHop(t, i, "192.0.2.8") != via {
		t.Errorf("by gateway: %+v", via)
	}
	want := maps.Nexthop{Ifindex: uint32(eth0), Mtu: 1500, Family: unix.AF_INET, Gateway: maps.Words(addr("10.9.0.254"))}
	if got := entry(t, i, via.Index); got != want {
		t.Errorf("gateway entry: %+v", got)
	}
	six, via6 := nextHop(t, i, "fd00:9::2"), nextHop(t, i, "2001:db8::7")
	if entry(t, i, six.Index).Family != unix.AF_INET6 || six.Source != addr("fd00:9::1") {
		t.Errorf("IPv6 on-link: %+v", six)
	}
	if got := entry(t, i, via6.Index); got.Gateway != maps.Words(addr("fd00:9::fe")) {
		t.Errorf("IPv6 gateway entry: %+v", got)
	}
	for dst, want := range map[string]error{
		"10.9.0.1": ErrLocal, "127.0.0.1": ErrLocal, "fd00:9::1": ErrLocal,
		"203.0.113.9": ErrUnreachable, "2001:db8:ffff::1": ErrUnreachable,
		"0.0.0.0": ErrUnreachable, "ff02::1": ErrUnreachable, "10.9.0.255": ErrUnreachable,
	} {
		if _, err := i.NextHop(addr(dst)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", dst, err, want)
		}
		if err := CheckBackend(netip.AddrPortFrom(addr(dst), 443)); !errors.Is(err, want) {
			t.Errorf("check %s: %v, want %v", dst, err, want)
		}
	}
	must(t, CheckBackend(addrPort("192.0.2.7:443")))
	if got := entry(t, i, 0); got != (maps.Nexthop{}) {
		t.Errorf("entry 0 is set: %+v", got)
	}
}

func TestNextHopFollowsRoutes(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	eth1 := addVeth(t, "eth1", "10.8.0.1/24").Attrs().Index
	routeVia(t, "192.0.2.0/24", "10.9.0.254")
	i := load(t, testOptions(t, "eth0"))
	run(t, i)
	before := nextHop(t, i, "192.0.2.7")

	t.Log("a route moves, and with it the bound flows that hold the entry")
	routeVia(t, "192.0.2.0/24", "10.8.0.254")
	eventually(t, "new gateway", func() bool { return nextHop(t, i, "192.0.2.7").Ifindex == eth1 })
	eventually(t, "entry moved", func() bool {
		return entry(t, i, before.Index).Gateway == maps.Words(addr("10.8.0.254"))
	})

	t.Log("and back")
	routeVia(t, "192.0.2.0/24", "10.9.0.254")
	eventually(t, "old gateway", func() bool { return nextHop(t, i, "192.0.2.7") == before })
	eventually(t, "entry moved back", func() bool {
		return entry(t, i, before.Index).Gateway == maps.Words(addr("10.9.0.254"))
	})

	t.Log("however often it does so, the table does not fill up")
	for range 5 {
		for _, gateway := range []string{"10.8.0.254", "10.9.0.254"} {
			routeVia(t, "192.0.2.0/24", gateway)
			eventually(t, "flap", func() bool {
				return entry(t, i, nextHop(t, i, "192.0.2.7").Index).Gateway == maps.Words(addr(gateway))
			})
		}
	}
	i.hops.mu.Lock()
	entries := len(i.hops.hops) - 1
	i.hops.mu.Unlock()
	if entries > 2 {
		t.Errorf("%d entries for two gateways", entries)
	}

	t.Log("one destination gets a route of its own: the others stay")
	nextHop(t, i, "192.0.2.8")
	own := routeVia(t, "192.0.2.7/32", "10.8.0.254")
	eventually(t, "host route", func() bool { return nextHop(t, i, "192.0.2.7").Ifindex == eth1 })
	time.Sleep(4 * settleTime)
	if got := entry(t, i, before.Index); got.Gateway != maps.Words(addr("10.9.0.254")) {
		t.Errorf("entry of the others: %+v", got)
	}

	must(t, netlink.RouteDel(own))
}

func TestNextHopFollowsLinks(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	routeVia(t, "192.0.2.0/24", "10.9.0.254")
	i := load(t, testOptions(t, "eth0"))
	run(t, i)
	before := nextHop(t, i, "192.0.2.8")

	t.Log("MTU of the link")
	must(t, netlink.LinkSetMTU(device(t, "eth0"), 1400))
	eventually(t, "MTU", func() bool { return entry(t, i, before.Index).Mtu == 1400 && nextHop(t, i, "192.0.2.8").MTU == 1400 })

	t.Log("the interface goes")
	must(t, netlink.LinkDel(device(t, "eth0")))
	eventually(t, "unset entry", func() bool { return entry(t, i, before.Index).Ifindex == 0 })
	if _, err := i.NextHop(addr("192.0.2.8")); !errors.Is(err, ErrUnreachable) {
		t.Errorf("without interface: %v", err)
	}
}

func TestRouteMTU(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24", "fd00:9::1/64")
	r := routeVia(t, "192.0.2.0/24", "10.9.0.254")
	routeVia(t, "198.51.100.0/24", "10.9.0.254")
	r.MTU = 1300
	must(t, netlink.RouteReplace(r))
	i := load(t, testOptions(t, "eth0"))
	if mss4, mss6 := i.MTU(); mss4 != 1460 || mss6 != 1440 {
		t.Errorf("MSS without backends: %d, %d", mss4, mss6)
	}
	narrow, wide := nextHop(t, i, "192.0.2.7"), nextHop(t, i, "198.51.100.7")
	if narrow.MTU != 1300 || wide.MTU != 1500 || narrow.Index == wide.Index {
		t.Errorf("one gateway, two MTUs: %+v, %+v", narrow, wide)
	}
	_, err := i.AddBackend(addrPort("192.0.2.7:443"))
	must(t, err)
	_, err = i.AddBackend(addrPort("[fd00:9::2]:443"))
	must(t, err)
	if mss4, mss6 := i.MTU(); mss4 != 1260 || mss6 != 1440 {
		t.Errorf("MSS: %d, %d", mss4, mss6)
	}
}

func paths(t *testing.T, i *Instance) []string {
	t.Helper()
	var key maps.PathKey
	var value maps.Path
	var all []string
	it := i.Tables().Paths.Iterate()
	for it.Next(&key, &value) {
		all = append(all, maps.Addr(key.Source).String()+" "+netip.AddrPortFrom(maps.Addr(key.Backend), maps.Port(key.Port)).String())
	}
	must(t, it.Err())
	slices.Sort(all)
	return all
}

func TestBackends(t *testing.T) {
	bothHooks(t, func(t *testing.T, kind string, clsact bool) {
		ns := newNetns(t)
		addVeth(t, "eth0", "10.9.0.1/24")
		eth1 := addVeth(t, "eth1", "10.8.0.1/24")
		eth2 := addVeth(t, "eth2", "10.7.0.1/24")
		before := snapshot(t, ns)
		o := testOptions(t, "eth0")
		o.forceClsact = clsact
		i, err := Load(o)
		must(t, err)
		must(t, i.Attach())
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { must(t, i.Run(ctx)) })

		for _, backend := range []string{"10.8.0.2:443", "10.8.0.2:8443"} {
			source, err := i.AddBackend(addrPort(backend))
			must(t, err)
			if source != addr("10.8.0.1") {
				t.Errorf("source %v", source)
			}
		}
		if got := programsOn(t, eth1); len(got) != 1 {
			t.Errorf("on the backends' interface: %q", got)
		}
		wantSame(t, paths(t, i), []string{"10.8.0.1 10.8.0.2:443", "10.8.0.1 10.8.0.2:8443"})

		t.Log("the route moves to another interface")
		routeVia(t, "10.8.0.2/32", "10.7.0.254")
		eventually(t, "program on eth2", func() bool { return len(programsOn(t, eth2)) == 1 })
		eventually(t, "new paths", func() bool { return len(paths(t, i)) == 4 })
		must(t, i.RemoveBackend(addrPort("10.8.0.2:8443")))
		wantSame(t, paths(t, i), []string{"10.7.0.1 10.8.0.2:443", "10.8.0.1 10.8.0.2:443"})

		t.Log("a backend without a route is taken up when one appears")
		if _, err := i.AddBackend(addrPort("192.0.2.9:443")); !errors.Is(err, ErrUnreachable) {
			t.Errorf("no route: %v", err)
		}
		if _, err := i.AddBackend(addrPort("10.9.0.1:443")); !errors.Is(err, ErrLocal) {
			t.Errorf("this node: %v", err)
		}
		routeVia(t, "192.0.2.0/24", "10.7.0.254")
		eventually(t, "late path", func() bool { return len(paths(t, i)) == 3 })

		must(t, i.Close())
		cancel()
		wg.Wait()
		wantSame(t, snapshot(t, ns), before)
	})
}

// A one-armed node has clients and backends on one interface: whatever the order of
// the calls, a client's packet meets the client program first.
func TestOneArmedOrder(t *testing.T) {
	bothHooks(t, func(t *testing.T, kind string, clsact bool) {
		for _, backendFirst := range []bool{false, true} {
			newNetns(t)
			d := addVeth(t, "eth0", "10.9.0.1/24")
			o := testOptions(t, "eth0")
			o.forceClsact = clsact
			i := load(t, o)
			steps := []func(){
				func() { must(t, i.Attach()) },
				func() { _, err := i.AddBackend(addrPort("10.9.0.2:443")); must(t, err) },
			}
			if backendFirst {
				slices.Reverse(steps)
			}
			for _, step := range steps {
				step()
			}
			want := []string{"program snilb_client on eth0", "program snilb_backend on eth0"}
			if clsact {
				want = []string{"filter snilb_client test on eth0", "filter snilb_backend test on eth0"}
			}
			wantSame(t, programsOn(t, d), want)
			if got := i.Interfaces(); got[1].Role != RoleClient && got[0].Role != RoleClient {
				t.Errorf("status: %v", got)
			}
			must(t, i.Close())
		}
	})
}

func listeners(t *testing.T, i *Instance) map[netip.AddrPort]uint16 {
	t.Helper()
	all := make(map[netip.AddrPort]uint16)
	var key maps.ListenerKey
	var value maps.Listener
	it := i.Tables().Listeners.Iterate()
	for it.Next(&key, &value) {
		all[netip.AddrPortFrom(maps.Addr(key.Addr), maps.Port(key.Port))] = value.Id
	}
	must(t, it.Err())
	return all
}

func TestListeners(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24", "fd00:9::1/64")
	addAddress(t, "lo", "203.0.113.1/32")
	i := load(t, testOptions(t, "eth0"))
	run(t, i)
	must(t, i.SetListeners([]ListenerSpec{
		{ID: 1, Addr: netip.AddrPortFrom(netip.Addr{}, 443)},
		{ID: 2, Addr: addrPort("203.0.113.1:443"), UnknownFlow: maps.UnknownFlowDrop},
		{ID: 3, Addr: addrPort("198.51.100.1:8443")}, // not on this node yet
	}))
	want := func(at string, id uint16) {
		t.Helper()
		if got := listeners(t, i)[addrPort(at)]; got != id {
			t.Errorf("%s: listener %d, want %d", at, got, id)
		}
	}
	want("10.9.0.1:443", 1)
	want("[fd00:9::1]:443", 1)
	want("203.0.113.1:443", 2)
	want("198.51.100.1:8443", 3)
	want("10.9.0.1:8443", 0)
	want("127.0.0.1:443", 0)
	want("[::1]:443", 0)

	addAddress(t, "eth0", "10.9.0.77/24")
	eventually(t, "new address", func() bool { return listeners(t, i)[addrPort("10.9.0.77:443")] == 1 })
	a, err := netlink.ParseAddr("10.9.0.77/24")
	must(t, err)
	must(t, netlink.AddrDel(device(t, "eth0"), a))
	eventually(t, "address gone", func() bool { return listeners(t, i)[addrPort("10.9.0.77:443")] == 0 })

	must(t, i.SetListeners([]ListenerSpec{{ID: 3, Addr: addrPort("198.51.100.1:8443")}}))
	if got := listeners(t, i); len(got) != 1 {
		t.Errorf("after a smaller set: %v", got)
	}
	if err := i.SetListeners([]ListenerSpec{{ID: 0, Addr: addrPort("198.51.100.1:8443")}}); err == nil {
		t.Error("listener without id taken")
	}
}

// brokenSubscription is a socket that fails as the test wants, once.
type brokenSubscription struct {
	changes
	fail chan error
}

func (b *brokenSubscription) Receive() ([]syscall.NetlinkMessage, *unix.SockaddrNetlink, error) {
	messages, from, err := b.changes.Receive()
	select {
	case err = <-b.fail:
	default:
	}
	return messages, from, err
}

// A message that was lost in an overflow, or with the socket, loses nothing.
func TestSubscriptionBreaks(t *testing.T) {
	for _, failure := range []unix.Errno{unix.ENOBUFS, unix.EBADF} {
		t.Run(unix.ErrnoName(failure), func(t *testing.T) {
			newNetns(t)
			addVeth(t, "eth0", "10.9.0.1/24")
			i := load(t, testOptions(t, "eth0"))
			fail := make(chan error, 1)
			var subscriptions atomic.Int32
			i.subscribe = func(ns *namespace) (changes, error) {
				subscriptions.Add(1)
				socket, err := subscribe(ns)
				return &brokenSubscription{socket, fail}, err
			}
			run(t, i)
			must(t, i.SetListeners([]ListenerSpec{{ID: 1, Addr: netip.AddrPortFrom(netip.Addr{}, 443)}}))
			eventually(t, "subscribed", func() bool { return subscriptions.Load() == 1 })

			fail <- failure
			addAddress(t, "eth0", "10.9.0.77/24")
			eventually(t, "address seen", func() bool { return listeners(t, i)[addrPort("10.9.0.77:443")] == 1 })
			addAddress(t, "eth0", "10.9.0.78/24")
			eventually(t, "next address seen", func() bool { return listeners(t, i)[addrPort("10.9.0.78:443")] == 1 })
			want := int32(1)
			if failure == unix.EBADF {
				want = 2
			}
			if got := subscriptions.Load(); got != want {
				t.Errorf("%d subscriptions, want %d", got, want)
			}
		})
	}
}

func TestInterfaceComesBack(t *testing.T) {
	bothHooks(t, func(t *testing.T, kind string, clsact bool) {
		ns := newNetns(t)
		addVeth(t, "eth0", "10.9.0.1/24")
		before := snapshot(t, ns)
		o := testOptions(t, "eth0")
		o.forceClsact = clsact
		i, err := Load(o)
		must(t, err)
		must(t, i.Attach())
		_, err = i.AddBackend(addrPort("10.9.0.2:443"))
		must(t, err)
		slots := slotsOf(i)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { must(t, i.Run(ctx)) })

		must(t, netlink.LinkDel(device(t, "eth0")))
		eventually(t, "forgotten", func() bool { return len(i.Interfaces()) == 1 })
		d := addVeth(t, "eth0", "10.9.0.1/24")
		eventually(t, "attached again", func() bool { return len(programsOn(t, d)) == 2 })
		if got := slotsOf(i); !slices.Equal(got, slots) {
			t.Errorf("slots were %v and are %v", slots, got)
		}
		must(t, i.Close())
		cancel()
		wg.Wait()
		wantSame(t, snapshot(t, ns), before)
	})
}

func slotsOf(i *Instance) []uint32 {
	var slots []uint32
	for _, s := range i.Interfaces() {
		slots = append(slots, s.Slot)
	}
	slices.Sort(slots)
	return slots
}

// Workers ask while routes change: for the race detector, and for answers that are
// never older than the change.
func TestNextHopConcurrently(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	i := load(t, testOptions(t, "eth0"))
	run(t, i)
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for n := range 500 {
				dst := netip.AddrFrom4([4]byte{10, 9, 0, byte(2 + (n+worker)%100)})
				if _, err := i.NextHop(dst); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for n := range 20 {
		routeVia(t, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 32).String(), "10.9.0.254")
	}
	wg.Wait()
	if got := len(i.hops.hops); got != 2 {
		t.Errorf("%d entries for one link", got-1)
	}
}

func TestCacheIsBounded(t *testing.T) {
	var c routeCache
	for n := range 4 * cacheShards * cachePerShard {
		c.put(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), answer{hop: NextHop{Index: 1}}, 0)
	}
	total := 0
	for n := range c.shards {
		total += len(c.shards[n].known)
	}
	if total == 0 || total > cacheShards*cachePerShard {
		t.Errorf("%d addresses are kept", total)
	}
	c.flush()
	c.put(addr("10.0.0.1"), answer{hop: NextHop{Index: 1}}, 0)
	if _, ok, _ := c.get(addr("10.0.0.1")); ok {
		t.Error("an answer from before the flush was kept")
	}
}

// That there is no route is believed until the network changes, but not for long.
func TestCacheOfNothing(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	i := load(t, testOptions(t, "eth0"))
	to := addr("192.0.2.7")
	if _, err := i.NextHop(to); !errors.Is(err, ErrUnreachable) {
		t.Fatal(err)
	}
	i.cache.put(to, answer{err: ErrUnreachable, until: time.Now().Add(time.Hour)}, i.cache.generation.Load())
	routeVia(t, "192.0.2.0/24", "10.9.0.254")
	if _, err := i.NextHop(to); !errors.Is(err, ErrUnreachable) {
		t.Errorf("asked again for what is known: %v", err)
	}
	i.cache.put(to, answer{err: ErrUnreachable, until: time.Now()}, i.cache.generation.Load())
	if _, err := i.NextHop(to); err != nil {
		t.Errorf("believed for too long: %v", err)
	}
	i.cache.put(to, answer{err: ErrUnreachable, until: time.Now().Add(time.Hour)}, i.cache.generation.Load())
	i.cache.flush()
	if _, err := i.NextHop(to); err != nil {
		t.Errorf("believed though the network has changed: %v", err)
	}
}

// What is asked for and does not exist is remembered.
func TestCacheKeepsNothing(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	i := load(t, testOptions(t, "eth0"))
	to := addr("192.0.2.7")
	_, first := i.NextHop(to)
	if a := i.cache.shard(to).known[to]; !errors.Is(a.err, ErrUnreachable) || time.Until(a.until) > unreachableFor || !errors.Is(first, ErrUnreachable) {
		t.Errorf("%v, known is %+v", first, a)
	}
}

func TestProbeCsumIPv6(t *testing.T) {
	needRoot(t)
	has, err := probeCsumIPv6()
	must(t, err)
	t.Log("BPF_F_IPV6:", has)
}

func TestRings(t *testing.T) {
	newNetns(t)
	addVeth(t, "eth0", "10.9.0.1/24")
	i := load(t, testOptions(t, "eth0"))
	for worker := range 2 {
		checkRing(t, i, uint32(worker), i.Ring(worker), i.opts.RingSize)
		checkRing(t, i, uint32(maps.MaxWorkers+worker), i.QuietRing(worker), os.Getpagesize())
	}
}

func checkRing(t *testing.T, i *Instance, index uint32, ring *ebpf.Map, size int) {
	t.Helper()
	info, err := ring.Info()
	must(t, err)
	want, _ := info.ID()
	var got ebpf.MapID
	must(t, i.Tables().Rings.Lookup(&index, &got))
	if got != want || int(ring.MaxEntries()) != size {
		t.Errorf("ring %d: id %d, want %d, %d bytes", index, got, want, ring.MaxEntries())
	}
}

func BenchmarkNextHopHit(b *testing.B) {
	newNetns(b)
	addVeth(b, "eth0", "10.9.0.1/24")
	i := load(b, testOptions(b, "eth0"))
	dst := addr("10.9.0.2")
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := i.NextHop(dst); err != nil {
				b.Error(err)
			}
		}
	})
}

// An address that was not asked for since the last change.
func BenchmarkNextHopMiss(b *testing.B) {
	newNetns(b)
	addVeth(b, "eth0", "10.9.0.1/24")
	i := load(b, testOptions(b, "eth0"))
	for b.Loop() {
		if _, err := i.resolve(addr("10.9.0.2")); err != nil {
			b.Fatal(err)
		}
	}
}

// The kernel's part of a miss.
func BenchmarkLookupRoute(b *testing.B) {
	ns := newNetns(b)
	addVeth(b, "eth0", "10.9.0.1/24")
	for b.Loop() {
		if _, err := lookupRoute(ns, addr("10.9.0.2")); err != nil {
			b.Fatal(err)
		}
	}
}
