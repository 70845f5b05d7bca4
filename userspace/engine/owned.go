// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"slices"

	"snilb/maps"
	"snilb/userspace/packet"
)

// ownedHellos is where the kernel keeps for the next daemon whose hello only this one has: maps.Tables.
type ownedHellos interface {
	OwnHello(client maps.Tuple, cookie uint32) error
	DisownHello(client maps.Tuple) error
}

// own is called before bytes of the client's are acknowledged: from then on it is lost with this daemon, and must be told by
// the next one.
func (h *handshake) own(w *worker) {
	if h.owns {
		return
	}
	h.owns = true
	if err := w.e.owned.OwnHello(h.clientTuple(), h.cookie); err != nil {
		w.log.limited(w.now, "an acknowledged hello is not noted: should this daemon die, its client hangs until its own timeout", "error", err)
	}
}

// disown is called when the connection is a flow, or over.
func (h *handshake) disown(w *worker) {
	if !h.owns {
		return
	}
	h.owns = false
	w.forgetHello(h.clientTuple())
}

func (c *connection) clientTuple() maps.Tuple { return maps.Tuple{Src: c.client, Dst: c.listener} }

// orphan is a connection that an earlier daemon took bytes over from, and died with.
type orphan struct {
	client maps.Tuple
	cookie uint32
}

// findOrphans looks for them among what is noted, the flows being known. Those that are bound are fine.
func (e *Engine) findOrphans() error {
	var bound []maps.Tuple
	err := e.o.Tables.OwnedHellos(func(client maps.Tuple, cookie uint32) {
		c := connection{client: client.Src, listener: client.Dst}
		if slices.ContainsFunc(e.workers, func(w *worker) bool { return w.flows.byClient(c) != nil }) {
			bound = append(bound, client)
			return
		}
		e.orphans = append(e.orphans, orphan{client, cookie})
	})
	for _, client := range bound {
		e.workers[0].forgetHello(client)
	}
	return err
}

// resetOrphans tells them, before any worker runs that could take one for a hello whose first bytes are late. Each is forgotten
// only then, so that a daemon that dies meanwhile leaves the rest to the next one.
func (e *Engine) resetOrphans() {
	for some := range slices.Chunk(e.orphans, burst) {
		e.workers[0].resetOrphans(some)
	}
	if n := len(e.orphans); n > 0 {
		e.o.Log.Warn("reset connections whose hello an earlier daemon had in part", "connections", n)
	}
	e.orphans = nil
}

// resetOrphans holds the lock, for who asks for the status meanwhile.
func (w *worker) resetOrphans(some []orphan) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.e.clock.now()
	for _, o := range some {
		// All that we ever sent was the SYN-ACK: the reset is where the client waits.
		w.send(&packet.Segment{Src: o.client.Dst, Dst: o.client.Src, Seq: o.cookie + 1, Flags: packet.RST})
		w.stats.hellos[helloOrphaned]++
		w.forgetHello(o.client)
	}
}

// forgetHello is not worth to end for if it fails: with all that would be lost, a client is reset once more.
func (w *worker) forgetHello(client maps.Tuple) {
	if err := w.e.owned.DisownHello(client); err != nil {
		w.log.limited(w.now, "an acknowledged hello is still noted: the next daemon resets its client's connection", "error", err)
	}
}
