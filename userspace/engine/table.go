// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"hash/maphash"
	"math/bits"
	"net/netip"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/pool"
)

// flow is a bound connection as the engine remembers it: who, and how it ends. Its numbers are in the two entries, which the
// kernel writes. There may be a million, so it has no pointers, which the garbage collector would follow, and 128 bytes.
type flow struct {
	bound   int64 // CLOCK_MONOTONIC ns
	closing closing

	client, listener, local endpoint // our side towards the backend is local

	cookie          uint32
	mss, generation uint16    // mss: payload of a segment that both ways take
	outlived        [2]bool   // by leg: a RST of it was no end
	timer           uint32    // in worker.flowTimers
	way, name       uint32    // what it shares, in the table
	place           uint32    // in the table's order
	next            [2]uint32 // in its chains, by leg
}

// unknownCookie is that of a flow of an earlier daemon: what a client's packet is about is then the kernel's to say. (A real one is
// this by chance once in 2^32.)
const unknownCookie = 0

// closing is what a flow's FINs and RSTs said.
type closing struct {
	resetAt      int64
	end          [2]uint32
	fin          [2]bool // by leg
	reset        bool
	resetBy      uint8 // leg
	backendFirst bool
	unheard      [2]bool // by leg: the end was only seen in the entry, where its FIN stands is not known
	resetBefore  bool    // by an earlier daemon's time: its sender may have outlived it then
}

// way is what all flows have in common that go to a backend by a route.
type way struct {
	backend  *pool.Backend
	ports    *ports           // where the local port belongs; nil with source: client
	timeouts *config.Timeouts // of the pool, which a reload leaves as it is
	route    string
}

// endpoint is a netip.AddrPort in 20 bytes instead of 32, and without the pointer.
type endpoint struct {
	addr       [16]byte
	port, bits uint16
}

func endpointOf(a netip.AddrPort) endpoint {
	return endpoint{a.Addr().As16(), a.Port(), uint16(a.Addr().BitLen())}
}

func (e endpoint) addrPort() netip.AddrPort {
	addr := netip.AddrFrom16(e.addr)
	if e.bits == 32 {
		addr = addr.Unmap()
	}
	return netip.AddrPortFrom(addr, e.port)
}

// table holds a worker's bound flows, which are found by the packets of either leg, and stay where they are in memory until
// they are removed. What is free is used again and never given back.
type table struct {
	chunks []*[chunkFlows]flow
	free   uint32      // numbers that are not in use, linked by next[0]; 0: none
	used   uint32      // numbers that ever were in use: 1 to this
	order  []uint32    // the numbers of all flows, as the sweep comes by
	heads  [][2]uint32 // of the chains of flows with alike hashes, by leg; 0 ends one
	seed   maphash.Seed

	ways    shared[way]
	names   shared[string]
	origins map[uint32]endpoint // by number: the client by its PROXY header, if it is not the peer
}

// chunkFlows are 64 KiB.
const chunkFlows = 512

func newTable() table {
	return table{
		heads: make([][2]uint32, 1), seed: maphash.MakeSeed(),
		ways: newShared[way](), names: newShared[string](), origins: make(map[uint32]endpoint),
	}
}

// len is how many flows there are.
func (t *table) len() int { return len(t.order) }

// at returns the flow of a number.
func (t *table) at(n uint32) *flow { return &t.chunks[n/chunkFlows][n%chunkFlows] }

// number is where a flow is.
func (t *table) number(f *flow) uint32 { return t.order[f.place] }

func (t *table) wayOf(f *flow) way     { return t.ways.value(f.way) }
func (t *table) nameOf(f *flow) string { return t.names.value(f.name) }

// originOf is the client as a PROXY header told it, not valid if that is the peer.
func (t *table) originOf(f *flow) netip.AddrPort {
	if e, ok := t.origins[t.number(f)]; ok {
		return e.addrPort()
	}
	return netip.AddrPort{}
}

// add returns a new flow with these ends. Of its other fields those about the table and its timer are not the caller's.
func (t *table) add(c connection, local netip.AddrPort, w way, name string, origin netip.AddrPort) *flow {
	n := t.take()
	f := t.at(n)
	*f = flow{
		client: endpointOf(c.client), listener: endpointOf(c.listener), local: endpointOf(local),
		way: t.ways.hold(w), name: t.names.hold(name), place: uint32(len(t.order)),
	}
	t.order = append(t.order, n)
	if origin != c.client {
		t.origins[n] = endpointOf(origin)
	}
	if len(t.order) > len(t.heads) {
		t.split()
	}
	for leg := range f.next {
		t.link(maps.Leg(leg), n)
	}
	return f
}

