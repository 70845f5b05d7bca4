// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// SocketOptions are what only sockets need.
type SocketOptions struct {
	// From are local addresses to connect from, in turn: one address has no more than 64,511 ports to one target. Optional.
	From []netip.Addr
	// ResetClose ends connections by RST and not by FIN, which leaves no TIME_WAIT behind.
	ResetClose bool
}

// Connections opens connections by sockets: connect, hello, the answer's first bytes, close.
func Connections(ctx context.Context, l Load, o SocketOptions) (*Result, error) {
	d, err := newDialer(l, o)
	if err != nil {
		return nil, err
	}
	return l.run(ctx, "connections", func(ctx context.Context, w *worker) {
		for due := range w.turns(ctx) {
			w.tally.began()
			if conn, err := d.open(ctx, w, due); err != nil {
				w.failed(ctx, err)
			} else {
				w.tally.succeeded(time.Since(due), l.Reply)
				_ = conn.Close()
			}
		}
	})
}

// dialer opens connections of a [Load].
type dialer struct {
	load Load
	opts SocketOptions
	from atomic.Uint64
}

func newDialer(l Load, o SocketOptions) (*dialer, error) {
	for _, a := range o.From {
		if a.Is4() != l.Target.Addr().Is4() {
			return nil, errors.New("local address " + a.String() + " and target " + l.Target.String() + " are of two families")
		}
	}
	return &dialer{load: l, opts: o}, l.check()
}

// open connects, writes a hello and reads the answer's first bytes, all within the timeout from begin. The connection it
// returns has no deadline.
func (d *dialer) open(ctx context.Context, w *worker, begin time.Time) (_ *net.TCPConn, err error) {
	hello, err := w.hellos.next()
	if err != nil {
		return nil, err
	}
	deadline := w.deadline(begin)
	dial := net.Dialer{Deadline: deadline, KeepAlive: -1, Control: d.control}
	if n := uint64(len(d.opts.From)); n > 0 {
		dial.LocalAddr = &net.TCPAddr{IP: d.opts.From[d.from.Add(1)%n].AsSlice()}
	}
	c, err := dial.DialContext(ctx, "tcp", d.load.Target.String())
	if err != nil {
		return nil, err
	}
	conn := c.(*net.TCPConn)
	defer func() {
		if err != nil {
			_ = conn.Close()
		}
	}()
	if d.opts.ResetClose {
		_ = conn.SetLinger(0)
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if err := writeIn(conn, hello, d.load.Hellos.opts.SegmentBytes); err != nil {
		return nil, err
	}
	if err := w.read(conn, d.load.Reply); err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Time{})
}

// control leaves the choice of the port to connect(2): bind(2) cannot know that the target differs from that of other
// connections of the port.
func (d *dialer) control(_, _ string, c syscall.RawConn) (err error) {
	if len(d.opts.From) == 0 {
		return nil
	}
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	}); e != nil {
		return e
	}
	return err
}

// writeIn writes b in writes of at most size bytes: without Nagle, so each is a segment of its own.
func writeIn(conn net.Conn, b []byte, size int) error {
	if size == 0 {
		size = len(b)
	}
	for part := range slices.Chunk(b, size) {
		if _, err := conn.Write(part); err != nil {
			return err
		}
	}
	return nil
}

// worker is one goroutine of a run.
type worker struct {
	load   *Load
	tally  *tally
	hellos *source
	begin  time.Time     // of the run
	end    time.Time     // of the run; zero: when what it does is done
	next   *atomic.Int64 // the number of the next attempt, of all workers
	buf    []byte
}

func (l *Load) worker(number int, rec *recorder, next *atomic.Int64, end time.Time) *worker {
	return &worker{
		load: l, tally: rec.part(number), hellos: l.Hellos.source(uint64(number)),
		begin: rec.began, end: end, next: next, buf: make([]byte, 2048),
	}
}

