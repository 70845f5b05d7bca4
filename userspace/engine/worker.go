// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"

	"snilb/maps"
	"snilb/userspace/packet"
	"snilb/userspace/ringbuf"
)

// staleAfter is the age at which a queued event says nothing any more: its sender
// has repeated the packet.
const staleAfter = 3 * time.Second

// connection is a client's tuple.
type connection struct {
	client, listener netip.AddrPort
}

// worker reads one ring. mu is held while an event or a timer is dealt with, and
// by who asks from outside (status, the sweep); it is never held while waiting.
type worker struct {
	e     *Engine
	id    int
	ring  *ringbuf.Reader
	wait  *ringbuf.Waiter // for the ring
	quiet *ringbuf.Reader // read along, without waiting for it
	queue io.Writer
	jobs  *maps.Jobs

	turns atomic.Uint64 // of run, for the heartbeat

	mu         sync.Mutex
	now        int64 // CLOCK_MONOTONIC ns, read once an event
	timers     timers[*handshake]
	flowTimers timers[uint32] // by the flows' numbers
	due        []*flow        // of those, in one look
	over       []ended        // of those, kept for its memory
	handshakes map[connection]*handshake
	leases     map[maps.Tuple]*handshake // by what a backend's packets show
	flows      table
	swept      int // how far the sweep came in its order
	paths      map[pathKey]*ports
	rotation   int // over a pool's source addresses
	refused    int // of handshakes, those in that phase
	generation uint16
	frame      []byte
	diary      diary
	stats      stats
	log        limiter
}

func newWorker(e *Engine, id int, queue io.Writer) *worker {
	w := &worker{
		e: e, id: id, queue: queue,
		handshakes: make(map[connection]*handshake),
		leases:     make(map[maps.Tuple]*handshake),
		flows:      newTable(),
		paths:      make(map[pathKey]*ports),
		log:        limiter{log: e.o.Log},
		stats:      newStats(),
		diary:      diary{lost: true}, // none is begun
	}
	now := e.clock.now()
	w.timers = newTimers(now, func(h *handshake) *uint32 { return &h.timer })
	w.flowTimers = newTimers(now, func(n uint32) *uint32 { return &w.flows.at(n).timer })
	return w
}

func (w *worker) openRings(main, quiet *ebpf.Map) (err error) {
	if w.wait, err = ringbuf.NewWaiter(main, len(w.e.o.Rings) > runtime.GOMAXPROCS(0)); err != nil {
		return err
	}
	if w.ring, err = ringbuf.NewReader(main); err != nil {
		return err
	}
	w.quiet, err = ringbuf.NewReader(quiet)
	return err
}

// burst bounds how many events are dealt with before others get the lock.
const burst = 64

// run returns nil after stop.
func (w *worker) run() error {
	for more := false; !w.wait.Closed(); {
		if w.isQuiet() {
			w.turns.Add(1)
			time.Sleep(quiescePoll)
			continue
		}
		if !more && !w.ring.HasData() {
			if err := w.wait.Wait(w.patience()); err != nil {
				return err
			}
		}
		w.mu.Lock()
		w.now = w.e.clock.now()
		more = w.read(w.quiet)
		w.read(w.ring)
		more = w.runTimers() || more
		w.mu.Unlock()
		w.turns.Add(1)
	}
	return nil
}

// stop ends run.
func (w *worker) stop() error { return w.wait.Close() }

// free gives back what run needed.
func (w *worker) free() (err error) {
	for _, r := range []*ringbuf.Reader{w.ring, w.quiet} {
		if r != nil {
			err = errors.Join(err, r.Close())
		}
	}
	if w.wait != nil {
		err = errors.Join(err, w.wait.Free())
	}
	return err
}

// read deals with a burst of a ring's events. Returns true if there may be more.
func (w *worker) read(r *ringbuf.Reader) bool {
	for range burst {
		record := r.Next()
		if record == nil {
			return false
		}
		w.now = w.e.clock.now()
		w.event(record)
		r.Done()
	}
	return true
}

