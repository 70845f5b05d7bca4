// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"net/netip"

	"github.com/cilium/ebpf"

	"snilb/maps"
)

// local is our side of one connection to a backend: an address and a port of ours,
// or, with source: client, the client's own. The zero value is none.
type local struct {
	netip.AddrPort
	ports *ports // where the port belongs; nil with source: client
}

// tuple is what the backend's packets of this attempt show.
func (a *attempt) tuple() maps.Tuple {
	return maps.Tuple{Src: a.backend.Addr, Dst: a.local.AddrPort}
}

// speaks reports whether a connection of this worker goes to a backend from an address of ours.
func (w *worker) speaks(backend, ours netip.AddrPort) bool {
	return w.leases[maps.Tuple{Src: backend, Dst: ours}] != nil || w.flows.byBackend(backend, ours) != nil
}

// takeLocal gives the attempt an address and port. Returns false when all that the
// pool may use are taken.
func (h *handshake) takeLocal(w *worker) bool {
	a := &h.attempt
	source := &h.decision.pool.Config.Source
	if source.Client {
		return h.borrowClient(w)
	}
	addrs := source.Of(h.client.Addr().Is4())
	if len(addrs) == 0 {
		addrs = []netip.Addr{a.hop.Source}
	}
	w.rotation++
	for i := range addrs {
		addr := addrs[(w.rotation+i)%len(addrs)]
		p := w.portsTo(pathKey{addr, a.backend.Addr, source.PortFirst, source.PortLast})
		port, ok := p.take(w.now, func(port uint16) bool {
			return w.speaks(a.backend.Addr, netip.AddrPortFrom(addr, port))
		})
		if ok {
			a.local = local{netip.AddrPortFrom(addr, port), p}
			w.leases[a.tuple()] = h
			return true
		}
	}
	w.log.limited(w.now, "source ports are used up: give the pool more source addresses", "backend", a.backend.Addr)
	return false
}

// isClients reports whether a local is the address and port the client itself has.
func (h *handshake) isClients(l local) bool { return l.AddrPort == h.client }

// borrowClient takes the client's own address and port, as a PROXY header tells them
// if there is one of the backend's family. No range of ports tells the
// kernel that the backend's answers are ours, so an entry does, until the bind puts
// the flow's in its place.
func (h *handshake) borrowClient(w *worker) bool {
	a := &h.attempt
	client := h.origin.client
	if client.Addr().Is4() != a.backend.Addr.Addr().Is4() {
		client = h.client
	}
	tuple := maps.Tuple{Src: a.backend.Addr, Dst: client}
	if old := w.flows.byBackend(tuple.Src, tuple.Dst); old != nil && (old == w.flows.byClient(h.connection) || old.isOver()) {
		// A SYN found it closed, or there would be no hello; or it came by another
		// connection of a proxy, and has ended.
		old.remove(w, "replaced")
	}
	pending := maps.Entry{To: tuple, Flow: maps.Flow{Control: maps.FlowControl(0, 0, w.id) | maps.FlowPending}}
	err := w.e.o.Tables.InsertFlow(maps.LegBackend, tuple, &pending)
	if errors.Is(err, ebpf.ErrKeyExist) {
		w.log.limited(w.now, "a client's address and port speak to this backend already, by another listener or proxy",
			"backend", a.backend.Addr, "client", client)
		h.tryLater()
		return false
	}
	if err != nil {
		w.log.limited(w.now, "no entry for a connection to a backend", "backend", a.backend.Addr, "error", err)
		return false
	}
	a.local = local{AddrPort: client}
	w.leases[tuple] = h
	return true
}

// giveUpLocal gives the address and port of a handshake back that does not become a flow. The backend may hold them in
// TIME_WAIT.
func (h *handshake) giveUpLocal(w *worker) {
	a := &h.attempt
	if !a.local.IsValid() {
		return
	}
	delete(w.leases, a.tuple())
	if p := a.local.ports; p != nil {
		p.give(w.now, a.local.Port(), true)
	} else if err := w.e.o.Tables.DeleteFlow(maps.LegBackend, a.tuple()); err != nil {
		w.log.limited(w.now, "pending entry not removed", "error", err)
	}
	a.local = local{}
}
