// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"snilb/maps"
)

var (
	// ErrLocal says that an address is one of this node's own.
	ErrLocal = errors.New("a backend on this very node: not supported yet")
	// ErrUnreachable says that the kernel has no route to an address.
	ErrUnreachable = errors.New("no route")
)

// NextHop is how packets to an address leave this node.
type NextHop struct {
	Index   uint16 // in the nexthops table; never 0
	MTU     int
	Ifindex int
	Source  netip.Addr // the address the kernel would speak from
}

// route is the kernel's answer for one destination.
type route struct {
	ifindex int
	gateway netip.Addr // invalid: the destination is on the link
	source  netip.Addr
	mtu     int // the route's own, 0: the link's
}

// lookupRoute asks the kernel. dst is not v4-mapped.
func lookupRoute(ns *namespace, dst netip.Addr) (route, error) {
	if !dst.IsValid() || dst.IsUnspecified() || dst.IsMulticast() {
		return route{}, fmt.Errorf("%v is no host's address: %w", dst, ErrUnreachable)
	}
	found, err := ns.RouteGet(dst.AsSlice())
	if err != nil {
		return route{}, fmt.Errorf("%w to %v (%w); see `ip route get %v`", ErrUnreachable, dst, err, dst)
	}
	if len(found) == 0 {
		return route{}, fmt.Errorf("%w to %v", ErrUnreachable, dst)
	}
	r := found[0]
	switch r.Type {
	case unix.RTN_LOCAL:
		return route{}, fmt.Errorf("%v: %w", dst, ErrLocal)
	case unix.RTN_UNICAST:
	default:
		return route{}, fmt.Errorf("%w to %v: the kernel's is of type %d, not unicast", ErrUnreachable, dst, r.Type)
	}
	return route{ifindex: r.LinkIndex, gateway: gatewayOf(&r), source: addrOf(r.Src), mtu: r.MTU}, nil
}

// gatewayOf knows IPv4 routes by IPv6 gateways too (RFC 5549), which stand in another
// attribute.
func gatewayOf(r *netlink.Route) netip.Addr {
	if via, ok := r.Via.(*netlink.Via); ok {
		return addrOf(via.Addr)
	}
	return addrOf(r.Gw)
}

func addrOf(ip []byte) netip.Addr {
	addr, _ := netip.AddrFromSlice(ip) // none is the invalid address
	return addr.Unmap()
}

// hopKey is what makes two destinations share an entry of the nexthops table.
type hopKey struct {
	ifindex int
	gateway netip.Addr // invalid: on the link; an ownDestination's own address
	family  uint8      // of the gateway, or of the destination
	mtu     int        // the route's own, 0: the link's
	limit   int        // less than both, for a destination that takes less; 0: none
}

func (t *hopTable) keyOf(dst netip.Addr, r route) hopKey {
	k := hopKey{ifindex: r.ifindex, gateway: r.gateway, family: unix.AF_INET6, mtu: r.mtu}
	if addr := r.gateway; addr.Is4() || !addr.IsValid() && dst.Is4() {
		k.family = unix.AF_INET
	}
	if !k.gateway.IsValid() && t.own.has(dst) {
		k.gateway = dst
	}
	return k
}

// neighbour is who the packets of an entry are handed to; none where it is anybody on
// the link.
func (k *hopKey) neighbour() neighbourKey {
	return neighbourKey{k.ifindex, k.gateway}
}

// Destinations on links that have entries of their own.
const (
	maxOwnDestinations = 1024
	maxOwnBackends     = 16384
)

// ownDestinations are those on links that do not share an entry: backends, as bound flows
// follow an entry when all of its destinations move, and one backend may move alone; and
// with XDP, which sends to the one link address that an entry has, everybody.
type ownDestinations struct {
	log       *slog.Logger
	everybody bool

	mu   sync.Mutex
	all  map[netip.Addr]bool
	full bool // and that was said
}

// has reports whether a destination is one of them, and makes it one while there is room.
func (o *ownDestinations) has(dst netip.Addr) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.all[dst] || !o.everybody {
		return o.all[dst]
	}
	if len(o.all) >= maxOwnDestinations {
		if !o.full {
			o.full = true
			o.log.Warn("too many peers on links of this node: what goes to further ones is sent by TC and not by XDP", "most", maxOwnDestinations)
		}
		return false
	}
	o.all[dst] = true
	return true
}

// add makes a backend one of them.
func (o *ownDestinations) add(dst netip.Addr) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.all) < maxOwnDestinations+maxOwnBackends {
		o.all[dst] = true
	}
}

// hop is one entry of the nexthops table. Bound flows hold its index, so it is
// never given away, but may be pointed elsewhere when its destinations move.
type hop struct {
	home    hopKey // what it was made for
	key     hopKey // where it points now
	link    linkInfo
	samples []netip.Addr
	written maps.Nexthop // what the kernel has
}

