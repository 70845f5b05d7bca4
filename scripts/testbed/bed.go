// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
)

// Topology says how the namespaces are joined; the package comment has the drawings.
type Topology int

// The topologies.
const (
	Routed     Topology = iota // the load balancer stands between clients and backends
	TwoUplinks                 // Routed, with a second client-side interface
	OneArmed                   // everybody on one LAN
)

// Options describes a [Bed]. The zero value is a routed bed with three backends and an MTU of 1500.
type Options struct {
	// Topology is optional, Routed by default.
	Topology Topology
	// Backends is how many addresses of each family the backend namespace has. Optional, 3 by default.
	Backends int
	// Clients is how many addresses of each family the client namespace has. Optional, 1 by default.
	Clients int
	// ClientMTU and BackendMTU are the MTUs of the two legs. Optional, 1500 by default. OneArmed has ClientMTU only.
	ClientMTU, BackendMTU int
	// Forward turns on IP forwarding in the load balancer's namespace. snilb does not need it: leave it off, so that
	// a packet that slips past snilb is seen to be lost.
	Forward bool
	// NoOffload turns off TSO, GSO and GRO on every interface: without it most MTU faults stay hidden.
	NoOffload bool
	// XDP prepares the far ends of the load balancer's interfaces for native XDP: whole checksums towards it, and GRO on,
	// because a veth accepts redirected frames only when its peer runs NAPI.
	XDP bool
	// Wires puts a [Wire] into both legs, without offloads, so that what it carries are packets as a cable has them. Only for
	// Routed.
	Wires bool
	// ClientHop and BackendHop put two routers with a link of that MTU between them into a leg. Only for Routed, without
	// Wires, and without [Raw] clients.
	ClientHop, BackendHop int
	// VLANs puts the addresses of both legs on VLAN devices, 100 towards clients and 200 towards backends. Tags are in the
	// frames, as XDP wants them, and not beside them. Only for Routed, alone.
	VLANs bool
}

// Bed is a network of namespaces that is up. Its fields are set by [New] and only read afterwards.
type Bed struct {
	Client, LB, Backend *NS
	LAN                 *NS // the bridge of OneArmed, otherwise nil

	// ClientWire and BackendWire are what stands in the legs with Options.Wires.
	ClientWire, BackendWire *Wire

	// Uplinks are the load balancer's interfaces that face clients.
	Uplinks []string
	// VIP4 and VIP6 are the load balancer's own addresses on Uplinks[0].
	VIP4, VIP6 netip.Addr
	// ExtraVIP4 and ExtraVIP6 are on its loopback device.
	ExtraVIP4, ExtraVIP6 netip.Addr

	// Clients4 and Clients6 are the client's addresses, Backends4 and Backends6 those of the backends.
	Clients4, Clients6   []netip.Addr
	Backends4, Backends6 []netip.Addr

	opts                  Options
	number                int64 // in this process
	all                   []*NS
	clientHop, backendHop *hop
}

// The networks of the package comment.
var (
	clientNet4  = netip.MustParsePrefix("198.51.100.0/25")
	clientNet6  = netip.MustParsePrefix("2001:db8:1::/64")
	uplinkNet4  = netip.MustParsePrefix("198.51.100.128/25")
	uplinkNet6  = netip.MustParsePrefix("2001:db8:4::/64")
	backendNet4 = netip.MustParsePrefix("192.0.2.0/24")
	backendNet6 = netip.MustParsePrefix("2001:db8:2::/64")
	extraVIP4   = netip.MustParseAddr("203.0.113.1")
	extraVIP6   = netip.MustParseAddr("2001:db8:3::1")
)

// beds counts the beds of this process: part of their names.
var beds atomic.Int64

