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
	return uint16(e.Flow.Control & 0xffff)
}

// Worker is who the flow belongs to.
func (e *Entry) Worker() int {
	return int(e.Flow.Control >> 21 & (MaxWorkers - 1))
}

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

const flowBatch = 4096

// Flows calls each for every entry of both tables. What is inserted or deleted
// meanwhile may be seen or not, or be seen twice.
func (t *Tables) Flows(each func(Leg, Tuple, *Entry)) error {
	err := batch(t.Flows4, func(key *Flow4Key, value *Flow4) {
		e := entry4(value)
		each(Leg(key.Leg), tuple4(key), &e)
	})
	if err != nil {
		return err
	}
	return batch(t.Flows6, func(key *Flow6Key, value *Flow6) {
		e := entry6(value)
		each(Leg(key.Leg), tuple6(key), &e)
	})
}

func batch[K, V any](m *ebpf.Map, each func(*K, *V)) error {
	keys, values := make([]K, flowBatch), make([]V, flowBatch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			each(&keys[i], &values[i])
		}
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return nil
		case err != nil:
			return fmt.Errorf("read %s: %w", m, err)
		}
	}
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