// Destinations that stand for all of an entry when routes change.
const hopSamples = 8

// hopTable is the nexthops table as user space knows it.
type hopTable struct {
	write func(uint32, *maps.Nexthop) error
	find  func(netip.Addr) (route, error) // asks the kernel
	own   *ownDestinations

	mu     sync.Mutex
	byKey  map[hopKey]uint16 // what new flows are given
	byHome map[hopKey]uint16
	hops   []hop    // by index; 0 stays unset
	free   []uint16 // of hops, those that no flow had when the daemon began
	// addresses are those of the neighbours that can be sent to.
	addresses map[neighbourKey][6]byte
}

func newHopTable(write func(uint32, *maps.Nexthop) error, find func(netip.Addr) (route, error)) *hopTable {
	return &hopTable{
		write:  write,
		find:   find,
		byKey:  make(map[hopKey]uint16),
		byHome: make(map[hopKey]uint16),
		hops:   make([]hop, 1),

		own:       &ownDestinations{all: make(map[netip.Addr]bool)},
		addresses: make(map[neighbourKey][6]byte),
	}
}

// index finds or adds the entry of a destination. link is the route's interface. Who
// the entry hands packets to is returned if XDP could.
func (t *hopTable) index(dst netip.Addr, r route, link linkInfo) (index uint16, mtu int, via neighbourKey, err error) {
	key := t.keyOf(dst, r)
	t.mu.Lock()
	defer t.mu.Unlock()
	index, mtu, err = t.indexOf(dst, key, link)
	if err == nil {
		via = t.hops[index].via()
	}
	return index, mtu, via, err
}

// via returns who an entry hands its packets to, if XDP could do so.
func (h *hop) via() neighbourKey {
	if h.link.mtu == 0 || h.link.xdp.ifindex == 0 || !h.key.gateway.IsValid() {
		return neighbourKey{}
	}
	return h.key.neighbour()
}

// indexOf is index for a next hop that is known; t.mu is held.
func (t *hopTable) indexOf(dst netip.Addr, key hopKey, link linkInfo) (index uint16, mtu int, err error) {
	index, ok := t.byKey[key]
	if !ok {
		if index, err = t.homeOrNew(key); err != nil {
			return 0, 0, err
		}
	}
	h := &t.hops[index]
	if len(h.samples) < hopSamples && !slices.Contains(h.samples, dst) {
		h.samples = append(h.samples, dst)
	}
	h.link = link
	return index, key.effectiveMTU(link.mtu), t.store(index)
}

// homeOrNew takes back the entry that was made for a next hop, if its destinations
// have all come back too: a route that flaps would use up the table otherwise. t.mu
// is held.
func (t *hopTable) homeOrNew(key hopKey) (uint16, error) {
	if index, ok := t.byHome[key]; ok {
		h := &t.hops[index]
		if t.follow(h) == key {
			t.move(index, key)
			return index, nil
		}
	}
	if len(t.free) == 0 && len(t.hops) >= maps.MaxNexthops {
		return 0, fmt.Errorf("all %d next hops are taken: restart the daemon", maps.MaxNexthops-1)
	}
	index := uint16(len(t.hops))
	if last := len(t.free) - 1; last >= 0 {
		index, t.free = t.free[last], t.free[:last]
		t.hops[index] = hop{home: key, key: key, written: t.hops[index].written}
	} else {
		t.hops = append(t.hops, hop{home: key, key: key})
	}
	t.byKey[key], t.byHome[key] = index, index
	return index, nil
}

// adopt takes over the entries that an earlier daemon has written: those that flows leave by, whose
// destinations are given, for these; the others for what comes. Nothing is written yet.
func (t *hopTable) adopt(written map[uint16]maps.Nexthop, samples map[uint16][]netip.Addr, link func(ifindex int) linkInfo) {
	t.mu.Lock()
	defer t.mu.Unlock()
	asked := make(map[int]linkInfo)
	link = func(ask func(int) linkInfo) func(int) linkInfo {
		return func(ifindex int) linkInfo {
			if _, ok := asked[ifindex]; !ok {
				asked[ifindex] = ask(ifindex)
			}
			return asked[ifindex]
		}
	}(link)
	last := 0
	for index := range written {
		last = max(last, int(index))
	}
	for index := range samples {
		last = max(last, int(index)) // whose interface is gone: nothing is written
	}
	for n := 1; n <= last; n++ {
		index := uint16(n)
		h := hop{written: written[index], samples: samples[index]}
		if h.key = t.keyWritten(&h, link); h.key.ifindex != 0 {
			h.home, h.link = h.key, link(h.key.ifindex)
			if _, ok := t.byKey[h.key]; !ok {
				t.byKey[h.key], t.byHome[h.key] = index, index
			}
		}
		if len(h.samples) == 0 {
			t.free = append(t.free, index)
		}
		t.hops = append(t.hops, h)
	}
}