// New builds a bed. When it returns an error nothing is left of it.
func New(opts Options) (_ *Bed, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("network namespaces need root")
	}
	sweep()
	if err := opts.check(); err != nil {
		return nil, err
	}
	b := &Bed{opts: opts.withDefaults(), number: beds.Add(1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
		}
	}()
	if err := b.addNamespaces(); err != nil {
		return nil, err
	}
	b.plan()
	build := b.buildRouted
	if b.opts.Topology == OneArmed {
		build = b.buildLAN
	}
	if err := build(); err != nil {
		return nil, err
	}
	return b, b.waitUp(5 * time.Second)
}

// Close removes everything New made, and kills the commands started in it that still run. It does not wait for them.
func (b *Bed) Close() error {
	var errs []error
	for _, w := range []*Wire{b.ClientWire, b.BackendWire} {
		if w != nil {
			errs = append(errs, w.close())
		}
	}
	b.ClientWire, b.BackendWire = nil, nil
	for _, ns := range b.all {
		errs = append(errs, ns.close())
	}
	b.all = nil
	return errors.Join(errs...)
}

func (o Options) withDefaults() Options {
	for _, f := range []struct {
		field *int
		value int
	}{{&o.Backends, 3}, {&o.Clients, 1}, {&o.ClientMTU, 1500}, {&o.BackendMTU, 1500}} {
		if *f.field == 0 {
			*f.field = f.value
		}
	}
	return o
}

func (o Options) check() error {
	hops := o.ClientHop != 0 || o.BackendHop != 0
	if (hops || o.Wires || o.VLANs) && o.Topology != Routed || hops && o.Wires || o.VLANs && (hops || o.Wires) {
		return errors.New("wires, or hops, or VLANs, are for the topology Routed")
	}
	return nil
}

func (b *Bed) addNamespaces() error {
	roles := []struct {
		name string
		ns   **NS
	}{{"client", &b.Client}, {"lb", &b.LB}, {"backend", &b.Backend}, {"lan", &b.LAN}}
	if b.opts.Topology != OneArmed {
		roles = roles[:3]
	}
	for _, r := range roles {
		if err := b.addNamespace(r.name, r.ns); err != nil {
			return err
		}
	}
	return b.addBetween()
}

func (b *Bed) addNamespace(role string, to **NS) error {
	ns, err := newNS(fmt.Sprintf("%s%d-%d-%s", namePrefix, os.Getpid(), b.number, role))
	if err != nil {
		return err
	}
	*to = ns
	b.all = append(b.all, ns)
	return ns.basics()
}

// addBetween makes what stands in the legs.
func (b *Bed) addBetween() (err error) {
	if b.opts.ClientHop != 0 {
		if b.clientHop, err = b.addHop(clientHop, "client", b.opts.ClientHop); err != nil {
			return err
		}
	}
	if b.opts.BackendHop != 0 {
		if b.backendHop, err = b.addHop(backendHop, "backend", b.opts.BackendHop); err != nil {
			return err
		}
	}
	if !b.opts.Wires {
		return nil
	}
	b.ClientWire, b.BackendWire = &Wire{}, &Wire{}
	return errors.Join(b.addNamespace("clientwire", &b.ClientWire.ns), b.addNamespace("backendwire", &b.BackendWire.ns))
}

// plan hands out the addresses.
func (b *Bed) plan() {
	b.VIP4, b.VIP6 = nth(clientNet4, 1), nth(clientNet6, 1)
	if h := b.clientHop; h != nil {
		b.VIP4, b.VIP6 = nth(h.net4, 1), nth(h.net6, 1)
	}
	b.ExtraVIP4, b.ExtraVIP6 = extraVIP4, extraVIP6
	b.Uplinks = []string{vlanName("eth0", b.clientVLAN())}
	if b.opts.Topology == TwoUplinks {
		b.Uplinks = append(b.Uplinks, "eth2")
	}
	for i := range b.opts.Clients {
		b.Clients4 = append(b.Clients4, nth(clientNet4, 10+i))
		b.Clients6 = append(b.Clients6, nth(clientNet6, 0x10+i))
	}
	net4, net6, first4, first6 := backendNet4, backendNet6, 11, 0x11
	if b.opts.Topology == OneArmed {
		net4, net6, first4, first6 = clientNet4, clientNet6, 101, 0x101
	}
	for i := range b.opts.Backends {
		b.Backends4 = append(b.Backends4, nth(net4, first4+i))
		b.Backends6 = append(b.Backends6, nth(net6, first6+i))
	}
}

