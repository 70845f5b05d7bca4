// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

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
	gateway netip.Addr // invalid: on the link
	family  uint8      // of the gateway, or of the destination
	mtu     int        // the route's own, 0: the link's
	limit   int        // less than both, for a destination that takes less; 0: none
}

func keyOf(dst netip.Addr, r route) hopKey {
	k := hopKey{ifindex: r.ifindex, gateway: r.gateway, family: unix.AF_INET6, mtu: r.mtu}
	if addr := r.gateway; addr.Is4() || !addr.IsValid() && dst.Is4() {
		k.family = unix.AF_INET
	}
	return k
}

// hop is one entry of the nexthops table. Bound flows hold its index, so it is
// never given away, but may be pointed elsewhere when its destinations move.
type hop struct {
	home    hopKey // what it was made for
	key     hopKey // where it points now
	mtu     int    // 0: the interface is gone
	samples []netip.Addr
}

// Destinations that stand for all of an entry when routes change.
const hopSamples = 8

// hopTable is the nexthops table as user space knows it.
type hopTable struct {
	write func(uint32, *maps.Nexthop) error
	find  func(netip.Addr) (route, error) // asks the kernel

	mu     sync.Mutex
	byKey  map[hopKey]uint16 // what new flows are given
	byHome map[hopKey]uint16
	hops   []hop // by index; 0 stays unset
}

func newHopTable(write func(uint32, *maps.Nexthop) error, find func(netip.Addr) (route, error)) *hopTable {
	return &hopTable{
		write:  write,
		find:   find,
		byKey:  make(map[hopKey]uint16),
		byHome: make(map[hopKey]uint16),
		hops:   make([]hop, 1),
	}
}

// index finds or adds the entry of a destination. linkMTU is that of the route's
// interface.
func (t *hopTable) index(dst netip.Addr, r route, linkMTU int) (index uint16, mtu int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.indexOf(dst, keyOf(dst, r), linkMTU)
}

// indexOf is index for a next hop that is known; t.mu is held.
func (t *hopTable) indexOf(dst netip.Addr, key hopKey, linkMTU int) (index uint16, mtu int, err error) {
	mtu = key.effectiveMTU(linkMTU)
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
	if h.mtu == mtu {
		return index, mtu, nil
	}
	h.mtu = mtu
	return index, mtu, t.store(index)
}

// homeOrNew takes back the entry that was made for a next hop, if its destinations
// have all come back too: a route that flaps would use up the table otherwise. t.mu
// is held.
func (t *hopTable) homeOrNew(key hopKey) (uint16, error) {
	if index, ok := t.byHome[key]; ok {
		h := &t.hops[index]
		if h.follow(t.find) == key {
			t.move(index, key)
			h.mtu = 0 // unlike any: it is to be written
			return index, nil
		}
	}
	if len(t.hops) >= maps.MaxNexthops {
		return 0, fmt.Errorf("all %d next hops are taken: restart the daemon", maps.MaxNexthops-1)
	}
	index := uint16(len(t.hops))
	t.hops = append(t.hops, hop{home: key, key: key})
	t.byKey[key], t.byHome[key] = index, index
	return index, nil
}

// within finds or adds an entry like another one, with a limit.
func (t *hopTable) within(index uint16, dst netip.Addr, limit int) (uint16, int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := t.hops[index].key
	key.limit = limit
	return t.indexOf(dst, key, t.hops[index].mtu)
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

// store writes an entry to the kernel; t.mu is held.
func (t *hopTable) store(index uint16) error {
	h := &t.hops[index]
	var value maps.Nexthop
	if h.mtu > 0 {
		value = maps.Nexthop{Ifindex: uint32(h.key.ifindex), Mtu: uint16(min(h.mtu, 65535)), Family: h.key.family}
		if h.key.gateway.IsValid() {
			value.Gateway = maps.Words(h.key.gateway) // all zero means on the link, which no v4-mapped address is
		}
	}
	if err := t.write(uint32(index), &value); err != nil {
		return fmt.Errorf("write next hop: %w", err)
	}
	return nil
}

// refresh brings all entries up to date: MTUs of links, interfaces that are gone,
// and entries whose destinations all moved to another next hop, which bound flows
// must follow. linkMTU is 0 for an interface that is gone. The routes are asked for
// without the lock: workers want it too.
func (t *hopTable) refresh(linkMTU func(ifindex int) int) error {
	t.mu.Lock()
	before := slices.Clone(t.hops)
	t.mu.Unlock()

	now := make([]hopKey, len(before))
	for n := 1; n < len(before); n++ {
		now[n] = before[n].follow(t.find)
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for n := 1; n < len(before); n++ {
		h := &t.hops[n]
		moved := now[n] != h.key && h.key == before[n].key // else a worker saw the change first
		if moved {
			t.move(uint16(n), now[n])
		}
		mtu := 0
		if link := linkMTU(h.key.ifindex); link > 0 {
			mtu = h.key.effectiveMTU(link)
		}
		if moved || mtu != h.mtu {
			h.mtu = mtu
			errs = append(errs, t.store(uint16(n)))
		}
	}
	return errors.Join(errs...)
}

// follow returns the next hop that all samples of an entry have now. If they do not
// agree it stays: one destination that moved alone must not take the others along.
func (h *hop) follow(find func(netip.Addr) (route, error)) hopKey {
	now, known := h.key, false
	for _, dst := range h.samples {
		r, err := find(dst)
		if err != nil {
			continue // without a route there is nowhere better to send it
		}
		key := keyOf(dst, r)
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
// no route. Known addresses cost no system call. The question is asked without a
// source address or interface: policy routing by source is not seen, and a
// link-local destination is looked for on one link only.
func (i *Instance) NextHop(dst netip.Addr) (NextHop, error) {
	dst = dst.Unmap()
	if h, ok := i.cache.get(dst); ok {
		return h, nil
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
		return NextHop{}, err
	}
	linkMTU, err := i.cache.linkMTU(i.ns, r.ifindex)
	if err != nil {
		return NextHop{}, fmt.Errorf("%w to %v: its interface is gone (%w)", ErrUnreachable, dst, err)
	}
	index, mtu, err := i.hops.index(dst, r, linkMTU)
	if err != nil {
		return NextHop{}, err
	}
	// Before anybody speaks from a new source or by a new interface, the answer must find its way.
	if err := i.settle(dst, r, mtu); err != nil {
		return NextHop{}, err
	}
	h := NextHop{Index: index, MTU: mtu, Ifindex: r.ifindex, Source: r.source}
	i.cache.put(dst, h, generation)
	return h, nil
}
