// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"slices"

	"snilb/maps"
	"snilb/userspace/packet"
)

// ownedHellos is where the kernel keeps for the next daemon what only this one has or knows of: maps.Tables.
type ownedHellos interface {
	OwnHello(client maps.Tuple, h *maps.OwnedHello) error
	DisownHello(client maps.Tuple) error
}

// own is called before bytes of the client's are acknowledged, or any are pushed to a backend: from then on the connection is lost
// with this daemon, and who of them does not repeat anything must be told by the next one.
func (h *handshake) own(w *worker) {
	note := maps.OwnedHello{Cookie: h.cookie, Acknowledged: h.ownsHello() || h.acked > 0}
	if h.phase == pushing {
		note.Backend, note.PushedTo = h.attempt.tuple(), h.pushEnd()
	}
	if note == h.noted {
		return
	}
	h.noted = note
	if err := w.e.owned.OwnHello(h.clientTuple(), &note); err != nil {
		w.log.limited(w.now, "an unfinished connection is not noted: should this daemon die, its ends hang until their own timeouts", "error", err)
	}
}

// ownsHello reports whether bytes of the client's were acknowledged, be they a probe's.
func (h *handshake) ownsHello() bool { return h.noted.Acknowledged }

// disown is called when the connection is a flow, or over.
func (h *handshake) disown(w *worker) {
	if h.noted == (maps.OwnedHello{}) {
		return
	}
	h.noted = maps.OwnedHello{}
	w.forgetHello(h.clientTuple())
}

func (c *connection) clientTuple() maps.Tuple { return maps.Tuple{Src: c.client, Dst: c.listener} }

// orphan is a connection that an earlier daemon was in the middle of, and died with.
type orphan struct {
	client maps.Tuple
	maps.OwnedHello
}

// findOrphans looks for them among what is noted, the flows being known. Those that are bound are fine.
func (e *Engine) findOrphans() error {
	var bound []maps.Tuple
	err := e.o.Tables.OwnedHellos(func(client maps.Tuple, h maps.OwnedHello) {
		c := connection{client: client.Src, listener: client.Dst}
		if slices.ContainsFunc(e.workers, func(w *worker) bool { return w.flows.byClient(c) != nil }) {
			bound = append(bound, client)
			return
		}
		if slices.ContainsFunc(e.workers, func(w *worker) bool { return w.flows.byBackend(h.Backend.Src, h.Backend.Dst) != nil }) {
			h.Backend = maps.Tuple{} // it went on to another, and the port to another connection
		}
		e.orphans = append(e.orphans, orphan{client, h})
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
		e.o.Log.Warn("reset what an earlier daemon was in the middle of", "connections", n)
	}
	e.orphans = nil
}

// resetOrphans holds the lock, for who asks for the status meanwhile.
func (w *worker) resetOrphans(some []orphan) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.e.clock.now()
	for _, o := range some {
		if o.Acknowledged {
			// All that we ever sent was the SYN-ACK: the reset is where the client waits.
			w.send(&packet.Segment{Src: o.client.Dst, Dst: o.client.Src, Seq: o.Cookie + 1, Flags: packet.RST})
			w.stats.hellos[helloOrphaned]++
		}
		if o.Backend != (maps.Tuple{}) {
			// As in release: it asks for another number if it does not have all.
			w.send(&packet.Segment{Src: o.Backend.Dst, Dst: o.Backend.Src, Seq: o.PushedTo, Flags: packet.RST})
		}
		w.forgetHello(o.client)
	}
}

// forgetHello is not worth to end for if it fails: with all that would be lost, a client is reset once more.
func (w *worker) forgetHello(client maps.Tuple) {
	if err := w.e.owned.DisownHello(client); err != nil {
		w.log.limited(w.now, "an unfinished connection is still noted: the next daemon resets it", "error", err)
	}
}