// The VLANs of Options.VLANs; 0 is none.
func (b *Bed) clientVLAN() int  { return ifSet(b.opts.VLANs, 100) }
func (b *Bed) backendVLAN() int { return ifSet(b.opts.VLANs, 200) }

func ifSet(set bool, vlan int) int {
	if !set {
		return 0
	}
	return vlan
}

// leg is one cable: the load balancer's end, and the end and addresses of the other side.
type leg struct {
	lbDev   string
	far     *NS
	farDev  string
	mtu     int
	net4    netip.Prefix
	net6    netip.Prefix
	far4    []netip.Addr
	far6    []netip.Addr
	gateway bool // the far side's default route is this leg
	wire    *Wire
	hop     *hop
	vlan    int // the addresses are on its devices, at both ends
}

func (b *Bed) legs() []leg {
	o := b.opts
	legs := []leg{
		{"eth0", b.Client, "eth0", o.ClientMTU, clientNet4, clientNet6, b.Clients4, b.Clients6, true, b.ClientWire, b.clientHop, b.clientVLAN()},
		{"eth1", b.Backend, "eth0", o.BackendMTU, backendNet4, backendNet6, b.Backends4, b.Backends6, true, b.BackendWire, b.backendHop, b.backendVLAN()},
	}
	if o.Topology == TwoUplinks {
		far4, far6 := []netip.Addr{nth(uplinkNet4, 2)}, []netip.Addr{nth(uplinkNet6, 2)}
		legs = append(legs, leg{"eth2", b.Client, "eth1", o.ClientMTU, uplinkNet4, uplinkNet6, far4, far6, false, nil, nil, 0})
	}
	return legs
}

func (b *Bed) buildRouted() error {
	if b.opts.Forward {
		for _, key := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := b.LB.Sysctl(key, "1"); err != nil {
				return err
			}
		}
	}
	if err := b.addVIPs(); err != nil {
		return err
	}
	for _, l := range b.legs() {
		connect := b.connect
		if l.hop != nil {
			connect = b.connectHop
		}
		if err := connect(l); err != nil {
			return fmt.Errorf("leg %s of the load balancer: %w", l.lbDev, err)
		}
	}
	return nil
}

func (b *Bed) connect(l leg) error {
	if err := b.cable(l); err != nil {
		return err
	}
	if err := l.tag(b.LB); err != nil {
		return err
	}
	if err := b.LB.setUp(l.lbDev, bits(l.net4, nth(l.net4, 1)), bits(l.net6, nth(l.net6, 1))); err != nil {
		return err
	}
	far := append(bits(l.net4, l.far4...), bits(l.net6, l.far6...)...)
	if err := l.far.setUp(l.farDev, far); err != nil {
		return err
	}
	if l.gateway {
		return l.far.defaultRoute(l.farDev, nth(l.net4, 1), nth(l.net6, 1))
	}
	return nil
}

// tag puts VLAN devices on both ends of a leg that has a VLAN, and makes them its ends.
func (l *leg) tag(lb *NS) error {
	if l.vlan == 0 {
		return nil
	}
	err := errors.Join(lb.addVLAN(l.lbDev, l.vlan), l.far.addVLAN(l.farDev, l.vlan))
	l.lbDev, l.farDev = vlanName(l.lbDev, l.vlan), vlanName(l.farDev, l.vlan)
	return err
}

// cable joins the two ends of a leg, by a wire if it has one.
func (b *Bed) cable(l leg) error {
	if l.wire != nil {
		return b.layWire(l)
	}
	if err := veth(b.LB, l.lbDev, l.far, l.farDev, l.mtu); err != nil {
		return err
	}
	return b.tune(b.LB, l.lbDev, l.far, l.farDev)
}

