// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"snilb/maps"
)

// setNeighbour is `ip neigh replace`.
func setNeighbour(t *testing.T, iface, ip string, mac net.HardwareAddr, state int) {
	t.Helper()
	must(t, netlink.NeighSet(&netlink.Neigh{
		LinkIndex: device(t, iface).Attrs().Index, IP: addr(ip).AsSlice(), HardwareAddr: mac, State: state,
	}))
}

func neighbourOf(t *testing.T, ns *namespace, iface, ip string) *netlink.Neigh {
	t.Helper()
	n, err := lookupNeighbour(ns, neighbourKey{device(t, iface).Attrs().Index, addr(ip)})
	must(t, err)
	return n
}

func isManaged(n *netlink.Neigh) bool { return n != nil && n.FlagsExt&netlink.NTF_EXT_MANAGED != 0 }

func testMAC(n byte) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 9, n} }

// An on-link destination has an entry of its own, whose link address follows the
// kernel's; what the kernel cannot send to is left to TC.
func TestNextHopFollowsNeighbours(t *testing.T) {
	eachXDP(t, func(t *testing.T, mode Mode) {
		ns := newNetns(t)
		eth0 := addXDPVeth(t, "eth0", "10.9.0.1/24", "fd00:9::1/64")
		routeVia(t, "192.0.2.0/24", "10.9.0.254")
		o := testOptions(t, "eth0")
		o.Mode = mode
		i := load(t, o)
		run(t, i)

		for _, c := range []struct{ dst, neighbour string }{
			{"10.9.0.2", "10.9.0.2"}, {"fd00:9::2", "fd00:9::2"}, {"192.0.2.7", "10.9.0.254"},
		} {
			index := nextHop(t, i, c.dst).Index
			closed := maps.Nexthop{Ifindex: uint32(eth0.Attrs().Index), Mtu: 1500, Family: unix.AF_INET, Gateway: maps.Words(addr(c.neighbour))}
			if strings.Contains(c.dst, ":") {
				closed.Family = unix.AF_INET6
			}
			if got := entry(t, i, index); got != closed {
				t.Errorf("%s before its neighbour is known: %+v", c.dst, got)
			}
			if !isManaged(neighbourOf(t, ns, "eth0", c.neighbour)) {
				t.Errorf("neighbour %s is not managed", c.neighbour)
			}
			open := closed
			open.XdpIfindex, open.Flags = closed.Ifindex, maps.NexthopBuffers
			open.Smac = [6]byte(eth0.Attrs().HardwareAddr)
			for n := range byte(2) { // then a changed one
				open.Dmac = [6]byte(testMAC(n))
				setNeighbour(t, "eth0", c.neighbour, testMAC(n), netlink.NUD_REACHABLE)
				eventually(t, fmt.Sprintf("link address %d of %s", n, c.neighbour), func() bool { return entry(t, i, index) == open })
				eventually(t, "managed again", func() bool { return isManaged(neighbourOf(t, ns, "eth0", c.neighbour)) })
			}
			setNeighbour(t, "eth0", c.neighbour, nil, netlink.NUD_FAILED)
			eventually(t, c.neighbour+" failed", func() bool { return entry(t, i, index) == closed })
			setNeighbour(t, "eth0", c.neighbour, testMAC(2), netlink.NUD_STALE)
			open.Dmac = [6]byte(testMAC(2))
			eventually(t, c.neighbour+" back", func() bool { return entry(t, i, index) == open })

			t.Log("deleted, it is asked for again")
			must(t, netlink.NeighDel(&netlink.Neigh{LinkIndex: eth0.Attrs().Index, IP: addr(c.neighbour).AsSlice()}))
			eventually(t, c.neighbour+" gone", func() bool { return entry(t, i, index) == closed })
			eventually(t, "managed again", func() bool { return isManaged(neighbourOf(t, ns, "eth0", c.neighbour)) })
		}
		if a, b := nextHop(t, i, "10.9.0.2"), nextHop(t, i, "10.9.0.3"); a.Index == b.Index {
			t.Error("two destinations on the link share an entry")
		}
		if a, b := nextHop(t, i, "192.0.2.7"), nextHop(t, i, "192.0.2.8"); a.Index != b.Index {
			t.Error("two destinations by one gateway have two entries")
		}
	})
}