// hearEnds deals with all of the quiet ring. Before a connection takes its place: what is told there of an earlier one from
// the same port came before it, and is not about it.
func (w *worker) hearEnds() {
	for w.quiet != nil && w.read(w.quiet) {
	}
}

// quietInterval is how long the end of a flow may wait for the engine to look.
const quietInterval = 100 * time.Millisecond

// patience is how long until the next timer ends or the quiet ring must be read, or a little longer. The sweep may start
// a timer meanwhile, which then waits for this or the next event: a second at the most.
func (w *worker) patience() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.e.clock.now()
	at := now + int64(time.Second)
	if w.flows.len() > 0 {
		at = now + int64(quietInterval)
	}
	for _, next := range []int64{w.timers.next(), w.flowTimers.next()} {
		if next != 0 && next < at {
			at = next
		}
	}
	return time.Duration((at>>tickShift+1)<<tickShift - now)
}

// runTimers has what is due looked at: flows together, since that takes system calls, and not more than one lot, since a hundred
// thousand may be due at once. Returns true if there may be more.
func (w *worker) runTimers() (more bool) {
	for h, ok := w.timers.due(w.now); ok; h, ok = w.timers.due(w.now) {
		h.expire(w)
	}
	w.due = w.due[:0]
	for len(w.due) < maps.FlowJobs {
		n, ok := w.flowTimers.due(w.now)
		if !ok {
			break
		}
		w.due = append(w.due, w.flows.at(n))
	}
	w.review(w.due)
	return len(w.due) == maps.FlowJobs
}

const eventHeaderSize = int(unsafe.Sizeof(maps.EventHeader{}))

// event is one ring record.
func (w *worker) event(raw []byte) {
	if len(raw) < eventHeaderSize {
		w.stats.badEvents++
		return
	}
	h := readEventHeader(raw)
	stale := w.now-int64(h.Time) > int64(staleAfter)
	if stale && (maps.EventKind(h.Kind) != maps.EventBackend || int64(h.Time) >= w.e.started) {
		w.stats.staleEvents++
		return
	}
	raw = raw[eventHeaderSize:][:min(int(h.Captured), len(raw)-eventHeaderSize)]
	if maps.EventKind(h.Kind) == maps.EventICMP {
		w.icmpError(maps.Leg(h.Leg), raw)
		return
	}
	s, err := packet.Parse(raw)
	if err != nil {
		w.stats.badEvents++
		return
	}
	if stale {
		w.leftOver(&s)
		return
	}
	switch maps.EventKind(h.Kind) {
	case maps.EventHello:
		if int64(h.Time) < w.e.started { // an earlier daemon had other numbers
			h.Listener = w.e.plan.Load().listenerAt(s.Dst)
		}
		w.clientSegment(h.Listener, &s)
	case maps.EventBackend:
		w.backendSegment(&s)
	case maps.EventClosing:
		w.closingSegment(maps.Leg(h.Leg), &s)
	case maps.EventClosed:
		w.closedSegment(&s)
	case maps.EventTooBig:
		w.tooBig(maps.Leg(h.Leg), &s, int(h.Length), int(h.Mtu))
	case maps.EventUnknown:
		w.stats.unknown++
		w.reset(&s)
	}
}

// readEventHeader decodes by hand what is one struct in bpf/abi.h, whose layout
// the static assertion there and a test here pin down: reflection would cost more
// than all the rest of a small event.
func readEventHeader(raw []byte) maps.EventHeader {
	return maps.EventHeader{
		Time:     binary.NativeEndian.Uint64(raw),
		Ifindex:  binary.NativeEndian.Uint32(raw[8:]),
		Length:   binary.NativeEndian.Uint32(raw[12:]),
		Captured: binary.NativeEndian.Uint16(raw[16:]),
		Listener: binary.NativeEndian.Uint16(raw[18:]),
		Kind:     raw[20],
		Leg:      raw[21],
		Mtu:      binary.NativeEndian.Uint16(raw[28:]),
	}
}

