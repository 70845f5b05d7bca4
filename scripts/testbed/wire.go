// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"container/heap"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Direction is a way through a [Wire].
type Direction int

// The directions.
const (
	ToLB Direction = iota
	FromLB
)

// Fate is what becomes of a frame.
type Fate int

// The fates. Chance leaves it to the probabilities of the [Impairment].
const (
	Chance Fate = iota
	Carried
	Dropped
	Doubled
	Echoed // carried, and once more after echoAfter
)

// Impairment is what a [Wire] does to the TCP segments that it carries one way. Everything else, such as ARP and ICMP, passes.
// The zero value carries everything.
type Impairment struct {
	// Drop, Duplicate and Reorder are probabilities. A reordered frame stands back behind the next one to five, for 20 ms at
	// the most.
	Drop, Duplicate, Reorder float64
	// Delay is added to every frame, and up to Jitter more. The order stays, unless Disorder is set.
	Delay, Jitter time.Duration
	Disorder      bool
	// Filter, if set, is asked first. It is called for one frame at a time, in both directions, and must not call the wire.
	Filter func(Frame) Fate
}

// Frame is a TCP segment that a [Wire] has seen.
type Frame struct {
	At time.Time
	Direction
	Segment        // without its payload when it is read from a record
	Bytes   int    // of payload
	Sum     uint32 // CRC-32 of the payload, only in a record
	Fate    Fate
}

// maxLate is how long a reordered frame waits for others to overtake it.
const maxLate = 20 * time.Millisecond

// echoAfter is long enough for what follows at once, such as a bind or an end, to be over.
const echoAfter = 300 * time.Millisecond

// Wire stands in a leg of a [Bed] and carries its frames between two packet sockets, worse than a cable would. It may be
// changed at any time.
type Wire struct {
	ns    *NS
	paths [2]*path

	mu        sync.Mutex // guards all below, and is held while Filter runs
	impair    [2]Impairment
	random    *rand.Rand
	recording bool
	frames    []Frame

	closed atomic.Bool
	done   sync.WaitGroup
}

// Impair sets what happens in both directions from now on.
func (w *Wire) Impair(i Impairment) {
	w.ImpairOne(ToLB, i)
	w.ImpairOne(FromLB, i)
}

// ImpairOne is [Wire.Impair] for one direction.
func (w *Wire) ImpairOne(d Direction, i Impairment) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.impair[d] = i
}

// Record starts a record of what arrives at the wire from now on, and forgets the last one.
func (w *Wire) Record() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.recording, w.frames = true, nil
}

// Settle waits until the record has not grown for that long: what one wire carried last is then on its way over the other no
// more. It gives up after a hundred times that.
func (w *Wire) Settle(quiet time.Duration) {
	count := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.frames)
	}
	for range 100 {
		before := count()
		time.Sleep(quiet)
		if count() == before {
			return
		}
	}
}

// Recorded ends the record and returns it.
func (w *Wire) Recorded() []Frame {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.recording = false
	return w.frames
}

// start opens the sockets on the devices near, of the load balancer's side, and far, and carries frames until close.
func (w *Wire) start(near, far string) error {
	w.random = rand.New(rand.NewPCG(1, 1))
	nearEnd, err := w.ns.packetSocket(near)
	if err != nil {
		return err
	}
	farEnd, err := w.ns.packetSocket(far)
	if err != nil {
		return errors.Join(err, nearEnd.file.Close())
	}
	w.paths = [2]*path{{wire: w, direction: ToLB, in: farEnd, out: nearEnd}, {wire: w, direction: FromLB, in: nearEnd, out: farEnd}}
	for _, p := range w.paths {
		w.done.Go(p.run)
	}
	return nil
}

// close returns the first error that the wire had with a frame, which a test might otherwise take for a loss.
func (w *Wire) close() error {
	if w.paths[0] == nil {
		return nil
	}
	w.closed.Store(true)
	errs := []error{w.paths[0].in.file.Close(), w.paths[1].in.file.Close()}
	w.done.Wait()
	return errors.Join(append(errs, w.paths[0].err, w.paths[1].err)...)
}