// layWire joins the two ends by way of the wire's namespace, in which no address and no IPv6 keeps the kernel silent.
func (b *Bed) layWire(l leg) error {
	w := l.wire
	if err := w.ns.Sysctl("ipv6/conf/default/disable_ipv6", "1"); err != nil {
		return err
	}
	if err := veth(b.LB, l.lbDev, w.ns, "near", l.mtu); err != nil {
		return err
	}
	if err := veth(w.ns, "far", l.far, l.farDev, l.mtu); err != nil {
		return err
	}
	err := errors.Join(
		b.LB.Offload(l.lbDev, false, TSO, GSO, GRO, TxChecksum), l.far.Offload(l.farDev, false, TSO, GSO, GRO, TxChecksum),
		w.ns.Offload("near", false, GRO), w.ns.Offload("far", false, GRO),
		b.tune(b.LB, l.lbDev, w.ns, "near"),
		w.ns.neverMerge("near"),
		w.ns.setUp("near"), w.ns.setUp("far"))
	if err != nil {
		return err
	}
	return w.start("near", "far")
}

// tune sets the offloads of both ends of a cable; far is the end away from the load balancer.
func (b *Bed) tune(near *NS, nearDev string, far *NS, farDev string) error {
	if b.opts.NoOffload {
		if err := errors.Join(near.Offload(nearDev, false, TSO, GSO, GRO), far.Offload(farDev, false, TSO, GSO, GRO)); err != nil {
			return err
		}
	}
	if b.opts.XDP {
		return errors.Join(far.Offload(farDev, false, TxChecksum), far.Offload(farDev, true, GRO))
	}
	return nil
}

// buildLAN joins the three namespaces by a bridge in a fourth.
func (b *Bed) buildLAN() error {
	if err := b.LAN.bridge("br0", b.opts.ClientMTU); err != nil {
		return err
	}
	if err := b.addVIPs(); err != nil {
		return err
	}
	for _, m := range []struct {
		ns         *NS
		port       string
		addr4      []netip.Addr
		addr6      []netip.Addr
		needsRoute bool
	}{
		{b.LB, "lb", []netip.Addr{b.VIP4}, []netip.Addr{b.VIP6}, false},
		{b.Client, "client", b.Clients4, b.Clients6, true},
		{b.Backend, "backend", b.Backends4, b.Backends6, false},
	} {
		if err := b.plug(m.ns, m.port, append(bits(clientNet4, m.addr4...), bits(clientNet6, m.addr6...)...)); err != nil {
			return fmt.Errorf("plug in %s: %w", m.port, err)
		}
		if !m.needsRoute {
			continue
		}
		for _, gw := range []netip.Addr{b.VIP4, b.VIP6} { // the extra VIPs are behind the load balancer
			if err := m.ns.route("eth0", netip.PrefixFrom(zero(gw), 0), gw); err != nil {
				return err
			}
		}
	}
	return nil
}

// plug connects eth0 of ns to a port of the bridge.
func (b *Bed) plug(ns *NS, port string, addrs []netip.Prefix) error {
	if err := veth(ns, "eth0", b.LAN, port, b.opts.ClientMTU); err != nil {
		return err
	}
	if err := ns.setUp("eth0", addrs); err != nil {
		return err
	}
	if err := b.LAN.setUp(port, nil); err != nil {
		return err
	}
	if err := b.LAN.enslave(port, "br0"); err != nil {
		return err
	}
	return b.tune(ns, "eth0", b.LAN, port)
}

// waitUp waits until the kernel has brought up every interface: until then, up to a second after the carrier is there, the
// first packets are lost, and whoever sent a SYN waits another second for its repetition.
func (b *Bed) waitUp(limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
		waiting, err := b.notUp()
		if err != nil || len(waiting) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("interfaces not up after %s: %v", limit, waiting)
		}
	}
}

