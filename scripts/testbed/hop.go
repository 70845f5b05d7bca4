// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
)

// hop is two routers in a leg, joined by a link of a small MTU. Whoever sends too big a packet through it, in either
// direction, learns of that link by ICMP alone: both links that hosts stand on keep the MTU of the leg.
type hop struct {
	near, far       *NS // the routers next to the load balancer and to the far host
	mtu             int
	net4, net6      netip.Prefix // between the load balancer and the near router
	small4, small6  netip.Prefix // between the routers
	nearDev, farDev string       // towards the hosts; the devices between the routers are "small"
}

// The networks of hops.
var (
	clientHop = hop{
		net4: uplinkNet4, net6: uplinkNet6,
		small4: netip.MustParsePrefix("203.0.113.128/26"), small6: netip.MustParsePrefix("2001:db8:5::/64"),
	}
	backendHop = hop{
		net4: netip.MustParsePrefix("203.0.113.64/26"), net6: netip.MustParsePrefix("2001:db8:6::/64"),
		small4: netip.MustParsePrefix("203.0.113.192/26"), small6: netip.MustParsePrefix("2001:db8:7::/64"),
	}
)

// addHop makes the routers.
func (b *Bed) addHop(h hop, name string, mtu int) (*hop, error) {
	h.mtu, h.nearDev, h.farDev = mtu, "near", "far"
	for _, r := range []struct {
		name string
		ns   **NS
	}{{name + "near", &h.near}, {name + "far", &h.far}} {
		if err := b.addNamespace(r.name, r.ns); err != nil {
			return nil, err
		}
		if err := (*r.ns).router(); err != nil {
			return nil, err
		}
	}
	return &h, nil
}

// router makes a namespace forward, and tell everybody whose packet is too big, however often.
func (ns *NS) router() error {
	for key, value := range map[string]string{
		"ipv4/ip_forward":          "1",
		"ipv6/conf/all/forwarding": "1",
		"ipv4/icmp_ratelimit":      "0",
		"ipv6/icmp/ratelimit":      "0",
		"ipv4/icmp_msgs_per_sec":   "100000",
		"ipv4/icmp_msgs_burst":     "1000",
	} {
		if err := ns.Sysctl(key, value); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("sysctl in %s: %w", ns.Name, err)
		}
	}
	return nil
}

// connectHop lays the leg's three links and sets the routes along it. The far host keeps its network, and .1 of it as its
// gateway.
func (b *Bed) connectHop(l leg) error {
	h := l.hop
	for _, c := range []struct {
		a    *NS
		aDev string
		z    *NS
		zDev string
		mtu  int
	}{{b.LB, l.lbDev, h.near, h.nearDev, l.mtu}, {h.near, "small", h.far, "small", h.mtu}, {h.far, h.farDev, l.far, l.farDev, l.mtu}} {
		if err := veth(c.a, c.aDev, c.z, c.zDev, c.mtu); err != nil {
			return err
		}
		if err := b.tune(c.a, c.aDev, c.z, c.zDev); err != nil {
			return err
		}
	}
	up := func(ns *NS, dev string, net4, net6 netip.Prefix, n int) error {
		return ns.setUp(dev, bits(net4, nth(net4, n)), bits(net6, nth(net6, n)))
	}
	err := errors.Join(
		up(b.LB, l.lbDev, h.net4, h.net6, 1), up(h.near, h.nearDev, h.net4, h.net6, 2),
		up(h.near, "small", h.small4, h.small6, 1), up(h.far, "small", h.small4, h.small6, 2),
		up(h.far, h.farDev, l.net4, l.net6, 1),
		l.far.setUp(l.farDev, bits(l.net4, l.far4...), bits(l.net6, l.far6...)))
	if err != nil {
		return err
	}
	return errors.Join(
		b.LB.route(l.lbDev, l.net4, nth(h.net4, 2)), b.LB.route(l.lbDev, l.net6, nth(h.net6, 2)),
		h.near.route("small", l.net4, nth(h.small4, 2)), h.near.route("small", l.net6, nth(h.small6, 2)),
		h.near.defaultRoute(h.nearDev, nth(h.net4, 1), nth(h.net6, 1)),
		h.far.defaultRoute("small", nth(h.small4, 1), nth(h.small6, 1)),
		l.far.defaultRoute(l.farDev, nth(l.net4, 1), nth(l.net6, 1)))
}

func (ns *NS) defaultRoute(dev string, gateways ...netip.Addr) error {
	for _, gw := range gateways {
		if err := ns.route(dev, netip.PrefixFrom(zero(gw), 0), gw); err != nil {
			return err
		}
	}
	return nil
}