// sendFar puts the far end of an interface into a network namespace of its own, with an
// address, and returns its link address.
func sendFar(t *testing.T, ns *namespace, name, prefix string) (*namespace, net.HardwareAddr) {
	t.Helper()
	fd, err := netns.New()
	must(t, err)
	must(t, netns.Set(ns.fd))
	must(t, netlink.LinkSetNsFd(device(t, name+"-far"), int(fd)))
	far := &namespace{fd: fd}
	far.Handle, err = netlink.NewHandleAt(fd, unix.NETLINK_ROUTE)
	must(t, err)
	t.Cleanup(func() { must(t, far.close()) })
	peer, err := far.LinkByName(name + "-far")
	must(t, err)
	a, err := netlink.ParseAddr(prefix)
	must(t, err)
	must(t, far.AddrAdd(peer, a))
	must(t, far.LinkSetUp(peer))
	return far, peer.Attrs().HardwareAddr
}

// The kernel is made to resolve: no packet need be sent first.
func TestNeighbourIsResolved(t *testing.T) {
	ns := newNetns(t)
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	_, mac := sendFar(t, ns, "eth0", "10.9.0.2/24")
	o := testOptions(t, "eth0")
	o.Mode = ModeXDP
	i := load(t, o)
	run(t, i)
	index := nextHop(t, i, "10.9.0.2").Index
	eventually(t, "resolved", func() bool { return entry(t, i, index).Dmac == [6]byte(mac) })
}

// What the peer of a veth takes is told by no change of a link here.
func TestXDPOutputFollowsPeer(t *testing.T) {
	ns := newNetns(t)
	// Its address detection changes the link for seconds.
	must(t, os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0))
	addXDPVeth(t, "eth0", "10.9.0.1/24")
	far, _ := sendFar(t, ns, "eth0", "10.9.0.2/24")
	o := testOptions(t, "eth0")
	o.Mode = ModeXDP
	i := load(t, o)
	run(t, i)
	index := nextHop(t, i, "10.9.0.2").Index
	for _, on := range []bool{true, false, true, false, true, false, true} {
		must(t, far.do(func() error { setGRO(t, "eth0-far", on); return nil }))
		eventually(t, fmt.Sprintf("GRO %v", on), func() bool { return (entry(t, i, index).XdpIfindex != 0) == on })
	}
}

// What a user has fixed is left as it is, and what was managed because of us is let go.
func TestNeighboursOfOthersStay(t *testing.T) {
	for _, crash := range []bool{false, true} {
		ns := newNetns(t)
		addXDPVeth(t, "eth0", "10.9.0.1/24", "fd00:9::1/64")
		setNeighbour(t, "eth0", "10.9.0.2", testMAC(2), netlink.NUD_PERMANENT)
		must(t, netlink.NeighSet(&netlink.Neigh{
			LinkIndex: device(t, "eth0").Attrs().Index, IP: addr("10.9.0.3").AsSlice(), FlagsExt: netlink.NTF_EXT_MANAGED, Flags: netlink.NTF_USE,
		}))
		before := snapshot(t, ns)
		o := testOptions(t, "eth0")
		o.Mode = ModeXDP
		i, err := Load(o)
		must(t, err)
		for _, dst := range []string{"10.9.0.2", "10.9.0.3", "10.9.0.4", "fd00:9::4"} {
			nextHop(t, i, dst)
		}
		if got := entry(t, i, nextHop(t, i, "10.9.0.2").Index); got.Dmac != [6]byte(testMAC(2)) || got.XdpIfindex == 0 {
			t.Errorf("entry of the permanent neighbour: %+v", got)
		}
		if n := neighbourOf(t, ns, "eth0", "10.9.0.2"); n.State != netlink.NUD_PERMANENT || isManaged(n) {
			t.Errorf("the permanent neighbour is %+v", n)
		}
		if !isManaged(neighbourOf(t, ns, "eth0", "fd00:9::4")) {
			t.Error("ours is not managed")
		}
		if crash {
			die(t, i)
			must(t, Detach("test", o.Logger))
		} else {
			must(t, i.Close())
		}
		wantSame(t, snapshot(t, ns), before)
		if n := neighbourOf(t, ns, "eth0", "10.9.0.2"); n.State != netlink.NUD_PERMANENT {
			t.Errorf("the permanent neighbour is %+v", n)
		}
	}
}