func (b *Bed) notUp() (waiting []string, err error) {
	for _, ns := range b.all {
		devs, err := ns.notUp()
		if err != nil {
			return nil, err
		}
		waiting = append(waiting, devs...)
	}
	return waiting, nil
}

// addVIPs puts the extra addresses on the loopback device.
func (b *Bed) addVIPs() error {
	return b.LB.setUp("lo", []netip.Prefix{netip.PrefixFrom(extraVIP4, 32), netip.PrefixFrom(extraVIP6, 128)})
}

// UseUplink makes the client send what is for the extra VIPs through uplink i, also in the middle of a connection.
// Replies still arrive by the first, where the client's address is. Only for TwoUplinks.
func (b *Bed) UseUplink(i int) error {
	dev, gateways := "eth0", []netip.Addr{nth(clientNet4, 1), nth(clientNet6, 1)}
	if i == 1 {
		dev, gateways = "eth1", []netip.Addr{nth(uplinkNet4, 1), nth(uplinkNet6, 1)}
	}
	for j, vip := range []netip.Addr{extraVIP4, extraVIP6} {
		if err := b.Client.route(dev, netip.PrefixFrom(vip, vip.BitLen()), gateways[j]); err != nil {
			return err
		}
	}
	return nil
}

// Neighbour tells the load balancer that addr, which no kernel owns, is reached at the client's eth0: this is how a
// [Raw] client gets its packets, while no TCP stack answers them by RST.
func (b *Bed) Neighbour(addr netip.Addr) error {
	mac, err := b.Client.mac("eth0")
	if err != nil {
		return err
	}
	return b.LB.neighbour("eth0", addr, mac)
}

// nth is the n-th address of a network.
func nth(p netip.Prefix, n int) netip.Addr {
	raw := p.Masked().Addr().AsSlice()
	last := len(raw) - 1
	raw[last] += byte(n)
	raw[last-1] += byte(n >> 8)
	addr, _ := netip.AddrFromSlice(raw)
	return addr
}

// zero is the unspecified address of addr's family.
func zero(addr netip.Addr) netip.Addr {
	if addr.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// bits gives addresses the prefix length of their network.
func bits(p netip.Prefix, addrs ...netip.Addr) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(addrs))
	for _, a := range addrs {
		out = append(out, netip.PrefixFrom(a, p.Bits()))
	}
	return out
}

// Unplug deletes an interface of the load balancer and the far end of its cable, with their addresses and routes.
func (b *Bed) Unplug(dev string) error {
	return b.LB.withLink(dev, func(h *netlink.Handle, link netlink.Link) error { return h.LinkDel(link) })
}

// Plug makes an interface again that Unplug has deleted, as New made it. Only for Routed and TwoUplinks.
func (b *Bed) Plug(dev string) error {
	for _, l := range b.legs() {
		if l.lbDev != dev {
			continue
		}
		return errors.Join(b.connect(l), b.waitLink(dev))
	}
	return fmt.Errorf("no leg has %s", dev)
}

// waitLink waits until the kernel has brought up one interface of the load balancer.
func (b *Bed) waitLink(dev string) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		waiting, err := b.LB.notUp()
		if err != nil || !slices.Contains(waiting, b.LB.Name+"/"+dev) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("interface %s is not up", dev)
		}
	}
}

// SecondPath is a further cable between the load balancer and the backends, with a network of its own on which each has the
// first and the second address. It is the load balancer's eth3 and the backends' eth1.
func (b *Bed) SecondPath() (net4, net6 netip.Prefix, err error) {
	net4, net6 = netip.MustParsePrefix("192.0.3.0/24"), netip.MustParsePrefix("2001:db8:5::/64")
	err = b.connect(leg{lbDev: "eth3", far: b.Backend, farDev: "eth1", mtu: b.opts.BackendMTU, net4: net4, net6: net6,
		far4: []netip.Addr{nth(net4, 2)}, far6: []netip.Addr{nth(net6, 2)}})
	return net4, net6, errors.Join(err, b.waitLink("eth3"))
}