// judge decides about a frame, and when it goes on.
func (w *Wire) judge(d Direction, frame []byte, now time.Time) (fate Fate, wait time.Duration, i Impairment) {
	s, err := ParseSegment(frame[min(ethHeader, len(frame)):])
	if err != nil {
		return Carried, 0, Impairment{}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	i = w.impair[d]
	f := Frame{At: now, Direction: d, Segment: s, Bytes: len(s.Payload)}
	if i.Filter != nil {
		f.Fate = i.Filter(f)
	}
	switch {
	case f.Fate != Chance:
	case w.random.Float64() < i.Drop:
		f.Fate = Dropped
	case w.random.Float64() < i.Duplicate:
		f.Fate = Doubled
	default:
		f.Fate = Carried
	}
	if w.recording {
		f.Sum = crc32.ChecksumIEEE(s.Payload)
		f.Options, f.Payload = append([]byte(nil), s.Options...), nil
		w.frames = append(w.frames, f)
	}
	wait = i.Delay
	if i.Jitter > 0 {
		wait += time.Duration(w.random.Int64N(int64(i.Jitter)))
	}
	return f.Fate, wait, i
}

// chance is true with probability p.
func (w *Wire) chance(p float64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return p > 0 && w.random.Float64() < p
}

const ethHeader = 14

// path is one direction of a wire. Only its goroutine uses it.
type path struct {
	wire      *Wire
	direction Direction
	in, out   *packetSocket

	delayed delayed
	late    []heldFrame
	last    time.Time // when the last frame that must keep the order goes on
	err     error
}

// heldFrame waits for its time or, in path.late, for so many others to pass it.
type heldFrame struct {
	frame   []byte
	due     time.Time
	behind  int
	reorder float64
}

// delayed is a heap by time. Frames of the same time may change places, so path.delay gives out no time twice.
type delayed []heldFrame

func (d delayed) Len() int           { return len(d) }
func (d delayed) Less(i, j int) bool { return d[i].due.Before(d[j].due) }
func (d delayed) Swap(i, j int)      { d[i], d[j] = d[j], d[i] }

// Push is heap.Interface's.
func (d *delayed) Push(x any) { *d = append(*d, x.(heldFrame)) }

// Pop is heap.Interface's.
func (d *delayed) Pop() any {
	last := len(*d) - 1
	h := (*d)[last]
	(*d)[last] = heldFrame{}
	*d = (*d)[:last]
	return h
}

func (p *path) run() {
	buf := make([]byte, 1<<17)
	var deadline time.Time
	for p.err == nil {
		if next := p.next(); !next.Equal(deadline) {
			deadline = next
			if p.in.file.SetReadDeadline(deadline) != nil {
				return // closed
			}
		}
		n, err := p.in.read(buf)
		now := time.Now()
		switch {
		case err == nil:
			p.take(buf[:n], now)
		case p.wire.closed.Load():
			return
		}
		p.flush(now)
	}
}

// next is when something that is held goes on by itself; zero is never.
func (p *path) next() (at time.Time) {
	if len(p.delayed) > 0 {
		at = p.delayed[0].due
	}
	for _, h := range p.late {
		if at.IsZero() || h.due.Before(at) {
			at = h.due
		}
	}
	return at
}

// take deals with a frame that came in.
func (p *path) take(frame []byte, now time.Time) {
	fate, wait, i := p.wire.judge(p.direction, frame, now)
	times := 1
	switch fate {
	case Dropped:
		times = 0
	case Doubled:
		times = 2
	case Echoed:
		heap.Push(&p.delayed, heldFrame{frame: append([]byte(nil), frame...), due: now.Add(echoAfter)})
	}
	for range times {
		if wait == 0 && len(p.delayed) == 0 {
			p.pass(frame, i.Reorder, now)
			continue
		}
		due := now.Add(wait)
		if !i.Disorder && !due.After(p.last) {
			due = p.last.Add(1)
		}
		p.last = due
		heap.Push(&p.delayed, heldFrame{frame: append([]byte(nil), frame...), due: due, reorder: i.Reorder})
	}
}

// flush sends on what has waited long enough.
func (p *path) flush(now time.Time) {
	for len(p.delayed) > 0 && !p.delayed[0].due.After(now) {
		h := heap.Pop(&p.delayed).(heldFrame)
		p.pass(h.frame, h.reorder, now)
	}
	p.sendLate(func(h heldFrame) bool { return !h.due.After(now) })
}

// pass sends a frame, unless it is to be late, and then those that have waited for it to pass.
func (p *path) pass(frame []byte, reorder float64, now time.Time) {
	if p.wire.chance(reorder) {
		behind := 1 + rand.IntN(5)
		p.late = append(p.late, heldFrame{frame: append([]byte(nil), frame...), due: now.Add(maxLate), behind: behind})
		return
	}
	p.send(frame)
	for i := range p.late {
		p.late[i].behind--
	}
	p.sendLate(func(h heldFrame) bool { return h.behind <= 0 })
}

func (p *path) sendLate(ready func(heldFrame) bool) {
	kept := p.late[:0]
	for _, h := range p.late {
		if ready(h) {
			p.send(h.frame)
		} else {
			kept = append(kept, h)
		}
	}
	p.late = kept
}

// send writes a frame. That it does not fit means that an offload is on: a fault of the bed and no loss.
func (p *path) send(frame []byte) {
	if err := p.out.write(frame); errors.Is(err, unix.EMSGSIZE) {
		p.err = fmt.Errorf("a frame of %d bytes on a wire: %w", len(frame), err)
	}
}

// packetSocket sees and sends whole frames of one device.
type packetSocket struct {
	file *os.File
	conn rawConn
}

func (ns *NS) packetSocket(dev string) (s *packetSocket, err error) {
	index, err := ns.Index(dev)
	if err != nil {
		return nil, err
	}
	err = ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 64<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: swap(unix.ETH_P_ALL), Ifindex: index}))
		if err != nil {
			_ = unix.Close(fd)
			return err
		}
		s = &packetSocket{file: os.NewFile(uintptr(fd), "wire "+dev)}
		s.conn, err = s.file.SyscallConn()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("packet socket on %s: %w", dev, err)
	}
	return s, nil
}

func (s *packetSocket) read(buf []byte) (n int, err error) {
	var readErr error
	err = s.conn.Read(func(fd uintptr) bool {
		n, readErr = unix.Read(int(fd), buf)
		return !errors.Is(readErr, unix.EAGAIN)
	})
	return n, errors.Join(err, readErr)
}

func (s *packetSocket) write(frame []byte) error {
	var writeErr error
	err := s.conn.Write(func(fd uintptr) bool {
		_, writeErr = unix.Write(int(fd), frame)
		return !errors.Is(writeErr, unix.EAGAIN)
	})
	return errors.Join(err, writeErr)
}