// turns yields when each of the worker's attempts is due, until ctx ends.
func (w *worker) turns(ctx context.Context) func(func(time.Time) bool) {
	return func(yield func(time.Time) bool) {
		for ctx.Err() == nil {
			due := time.Now()
			if !due.Before(w.end) {
				return
			}
			if w.load.Rate > 0 {
				n := w.next.Add(1) - 1
				due = w.begin.Add(time.Duration(float64(n) / w.load.Rate * float64(time.Second)))
				if !sleepUntil(ctx, due) {
					return
				}
			}
			if !yield(due) {
				return
			}
		}
	}
}

// deadline is when an attempt that was due then must be over: its timeout from when it was begun in fact, now, and not
// after the run's end.
func (w *worker) deadline(due time.Time) time.Time {
	if now := time.Now(); now.After(due) {
		due = now
	}
	end := due.Add(w.load.Timeout)
	if !w.end.IsZero() && w.end.Before(end) {
		return w.end
	}
	return end
}

func sleepUntil(ctx context.Context, t time.Time) bool {
	wait := time.Until(t)
	if wait <= 0 {
		return true
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// read reads n bytes and throws them away.
func (w *worker) read(conn *net.TCPConn, n int) error {
	if n <= len(w.buf) {
		_, err := io.ReadFull(conn, w.buf[:n])
		return err
	}
	_, err := discard(conn, n, nil)
	return err
}

// failed counts an error, except the one that the end of the run caused.
func (w *worker) failed(ctx context.Context, err error) {
	if ctx.Err() != nil || !w.end.IsZero() && !time.Now().Before(w.end) {
		return
	}
	why := classify(err)
	w.tally.fail(why)
	if why == Local {
		// No ports or descriptors: asking again at once would only burn the CPU that others need to give some back.
		time.Sleep(10 * time.Millisecond)
	}
}

func classify(err error) Failure {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return Refused
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return Reset
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return Closed
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return Unreachable
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ETIMEDOUT):
		return Timeout
	}
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		return Timeout
	}
	return Local
}

// discard takes n bytes off the connection without copying them out of the kernel (tcp(7), MSG_TRUNC). It tells count of
// each portion, and returns how many came.
func discard(conn *net.TCPConn, n int, count func(int)) (got int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var scratch [1]byte
	for got < n {
		var m int
		var e error
		err = raw.Read(func(fd uintptr) bool {
			m, e = recvTrunc(fd, &scratch[0], min(n-got, 4<<20))
			return !errors.Is(e, unix.EAGAIN)
		})
		switch {
		case err != nil:
			return got, err
		case errors.Is(e, unix.EINTR):
			continue
		case e != nil:
			return got, e
		case m == 0:
			return got, io.ErrUnexpectedEOF
		}
		got += m
		if count != nil {
			count(m)
		}
	}
	return got, nil
}

// request is a record that asks for so many bytes and is size bytes long, at least 13.
func request(wanted uint64, size int) []byte {
	b := make([]byte, max(size, requestHeader))
	b[0], b[1], b[2] = 23, 3, 3
	binary.BigEndian.PutUint16(b[3:], uint16(len(b)-5))
	binary.BigEndian.PutUint64(b[5:], wanted)
	return b
}

const requestHeader = 5 + 8

// run starts Concurrency goroutines, warms up, measures, and waits for all to end.
func (l *Load) run(ctx context.Context, kind string, work func(context.Context, *worker)) (*Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rec := newRecorder()
	end := rec.began.Add(l.Warmup + l.Duration)
	// No deadline of the context, which dials would take for theirs, and then tell a timeout.
	defer time.AfterFunc(time.Until(end), cancel).Stop()
	var all sync.WaitGroup
	var next atomic.Int64
	for i := range l.Concurrency {
		w := l.worker(i, rec, &next, end)
		all.Go(func() { work(ctx, w) })
	}
	res := l.observe(ctx, rec, kind)
	all.Wait()
	return res, nil
}

// observe watches the run's warm-up and measurement, and returns what the latter brought.
func (l *Load) observe(ctx context.Context, rec *recorder, kind string) *Result {
	if l.Warmup > 0 {
		sleepUntil(ctx, time.Now().Add(l.Warmup))
		rec.reset()
	}
	rec.watch(ctx.Done(), l.Progress)
	res := rec.result(kind, "sockets", l.Target)
	res.Offered = l.Rate
	return res
}
