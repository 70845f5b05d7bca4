// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Tuple is what a packet of one leg shows: who sent it, to whom. Both are of one
// family.
type Tuple struct {
	Src, Dst netip.AddrPort
}

// Reverse is the tuple of the answer.
func (t Tuple) Reverse() Tuple {
	return Tuple{Src: t.Dst, Dst: t.Src}
}

// Entry is one direction of a bound flow: what the kernel makes of a packet of
// this tuple. Flow's ports are set from To.
type Entry struct {
	Flow Flow
	To   Tuple // the packet's new addresses
}

// Nexthop is the index of the next hop the direction leaves by.
func (e *Entry) Nexthop() uint16 {
	return nexthopOf(e.Flow.Control)
}

func nexthopOf(control uint32) uint16 { return uint16(control & 0xffff) }

// Worker is who the flow belongs to.
func (e *Entry) Worker() int {
	return workerOf(e.Flow.Control)
}

func workerOf(control uint32) int { return int(control >> 21 & (MaxWorkers - 1)) }

// Has reports whether all of these FlowFIN, FlowRST, FlowConfirmed are set.
func (e *Entry) Has(state uint32) bool {
	return e.Flow.Control&state == state
}

// FlowControl packs a next hop, a window shift (-14 to 14; positive: left) and the
// worker that owns the flow as Flow.Control.
func FlowControl(nexthop uint16, shift, worker int) uint32 {
	return uint32(nexthop) | uint32(shift+14)<<16 | uint32(worker)<<21
}

// InsertFlow adds an entry. Returns an error that is ebpf.ErrKeyExist if the tuple
// has one already, and unix.E2BIG if the table is full.
func (t *Tables) InsertFlow(leg Leg, tuple Tuple, e *Entry) error {
	f := e.Flow
	f.Sport, f.Dport = Port(e.To.Src.Port()), Port(e.To.Dst.Port())
	if tuple.Src.Addr().Is4() {
		key := flow4Key(leg, tuple)
		value := Flow4{Flow: f, Saddr: word4(e.To.Src.Addr()), Daddr: word4(e.To.Dst.Addr())}
		return t.Flows4.Update(&key, &value, ebpf.UpdateNoExist)
	}
	key := flow6Key(leg, tuple)
	value := Flow6{Flow: f, Saddr: Words(e.To.Src.Addr()), Daddr: Words(e.To.Dst.Addr())}
	return t.Flows6.Update(&key, &value, ebpf.UpdateNoExist)
}

// LookupFlow reads an entry. Returns an error that is ebpf.ErrKeyNotExist if there
// is none.
func (t *Tables) LookupFlow(leg Leg, tuple Tuple) (Entry, error) {
	if tuple.Src.Addr().Is4() {
		key := flow4Key(leg, tuple)
		var value Flow4
		err := t.Flows4.Lookup(&key, &value)
		return entry4(&value), err
	}
	key := flow6Key(leg, tuple)
	var value Flow6
	err := t.Flows6.Lookup(&key, &value)
	return entry6(&value), err
}

// DeleteFlow removes an entry; that there is none is no error.
func (t *Tables) DeleteFlow(leg Leg, tuple Tuple) error {
	var err error
	if tuple.Src.Addr().Is4() {
		key := flow4Key(leg, tuple)
		err = t.Flows4.Delete(&key)
	} else {
		key := flow6Key(leg, tuple)
		err = t.Flows6.Delete(&key)
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete flow: %w", err)
	}
	return nil
}

// Flows calls each for every entry of both tables. What is inserted or deleted
// meanwhile may be seen or not, or be seen twice.
func (t *Tables) Flows(each func(Leg, Tuple, *Entry)) error {
	if err := batch(t.Flows4, decoded4(each)); err != nil {
		return err
	}
	return batch(t.Flows6, decoded6(each))
}

