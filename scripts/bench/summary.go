// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// metric is one figure of a record. Cost that a contender adds is the difference to the plainly routed path in the same
// round: so slow changes of the machine cancel out.
type metric struct {
	title  string
	format string
	of     func(r, plain *record) (float64, bool)
}

// The figures, by what was measured.
var (
	connectionMetrics = []metric{
		{"CPU added, µs", "%.0f", added(micros((*record).connectionCPU))},
		{"CPU in all, µs", "%.0f", whole(micros((*record).connectionCPU))},
		{"p50, ms", "%.2f", latency(func(r *record) *phase { return r.ConnectionsAt }, 50)},
		{"p99, ms", "%.2f", latency(func(r *record) *phase { return r.ConnectionsAt }, 99)},
		{"at most, a second", "%.0f", whole(func(r *record) float64 { return r.Connections.Rate })},
	}
	bulkMetrics = []metric{
		{"GB a second", "%.2f", whole(func(r *record) float64 { return gigabytes(r.Bulk) / r.Bulk.Seconds })},
		{"CPU added, s/GB", "%.2f", added((*record).bulkCPU)},
		{"CPU in all, s/GB", "%.2f", whole((*record).bulkCPU)},
	}
	requestMetrics = []metric{
		{"CPU added, µs", "%.1f", added(micros((*record).requestCPU))},
		{"CPU in all, µs", "%.1f", whole(micros((*record).requestCPU))},
		{"p50, ms", "%.2f", latency(func(r *record) *phase { return r.RequestsAt }, 50)},
		{"p99, ms", "%.2f", latency(func(r *record) *phase { return r.RequestsAt }, 99)},
		{"at most, a second", "%.0f", whole(func(r *record) float64 { return r.Requests.Rate })},
	}
	memoryMetrics = []metric{
		{"kernel, bytes a connection", "%.0f", added((*record).idleKernel)},
		{"processes, bytes a connection", "%.0f", whole((*record).idleDaemon)},
		{"kernel at start, MB", "%.1f", whole(func(r *record) float64 { return float64(r.Idle.Started.kernel()-r.Idle.Before.kernel()) / 1e6 })},
		{"processes at start, MB", "%.1f", whole(func(r *record) float64 { return float64(r.Idle.Started.Daemon) / 1e6 })},
	}
	// keyMetrics are those of the README.
	keyMetrics = []metric{
		named("CPU added per connection, µs", connectionMetrics[0]), named("per GB, s", bulkMetrics[1]),
		named("per request, µs", requestMetrics[0]), named("connection p99, ms", connectionMetrics[3]),
		named("GB/s", bulkMetrics[0]),
		{"bytes per idle connection", "%.0f", func(r, plain *record) (float64, bool) {
			return r.idleKernel() - plain.idleKernel() + r.idleDaemon(), r.Contender != floor
		}},
	}
	calmMetrics = []metric{
		{"served, %", "%.1f", whole(func(r *record) float64 { return r.Calm.served() })},
		{"p50, ms", "%.2f", latency(func(r *record) *phase { return r.Calm }, 50)},
		{"p99, ms", "%.2f", latency(func(r *record) *phase { return r.Calm }, 99)},
		{"CPUs at work", "%.2f", whole(func(r *record) float64 { return r.Calm.cpus() })},
	}
)

func named(title string, m metric) metric { return metric{title, m.format, m.of} }

func whole(f func(*record) float64) func(r, plain *record) (float64, bool) {
	return func(r, _ *record) (float64, bool) { return f(r), true }
}

func added(f func(*record) float64) func(r, plain *record) (float64, bool) {
	return func(r, plain *record) (float64, bool) { return f(r) - f(plain), r.Contender != floor }
}

func micros(f func(*record) float64) func(*record) float64 {
	return func(r *record) float64 { return f(r) * 1e6 }
}

// latency is that percentile in ms, if anything succeeded.
func latency(of func(*record) *phase, percentile int) func(r, plain *record) (float64, bool) {
	return func(r, _ *record) (float64, bool) {
		l := of(r).Latency
		switch {
		case l == nil:
			return 0, false
		case percentile == 50:
			return l.P50 / 1e3, true
		default:
			return l.P99 / 1e3, true
		}
	}
}

// keyFloodMetrics are the figures of floods in the README: of all kinds of a rate the worst.
func (r *results) keyFloodMetrics() []metric {
	metrics := []metric{named("p99 without a flood, ms", calmMetrics[2])}
	for _, rate := range r.Settings.Flood.Rates {
		of := func(f func(*flooded) float64) func(r, plain *record) (float64, bool) {
			return whole(func(r *record) float64 { return worst(r, rate, f) })
		}
		title := rateTitle(rate)
		metrics = append(metrics,
			metric{title + ": fewest packets a second", "%.0f", of(func(f *flooded) float64 { return -f.Arrived })},
			metric{"served, %", "%.1f", of(func(f *flooded) float64 { return -f.Clients.served() })},
			metric{"p99, ms", "%.2f", of((*flooded).p99)},
			metric{"kernel memory, MB", "%.1f", of(func(f *flooded) float64 { return float64(f.Most) / 1e6 })})
	}
	return metrics
}

