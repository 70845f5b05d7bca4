// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"net/netip"
	"time"
)

// Result is what a run measured. Its JSON is the output of `snilb bench -o json`.
type Result struct {
	Kind      string            `json:"kind"`      // connections | requests | bulk | idle | flood
	Generator string            `json:"generator"` // sockets | packets
	Target    netip.AddrPort    `json:"target"`
	Started   time.Time         `json:"started"`
	Seconds   float64           `json:"seconds"` // measured, without the warm-up
	Offered   float64           `json:"offered_per_second,omitempty"`
	Attempts  uint64            `json:"attempts"`
	Successes uint64            `json:"successes"`
	Failures  map[string]uint64 `json:"failures"`          // by kind, only those above 0
	Rate      float64           `json:"per_second"`        // successes
	Bytes     uint64            `json:"bytes"`             // payload received
	Latency   *Latency          `json:"latency,omitempty"` // of successes, from when they were due
	Curve     []Point           `json:"curve,omitempty"`   // the latency histogram, by percentile
	Every     []Second          `json:"every_second,omitempty"`
}

// Latency holds percentiles in microseconds.
type Latency struct {
	Min  float64 `json:"min_us"`
	Mean float64 `json:"mean_us"`
	P50  float64 `json:"p50_us"`
	P90  float64 `json:"p90_us"`
	P99  float64 `json:"p99_us"`
	P999 float64 `json:"p99_9_us"`
	P9   float64 `json:"p99_99_us"`
	Max  float64 `json:"max_us"`
}

// Point is one point of the latency curve: that share of the successes took at most so long.
type Point struct {
	Percentile float64 `json:"percentile"`
	Micros     float64 `json:"us"`
}

// Second is what one second, or what was left of the last, brought.
type Second struct {
	At        float64 `json:"at"`      // seconds since the measurement began, at its end
	Seconds   float64 `json:"seconds"` // its length
	Attempts  uint64  `json:"attempts"`
	Successes uint64  `json:"successes"`
	Failures  uint64  `json:"failures"`
	Bytes     uint64  `json:"bytes"`
	P99       float64 `json:"p99_us"`
}

// Failed is the number of attempts that failed.
func (r *Result) Failed() (n uint64) {
	for _, f := range r.Failures {
		n += f
	}
	return n
}

// result closes the recorder's books. Attempts that neither succeeded nor failed yet, because the run ended, are in
// Attempts only.
func (r *recorder) result(kind, generator string, target netip.AddrPort) *Result {
	r.every = append(r.every, r.gather())
	t := r.total
	seconds := r.last.Sub(r.began).Seconds()
	res := &Result{
		Kind: kind, Generator: generator, Target: target, Started: r.began, Seconds: seconds,
		Attempts: t.attempts, Successes: t.successes, Failures: map[string]uint64{},
		Rate: float64(t.successes) / seconds, Bytes: t.bytes, Every: r.every,
	}
	for i, n := range t.failed {
		if n > 0 {
			res.Failures[Failure(i).String()] = n
		}
	}
	if h := t.latency; h.TotalCount() > 0 {
		at := func(q float64) float64 { return micros(h.ValueAtPercentile(q)) }
		res.Latency = &Latency{
			Min: micros(h.Min()), Mean: h.Mean() / 1e3, Max: micros(h.Max()),
			P50: at(50), P90: at(90), P99: at(99), P999: at(99.9), P9: at(99.99),
		}
		for _, b := range h.CumulativeDistributionWithTicks(5) {
			res.Curve = append(res.Curve, Point{Percentile: b.Quantile, Micros: micros(b.ValueAt)})
		}
	}
	return res
}

func micros(ns int64) float64 { return float64(ns) / 1e3 }