// keyWritten is what an entry was written for. What made its MTU less than the link's is not written: what the
// route does not explain is a limit. One that nothing is written of was for an interface that is gone: it is for where its
// destinations are now, and follows them if they are nowhere. Returns the zero key for that, and for one without flows.
func (t *hopTable) keyWritten(h *hop, link func(ifindex int) linkInfo) hopKey {
	switch {
	case len(h.samples) == 0:
		return hopKey{}
	case h.written.Ifindex == 0:
		return t.follow(h)
	}
	key := hopKey{ifindex: int(h.written.Ifindex), family: h.written.Family}
	if h.written.Gateway != [4]uint32{} {
		key.gateway = maps.Addr(h.written.Gateway)
		if slices.Contains(h.samples, key.gateway) {
			t.own.add(key.gateway)
		}
	}
	if r, err := t.find(h.samples[0]); err == nil {
		if now := t.keyOf(h.samples[0], r); now.ifindex == key.ifindex && now.gateway == key.gateway {
			key.mtu = now.mtu
		}
	}
	if mtu := int(h.written.Mtu); mtu < key.effectiveMTU(link(key.ifindex).mtu) {
		key.limit = mtu
	}
	return key
}

// within finds or adds an entry like another one, with a limit.
func (t *hopTable) within(index uint16, dst netip.Addr, limit int) (uint16, int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := t.hops[index].key
	key.limit = limit
	return t.indexOf(dst, key, t.hops[index].link)
}

// effectiveMTU is the smallest of the link's, the route's and the limit.
func (k *hopKey) effectiveMTU(linkMTU int) int {
	for _, mtu := range []int{k.mtu, k.limit} {
		if mtu > 0 && mtu < linkMTU {
			linkMTU = mtu
		}
	}
	return linkMTU
}

// value is what the kernel shall have of an entry; t.mu is held.
func (t *hopTable) value(h *hop) maps.Nexthop {
	if h.link.mtu == 0 {
		return maps.Nexthop{}
	}
	mtu := h.key.effectiveMTU(h.link.mtu)
	value := maps.Nexthop{Ifindex: uint32(h.key.ifindex), Mtu: uint16(min(mtu, 65535)), Family: h.key.family}
	if h.key.gateway.IsValid() {
		value.Gateway = maps.Words(h.key.gateway) // all zero means on the link, which no v4-mapped address is
	}
	address, ok := t.addresses[h.via()]
	if !ok {
		return value
	}
	out := &h.link.xdp
	value.XdpIfindex, value.Dmac, value.Smac = uint32(out.ifindex), address, out.address
	value.VlanProto, value.VlanId = out.vlanProto, out.vlanID
	if out.buffers {
		value.Flags |= maps.NexthopBuffers
	}
	return value
}

// store writes an entry to the kernel if it changed; t.mu is held.
func (t *hopTable) store(index uint16) error {
	h := &t.hops[index]
	value := t.value(h)
	for _, step := range writeSteps(h.written, value) {
		if err := t.write(uint32(index), &step); err != nil {
			return fmt.Errorf("write next hop: %w", err)
		}
		h.written = step
	}
	return nil
}

// writeSteps returns what to write one after the other. Programs read an entry while the
// kernel copies it: as long as the link addresses change, XDP is told not to use them.
func writeSteps(from, to maps.Nexthop) []maps.Nexthop {
	if from == to {
		return nil
	}
	var steps []maps.Nexthop
	if from.XdpIfindex != 0 {
		from.XdpIfindex = 0
		steps = append(steps, from)
	}
	if to.XdpIfindex != 0 {
		closed := to
		closed.XdpIfindex = 0
		steps = append(steps, closed)
	}
	return slices.Compact(append(steps, to))
}

// setNeighbour notes the link address of a neighbour, or that there is none just now.
func (t *hopTable) setNeighbour(key neighbourKey, address [6]byte, ok bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if was, had := t.addresses[key]; had == ok && was == address {
		return nil
	}
	if ok {
		t.addresses[key] = address
	} else {
		delete(t.addresses, key)
	}
	var errs []error
	for n := 1; n < len(t.hops); n++ {
		if t.hops[n].key.neighbour() == key {
			errs = append(errs, t.store(uint16(n)))
		}
	}
	return errors.Join(errs...)
}

// neighbours lists whom entries hand packets to, where XDP could do so.
func (t *hopTable) neighbours() []neighbourKey {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []neighbourKey
	for n := 1; n < len(t.hops); n++ {
		if via := t.hops[n].via(); via.addr.IsValid() {
			all = append(all, via)
		}
	}
	return all
}