// clientSegment is data, FIN or RST of a client whose cookie is good.
func (w *worker) clientSegment(listener uint16, s *packet.Segment) {
	w.hearEnds()
	c := connection{client: s.Src, listener: s.Dst}
	cookie := s.Ack - 1
	if f := w.flows.byClient(c); f != nil && (f.cookie == cookie || f.cookie == unknownCookie) {
		if f.hasEntry(w) {
			// It was queued while its connection was bound.
			w.stats.late++
			w.replay(maps.LegClient, *s, int(f.mss))
			return
		}
		// The client was given the same cookie for a new connection from the
		// same port: the kernel has deleted the old one's entry before.
		f.remove(w, "replaced")
	}
	h := w.handshakes[c]
	if h != nil && (h.cookie != cookie || h.begunAnew(s)) {
		// A new connection from the same port; the old one is over.
		h.release(w, true)
		w.drop(h)
		h = nil
	}
	if h == nil && len(s.Payload) == 0 {
		w.closeUnopened(s)
		return
	}
	if s.Has(packet.RST) && h != nil && h.phase == refused {
		w.drop(h)
		return
	}
	if s.Has(packet.RST) {
		// RFC 9293 3.5.3: a reset counts only at the next sequence number.
		if h != nil && (h.phase == refused || s.Seq == h.end() || s.Seq == h.hello.Start()) {
			w.stats.hellos[helloReset]++
			h.release(w, true)
			w.drop(h)
		}
		return
	}
	if h == nil {
		if w.e.quiescing.Load() {
			return // its client repeats it, to the next daemon
		}
		if h = w.newHandshake(c, listener, s); h == nil {
			return
		}
	}
	h.add(w, s)
}

// closeUnopened answers a FIN before any data, so that a client that only looks
// whether the port is open (a health check) sees an orderly close. Nothing is
// stored: a repeated FIN is answered again.
func (w *worker) closeUnopened(s *packet.Segment) {
	if !s.Has(packet.FIN) || s.Has(packet.RST) {
		return
	}
	w.stats.hellos[helloNone]++
	r := answerTo(s, packet.FIN)
	r.Options = echo(s)
	w.send(&r)
}

// echo is the timestamp option of an answer: our TSval stays what the client saw
// last, which is always allowed (RFC 7323 4.1: it must not go back).
func echo(s *packet.Segment) packet.Options {
	if !s.Options.HasTimestamps {
		return packet.Options{}
	}
	return packet.Options{HasTimestamps: true, TSVal: s.Options.TSEcr, TSEcr: s.Options.TSVal}
}

// backendSegment is a backend's packet to one of our ports that no entry took.
func (w *worker) backendSegment(s *packet.Segment) {
	if h := w.leases[maps.Tuple{Src: s.Src, Dst: s.Dst}]; h != nil {
		h.backendSegment(w, s)
		return
	}
	f := w.flows.byBackend(s.Src, s.Dst)
	if f == nil {
		w.stats.unknown++
		w.reset(s)
		return
	}
	w.stats.late++
	// A SYN-ACK that comes again is not for the client, whose hello, repeated until the backend has it, answers it.
	if !s.Has(packet.SYN | packet.ACK) {
		w.replay(maps.LegBackend, *s, int(f.mss))
	}
}

// leftOver is a backend's packet that waited while no daemon was there. A backend that had all it waited for, a PROXY header, does
// not repeat it: if nobody has the connection now, nobody else would tell it.
func (w *worker) leftOver(s *packet.Segment) {
	w.stats.staleEvents++
	if w.leases[maps.Tuple{Src: s.Src, Dst: s.Dst}] == nil && w.flows.byBackend(s.Src, s.Dst) == nil {
		w.stats.unknown++
		w.reset(s)
	}
}

// portsTo returns this worker's ports of a path.
func (w *worker) portsTo(key pathKey) *ports {
	p := w.paths[key]
	if p == nil {
		first, last := w.e.o.SourcePortsOwn[0], w.e.o.SourcePortsOwn[1]
		if key.first != 0 {
			first, last = key.first, key.last
		}
		p = newPorts(w.e.o.SourcePortFirst, first, last, w.id, len(w.e.workers))
		p.begin = rand.IntN(max(p.all, 1))
		w.paths[key] = p
	}
	return p
}
