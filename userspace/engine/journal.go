// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"snilb/maps"
	"snilb/userspace/pool"
)

const (
	// journalInterval is how long what a worker notes may wait to be written: a daemon that dies takes it along.
	journalInterval = 100 * time.Millisecond
	// journalHurry notes of a worker are written at once, and journalMost are the most that wait.
	journalHurry = 32 << 10
	journalMost  = 4 << 20
	// journalSmall is what a journal may grow by, however little it began with: making it smaller is work.
	journalSmall = 1 << 20
	// journalRetry is how long after a failure another is begun.
	journalRetry = 10 * time.Second
)

// journal is the file that tells the next daemon what the kernel's entries do not hold of a flow: its name, cookie, origin and age,
// what its ids mean, and what backends lack. What it lacks costs no flow, so no worker ever waits for it: they note what they bind in memory, under
// locks that they hold anyway, and one goroutine writes. Ends are not noted: the entry is gone then.
//
// The file is begun anew when it has grown by half of what it began with, or by journalSmall if that is more. So it holds at most one and
// a half times what is known, or journalSmall more, and what had waited when it was written last; twice that while there are two.
type journal struct {
	e       *Engine
	path    string
	boot    string
	file    *os.File // nil: to be begun anew
	size    int64
	begun   int64 // its size when all was in it that was known
	plan    *Plan // whose ids it tells
	retryAt int64
	failed  bool // and it was logged
	kick    chan struct{}
	spare   []byte
}

// diary is what a worker has noted for the journal. Guarded by its mu.
type diary struct {
	records []byte
	said    map[told]uint32 // numbers of ways in the journal
	lost    bool            // the journal must be begun anew
}

// told is what a way's record says.
type told struct {
	backend *pool.Backend
	route   string
}

func newJournal(e *Engine, path string) (*journal, error) {
	if path == "" {
		return nil, nil
	}
	boot, err := bootID()
	return &journal{e: e, path: path, boot: boot, kick: make(chan struct{}, 1)}, err
}

// note tells the next daemon of a flow, again if something has changed.
func (w *worker) note(f *flow) {
	d, j := &w.diary, w.e.journal
	if j == nil || d.lost {
		return
	}
	if len(d.records) > journalMost {
		d.records, d.lost = nil, true
		return
	}
	r := record{
		kind: recordFlow, number: w.noteWay(f), connection: connection{f.client.addrPort(), f.listener.addrPort()}, origin: w.flows.originOf(f),
		generation: f.generation, mss: f.mss, cookie: f.cookie, bound: f.bound, outlived: f.outlived, sni: w.flows.nameOf(f),
	}
	d.records = r.append(d.records)
	if len(d.records) > journalHurry {
		select {
		case j.kick <- struct{}{}:
		default:
		}
	}
}

// noteWay returns the number of a flow's way in the journal, which tells whose it is: no two workers have one in common.
func (w *worker) noteWay(f *flow) uint32 {
	d, v := &w.diary, w.flows.wayOf(f)
	key := told{v.backend, v.route}
	n, ok := d.said[key]
	if !ok {
		n = uint32(len(d.said)*maps.MaxWorkers + w.id)
		d.said[key] = n
		r := record{
			kind: recordWay, number: n, id: v.backend.ID, pool: v.backend.Pool, name: v.backend.Name, backend: v.backend.Addr, route: v.route,
		}
		d.records = r.append(d.records)
	}
	return n
}

// beginDiary has a worker note everything again.
func (w *worker) beginDiary() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.diary = diary{records: w.diary.records[:0], said: make(map[told]uint32)}
}

// takeNotes takes what the worker noted, and leaves it an empty buffer.
func (w *worker) takeNotes(empty []byte) (notes []byte, lost bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	notes, w.diary.records = w.diary.records, empty[:0]
	return notes, w.diary.lost
}

// noteChunk notes the flows with numbers from that one on, some at a time. Flows keep their numbers, and one that is bound
// meanwhile is noted anyway. Returns the number to go on with, 0 if there is none.
func (w *worker) noteChunk(from uint32) uint32 {
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := from; n < from+chunkFlows; n++ {
		if n > w.flows.used {
			return 0
		}
		if f := w.flows.at(n); f.client.bits != 0 {
			w.note(f)
		}
	}
	return from + chunkFlows
}

// run writes until ctx ends.
func (j *journal) run(ctx context.Context) {
	tick := time.NewTicker(journalInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-j.kick:
		}
		j.step()
	}
}

