// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"snilb/userspace/bench"
)

// settings are the sizes of a run.
type settings struct {
	Rounds      int `json:"rounds"`
	Concurrency int `json:"concurrency"`
	// ConnectionRate and RequestRate are the fixed rates at which CPU is compared. 0: half of what the slowest can do.
	ConnectionRate float64       `json:"connections_per_second"`
	RequestRate    float64       `json:"requests_per_second"`
	Warmup         time.Duration `json:"warmup_ns"`
	Duration       time.Duration `json:"duration_ns"`
	// Patience is what a client waits for a connection or an answer.
	Patience     time.Duration `json:"patience_ns"`
	BulkBytes    int64         `json:"bulk_bytes"`
	RequestBytes int64         `json:"request_bytes"`
	IdleConns    int           `json:"idle_connections"`
	IdleSettle   time.Duration `json:"idle_settle_ns"`
	Generator    string        `json:"generator"`
	Flood        floodSettings `json:"flood"`

	files int // that a process may open
}

// The kinds of clients for new connections.
const sockets, packets = "sockets", "packets"

// full is what `make bench` measures, short what the test takes.
var (
	full = settings{
		Rounds: 5, Concurrency: 256, Warmup: 500 * time.Millisecond, Duration: 2500 * time.Millisecond,
		Patience: 3 * time.Second, BulkBytes: 2 << 30, RequestBytes: 1000, IdleConns: 10000, IdleSettle: time.Second, Generator: sockets,
		Flood: floodSettings{
			Kinds: bench.FloodKinds, Rates: []float64{100_000, 0}, Clients: 500, Patience: time.Second,
			Lead: 1500 * time.Millisecond, Rest: time.Second,
		},
	}
	short = settings{
		Rounds: 1, Concurrency: 128, ConnectionRate: 200, RequestRate: 500, Warmup: 100 * time.Millisecond, Duration: 500 * time.Millisecond,
		Patience:  10 * time.Second, // nobody need hurry
		BulkBytes: 64 << 20, RequestBytes: 1000, IdleConns: 300, IdleSettle: 200 * time.Millisecond, Generator: sockets,
		Flood: floodSettings{
			Kinds: bench.FloodKinds, Rates: []float64{40_000}, Clients: 50, Patience: 10 * time.Second,
			Lead: 200 * time.Millisecond, Rest: 200 * time.Millisecond,
		},
	}
)

// Rates that a fast machine need not go above: what they compare does not change.
const (
	maxConnectionRate = 2000
	maxRequestRate    = 20000
)

// record is what one contender did in one round.
type record struct {
	Round     int    `json:"round"`
	Contender string `json:"contender"`

	Idle          idle   `json:"idle,omitzero"`
	Bulk          *phase `json:"bulk,omitempty"`
	Requests      *phase `json:"requests,omitempty"`       // as fast as it goes
	RequestsAt    *phase `json:"requests_at,omitempty"`    // at the fixed rate
	Connections   *phase `json:"connections,omitempty"`    // as fast as it goes
	ConnectionsAt *phase `json:"connections_at,omitempty"` // at the fixed rate

	// Of a run with -flood, which has nothing of the above.
	Calm   *phase    `json:"calm,omitempty"` // few clients, no flood
	Floods []flooded `json:"floods,omitempty"`
}

// idle is memory before the contender was started, when it was, and with idle connections.
type idle struct {
	Connections int              `json:"connections"`
	Before      memory           `json:"before"`
	Started     memory           `json:"started"`
	Holding     memory           `json:"holding"`
	Kernel      int64            `json:"kernel"` // bytes that the connections took
	Grown       map[string]int64 `json:"grown"`  // the slab caches that grew most
}

// all measures a contender in a fresh site. Memory comes first, while no slab is half empty from what was before.
func (s *site) all(ctx context.Context) (r record, err error) {
	r.Contender = s.c.Name
	set := s.set
	steps := []struct {
		what string
		do   func() error
	}{
		{"idle connections", func() error { r.Idle, err = s.idle(ctx); return err }},
		{"bulk", func() error { r.Bulk, err = s.bulk(ctx); return err }},
		{"requests", func() error { r.Requests, err = s.requests(ctx, 0); return err }},
		{"requests at a fixed rate", func() error { r.RequestsAt, err = s.requests(ctx, set.RequestRate); return err }},
		{"the server of connections", s.serveConnections},
		{"connections", func() error { r.Connections, err = s.connections(ctx, 0, set.Duration, set.Patience); return err }},
		{"connections at a fixed rate", func() error {
			r.ConnectionsAt, err = s.connections(ctx, set.ConnectionRate, set.Duration, set.Patience)
			return err
		}},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return r, fmt.Errorf("%s: %s: %w", s.c.Name, step.what, err)
		}
	}
	return r, nil
}

// times are the arguments of a run that takes so long.
func (s *site) times(d, timeout time.Duration) []string {
	return []string{"--warmup", s.set.Warmup.String(), "--duration", d.String(), "--timeout", timeout.String()}
}

