// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Failure is why an attempt failed.
type Failure uint8

// The failures. Each attempt that does not succeed is exactly one of them.
const (
	Refused     Failure = iota // RST to the SYN
	Reset                      // RST later, before what was wanted had come
	Timeout                    // the attempt's time was up
	Closed                     // FIN before what was wanted had come
	Unreachable                // ICMP, or no route
	Local                      // the generator's own: no port, no descriptor, no buffer
	failures
)

var failureNames = [failures]string{"refused", "reset", "timeout", "closed", "unreachable", "local"}

func (f Failure) String() string { return failureNames[f] }

// The histogram's range in nanoseconds, and its precision: 1 us to 100 s in three digits costs 0.2 MB a recorder.
const (
	histogramLow, histogramHigh = int64(time.Microsecond), int64(100 * time.Second)
	histogramDigits             = 3
)

// tally counts what one goroutine saw. A reader takes it away from time to time: that is the only contention.
type tally struct {
	mu        sync.Mutex
	attempts  uint64
	successes uint64
	failed    [failures]uint64
	bytes     uint64 // payload received
	latency   *hdrhistogram.Histogram
}

func newTally() *tally {
	return &tally{latency: hdrhistogram.New(histogramLow, histogramHigh, histogramDigits)}
}

func (t *tally) began() {
	t.mu.Lock()
	t.attempts++
	t.mu.Unlock()
}

// succeeded counts a success of that latency, and the payload bytes it brought.
func (t *tally) succeeded(latency time.Duration, bytes int) {
	t.mu.Lock()
	t.successes++
	t.bytes += uint64(bytes)
	_ = t.latency.RecordValue(min(max(int64(latency), histogramLow), histogramHigh))
	t.mu.Unlock()
}

func (t *tally) fail(why Failure) {
	t.mu.Lock()
	t.failed[why]++
	t.mu.Unlock()
}

func (t *tally) received(bytes int) {
	t.mu.Lock()
	t.bytes += uint64(bytes)
	t.mu.Unlock()
}

// add moves what from has counted into t and leaves from empty.
func (t *tally) add(from *tally) {
	from.mu.Lock()
	defer from.mu.Unlock()
	t.attempts += from.attempts
	t.successes += from.successes
	t.bytes += from.bytes
	for i := range from.failed {
		t.failed[i] += from.failed[i]
	}
	t.latency.Merge(from.latency)
	from.attempts, from.successes, from.bytes, from.failed = 0, 0, 0, [failures]uint64{}
	from.latency.Reset()
}

// recorder gathers the tallies of a run's goroutines.
type recorder struct {
	mu    sync.Mutex
	parts []*tally
	total *tally
	every []Second
	began time.Time
	last  time.Time
}

func newRecorder() *recorder {
	now := time.Now()
	return &recorder{total: newTally(), began: now, last: now}
}

// shards is how many tallies goroutines share at most: a histogram is large, and there may be a million of them.
const shards = 16

// part returns the tally for the goroutine of that number.
func (r *recorder) part(number int) *tally {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.parts) < shards && number >= len(r.parts) {
		r.parts = append(r.parts, newTally())
	}
	return r.parts[number%len(r.parts)]
}

// gather moves the parts' counts to the total and returns what this interval brought. Not for two goroutines at once.
func (r *recorder) gather() Second {
	interval := newTally()
	r.mu.Lock()
	for _, p := range r.parts {
		interval.add(p)
	}
	r.mu.Unlock()
	now := time.Now()
	s := Second{
		At: now.Sub(r.began).Seconds(), Seconds: now.Sub(r.last).Seconds(),
		Attempts: interval.attempts, Successes: interval.successes, Bytes: interval.bytes,
		P99: micros(interval.latency.ValueAtPercentile(99)),
	}
	for _, n := range interval.failed {
		s.Failures += n
	}
	r.last = now
	r.total.add(interval)
	return s
}

// reset forgets what was counted: the warm-up is over.
func (r *recorder) reset() {
	r.gather()
	r.total = newTally()
	r.every = nil
	r.began = r.last
}

// watch gathers once a second until done is closed, and tells progress.
func (r *recorder) watch(done <-chan struct{}, progress func(Second)) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			s := r.gather()
			r.every = append(r.every, s)
			if progress != nil {
				progress(s)
			}
		}
	}
}