// take returns a number that is not in use.
func (t *table) take() uint32 {
	if n := t.free; n != 0 {
		t.free = t.at(n).next[0]
		return n
	}
	t.used++
	if int(t.used/chunkFlows) == len(t.chunks) {
		t.chunks = append(t.chunks, new([chunkFlows]flow))
	}
	return t.used
}

// remove forgets a flow, whose timer must not run.
func (t *table) remove(f *flow) {
	n := t.number(f)
	for leg := range f.next {
		t.unlink(maps.Leg(leg), n)
	}
	last := len(t.order) - 1
	t.order[f.place] = t.order[last]
	t.at(t.order[last]).place = f.place
	t.order = t.order[:last]
	t.ways.release(f.way)
	t.names.release(f.name)
	delete(t.origins, n)
	*f = flow{next: [2]uint32{t.free}}
	t.free = n
}

// byClient finds the flow of a client's connection, nil if there is none.
func (t *table) byClient(c connection) *flow {
	return t.find(maps.LegClient, ends{endpointOf(c.client), endpointOf(c.listener)})
}

// byBackend finds the flow that a backend's packets to an address of ours belong to, nil if there is none.
func (t *table) byBackend(backend, ours netip.AddrPort) *flow {
	return t.find(maps.LegBackend, ends{endpointOf(backend), endpointOf(ours)})
}

// ends are what packets to us show on a leg: from whom, and to whom.
type ends struct{ theirs, ours endpoint }

func (t *table) ends(leg maps.Leg, f *flow) ends {
	if leg == maps.LegClient {
		return ends{f.client, f.listener}
	}
	return ends{endpointOf(t.wayOf(f).backend.Addr), f.local}
}

func (t *table) find(leg maps.Leg, e ends) *flow {
	for n := *t.head(leg, e); n != 0; {
		f := t.at(n)
		if t.ends(leg, f) == e {
			return f
		}
		n = f.next[leg]
	}
	return nil
}

// head is where the chain begins of which a flow with such ends is. There are any number of chains: where the hash is of one
// that is still to come, it is the chain that this one will be split from.
func (t *table) head(leg maps.Leg, e ends) *uint32 {
	last := uint32(len(t.heads) - 1)
	n := uint32(maphash.Comparable(t.seed, e)) & (1<<bits.Len32(last) - 1)
	if n > last {
		n = parent(n)
	}
	return &t.heads[n][leg]
}

// parent is the chain that another was split from: its number without the highest bit.
func parent(n uint32) uint32 { return n &^ (1 << (bits.Len32(n) - 1)) }

// split adds one chain of each leg. To double the number of all at once would be a long pause with many flows.
func (t *table) split() {
	old := &t.heads[parent(uint32(len(t.heads)))]
	chains := *old
	*old = [2]uint32{}
	t.heads = append(t.heads, [2]uint32{})
	for leg, n := range chains {
		for n != 0 {
			next := t.at(n).next[leg]
			t.link(maps.Leg(leg), n)
			n = next
		}
	}
}

func (t *table) link(leg maps.Leg, n uint32) {
	f := t.at(n)
	head := t.head(leg, t.ends(leg, f))
	f.next[leg], *head = *head, n
}

func (t *table) unlink(leg maps.Leg, n uint32) {
	f := t.at(n)
	link := t.head(leg, t.ends(leg, f))
	for *link != n {
		link = &t.at(*link).next[leg]
	}
	*link = f.next[leg]
}

// setWay changes a flow's, to one of the same backend's address, by which it is found.
func (t *table) setWay(f *flow, w way) {
	old := f.way
	f.way = t.ways.hold(w)
	t.ways.release(old)
}

func (t *table) setName(f *flow, name string) {
	old := f.name
	f.name = t.names.hold(name)
	t.names.release(old)
}

func (t *table) setOrigin(f *flow, origin netip.AddrPort) {
	t.origins[t.number(f)] = endpointOf(origin)
}

// clientTuple is what the client's packets show.
func (f *flow) clientTuple() maps.Tuple {
	return maps.Tuple{Src: f.client.addrPort(), Dst: f.listener.addrPort()}
}

// backendTuple is what the backend's packets show.
func (t *table) backendTuple(f *flow) maps.Tuple {
	return f.tupleOf(t.wayOf(f).backend)
}

// tupleOf is what the packets of its backend show.
func (f *flow) tupleOf(b *pool.Backend) maps.Tuple {
	return maps.Tuple{Src: b.Addr, Dst: f.local.addrPort()}
}