// An interface that is down, or has another address.
func TestXDPOutputFollowsLinks(t *testing.T) {
	newNetns(t)
	eth0 := addXDPVeth(t, "eth0", "10.9.0.1/24")
	o := testOptions(t, "eth0")
	o.Mode = ModeXDP
	i := load(t, o)
	run(t, i)
	setNeighbour(t, "eth0", "10.9.0.2", testMAC(2), netlink.NUD_PERMANENT)
	index := nextHop(t, i, "10.9.0.2").Index
	sends := func() bool { return entry(t, i, index).XdpIfindex == uint32(eth0.Attrs().Index) }
	leaves := func() bool { return entry(t, i, index).XdpIfindex == 0 }
	eventually(t, "sends", sends)

	must(t, netlink.LinkSetDown(device(t, "eth0-far")))
	eventually(t, "no carrier", leaves)
	must(t, netlink.LinkSetUp(device(t, "eth0-far")))
	eventually(t, "carrier", sends)
	must(t, netlink.LinkSetHardwareAddr(eth0, testMAC(1)))
	setNeighbour(t, "eth0", "10.9.0.2", testMAC(2), netlink.NUD_PERMANENT) // the kernel forgot all of them
	eventually(t, "other address", func() bool { return entry(t, i, index).Smac == [6]byte(testMAC(1)) && sends() })
}

// fakeHops is a table without a kernel.
func fakeHops(log *slog.Logger, find func(netip.Addr) (route, error)) (*hopTable, map[uint32][]maps.Nexthop) {
	written := make(map[uint32][]maps.Nexthop)
	t := newHopTable(func(index uint32, hop *maps.Nexthop) error {
		written[index] = append(written[index], *hop)
		return nil
	}, find)
	t.own.log, t.own.everybody = log, true
	return t, written
}

func TestOwnDestinationsAreBounded(t *testing.T) {
	var said bytes.Buffer
	onLink := route{ifindex: 3}
	hops, _ := fakeHops(slog.New(slog.NewTextHandler(&said, nil)), func(netip.Addr) (route, error) { return onLink, nil })
	link := linkInfo{mtu: 1500, xdp: xdpOutput{ifindex: 3}}
	used := make(map[uint16]bool)
	for range 2 {
		for n := range maxOwnDestinations + 10 {
			index, _, _, err := hops.index(netip.AddrFrom4([4]byte{10, 9, byte(n >> 8), byte(n)}), onLink, link)
			must(t, err)
			used[index] = true
		}
	}
	if len(used) != maxOwnDestinations+1 || strings.Count(said.String(), "level=WARN") != 1 {
		t.Errorf("%d entries, said %s", len(used), said.String())
	}
}

// Entries whose destinations move between links and gateways take the right address.
func TestOwnDestinationMoves(t *testing.T) {
	dst, gateway := addr("10.9.0.2"), addr("10.9.0.254")
	now := route{ifindex: 3}
	hops, written := fakeHops(slog.New(slog.DiscardHandler), func(netip.Addr) (route, error) { return now, nil })
	link := linkInfo{mtu: 1500, xdp: xdpOutput{ifindex: 3}}
	index, _, via, err := hops.index(dst, now, link)
	must(t, err)
	if via != (neighbourKey{3, dst}) {
		t.Errorf("by %v", via)
	}
	must(t, hops.setNeighbour(neighbourKey{3, dst}, [6]byte(testMAC(2)), true))
	must(t, hops.setNeighbour(neighbourKey{3, gateway}, [6]byte(testMAC(3)), true))
	last := func() maps.Nexthop { return written[uint32(index)][len(written[uint32(index)])-1] }
	for _, c := range []struct {
		route route
		via   netip.Addr
		mac   byte
	}{{route{ifindex: 3, gateway: gateway}, gateway, 3}, {route{ifindex: 3}, dst, 2}} {
		now = c.route
		must(t, hops.refresh(func(int) linkInfo { return link }))
		if got := last(); got.Dmac != [6]byte(testMAC(c.mac)) || got.XdpIfindex != 3 || got.Gateway != maps.Words(c.via) {
			t.Errorf("by %v: %+v", c.via, got)
		}
	}
}

// No write shows XDP link addresses that change while it may use them.
func TestWriteSteps(t *testing.T) {
	a := maps.Nexthop{Ifindex: 3, Mtu: 1500, XdpIfindex: 3, Dmac: [6]byte{1}}
	b := maps.Nexthop{Ifindex: 3, Mtu: 1500, XdpIfindex: 3, Dmac: [6]byte{2}}
	closedA, closedB := a, b
	closedA.XdpIfindex, closedB.XdpIfindex = 0, 0
	plain := maps.Nexthop{Ifindex: 3, Mtu: 1500}
	for _, c := range []struct {
		from, to maps.Nexthop
		want     []maps.Nexthop
	}{
		{a, a, nil},
		{a, b, []maps.Nexthop{closedA, closedB, b}},
		{a, plain, []maps.Nexthop{closedA, plain}},
		{a, closedA, []maps.Nexthop{closedA}},
		{plain, b, []maps.Nexthop{closedB, b}},
		{maps.Nexthop{}, plain, []maps.Nexthop{plain}},
	} {
		if d := cmp.Diff(c.want, writeSteps(c.from, c.to)); d != "" {
			t.Errorf("from %+v to %+v, -want +got:\n%s", c.from, c.to, d)
		}
	}
}

