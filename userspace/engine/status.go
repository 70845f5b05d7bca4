// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"slices"
	"time"

	"snilb/maps"
)

// Flow is a connection as `snilb flows` shows it.
type Flow struct {
	Client   string  `json:"client"`         // by its PROXY header, if there is one
	Peer     string  `json:"peer,omitempty"` // who speaks for it
	Listener string  `json:"listener"`
	SNI      string  `json:"sni"`
	Route    string  `json:"route"`
	Pool     string  `json:"pool"`
	Backend  string  `json:"backend"`
	State    string  `json:"state"` // hello, connecting, open or closing
	Age      float64 `json:"age_seconds"`
	Idle     float64 `json:"idle_seconds"`
	BytesIn  uint64  `json:"bytes_in"`  // client to backend, TCP payload
	BytesOut uint64  `json:"bytes_out"` // backend to client
}

// Flows lists all connections: those without a backend yet, and the bound ones
// with what the kernel counted.
func (e *Engine) Flows() ([]Flow, error) {
	now := e.clock.now()
	type numbers struct {
		bytes uint64
		idle  time.Duration
	}
	up, down := make(map[maps.Tuple]numbers), make(map[maps.Tuple]numbers)
	err := e.o.Tables.Flows(func(leg maps.Leg, t maps.Tuple, entry *maps.Entry) {
		n := numbers{entry.Flow.Bytes, idle(now, entry.Flow.LastSeen)}
		if leg == maps.LegClient {
			up[t] = n
		} else {
			down[t] = n
		}
	})
	all := []Flow{}
	for _, w := range e.workers {
		w.mu.Lock()
		for _, h := range w.handshakes {
			if h.phase == refused {
				continue // over; remembered for its repetitions
			}
			all = append(all, h.status(now))
		}
		for _, n := range w.flows.order {
			f := w.flows.at(n)
			in, out := up[f.clientTuple()], down[w.flows.backendTuple(f)]
			s := w.flows.status(f, now)
			s.BytesIn, s.BytesOut = in.bytes, out.bytes
			s.Idle = seconds(min(in.idle, out.idle))
			all = append(all, s)
		}
		w.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b Flow) int { return cmp.Compare(a.Client, b.Client) })
	return all, err
}

func (h *handshake) status(now int64) Flow {
	f := Flow{
		Client:   h.origin.client.String(),
		Listener: h.connection.listener.String(),
		SNI:      h.sni,
		Route:    h.decision.routeName(),
		Pool:     h.decision.poolName(),
		State:    "hello",
		Age:      seconds(time.Duration(now - h.started)),
		Idle:     seconds(time.Duration(now - h.progress)),
	}
	if h.origin.client != h.client {
		f.Peer = h.client.String()
	}
	switch h.phase {
	case paused:
		f.State = "connecting"
	case connecting, pushing:
		f.State, f.Backend = "connecting", h.attempt.backend.Addr.String()
	case refused:
		f.State = "closing"
	}
	return f
}

func (t *table) status(f *flow, now int64) Flow {
	client, v := f.clientTuple(), t.wayOf(f)
	s := Flow{
		Client:   client.Src.String(),
		Listener: client.Dst.String(),
		SNI:      t.nameOf(f),
		Route:    v.route,
		Pool:     v.backend.Pool,
		Backend:  v.backend.Addr.String(),
		State:    "open",
		Age:      seconds(time.Duration(now - f.bound)),
	}
	if origin := t.originOf(f); origin.IsValid() {
		s.Client, s.Peer = origin.String(), s.Client
	}
	if f.closing.ended() {
		s.State = "closing"
	}
	return s
}

func seconds(d time.Duration) float64 { return d.Round(time.Millisecond).Seconds() }

// Status is what the engine has done since it started.
type Status struct {
	Flows      int               `json:"flows"`
	Adopted    int               `json:"adopted"` // of these, at the start, what an earlier daemon had bound
	FlowsLimit int               `json:"flows_limit"`
	HalfOpen   int               `json:"half_open"`
	HelloBytes int64             `json:"hello_bytes"`
	Hellos     map[string]uint64 `json:"hellos"`
	Decisions  []DecisionCount   `json:"decisions"`
	Connects   []ConnectCount    `json:"connects"`
	Closed     map[string]uint64 `json:"closed"`
	Events     map[string]uint64 `json:"events"`
	// HandshakeMicroseconds is the mean from the first hello byte to the bind.
	HandshakeMicroseconds float64 `json:"handshake_microseconds"`
}

// DecisionCount counts decisions alike.
type DecisionCount struct {
	Route  string `json:"route"`
	Pool   string `json:"pool"`
	Result string `json:"result"` // why/action
	Count  uint64 `json:"count"`
}

// ConnectCount counts attempts to reach a backend.
type ConnectCount struct {
	Pool    string `json:"pool"`
	Backend string `json:"backend"`
	Result  string `json:"result"`
	Count   uint64 `json:"count"`
}

// Status sums the workers' counters.
func (e *Engine) Status() Status {
	s := Status{
		Flows:      e.Bound(),
		Adopted:    e.adopted,
		FlowsLimit: e.plan.Load().config.Limits.Flows,
		HelloBytes: e.held.Load(),
		Hellos:     make(map[string]uint64),
		Closed:     make(map[string]uint64),
		Events:     map[string]uint64{"half_flows": e.halves},
	}
	decisions, connects := make(map[decisionKey]uint64), make(map[connectKey]uint64)
	var handshakes, nanoseconds uint64
	for _, w := range e.workers {
		w.mu.Lock()
		s.HalfOpen += w.halfOpen()
		addTo(decisions, w.stats.decisions)
		addTo(connects, w.stats.connects)
		addTo(s.Closed, w.stats.closed)
		w.stats.addNamed(&s)
		handshakes += w.stats.handshakes
		nanoseconds += w.stats.handshakeNanoseconds
		w.mu.Unlock()
	}
	for k, n := range decisions {
		s.Decisions = append(s.Decisions, DecisionCount{k.route, k.pool, k.result, n})
	}
	for k, n := range connects {
		s.Connects = append(s.Connects, ConnectCount{k.pool, k.backend, k.result, n})
	}
	slices.SortFunc(s.Decisions, func(a, b DecisionCount) int {
		return cmp.Or(cmp.Compare(a.Route, b.Route), cmp.Compare(a.Pool, b.Pool), cmp.Compare(a.Result, b.Result))
	})
	slices.SortFunc(s.Connects, func(a, b ConnectCount) int {
		return cmp.Or(cmp.Compare(a.Pool, b.Pool), cmp.Compare(a.Backend, b.Backend), cmp.Compare(a.Result, b.Result))
	})
	if handshakes > 0 {
		s.HandshakeMicroseconds = float64(nanoseconds/handshakes) / 1000
	}
	return s
}

func addTo[K comparable](sum, some map[K]uint64) {
	for k, n := range some {
		sum[k] += n
	}
}

func (s *stats) addNamed(to *Status) {
	for i, n := range s.hellos {
		to.Hellos[helloNames[i]] += n
	}
	for name, n := range map[string]uint64{
		"acks": s.acks, "late": s.late, "icmp": s.icmp, "too_big": s.tooBig, "unknown": s.unknown, "bad": s.badEvents,
		"stale": s.staleEvents, "out_of_window": s.outOfWindow,
		"unroutable": s.unroutable, "write_errors": s.writeErrors,
	} {
		to.Events[name] += n
	}
}
