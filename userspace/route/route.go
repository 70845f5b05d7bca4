// SPDX-License-Identifier: Apache-2.0

// Package route says which route a hello takes.
//
// A Table is built once from a config.Config and never changes, so any number
// of goroutines may match without a lock. Matching by exact name or wildcard
// allocates nothing.
//
// The order of precedence is: exact, the longest "*.", the longest "**.",
// regular expressions in file order, "**", and then the listener's no_match. A
// hello without a name is matched by sni: "" alone. A route whose alpn, clients
// or listen does not hold is no match and the search goes on; among equals the
// file's order decides.
package route

import (
	"net/netip"
	"slices"
	"strings"

	"snilb/userspace/config"
)

// Query is what is known of a connection once its hello was read.
type Query struct {
	ServerName string     // Canonical; "" when the hello carries no name.
	ALPN       []string   // What the client offers.
	Client     netip.Addr // IPv4 in IPv6 counts as IPv4.
	Listener   int        // config.Listener.Index.

	// Hash picks the pool of a route that spreads over several. The same hash
	// picks the same pool.
	Hash uint64
}

// Decision is where a hello goes.
type Decision struct {
	Route   *config.Route   // nil means that no route matched.
	Pattern *config.Pattern // Of Route. nil means the same.
	Pool    *config.Pool    // Set when Action.Kind is config.ToPool.
	Action  config.Action   // Its Pool is the same as Pool.
	Reason  Reason
}

// Reason says by which rule a decision was made.
type Reason uint8

// The reasons are the pattern kinds in their order of precedence, and NoMatch.
const (
	Exact Reason = iota
	OneLabel
	AnyLabels
	Regex
	AnyName
	Nameless
	NoMatch
)

var reasonWords = [...]string{
	Exact: "exact", OneLabel: "one_label", AnyLabels: "any_labels", Regex: "regex",
	AnyName: "any_name", Nameless: "no_name", NoMatch: "no_match",
}

// String returns a word for people, logs and JSON.
func (r Reason) String() string {
	if int(r) < len(reasonWords) {
		return reasonWords[r]
	}
	return "unknown"
}

var reasonOf = [...]Reason{
	config.Exact: Exact, config.OneLabel: OneLabel, config.AnyLabels: AnyLabels,
	config.Regex: Regex, config.AnyName: AnyName, config.Nameless: Nameless,
}

// candidate is one pattern of one route.
type candidate struct {
	route   *config.Route
	pattern *config.Pattern
}

// Table matches hellos. It is immutable.
type Table struct {
	listeners []*config.Listener
	noMatch   config.Action

	// Every list is in file order. The wildcards are keyed by what follows
	// their first dot.
	exact     map[string][]candidate
	oneLabel  map[string][]candidate
	anyLabels map[string][]candidate
	regex     []candidate
	anyName   []candidate
	nameless  []candidate

	// longest is the number of bytes of the longest key of anyLabels: a longer
	// suffix needs no lookup.
	longest int
}

// New builds a table.
func New(c *config.Config) *Table {
	t := &Table{
		listeners: c.Listeners,
		noMatch:   c.NoMatch,
		exact:     map[string][]candidate{},
		oneLabel:  map[string][]candidate{},
		anyLabels: map[string][]candidate{},
	}
	for _, route := range c.Routes {
		for i := range route.Patterns {
			t.add(candidate{route: route, pattern: &route.Patterns[i]})
		}
	}
	return t
}

func (t *Table) add(c candidate) {
	name := c.pattern.Name
	switch c.pattern.Kind {
	case config.Exact:
		t.exact[name] = append(t.exact[name], c)
	case config.OneLabel:
		t.oneLabel[name] = append(t.oneLabel[name], c)
	case config.AnyLabels:
		t.anyLabels[name] = append(t.anyLabels[name], c)
		t.longest = max(t.longest, len(name))
	case config.Regex:
		t.regex = append(t.regex, c)
	case config.AnyName:
		t.anyName = append(t.anyName, c)
	case config.Nameless:
		t.nameless = append(t.nameless, c)
	}
}

// Match decides where a hello goes.
func (t *Table) Match(q Query) Decision {
	q.Client = q.Client.Unmap()
	s := search{table: t, name: q.ServerName}
	for c, ok := s.next(); ok; c, ok = s.next() {
		if holds(c.route, &q) == "" {
			return decide(c, &q)
		}
	}
	return t.noDecision(&q)
}

func decide(c candidate, q *Query) Decision {
	d := Decision{Route: c.route, Pattern: c.pattern, Action: c.route.Action, Reason: reasonOf[c.pattern.Kind]}
	if d.Action.Kind == config.ToPool {
		d.Pool = pick(c.route.Pools, q.Hash)
		d.Action.Pool = d.Pool
	}
	return d
}

func (t *Table) noDecision(q *Query) Decision {
	action := t.noMatch
	if q.Listener >= 0 && q.Listener < len(t.listeners) {
		action = t.listeners[q.Listener].NoMatch
	}
	return Decision{Action: action, Pool: action.Pool, Reason: NoMatch}
}

// pick chooses by weight.
func pick(pools []config.WeightedPool, hash uint64) *config.Pool {
	if len(pools) == 1 {
		return pools[0].Pool
	}
	sum := uint64(0)
	for _, p := range pools {
		sum += uint64(p.Weight)
	}
	// The hash may have its randomness in any of its bits, and a pool's balancer
	// may take the same hash modulo something else: mix it first.
	point := mix(hash) % sum
	for _, p := range pools {
		if point < uint64(p.Weight) {
			return p.Pool
		}
		point -= uint64(p.Weight)
	}
	return nil // Not reached: point is less than the sum.
}

// mix spreads every bit of x over the whole result (the finisher of splitmix64).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// holds returns which condition of a route does not hold, or "".
func holds(route *config.Route, q *Query) string {
	switch {
	case len(route.Listeners) > 0 && !slices.ContainsFunc(route.Listeners, func(l *config.Listener) bool { return l.Index == q.Listener }):
		return "listen"
	case len(route.Clients) > 0 && !slices.ContainsFunc(route.Clients, func(p netip.Prefix) bool { return p.Contains(q.Client) }):
		return "clients"
	case len(route.ALPN) > 0 && !slices.ContainsFunc(route.ALPN, func(want string) bool { return slices.Contains(q.ALPN, want) }):
		return "alpn"
	}
	return ""
}

// cutLabel returns what follows the first dot, "" when there is none.
func cutLabel(name string) string {
	_, rest, _ := strings.Cut(name, ".")
	return rest
}