// step writes what was noted, into a new file if it is time for one. That it fails is logged once.
func (j *journal) step() {
	if j.file == nil && j.e.clock.now() < j.retryAt {
		return // the workers have lost their notes, or will: see journalMost
	}
	err := j.write()
	switch {
	case err != nil:
		err = errors.Join(err, j.Close())
		j.retryAt = j.e.clock.now() + int64(journalRetry)
		if !j.failed {
			j.e.o.Log.Warn("journal not written: should this daemon end, the next one takes the flows over without their names", "error", err)
		}
	case j.failed:
		j.e.o.Log.Info("journal is written again")
	}
	j.failed = err != nil
}

func (j *journal) write() error {
	if j.file != nil && j.plan == j.e.plan.Load() {
		if again, err := j.flush(); !again || err != nil {
			return err
		}
	}
	err := j.rewrite()
	if errors.Is(err, syscall.ENOSPC) && os.Remove(j.path) == nil {
		return j.rewrite() // there may be room for one, and the old one would never be true again
	}
	return err
}

// flush adds what was noted. Returns true if the file has become too large, or has gaps.
func (j *journal) flush() (again bool, err error) {
	for _, w := range j.e.workers {
		notes, lost := w.takeNotes(j.spare)
		j.spare = notes
		again = again || lost
		if err := j.put(notes); err != nil {
			return false, err
		}
	}
	j.spare = j.e.peers.journal(j.spare[:0], false)
	if err := j.put(j.spare); err != nil {
		return false, err
	}
	return again || j.size > j.begun+max(j.begun/2, journalSmall), nil
}

func (j *journal) put(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	n, err := j.file.Write(b)
	j.size += int64(n)
	return err
}

// rewrite begins a new file with what is known now, and puts it in the old one's place when it is whole.
func (j *journal) rewrite() error {
	if err := j.Close(); err != nil {
		return err
	}
	next := j.path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	file, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	j.file, j.size, j.plan = file, 0, j.e.plan.Load()
	if err = j.writeAll(); err == nil {
		err = os.Rename(next, j.path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(next), j.Close()) // it takes room as long as it is open
	}
	j.begun = j.size
	return nil
}

func (j *journal) writeAll() error {
	for _, w := range j.e.workers {
		w.beginDiary()
	}
	if err := j.put(j.e.peers.journal(j.ids(), true)); err != nil {
		return err
	}
	for _, w := range j.e.workers {
		for from := uint32(1); from != 0; {
			from = w.noteChunk(from)
			notes, lost := w.takeNotes(j.spare)
			j.spare = notes
			if err := j.put(notes); err != nil {
				return err
			}
			if lost {
				return fmt.Errorf("worker %d notes faster than can be written", w.id)
			}
		}
	}
	return nil
}

// ids is how the file begins: what the ids in entries and events mean, be it of backends that are no more in the configuration.
func (j *journal) ids() []byte {
	b := []byte(journalStart(j.boot))
	backend := func(one *pool.Backend) {
		r := record{kind: recordBackend, number: uint32(one.ID), pool: one.Pool, name: one.Name, backend: one.Addr}
		b = r.append(b)
	}
	for _, p := range j.plan.pools.Pools {
		for _, one := range p.Backends {
			backend(one)
		}
	}
	gone := make(map[uint16]bool)
	for _, w := range j.e.workers {
		w.mu.Lock()
		for _, v := range w.flows.ways.all {
			one := v.value.backend
			if one == nil || one.Pool == "" || j.plan.pools.Backend(one.ID) != nil || gone[one.ID] {
				continue
			}
			gone[one.ID] = true
			backend(one)
		}
		w.mu.Unlock()
	}
	listener := func(id uint16, addr netip.AddrPort) {
		r := record{kind: recordListener, number: uint32(id), backend: addr}
		b = r.append(b)
	}
	for addr, id := range j.plan.ids {
		listener(id, addr)
	}
	listener(j.plan.lastID, netip.AddrPort{})
	for _, route := range j.plan.config.Routes {
		r := record{kind: recordRoute, number: uint32(route.Index + 1), route: route.Name}
		b = r.append(b)
	}
	return b
}

// Close closes the file as it is.
func (j *journal) Close() error {
	if j.file == nil {
		return nil
	}
	err := j.file.Close()
	j.file = nil
	return err
}