// FlowsByWorker is Flows where each[n] is called for the entries of worker n. They are
// called side by side, each by one goroutine. Returns an error if there is an entry of
// a worker beyond them; some others were passed on by then.
func (t *Tables) FlowsByWorker(each []func(Leg, Tuple, *Entry)) error {
	err := batchByWorker(t.Flows4, decodedAll(each, decoded4), func(v *Flow4) uint32 { return v.Flow.Control })
	if err != nil {
		return err
	}
	return batchByWorker(t.Flows6, decodedAll(each, decoded6), func(v *Flow6) uint32 { return v.Flow.Control })
}

// FlowHops calls each with the next hop of every entry and where it takes packets to,
// but for those of connections that are not bound yet.
func (t *Tables) FlowHops(each func(index uint16, dst netip.Addr)) error {
	err := batch(t.Flows4, func(_ *Flow4Key, v *Flow4) {
		if v.Flow.Control&FlowPending == 0 {
			each(nexthopOf(v.Flow.Control), addr4(v.Daddr))
		}
	})
	if err != nil {
		return err
	}
	return batch(t.Flows6, func(_ *Flow6Key, v *Flow6) {
		if v.Flow.Control&FlowPending == 0 {
			each(nexthopOf(v.Flow.Control), Addr(v.Daddr))
		}
	})
}

func decoded4(each func(Leg, Tuple, *Entry)) func(*Flow4Key, *Flow4) {
	return func(key *Flow4Key, value *Flow4) {
		e := entry4(value)
		each(Leg(key.Leg), tuple4(key), &e)
	}
}

func decoded6(each func(Leg, Tuple, *Entry)) func(*Flow6Key, *Flow6) {
	return func(key *Flow6Key, value *Flow6) {
		e := entry6(value)
		each(Leg(key.Leg), tuple6(key), &e)
	}
}

func decodedAll[F, G any](each []F, decoded func(F) G) []G {
	all := make([]G, len(each))
	for i := range each {
		all[i] = decoded(each[i])
	}
	return all
}

func flow4Key(leg Leg, tuple Tuple) Flow4Key {
	return Flow4Key{
		Saddr: word4(tuple.Src.Addr()),
		Daddr: word4(tuple.Dst.Addr()),
		Sport: Port(tuple.Src.Port()),
		Dport: Port(tuple.Dst.Port()),
		Leg:   uint32(leg),
	}
}

func flow6Key(leg Leg, tuple Tuple) Flow6Key {
	return Flow6Key{
		Saddr: Words(tuple.Src.Addr()),
		Daddr: Words(tuple.Dst.Addr()),
		Sport: Port(tuple.Src.Port()),
		Dport: Port(tuple.Dst.Port()),
		Leg:   uint32(leg),
	}
}

func tuple4(key *Flow4Key) Tuple {
	return Tuple{
		Src: netip.AddrPortFrom(addr4(key.Saddr), Port(key.Sport)),
		Dst: netip.AddrPortFrom(addr4(key.Daddr), Port(key.Dport)),
	}
}

func tuple6(key *Flow6Key) Tuple {
	return Tuple{
		Src: netip.AddrPortFrom(Addr(key.Saddr), Port(key.Sport)),
		Dst: netip.AddrPortFrom(Addr(key.Daddr), Port(key.Dport)),
	}
}

func entry4(v *Flow4) Entry {
	return Entry{Flow: v.Flow, To: Tuple{
		Src: netip.AddrPortFrom(addr4(v.Saddr), Port(v.Flow.Sport)),
		Dst: netip.AddrPortFrom(addr4(v.Daddr), Port(v.Flow.Dport)),
	}}
}

func entry6(v *Flow6) Entry {
	return Entry{Flow: v.Flow, To: Tuple{
		Src: netip.AddrPortFrom(Addr(v.Saddr), Port(v.Flow.Sport)),
		Dst: netip.AddrPortFrom(Addr(v.Daddr), Port(v.Flow.Dport)),
	}}
}