// client are the arguments that say who connects and with what hello.
func (s *site) client() []string {
	var from []string
	for _, a := range s.bed.Clients4 {
		from = append(from, a.String())
	}
	return append(hello(), "--from", strings.Join(from, ","))
}

func hello() []string { return []string{"--sni", "a.example.com", "--layout", "go-classic"} }

// connections opens connections, at a rate or, for 0, one after the other. As packets they cost a fraction of what they
// measure, but there are no requests, downloads and idle connections of that kind.
func (s *site) connections(ctx context.Context, rate float64, d, timeout time.Duration) (*phase, error) {
	args := s.client()
	if s.set.Generator == packets {
		args = append(hello(), "--packets", "--interface", "eth0", "--sources", packetSources.String())
	}
	args = append(args, s.times(d, timeout)...)
	return s.load(ctx, "connections", append(args, "--rate", fmt.Sprint(rate), "--concurrency", fmt.Sprint(s.set.Concurrency),
		"--reply", "1")...)
}

// serveConnections has packets answered by packets.
func (s *site) serveConnections() error {
	if s.set.Generator == packets {
		return s.serve("--packets", "--interface", "eth0")
	}
	return nil
}

// requests asks for answers on connections that stay open.
func (s *site) requests(ctx context.Context, rate float64) (*phase, error) {
	args := append(s.client(), s.times(s.set.Duration, s.set.Patience)...)
	return s.load(ctx, "requests", append(args, "--rate", fmt.Sprint(rate), "--concurrency", fmt.Sprint(s.set.Concurrency),
		"--size", fmt.Sprint(s.set.RequestBytes))...)
}

func (s *site) bulk(ctx context.Context) (*phase, error) {
	args := append(s.client(), "--concurrency", "1", "--size", fmt.Sprint(s.set.BulkBytes), "--duration", "2m")
	p, err := s.load(ctx, "bulk", args...)
	if err == nil && p.Bytes != uint64(s.set.BulkBytes) {
		err = fmt.Errorf("%d bytes of %d came", p.Bytes, s.set.BulkBytes)
	}
	return p, err
}

// idle opens connections and reads the memory while they stand.
func (s *site) idle(ctx context.Context) (i idle, err error) {
	i.Connections, i.Before = s.set.IdleConns, s.before
	if i.Started, err = s.memory(); err != nil {
		return i, err
	}
	count, hold := fmt.Sprint(s.set.IdleConns), s.set.IdleSettle+time.Second
	cmd := s.tool(ctx, "idle", append(s.client(), "--concurrency", count, "--hold", hold.String())...)
	var out bytes.Buffer
	cmd.Stdout = &out
	p, err := startProcess("snilb bench idle", cmd)
	if err != nil {
		return i, err
	}
	// The number is looked at below: the tool holds as many as it could open.
	if _, err := p.waitLine("holding ", time.Minute); err != nil {
		return i, errors.Join(err, p.kill())
	}
	time.Sleep(s.set.IdleSettle)
	i.Holding, err = s.memory()
	i.Kernel = i.Holding.taken(i.Started)
	i.Grown = grown(i.Started.Caches, i.Holding.Caches, 12)
	i.Before.Caches, i.Started.Caches, i.Holding.Caches = nil, nil, nil // hundreds of lines
	if err != nil {
		return i, errors.Join(err, p.kill())
	}
	<-p.exited
	result, err := readPhase("idle", out.Bytes(), p.said.String(), p.err)
	if err == nil && result.Successes != uint64(s.set.IdleConns) {
		err = fmt.Errorf("%d connections of %d stand: %v", result.Successes, s.set.IdleConns, result.Failures)
	}
	return i, err
}

// whole says what failed in a round, other than in a flood, where failing is a result. Attempts that the end of a run cut
// short are no failures.
func (r *record) whole() error {
	var errs []error
	for _, p := range []struct {
		what string
		*phase
	}{
		{"requests", r.Requests}, {"requests at a fixed rate", r.RequestsAt}, {"connections", r.Connections},
		{"connections at a fixed rate", r.ConnectionsAt}, {"connections without a flood", r.Calm},
	} {
		if p.phase == nil {
			continue
		}
		if err := complete(p.Result); err != nil {
			errs = append(errs, fmt.Errorf("%s: %s: %w", r.Contender, p.what, err))
		}
	}
	return errors.Join(errs...)
}

// keptUp says whether the fixed rates were reached: otherwise the CPU of less work is compared with that of more.
func (r *record) keptUp() error {
	var errs []error
	for what, p := range map[string]*phase{"requests": r.RequestsAt, "connections": r.ConnectionsAt} {
		if p != nil && p.Rate < 0.97*p.Offered {
			errs = append(errs, fmt.Errorf("%s: %.0f %s a second of %.0f", r.Contender, p.Rate, what, p.Offered))
		}
	}
	return errors.Join(errs...)
}

func complete(r *bench.Result) error {
	switch {
	case r.Failed() > 0:
		return fmt.Errorf("%d of %d failed: %v", r.Failed(), r.Attempts, r.Failures)
	case r.Successes == 0:
		return errors.New("none succeeded")
	}
	return nil
}
