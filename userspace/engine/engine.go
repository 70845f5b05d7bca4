// SPDX-License-Identifier: Apache-2.0

// Package engine is the handshake engine: it takes the hellos that the kernel
// programs hand over, decides the backend, shakes hands with it, writes the two
// flow entries and replays the hello. From then on the kernel moves the packets,
// and the engine hears of the flow again when it ends.
//
// Events arrive on two rings a worker: one wakes it, the quiet one, with the ends of
// flows, is read along. A worker owns its half-open handshakes, its bound flows and
// its slice of the source ports: a client's address and port belong to one worker,
// and the ports it uses bring the backend's packets to the same one.
package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/userspace/pool"
)

// Hop is where packets to an address leave this node.
type Hop struct {
	Index  uint16     // in the nexthops table
	MTU    int        // bytes of an IP packet
	Source netip.Addr // the address to speak from
}

// Options are what the engine works with. All but Adopted and Journal are required.
type Options struct {
	Tables *maps.Tables
	Rings  []*ebpf.Map // one a worker
	// QuietRings are of the same workers: what is in them can wait, and wakes nobody.
	QuietRings []*ebpf.Map
	Jobs       []*maps.Jobs // of the same workers
	Queues     []io.Writer  // of the TAP device, one a worker; a write is a frame
	// NextHop asks the kernel for the way to an address.
	NextHop func(netip.Addr) (Hop, error)
	// NextHopWithin is NextHop for a destination that takes IP packets of mtu bytes
	// and no larger ones.
	NextHopWithin func(addr netip.Addr, mtu int) (Hop, error)
	// MSS is what SYN-ACKs announce, in bytes.
	MSS func() (mss4, mss6 uint16)
	// HasSockets says whether a socket of this node may own a connection to a listener.
	HasSockets                      func() bool
	SourcePortFirst, SourcePortLast uint16 // both included: the kernel programs' range
	// SourcePortsOwn is the part of it for pools that name none, first and last.
	SourcePortsOwn [2]uint16
	// Secret is what the cookie keys are made of, nobody else's to know. The next daemon must have the same, to accept the
	// cookies of SYNs that this one's programs answered.
	Secret [32]byte
	// Adopted says that an earlier daemon's programs are at work on the tables: until Ready they go by its last sign of life.
	Adopted bool
	// Journal is the path of a file that tells the next daemon what flows' entries do not hold; empty is none.
	Journal string
	Log     *slog.Logger
}

// Engine runs the workers. Make one with New.
type Engine struct {
	o       Options
	clock   clock
	workers []*worker
	secret  pool.Key // of sequence numbers and timestamps, the same until a reboot

	plan         atomic.Pointer[Plan]
	reloading    sync.Mutex  // held while the plan changes
	beating      sync.Mutex  // held while the kernel is told
	sourceClient atomic.Bool // as if the plan had it: an earlier one did, or the next one does
	sources      sources
	peers        peers
	flows        atomic.Int64 // bound now
	held         atomic.Int64 // bytes that handshakes hold, themselves included
	silent       atomic.Bool  // no heartbeat: SYNs go to the stack
	waiting      bool         // by beating: for Ready, and the kernel has
	inherited    uint64       // the beat of an earlier daemon
	beaten       atomic.Int64 // when: CLOCK_MONOTONIC ns
	faint        atomic.Bool  // a worker is stuck: no beat is a sign of life
	owned        ownedHellos
	journal      *journal // nil: none

	quiescing atomic.Bool // no new connection is begun

	started int64  // CLOCK_MONOTONIC ns: when the workers began, who alone read it
	adopted int    // flows that an earlier daemon bound
	halves  uint64 // halves of its flows, removed
	orphans []orphan
}

// New makes an engine that decides by p, and takes over the flows in the tables: nobody else may work with them.
func New(o Options, p *Plan) (*Engine, error) {
	if n := len(o.Rings); n == 0 || n != len(o.QuietRings) || n != len(o.Jobs) || n != len(o.Queues) {
		return nil, fmt.Errorf("%d rings, %d quiet ones, %d lists of jobs and %d queues: want one of each a worker",
			n, len(o.QuietRings), len(o.Jobs), len(o.Queues))
	}
	if o.Secret == [32]byte{} {
		return nil, errors.New("no secret for the cookie keys")
	}
	secret, err := bootSecret()
	if err != nil {
		return nil, err
	}
	e := &Engine{o: o, clock: newClock(), secret: secret, owned: o.Tables}
	e.plan.Store(p)
	if e.journal, err = newJournal(e, o.Journal); err != nil {
		return nil, err
	}
	for i := range o.Rings {
		w := newWorker(e, i, o.Queues[i])
		w.jobs = o.Jobs[i]
		e.workers = append(e.workers, w)
		if err := w.openRings(o.Rings[i], o.QuietRings[i]); err != nil {
			return nil, errors.Join(fmt.Errorf("open the rings of worker %d: %w", i, err), e.free())
		}
	}
	if err := e.adopt(); err != nil {
		return nil, errors.Join(fmt.Errorf("take over the flows of an earlier daemon: %w", err), e.free())
	}
	if err := e.findOrphans(); err != nil {
		return nil, errors.Join(err, e.free())
	}
	if e.journal != nil {
		e.journal.step() // what ids mean, before anything new is bound
	}
	if e.waiting = o.Adopted; e.waiting {
		live, err := o.Tables.Live()
		if err != nil {
			return nil, errors.Join(err, e.free())
		}
		e.inherited = live.Beat
	}
	// Before any program is attached: none must find the daemon dead.
	if err := e.beat(); err != nil {
		return nil, errors.Join(err, e.free())
	}
	return e, nil
}

// Run works until ctx ends, then returns nil; or until a worker or the heartbeat
// cannot go on.
func (e *Engine) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	e.resetOrphans()
	e.started = e.clock.now() // to take over many flows is a while without a daemon too
	var all sync.WaitGroup
	for _, w := range e.workers {
		all.Go(func() {
			if err := w.run(); err != nil {
				cancel(fmt.Errorf("worker %d: %w", w.id, err))
			}
		})
	}
	all.Go(func() { e.runBeat(ctx, cancel) })
	all.Go(func() { e.runSweep(ctx) })
	if e.journal != nil {
		all.Go(func() { e.journal.run(ctx) })
	}
	<-ctx.Done()
	var errs []error
	for _, w := range e.workers {
		errs = append(errs, w.stop())
	}
	all.Wait()
	if e.journal != nil {
		e.journal.step() // what was bound last
	}
	if err := errors.Join(append(errs, e.free())...); err != nil {
		e.o.Log.Warn("close the rings", "error", err)
	}
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// StopListening makes the kernel leave SYNs to the stack; bound flows go on.
func (e *Engine) StopListening() error {
	e.silent.Store(true)
	return e.beat()
}

// Bound is the number of bound flows.
func (e *Engine) Bound() int { return int(e.flows.Load()) }

// Live is the number of connections that would lose something if the engine ended
// now: half-open ones, and bound flows that no RST has ended. (Those are kept for a
// while only because a RST may be forged.)
func (e *Engine) Live() int {
	live := 0
	for _, w := range e.workers {
		w.mu.Lock()
		live += w.halfOpen()
		for _, n := range w.flows.order {
			if !w.flows.at(n).closing.reset {
				live++
			}
		}
		w.mu.Unlock()
	}
	return live
}

// free gives back what the workers' runs needed.
func (e *Engine) free() (err error) {
	if e.journal != nil {
		err = e.journal.Close()
	}
	for _, w := range e.workers {
		err = errors.Join(err, w.free())
	}
	return err
}
