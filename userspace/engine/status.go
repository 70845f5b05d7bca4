// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"iter"
	"net/netip"
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

// Flows yields all connections, in no order: those without a backend yet, and the bound ones with what the kernel counted. There may
// be a million, and the reader may be slow, so they are looked at some at a time, and no lock is held while one is yielded.
func (e *Engine) Flows() iter.Seq[*Flow] {
	return func(yield func(*Flow) bool) {
		for _, w := range e.workers {
			handshakes, now := w.listHandshakes()
			for i := range handshakes {
				if !yield(&handshakes[i]) {
					return
				}
			}
			for from := uint32(1); from != 0; {
				var some []listed
				some, from = w.listChunk(from, now)
				for i := range some {
					f := some[i].status(now)
					if e.count(f, &some[i], now) && !yield(f) {
						return
					}
				}
			}
		}
	}
}

// listHandshakes returns those that are not bound, and when that was.
func (w *worker) listHandshakes() (all []Flow, now int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now = w.e.clock.now()
	for _, h := range w.handshakes {
		if h.phase != refused { // over; remembered for its repetitions
			all = append(all, h.status(now))
		}
	}
	return all, now
}

// listed is a flow as it was under the lock.
type listed struct {
	flow
	way    way
	name   string
	origin netip.AddrPort
}

func (t *table) listed(f *flow) listed { return listed{*f, t.wayOf(f), t.nameOf(f), t.originOf(f)} }

// listChunk returns the flows with numbers from that one on, but for those that were bound later, and the number to go on with, 0 if
// there is none. Flows keep their numbers.
func (w *worker) listChunk(from uint32, bound int64) (some []listed, next uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := from; n < from+chunkFlows; n++ {
		if n > w.flows.used {
			return some, 0
		}
		if f := w.flows.at(n); f.client.bits != 0 && f.bound <= bound {
			some = append(some, w.flows.listed(f))
		}
	}
	return some, from + chunkFlows
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

func (l *listed) status(now int64) *Flow {
	client := l.clientTuple()
	s := &Flow{
		Client:   client.Src.String(),
		Listener: client.Dst.String(),
		SNI:      l.name,
		Route:    l.way.route,
		Pool:     l.way.backend.Pool,
		Backend:  l.way.backend.Addr.String(),
		State:    "open",
		Age:      seconds(time.Duration(now - l.bound)),
	}
	if l.origin.IsValid() {
		s.Client, s.Peer = l.origin.String(), s.Client
	}
	if l.closing.ended() {
		s.State = "closing"
	}
	return s
}

// count adds what the kernel counted. Returns false if the flow has ended meanwhile. The kernel is asked by key: to read the tables
// through holds a CPU, and the packets that are its, for longer.
func (e *Engine) count(s *Flow, l *listed, now int64) bool {
	up, errUp := e.o.Tables.LookupFlow(maps.LegClient, l.clientTuple())
	down, errDown := e.o.Tables.LookupFlow(maps.LegBackend, l.tupleOf(l.way.backend))
	if errUp != nil || errDown != nil || up.Flow.Generation != l.generation { // the kernel knows no other error of a lookup
		return false
	}
	s.BytesIn, s.BytesOut = up.Flow.Bytes, down.Flow.Bytes
	s.Idle = seconds(min(idle(now, up.Flow.LastSeen), idle(now, down.Flow.LastSeen)))
	return true
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
