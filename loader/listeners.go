// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"fmt"
	stdmaps "maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"snilb/maps"
)

// ListenerSpec is a listener of the configuration.
type ListenerSpec struct {
	ID uint16 // not 0
	// Addr without an address, or with an unspecified one, is every address of the network namespace.
	Addr        netip.AddrPort
	UnknownFlow uint8 // maps.UnknownFlowReset, Pass or Drop
}

func (l *ListenerSpec) isWildcard() bool {
	return !l.Addr.Addr().IsValid() || l.Addr.Addr().IsUnspecified()
}

// listenerSet is what was asked for and what the kernel was told. Guarded by
// Instance.mu.
type listenerSet struct {
	want    []ListenerSpec
	applied map[netip.AddrPort]maps.Listener
}

// SetListeners makes the kernel answer on these listeners and no others. A wildcard
// is every address that the network namespace has, and Run keeps it so; a listener
// with an address beats it on the same port.
func (i *Instance) SetListeners(want []ListenerSpec) error {
	for _, l := range want {
		if l.ID == 0 || l.Addr.Port() == 0 {
			return fmt.Errorf("listener %d at %v: want an id and a port above 0", l.ID, l.Addr)
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.sockets.watch(want)
	i.listeners.want = slices.Clone(want)
	return i.applyListeners()
}

// applyListeners expands the wildcards anew and tells the kernel what changed. i.mu
// is held.
func (i *Instance) applyListeners() error {
	var addrs []netip.Addr
	if slices.ContainsFunc(i.listeners.want, func(l ListenerSpec) bool { return l.isWildcard() }) {
		var err error
		if addrs, err = ownAddresses(i.ns); err != nil {
			return err
		}
	}
	expanded := expand(i.listeners.want, addrs)
	if stdmaps.Equal(expanded, i.listeners.applied) {
		return nil
	}
	if err := i.tables.SetListeners(expanded); err != nil {
		i.listeners.applied = nil // half of it may stand: do all of it next time
		return err
	}
	i.listeners.applied = expanded
	i.log.Debug("listeners set", "addresses", len(expanded))
	return nil
}

// expand turns listeners into the addresses they mean.
func expand(want []ListenerSpec, addrs []netip.Addr) map[netip.AddrPort]maps.Listener {
	all := make(map[netip.AddrPort]maps.Listener)
	add := func(at netip.AddrPort, l *ListenerSpec) {
		if _, taken := all[at]; !taken {
			all[at] = maps.Listener{Id: l.ID, UnknownFlow: l.UnknownFlow}
		}
	}
	for n := range want {
		if l := &want[n]; !l.isWildcard() {
			add(netip.AddrPortFrom(l.Addr.Addr().Unmap().WithZone(""), l.Addr.Port()), l)
		}
	}
	for n := range want {
		if l := &want[n]; l.isWildcard() {
			for _, addr := range addrs {
				add(netip.AddrPortFrom(addr, l.Addr.Port()), l)
			}
		}
	}
	return all
}

// ownAddresses lists the addresses of all interfaces for which packets can come in:
// the loopback device's own are refused on every other interface.
func ownAddresses(ns *namespace) ([]netip.Addr, error) {
	list, err := dump(func() ([]netlink.Addr, error) { return ns.AddrList(nil, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var addrs []netip.Addr
	for _, a := range list {
		if a.IPNet == nil {
			continue
		}
		if addr := addrOf(a.IP); addr.IsValid() && !addr.IsLoopback() {
			addrs = append(addrs, addr)
		}
	}
	return addrs, nil
}
