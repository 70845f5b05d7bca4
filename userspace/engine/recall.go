// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"io/fs"
	"net/netip"

	"snilb/maps"
	"snilb/userspace/pool"
)

// ids is what the first part of a journal says: what ids in entries and events mean.
type ids struct {
	backends     map[uint16]*pool.Backend
	routes       map[uint16]string
	listeners    map[netip.AddrPort]uint16
	lastListener uint16
}

// readIDs returns an error as openJournal does.
func readIDs(path, boot string) (ids, error) {
	found := ids{make(map[uint16]*pool.Backend), make(map[uint16]string), make(map[netip.AddrPort]uint16), 0}
	r, err := openJournal(path, boot)
	if err != nil {
		return found, err
	}
	var one record
	for r.next(&one) && (one.kind == recordBackend || one.kind == recordRoute || one.kind == recordListener) {
		if one.number == 0 || one.number > 1<<16-1 {
			continue
		}
		id := uint16(one.number)
		switch {
		case one.kind == recordRoute:
			found.routes[id] = one.route
		case one.kind == recordListener && one.backend.Port() != 0:
			found.listeners[one.backend] = id
		case one.kind == recordListener:
			found.lastListener = id
		default:
			found.backends[id] = &pool.Backend{ID: id, Pool: one.pool, Name: one.name, Addr: one.backend}
		}
	}
	return found, r.Close()
}

// Known is what an earlier plan gave ids to.
type Known struct {
	backends     map[pool.Identity]uint16
	listeners    map[netip.AddrPort]uint16
	lastListener uint16 // the last id that was given to one
}

// KnownIDs returns the ids that flows and queued events of an earlier daemon have, by its journal: for FirstPlan. There are none if
// there is no such journal, or it is of no use.
func KnownIDs(journal string) Known {
	boot, err := bootID()
	if err != nil {
		return Known{}
	}
	found, err := readIDs(journal, boot)
	if err != nil {
		return Known{} // New reads it too, and tells
	}
	known := Known{make(map[pool.Identity]uint16, len(found.backends)), found.listeners, found.lastListener}
	for id, b := range found.backends {
		known.backends[pool.Identity{Pool: b.Pool, Addr: b.Addr}] = id
	}
	return known
}

// knownIDs are those of the journal that an earlier daemon left, none if there is no such.
func (j *journal) knownIDs() (ids, error) {
	if j == nil {
		return ids{}, nil
	}
	found, err := readIDs(j.path, j.boot)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return found, err
}

// recall reads from the journal what is known of the flows that were adopted, and of backends. What it says counts only for the
// very flow. Returns whether there was a journal, and it was whole.
func (a *adoption) recall(j *journal) (whole bool) {
	if j == nil {
		return false
	}
	r, err := openJournal(j.path, j.boot)
	if err != nil {
		return false // there is none, or knownIDs has told
	}
	defer func() { _ = r.Close() }()
	ways, backends := make(map[uint32]way), make(map[netip.AddrPort]bool)
	for _, addr := range a.e.plan.Load().Backends() {
		backends[addr] = true
	}
	var one record
	for r.next(&one) {
		switch one.kind {
		case recordWay:
			b := a.names.backendOf(pool.Backend{ID: one.id, Pool: one.pool, Name: one.name, Addr: one.backend})
			ways[one.number] = way{backend: b, timeouts: a.names.timeouts(b.Pool), route: one.route}
		case recordFlow:
			a.recallFlow(&one, ways[one.number])
		case recordPeer:
			if backends[one.backend] {
				a.e.peers.recall(one.backend, one.peer)
			}
		}
	}
	if r.torn {
		a.e.o.Log.Warn("journal is cut off or damaged: the flows behind that are taken over without their names")
	}
	return !r.torn
}

// recallPeers takes from the kernel's table what no journal tells of backends.
func (e *Engine) recallPeers() error {
	was, err := e.o.Tables.Live()
	if err != nil || was.Mss4 == 0 { // there was no daemon
		return err
	}
	mss4, mss6 := e.o.MSS()
	e.peers.guess(e.plan.Load().Backends(), announcement{was.Mss4, was.Mss6, was.Flags}, mss4, mss6)
	return nil
}

// recallFlow takes over what a record says of a flow, v being its way.
func (a *adoption) recallFlow(one *record, v way) {
	n := int(one.number % maps.MaxWorkers)
	if n >= len(a.e.workers) {
		return
	}
	w := a.e.workers[n]
	f := w.flows.byClient(one.connection)
	if f == nil || f.generation != one.generation || v.backend == nil || v.backend.Addr != w.flows.wayOf(f).backend.Addr {
		return
	}
	w.flows.setWay(f, v)
	w.flows.setName(f, one.sni)
	if one.origin.IsValid() {
		w.flows.setOrigin(f, one.origin)
	}
	f.cookie = one.cookie
	if one.mss >= smallestMSS {
		f.mss = one.mss
	}
	if one.bound > 0 && one.bound < a.now {
		f.bound = one.bound
	}
	f.outlived = one.outlived
	if f.closing.reset && f.outlived[f.closing.resetBy] {
		f.closing.reset = false
	}
}