func fakeDevice(index int, name string) netlink.LinkAttrs {
	return netlink.LinkAttrs{
		Index: index, Name: name, EncapType: "ether", HardwareAddr: testMAC(byte(index)), NetNsID: -1,
		RawFlags: unix.IFF_UP | unix.IFF_LOWER_UP,
	}
}

func TestXDPOutput(t *testing.T) {
	nic := &netlink.Device{LinkAttrs: fakeDevice(3, "eth0")}
	veth := &netlink.Veth{LinkAttrs: fakeDevice(5, "veth0")}
	vlanAttrs := fakeDevice(4, "eth0.7")
	vlanAttrs.ParentIndex = 3
	vlan := &netlink.Vlan{LinkAttrs: vlanAttrs, VlanId: 7, VlanProtocol: netlink.VLAN_PROTOCOL_8021AD}
	away := &netlink.Vlan{LinkAttrs: vlanAttrs, VlanId: 7, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q}
	away.NetNsID = 0
	tunnel := &netlink.Device{LinkAttrs: fakeDevice(3, "tun0")}
	tunnel.EncapType = "none"
	down, noCarrier := &netlink.Device{LinkAttrs: fakeDevice(3, "eth0")}, &netlink.Device{LinkAttrs: fakeDevice(3, "eth0")}
	down.RawFlags, noCarrier.RawFlags = unix.IFF_LOWER_UP, unix.IFF_UP

	plain := func(buffers bool) xdpOutput {
		return xdpOutput{ifindex: 3, buffers: buffers, address: [6]byte(testMAC(3))}
	}
	tagged := xdpOutput{ifindex: 3, address: [6]byte(testMAC(4)), vlanProto: maps.Port(0x88a8), vlanID: maps.Port(7)}
	taggedBuffers := tagged
	taggedBuffers.buffers = true
	none := xdpOutput{}
	for what, c := range map[string]struct {
		device   netlink.Link
		generic  bool
		sole     string
		unknown  bool
		features uint64
		want     xdpOutput
	}{
		"takes frames":              {nic, false, "", false, featureXmit, plain(false)},
		"in several buffers":        {nic, false, "", false, featureXmit | featureXmitBuffers, plain(true)},
		"takes none":                {nic, false, "", false, featureBasic, none},
		"takes none but back":       {nic, false, "eth0", false, featureBasic, plain(false)},
		"another is the only one":   {nic, false, "eth1", false, featureBasic, none},
		"old kernel":                {nic, false, "", true, 0, none},
		"old kernel, back":          {nic, false, "eth0", true, 0, plain(false)},
		"old kernel, veth":          {veth, false, "veth0", true, 0, none},
		"generic":                   {nic, true, "", false, 0, plain(true)},
		"VLAN":                      {vlan, false, "", false, featureXmit, tagged},
		"VLAN on a NIC without":     {vlan, false, "", false, featureBasic, none},
		"VLAN back":                 {vlan, false, "eth0", false, featureBasic, tagged},
		"VLAN generic":              {vlan, true, "", false, 0, taggedBuffers},
		"VLAN of another namespace": {away, true, "", false, featureXmit, none},
		"no Ethernet":               {tunnel, true, "", false, featureXmit, none},
		"down":                      {down, true, "", false, featureXmit, none},
		"no carrier":                {noCarrier, true, "", false, featureXmit, none},
	} {
		s := &xdpSender{
			native: !c.generic, sole: c.sole,
			link: func(index int) (netlink.Link, error) {
				if index != 3 {
					t.Errorf("%s: interface %d looked up", what, index)
				}
				return nic, nil
			},
			features: func(int) (uint64, bool, error) { return c.features, !c.unknown, nil },
		}
		got, err := s.output(c.device)
		if got != c.want || err != nil {
			t.Errorf("%s: %+v, %v, want %+v", what, got, err, c.want)
		}
	}
}

func TestNeighbourMark(t *testing.T) {
	for _, key := range []neighbourKey{{3, addr("10.9.0.2")}, {12, addr("fd00:9::2")}, {7, addr("fe80::1")}} {
		if got, err := parseNeighbourMark(neighbourMark(key)); got != key || err != nil || strings.ContainsAny(neighbourMark(key), ".:") {
			t.Errorf("%v came back as %v from %s, %v", key, got, neighbourMark(key), err)
		}
	}
	for _, bad := range []string{"", "3", "x-10%2e9%2e0%2e2", "3-zz", "3-%2"} {
		if _, err := parseNeighbourMark(bad); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}