// worst is the largest figure of the floods of a rate. One that is negative says that the smallest is the worst.
func worst(r *record, rate float64, of func(*flooded) float64) float64 {
	most := math.Inf(-1)
	for i := range r.Floods {
		if f := &r.Floods[i]; f.Offered == rate {
			most = max(most, of(f))
		}
	}
	return math.Abs(most)
}

// p99 is that of the clients in ms; infinite, which is no figure, where none was served.
func (f *flooded) p99() float64 {
	if f.Clients.Latency == nil {
		return math.Inf(1)
	}
	return f.Clients.Latency.P99 / 1e3
}

// floodMetrics are the figures of one of the floods.
func floodMetrics(i int) []metric {
	of := func(f func(*flooded) float64) func(r, plain *record) (float64, bool) {
		return whole(func(r *record) float64 { return f(&r.Floods[i]) })
	}
	ours := func(f func(*floodState) int) func(r, plain *record) (float64, bool) {
		return func(r, _ *record) (float64, bool) {
			if s := r.Floods[i].Snilb; s != nil {
				return float64(f(s)), true
			}
			return 0, false
		}
	}
	clients := func(r *record) *phase { return r.Floods[i].Clients }
	return []metric{
		{"packets a second", "%.0f", of(func(f *flooded) float64 { return f.Arrived })},
		{"served, %", "%.1f", whole(func(r *record) float64 { return clients(r).served() })},
		{"p50, ms", "%.2f", latency(clients, 50)},
		{"p99, ms", "%.2f", latency(clients, 99)},
		{"CPUs at work", "%.2f", whole(func(r *record) float64 { return clients(r).cpus() })},
		{"kernel memory, MB", "%.1f", of(func(f *flooded) float64 { return float64(f.Most) / 1e6 })},
		{"after it", "%.1f", of(func(f *flooded) float64 { return float64(f.Left) / 1e6 })},
		{"conntrack", "%.0f", of(func(f *flooded) float64 { return float64(f.Conntrack) })},
		{"half open", "%.0f", of(func(f *flooded) float64 { return float64(f.HalfOpen) })},
		{"flows of it", "%.0f", ours(func(s *floodState) int { return s.Flows })},
		{"guessed cookies", "%.0f", ours(func(s *floodState) int { return s.Guessed })},
	}
}

// served is the share of the attempts that succeeded, in percent. Those that the end of the run cut short do not count.
func (p *phase) served() float64 {
	return 100 * float64(p.Successes) / float64(max(p.Successes+p.Failed(), 1))
}

// cpus is how many CPUs of the machine worked.
func (p *phase) cpus() float64 { return p.Busy / p.Seconds }

func gigabytes(p *phase) float64 { return float64(p.Bytes) / 1e9 }

func (r *record) connectionCPU() float64 {
	return r.ConnectionsAt.Busy / float64(r.ConnectionsAt.Successes)
}
func (r *record) requestCPU() float64 { return r.RequestsAt.Busy / float64(r.RequestsAt.Successes) }
func (r *record) bulkCPU() float64    { return r.Bulk.Busy / gigabytes(r.Bulk) }

// idleKernel and idleDaemon are bytes by idle connection.
func (r *record) idleKernel() float64 {
	return float64(r.Idle.Kernel) / float64(r.Idle.Connections)
}

func (r *record) idleDaemon() float64 {
	return float64(r.Idle.Holding.Daemon-r.Idle.Started.Daemon) / float64(r.Idle.Connections)
}

// spread is a figure over the rounds.
type spread struct {
	median, min, max float64
	rounds           int
}

func newSpread(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	sorted := slices.Sorted(slices.Values(values))
	half := len(sorted) / 2
	median := sorted[half]
	if len(sorted)%2 == 0 {
		median = (sorted[half-1] + median) / 2
	}
	return spread{median, sorted[0], sorted[len(sorted)-1], len(sorted)}
}

// text is "median (min to max)"; a dash where there is nothing.
func (s spread) text(format string) string {
	switch s.rounds {
	case 0:
		return "–"
	case 1:
		return number(format, s.median)
	}
	return fmt.Sprintf("%s (%s to %s)", number(format, s.median), number(format, s.min), number(format, s.max))
}

// number formats a figure. What rounds to zero has no sign.
func number(format string, v float64) string {
	text := fmt.Sprintf(format, v)
	if strings.Trim(text, "-0.") == "" {
		return strings.TrimPrefix(text, "-")
	}
	return text
}

// values are a metric's of one contender, one a round that the floor has finished.
func (r *results) values(m metric, contender string) []float64 {
	var out []float64
	for i := range r.Records {
		rec := &r.Records[i]
		plain := r.floorOf(rec.Round)
		if rec.Contender != contender || plain == nil {
			continue
		}
		// Where nothing succeeded, there is nothing to divide by.
		if v, ok := m.of(rec, plain); ok && !math.IsInf(v, 0) && !math.IsNaN(v) {
			out = append(out, v)
		}
	}
	return out
}

// floorOf is the plainly routed record of a round, if there is one.
func (r *results) floorOf(round int) *record {
	for i := range r.Records {
		if r.Records[i].Contender == floor && r.Records[i].Round == round {
			return &r.Records[i]
		}
	}
	return nil
}
