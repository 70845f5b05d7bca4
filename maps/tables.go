// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Tables are the maps of one instance that Go reads or writes, as loaded or
// pinned. The tags are the names in the object and of the pins.
type Tables struct {
	Flows4        *ebpf.Map `ebpf:"flows4"`
	Flows6        *ebpf.Map `ebpf:"flows6"`
	Listeners     *ebpf.Map `ebpf:"listeners"`
	ListenerPorts *ebpf.Map `ebpf:"listener_ports"`
	Paths         *ebpf.Map `ebpf:"paths"`
	Nexthops      *ebpf.Map `ebpf:"nexthops"`
	Control       *ebpf.Map `ebpf:"control"`
	Rings         *ebpf.Map `ebpf:"rings"`
	Counters      *ebpf.Map `ebpf:"counters"`
	Instance      *ebpf.Map `ebpf:"instance"`
	Owned         *ebpf.Map `ebpf:"owned"`
}

// All lists the maps under their names, in a fixed order.
func (t *Tables) All() []NamedMap {
	return []NamedMap{
		{bpfMapFlows4, t.Flows4},
		{bpfMapFlows6, t.Flows6},
		{bpfMapListeners, t.Listeners},
		{bpfMapListenerPorts, t.ListenerPorts},
		{bpfMapPaths, t.Paths},
		{bpfMapNexthops, t.Nexthops},
		{bpfMapControl, t.Control},
		{bpfMapRings, t.Rings},
		{bpfMapCounters, t.Counters},
		{bpfMapInstance, t.Instance},
		{bpfMapOwned, t.Owned},
	}
}

// NamedMap is a map with its name in the object.
type NamedMap struct {
	Name string
	Map  *ebpf.Map
}

// SetListeners makes the kernel answer exactly these addresses. A port's bit goes
// up after its listeners stand, so that no packet meets a half-written state that
// answers what is not ours, and stays up when they go: connections that are bound
// have the port still, and go on.
func (t *Tables) SetListeners(want map[netip.AddrPort]Listener) error {
	have, err := t.listenerKeys()
	if err != nil {
		return err
	}
	for addr, l := range want {
		key := listenerKey(addr)
		if err := t.Listeners.Put(&key, &l); err != nil {
			return fmt.Errorf("add listener %v: %w", addr, err)
		}
		delete(have, key)
	}
	if err := t.raiseListenerPorts(want); err != nil {
		return err
	}
	for key := range have {
		if err := t.Listeners.Delete(&key); err != nil {
			return fmt.Errorf("remove listener: %w", err)
		}
	}
	return nil
}

func (t *Tables) listenerKeys() (map[ListenerKey]bool, error) {
	have := make(map[ListenerKey]bool)
	var key ListenerKey
	var value Listener
	it := t.Listeners.Iterate()
	for it.Next(&key, &value) {
		have[key] = true
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read listeners: %w", err)
	}
	return have, nil
}

func (t *Tables) raiseListenerPorts(want map[netip.AddrPort]Listener) error {
	var words [1024]uint64
	for addr := range want {
		words[addr.Port()>>6] |= 1 << (addr.Port() & 63)
	}
	for i, bits := range words {
		word := uint32(i)
		var have uint64
		if err := t.ListenerPorts.Lookup(&word, &have); err != nil {
			return fmt.Errorf("read listener ports: %w", err)
		}
		if bits |= have; have == bits {
			continue
		}
		if err := t.ListenerPorts.Put(&word, &bits); err != nil {
			return fmt.Errorf("set listener ports: %w", err)
		}
	}
	return nil
}

func listenerKey(addr netip.AddrPort) ListenerKey {
	return ListenerKey{Addr: Words(addr.Addr()), Port: Port(addr.Port())}
}

// AddPath makes the kernel hand what this backend sends to a source port of ours
// to the engine.
func (t *Tables) AddPath(source netip.Addr, backend netip.AddrPort, id uint32) error {
	key := pathKey(source, backend)
	if err := t.Paths.Put(&key, &Path{Id: id}); err != nil {
		return fmt.Errorf("add path %v to %v: %w", source, backend, err)
	}
	return nil
}

// DeletePath undoes AddPath.
func (t *Tables) DeletePath(source netip.Addr, backend netip.AddrPort) error {
	key := pathKey(source, backend)
	if err := t.Paths.Delete(&key); err != nil {
		return fmt.Errorf("remove path %v to %v: %w", source, backend, err)
	}
	return nil
}

func pathKey(source netip.Addr, backend netip.AddrPort) PathKey {
	return PathKey{
		Backend: Words(backend.Addr()),
		Source:  Words(source),
		Port:    Port(backend.Port()),
	}
}

// SetLive writes the switches the kernel reads while running.
func (t *Tables) SetLive(l *Live) error {
	zero := uint32(0)
	if err := t.Control.Put(&zero, l); err != nil {
		return fmt.Errorf("write control: %w", err)
	}
	return nil
}

// Live is what SetLive wrote last.
func (t *Tables) Live() (l Live, err error) {
	zero := uint32(0)
	if err := t.Control.Lookup(&zero, &l); err != nil {
		return l, fmt.Errorf("read control: %w", err)
	}
	return l, nil
}

// Packets sums the counters of one slot over the CPUs, by reason.
func (t *Tables) Packets(slot uint32) (CounterSet, error) {
	var perCPU []CounterSet
	var sum CounterSet
	if err := t.Counters.Lookup(&slot, &perCPU); err != nil {
		return sum, fmt.Errorf("read counters: %w", err)
	}
	for _, c := range perCPU {
		for reason, n := range c.Packets {
			sum.Packets[reason] += n
		}
	}
	return sum, nil
}