// refresh brings all entries up to date: what is known of links, interfaces that are
// gone, and entries whose destinations all moved to another next hop, which bound flows
// must follow. link is asked about each interface in use. The routes are asked for
// without the lock: workers want it too.
func (t *hopTable) refresh(link func(ifindex int) linkInfo) error {
	t.mu.Lock()
	before := slices.Clone(t.hops)
	t.mu.Unlock()

	now := make([]hopKey, len(before))
	links := make(map[int]linkInfo)
	for n := 1; n < len(before); n++ {
		now[n] = t.follow(&before[n])
		for _, ifindex := range []int{before[n].key.ifindex, now[n].ifindex} {
			if _, asked := links[ifindex]; !asked && ifindex != 0 {
				links[ifindex] = link(ifindex)
			}
		}
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for n := 1; n < len(before); n++ {
		h := &t.hops[n]
		if h.key == before[n].key && now[n] != h.key { // else a worker saw the change first
			t.move(uint16(n), now[n])
		}
		if known, asked := links[h.key.ifindex]; asked {
			h.link = known
			errs = append(errs, t.store(uint16(n)))
		}
	}
	return errors.Join(errs...)
}

// follow returns the next hop that all samples of an entry have now. If they do not
// agree it stays: one destination that moved alone must not take the others along.
func (t *hopTable) follow(h *hop) hopKey {
	now, known := h.key, false
	for _, dst := range h.samples {
		r, err := t.find(dst)
		if err != nil {
			continue // without a route there is nowhere better to send it
		}
		key := t.keyOf(dst, r)
		key.limit = h.key.limit
		if known && key != now {
			return h.key
		}
		now, known = key, true
	}
	return now
}

// move points an entry elsewhere; whoever is routed the old way from now on gets an
// entry of his own. t.mu is held.
func (t *hopTable) move(index uint16, to hopKey) {
	h := &t.hops[index]
	if t.byKey[h.key] == index {
		delete(t.byKey, h.key)
	}
	h.key = to
	if _, ok := t.byKey[to]; !ok {
		t.byKey[to] = index
	}
}

// NextHop returns how packets to an address leave this node, as the kernel routes
// them, and makes sure that the nexthops table has it. Returns an error that is
// ErrLocal for an address of this node, and one that is ErrUnreachable if there is
// no route. Known addresses cost no system call, nor for a second do those without a route. The question is asked without a
// source address or interface: policy routing by source is not seen, and a
// link-local destination is looked for on one link only.
func (i *Instance) NextHop(dst netip.Addr) (NextHop, error) {
	dst = dst.Unmap()
	if h, ok, err := i.cache.get(dst); ok {
		return h, err
	}
	return i.resolve(dst)
}

// NextHopWithin is NextHop for a destination that takes IP packets of at most mtu
// bytes, less than the way to it: the kernel programs treat larger ones as too big.
func (i *Instance) NextHopWithin(dst netip.Addr, mtu int) (NextHop, error) {
	dst = dst.Unmap()
	h, err := i.NextHop(dst)
	if err != nil || h.MTU <= mtu {
		return h, err
	}
	h.Index, h.MTU, err = i.hops.within(h.Index, dst, mtu)
	return h, err
}

func (i *Instance) resolve(dst netip.Addr) (NextHop, error) {
	generation := i.cache.generation.Load()
	r, err := lookupRoute(i.ns, dst)
	if err != nil {
		i.cache.put(dst, answer{err: err, until: time.Now().Add(unreachableFor)}, generation)
		return NextHop{}, err
	}
	link, err := i.cache.link(r.ifindex, i.askLink)
	if err != nil {
		return NextHop{}, fmt.Errorf("%w to %v: its interface is gone (%w)", ErrUnreachable, dst, err)
	}
	index, mtu, via, err := i.hops.index(dst, r, link)
	if err != nil {
		return NextHop{}, err
	}
	if via.addr.IsValid() {
		i.neighbours.watch(via)
	}
	// Before anybody speaks from a new source or by a new interface, the answer must find its way.
	if err := i.settle(dst, r, mtu); err != nil {
		return NextHop{}, err
	}
	h := NextHop{Index: index, MTU: mtu, Ifindex: r.ifindex, Source: r.source}
	i.cache.put(dst, answer{hop: h}, generation)
	return h, nil
}

// askLink describes an interface. A driver that cannot be asked is one that XDP does not
// send by: TC does.
func (i *Instance) askLink(ifindex int) (linkInfo, error) {
	device, err := i.ns.LinkByIndex(ifindex)
	if err != nil {
		return linkInfo{}, err
	}
	known := linkInfo{mtu: device.Attrs().MTU}
	if i.neighbours != nil {
		if known.xdp, err = i.newSender().output(device); err != nil && !isGone(err) {
			i.log.Warn("XDP does not send by an interface", "interface", device.Attrs().Name, "error", err)
		}
	}
	return known, nil
}
