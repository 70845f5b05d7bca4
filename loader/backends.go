// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
)

// backendSet is what is known of the backends, by address.
type backendSet struct {
	mu     sync.RWMutex
	byAddr map[netip.Addr]*backend
	lastID uint32
}

type backend struct {
	ports   []uint16
	sources []netip.Addr // beside the route's own
	ready   map[backendPath]bool
	mtu     int
	problem string // the last one that was logged
}

// backendPath is one way by which a backend's answers come in.
type backendPath struct {
	ifindex int
	source  netip.Addr
	port    uint16
}

func newBackendSet() backendSet {
	return backendSet{byAddr: make(map[netip.Addr]*backend)}
}

// AddBackend makes the kernel hand what a backend sends to our source ports to the
// engine: it attaches the backend program on the interface towards it and enters
// its path, and one for each of sources, addresses of this node that are spoken
// from as well. Returns the address that the route speaks from. The backend is
// remembered even if an error is returned, and Run takes it up when a route appears;
// RemoveBackend forgets it.
func (i *Instance) AddBackend(addr netip.AddrPort, sources ...netip.Addr) (source netip.Addr, err error) {
	if !addr.IsValid() || addr.Port() == 0 {
		return netip.Addr{}, fmt.Errorf("backend %v: want an address and a port", addr)
	}
	dst := addr.Addr().Unmap()
	i.backends.add(dst, addr.Port(), sources)
	i.hops.own.add(dst)
	h, err := i.resolve(dst)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("backend %v: %w", addr, err)
	}
	return h.Source, nil
}

// RemoveBackend undoes AddBackend. Programs stay on their interfaces, and bound
// flows are not touched.
func (i *Instance) RemoveBackend(addr netip.AddrPort) error {
	dst := addr.Addr().Unmap()
	i.mu.Lock() // or a worker that asks for the way there could enter a path behind us
	defer i.mu.Unlock()
	if i.closed {
		return errClosed
	}
	var first error
	for source := range i.backends.remove(dst, addr.Port()) {
		err := i.tables.DeletePath(source, netip.AddrPortFrom(dst, addr.Port()))
		if err != nil && first == nil {
			first = err
		}
	}
	return first
}

func (s *backendSet) add(dst netip.Addr, port uint16, sources []netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.byAddr[dst]
	if b == nil {
		b = &backend{ready: make(map[backendPath]bool)}
		s.byAddr[dst] = b
	}
	if !slices.Contains(b.ports, port) {
		b.ports = append(b.ports, port)
	}
	for _, source := range sources {
		if !slices.Contains(b.sources, source) {
			b.sources = append(b.sources, source)
		}
	}
}

// remove forgets a backend and returns the sources it had paths for.
func (s *backendSet) remove(dst netip.Addr, port uint16) map[netip.Addr]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	sources := make(map[netip.Addr]bool)
	b := s.byAddr[dst]
	if b == nil {
		return sources
	}
	for path := range b.ready {
		if path.port == port {
			sources[path.source] = true
			delete(b.ready, path)
		}
	}
	b.ports = slices.DeleteFunc(b.ports, func(p uint16) bool { return p == port })
	if len(b.ports) == 0 {
		delete(s.byAddr, dst)
	}
	return sources
}

// missing lists the paths of a backend by this route that are not there yet, and
// notes the MTU towards it. It is empty for what is no backend.
func (s *backendSet) missing(dst netip.Addr, r route, mtu int) []backendPath {
	s.mu.RLock()
	b := s.byAddr[dst]
	if b == nil {
		s.mu.RUnlock()
		return nil
	}
	s.mu.RUnlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	b.mtu = mtu
	var paths []backendPath
	for _, port := range b.ports {
		for _, source := range append([]netip.Addr{r.source}, b.sources...) {
			if path := (backendPath{r.ifindex, source, port}); !b.ready[path] {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// settle makes a backend's answers reach the engine by this route; it does nothing
// for other addresses.
func (i *Instance) settle(dst netip.Addr, r route, mtu int) error {
	if len(i.backends.missing(dst, r, mtu)) == 0 {
		return nil
	}
	device, err := i.ns.LinkByIndex(r.ifindex)
	if err != nil {
		return fmt.Errorf("%w to %v: its interface is gone (%w)", ErrUnreachable, dst, err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return errClosed
	}
	if !r.source.IsValid() {
		return fmt.Errorf("%w with a source address; give interface %s an address of that family", ErrUnreachable, device.Attrs().Name)
	}
	// The interface may be new under an old name: what is known of that must not be mixed up with it.
	if err := errors.Join(i.forgetDead(), i.attachTowards(device)); err != nil {
		return err
	}
	for _, path := range i.backends.missing(dst, r, mtu) {
		if err := i.tables.AddPath(path.source, netip.AddrPortFrom(dst, path.port), i.backends.nextID()); err != nil {
			return err
		}
		i.backends.done(dst, path)
	}
	return nil
}

// attachTowards puts the programs on an interface that backends answer by. One that
// faces clients too gets XDP from Attach: not before its client program. i.mu is held.
func (i *Instance) attachTowards(device netlink.Link) error {
	if _, err := i.attach(device, RoleBackend); err != nil {
		return err
	}
	if mode, facesClients := i.opts.mode(device.Attrs().Name); mode == ModeTC || facesClients {
		return nil
	}
	_, err := i.attach(device, RoleXDP)
	return err
}

func (s *backendSet) nextID() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastID++
	return s.lastID
}

func (s *backendSet) done(dst netip.Addr, path backendPath) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.byAddr[dst]; b != nil {
		b.ready[path] = true
	}
}

// lost forgets what came in by an interface whose program is gone.
func (s *backendSet) lost(ifindex int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.byAddr {
		for path := range b.ready {
			if path.ifindex == ifindex {
				b.ready[path] = false // the path in the kernel stands, for remove to find
			}
		}
	}
}

// has reports whether we speak to a backend from a source, or may come to do so.
func (s *backendSet) has(source netip.Addr, backend netip.AddrPort) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	b := s.byAddr[backend.Addr()]
	if b == nil || !slices.Contains(b.ports, backend.Port()) {
		return false
	}
	for path := range b.ready {
		if path.source == source && path.port == backend.Port() {
			return true
		}
	}
	return len(b.ready) == 0 // without a route just now
}

// addresses lists the backends.
func (s *backendSet) addresses() []netip.Addr {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var all []netip.Addr
	for addr := range s.byAddr {
		all = append(all, addr)
	}
	return all
}

// news notes what is wrong with a backend and reports whether that is new.
func (s *backendSet) news(dst netip.Addr, problem string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.byAddr[dst]
	if b == nil || b.problem == problem {
		return false
	}
	b.problem = problem
	return true
}

// smallestMTU returns the smallest MTU towards a backend of each family; Ethernet's
// where there is none.
func (s *backendSet) smallestMTU() (mtu4, mtu6 int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for addr, b := range s.byAddr {
		smallest := &mtu6
		if family4(addr) {
			smallest = &mtu4
		}
		if b.mtu > 0 && (*smallest == 0 || b.mtu < *smallest) {
			*smallest = b.mtu
		}
	}
	const ethernet = 1500
	if mtu4 == 0 {
		mtu4 = ethernet
	}
	if mtu6 == 0 {
		mtu6 = ethernet
	}
	return mtu4, mtu6
}
