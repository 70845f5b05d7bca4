// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"slices"
	"strings"
)

// warnings looks for what is valid but rarely meant.
func warnings(c *Config) Problems {
	var found Problems
	warn := func(pos Position, what, remedy string) {
		found = append(found, Problem{Position: pos, What: what, Remedy: remedy})
	}
	warnUnused(c, warn)
	warnTimeouts(c, warn)
	warnUnreachable(c, warn)
	warnCoalescing(c, warn)
	return found
}

type warner func(pos Position, what, remedy string)

func warnUnused(c *Config, warn warner) {
	used := map[*Pool]bool{c.NoMatch.Pool: true, c.NotTLS.Pool: true, c.NoBackend.Pool: true}
	for _, l := range c.Listeners {
		used[l.NoMatch.Pool] = true
	}
	for _, pool := range c.Pools {
		used[pool.NoBackend.Pool] = true
	}
	for _, route := range c.Routes {
		for _, share := range route.Pools {
			used[share.Pool] = true
		}
	}
	for _, pool := range c.Pools {
		if !used[pool] {
			warn(pool.Pos, fmt.Sprintf("pool %s is not used", pool.Name), "name it in a route, or remove it")
		}
	}
	delete(used, nil)
	if len(used) == 0 {
		warn(Position{File: c.File}, "nothing leads to a backend: every hello is refused", "add a pool and a route")
	}
}

func warnTimeouts(c *Config, warn warner) {
	for _, pool := range c.Pools {
		if t := pool.Timeouts; t.Attempt > t.Connect {
			warn(pool.Pos, fmt.Sprintf("pool %s waits %s for one backend and %s for all: a second is never tried", pool.Name, t.Attempt, t.Connect),
				"make timeout attempt shorter than connect")
		}
	}
}

// warnUnreachable finds routes that stand behind one with the same pattern and
// no conditions.
func warnUnreachable(c *Config, warn warner) {
	taken := map[string]Position{}
	for _, route := range c.Routes {
		for _, p := range route.Patterns {
			if first, ok := taken[p.Text]; ok {
				warn(p.Pos, fmt.Sprintf("pattern %q is never reached: line %d takes it without conditions", p.Text, first.Line),
					"move this route above that one")
			} else if len(route.ALPN)+len(route.Clients)+len(route.Listeners) == 0 {
				taken[p.Text] = p.Pos
			}
		}
	}
}

// warnCoalescing finds names that a browser may send down a connection which
// was routed for another name. It does so when one certificate covers both,
// which is what a wildcard pattern suggests, and HTTP/2 was negotiated. One
// warning a wildcard is enough.
func warnCoalescing(c *Config, warn warner) {
	wildcards := map[string]*Route{}
	for _, route := range c.Routes {
		for _, p := range route.Patterns {
			if _, taken := wildcards[p.Text]; !taken && (p.Kind == OneLabel || p.Kind == AnyLabels) && mayCoalesce(route) {
				wildcards[p.Text] = route
			}
		}
	}
	warned := map[string]bool{}
	for _, route := range c.Routes {
		if !mayCoalesce(route) {
			continue
		}
		for _, p := range route.Patterns {
			for _, wildcard := range covering(p) {
				wide := wildcards[wildcard]
				if wide == nil || warned[wildcard] || samePools(wide, route) {
					continue
				}
				warned[wildcard] = true
				warn(wide.Pos, fmt.Sprintf("%q spans pools: %q on line %d goes to another one, and a browser may reuse one HTTP/2 connection for both names",
					wildcard, p.Text, p.Pos.Line), "let the backends answer 421 to names that are not theirs")
			}
		}
	}
}

func mayCoalesce(route *Route) bool {
	return route.Action.Kind == ToPool && (len(route.ALPN) == 0 || slices.Contains(route.ALPN, "h2"))
}

// covering lists the wildcards that match every name that p matches.
func covering(p Pattern) []string {
	if p.Kind != Exact && p.Kind != OneLabel && p.Kind != AnyLabels {
		return nil
	}
	var wide []string
	name := p.Name
	if p.Kind == OneLabel {
		wide = append(wide, "**."+name)
	}
	for first := true; ; first = false {
		_, suffix, more := strings.Cut(name, ".")
		if !more {
			return wide
		}
		if first && p.Kind == Exact {
			wide = append(wide, "*."+suffix)
		}
		wide = append(wide, "**."+suffix)
		name = suffix
	}
}

func samePools(a, b *Route) bool {
	for _, x := range a.Pools {
		if !slices.ContainsFunc(b.Pools, func(y WeightedPool) bool { return x.Pool == y.Pool }) {
			return false
		}
	}
	return len(a.Pools) == len(b.Pools)
}
