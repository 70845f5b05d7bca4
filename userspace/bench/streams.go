// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Requests keeps Concurrency connections open and sends requests over them: each asks for answer bytes and is itself
// request bytes long. An attempt is one request; a connection that ends is opened again.
func Requests(ctx context.Context, l Load, o SocketOptions, requestBytes, answerBytes int) (*Result, error) {
	d, err := newDialer(l, o)
	if err != nil {
		return nil, err
	}
	if requestBytes < requestHeader || requestBytes > maxRecord || answerBytes < 1 || answerBytes > 1<<30 {
		return nil, fmt.Errorf("requests of %d bytes (between %d and %d), answers of %d (between 1 and 1 GiB)",
			requestBytes, requestHeader, maxRecord, answerBytes)
	}
	ask := request(uint64(answerBytes), requestBytes)
	return l.run(ctx, "requests", func(ctx context.Context, w *worker) {
		var conn *net.TCPConn
		defer func() { closeIf(conn) }()
		for due := range w.turns(ctx) {
			w.tally.began()
			var err error
			if conn == nil {
				conn, err = d.open(ctx, w, due)
			}
			if err == nil {
				err = w.exchange(conn, ask, answerBytes, w.deadline(due))
			}
			if err != nil {
				w.failed(ctx, err)
				closeIf(conn)
				conn = nil
				continue
			}
			w.tally.succeeded(time.Since(due), answerBytes)
		}
	})
}

// exchange sends a request and reads its answer.
func (w *worker) exchange(conn *net.TCPConn, ask []byte, answer int, deadline time.Time) error {
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := conn.Write(ask); err != nil {
		return err
	}
	return w.read(conn, answer)
}

func closeIf(conn *net.TCPConn) {
	if conn != nil {
		_ = conn.Close()
	}
}

// Bulk moves size bytes over each of Concurrency connections, once, down or up. It ends when all have; Duration is the
// longest that it may take. An attempt is one transfer, its latency the time from the request to the last byte.
func Bulk(ctx context.Context, l Load, o SocketOptions, size int64, upload bool) (*Result, error) {
	d, err := newDialer(l, o)
	if err != nil {
		return nil, err
	}
	if size < 1 || size > 1<<40 {
		return nil, fmt.Errorf("a transfer of %d bytes: between 1 and 1 TiB", size)
	}
	if l.Rate != 0 || l.Warmup != 0 {
		return nil, errors.New("a bulk transfer has no rate and no warm-up")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rec := newRecorder()
	end := rec.began.Add(l.Duration)
	var all sync.WaitGroup
	var next atomic.Int64
	for i := range l.Concurrency {
		w := l.worker(i, rec, &next, end)
		all.Go(func() { w.transfer(ctx, d, size, upload) })
	}
	go func() { all.Wait(); cancel() }()
	res := l.observe(ctx, rec, "bulk")
	all.Wait()
	return res, nil
}

func (w *worker) transfer(ctx context.Context, d *dialer, size int64, upload bool) {
	w.tally.began()
	conn, err := d.open(ctx, w, time.Now())
	if err != nil {
		w.failed(ctx, err)
		return
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	begin := time.Now()
	err = conn.SetDeadline(w.end)
	if err == nil && upload {
		err = w.upload(conn, size)
	} else if err == nil {
		if _, err = conn.Write(request(uint64(size), requestHeader)); err == nil {
			_, err = discard(conn, int(size), w.tally.received)
		}
	}
	if err != nil {
		w.tally.fail(classify(err))
		return
	}
	w.tally.succeeded(time.Since(begin), 0)
}

// upload sends size bytes as records that want nothing, and one more that wants a byte: when that comes, all were taken.
func (w *worker) upload(conn *net.TCPConn, size int64) error {
	const together = 16
	record := request(0, maxRecord)
	var burst []byte
	for range together {
		burst = append(burst, record...)
	}
	for left := size; left > 0; {
		n := min(left, int64(len(burst)))
		if n < int64(len(burst)) {
			// The last burst is made to measure: whole records, and one that is as long as what is left.
			n = min(left, maxRecord)
			burst = request(0, int(n))
		}
		if _, err := conn.Write(burst); err != nil {
			return err
		}
		w.tally.received(int(n))
		left -= n
	}
	if _, err := conn.Write(request(1, requestHeader)); err != nil {
		return err
	}
	return w.read(conn, 1)
}

// Idle opens Concurrency connections, at most opening of them at once, calls standing with the number that stand, and
// keeps them for Duration. Then each must still answer a request: that is the attempt.
func Idle(ctx context.Context, l Load, o SocketOptions, opening int, standing func(int)) (*Result, error) {
	d, err := newDialer(l, o)
	if err != nil {
		return nil, err
	}
	rec := newRecorder()
	slots := make(chan struct{}, max(opening, 1))
	var opened, all sync.WaitGroup
	var stand, next atomic.Int64
	release := make(chan struct{})
	for i := range l.Concurrency {
		w := l.worker(i, rec, &next, time.Time{})
		opened.Add(1)
		slots <- struct{}{}
		all.Go(func() {
			begin := time.Now()
			w.tally.began()
			conn, err := d.open(ctx, w, begin)
			<-slots
			if err == nil {
				stand.Add(1)
			}
			opened.Done()
			if err != nil {
				w.failed(ctx, err)
				return
			}
			w.keep(ctx, conn, release, time.Since(begin))
		})
	}
	opened.Wait()
	standing(int(stand.Load()))
	sleepUntil(ctx, time.Now().Add(l.Duration))
	close(release)
	all.Wait()
	res := rec.result("idle", "sockets", l.Target)
	return res, nil
}

// keep holds a connection until release is closed and then asks for a byte. The latency it counts is that of opening.
func (w *worker) keep(ctx context.Context, conn *net.TCPConn, release <-chan struct{}, latency time.Duration) {
	defer func() { _ = conn.Close() }()
	select {
	case <-release:
	case <-ctx.Done():
		return
	}
	err := w.exchange(conn, request(1, requestHeader), 1, time.Now().Add(w.load.Timeout))
	if err != nil {
		w.tally.fail(classify(err))
		return
	}
	w.tally.succeeded(latency, 1)
}
