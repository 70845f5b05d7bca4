// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// maxALPN is what the length byte of a protocol name can say.
const maxALPN = 255

func (r *reader) routes(node ast.Node) {
	var read []*routeReader
	for _, item := range r.items(node) {
		if isAlias(item) {
			continue
		}
		read = append(read, r.route(item))
	}
	// Listeners and pools may stand below the routes.
	r.later = append(r.later, func() {
		names := map[string]*Route{}
		patterns := map[string]Position{}
		for _, rr := range read {
			if rr.valid = rr.resolve() && rr.valid; !rr.valid {
				continue
			}
			r.uniqueRoute(rr, names, patterns)
			rr.route.Index = len(r.config.Routes)
			r.config.Routes = append(r.config.Routes, rr.route)
		}
	})
}

// routeReader is a route on its way from text to data.
type routeReader struct {
	*reader
	route     *Route
	named     bool
	valid     bool
	listeners []scalar
	pool      *scalar
	pools     []share
}

// share is one item of pools, by name.
type share struct {
	pool   scalar
	weight int
}

func (r *reader) route(node ast.Node) *routeReader {
	rr := &routeReader{reader: r, route: &Route{Pos: r.at(node)}}
	before := len(r.problems)
	seen := r.mapping(node, "a route", []field{
		{key: "name", read: func(n ast.Node) { rr.route.Name, rr.named = r.label(n, "route name"), true }},
		{key: "sni", read: rr.sni, null: `write "" for hellos without a name`},
		{key: "alpn", read: rr.alpn},
		{key: "clients", read: rr.clients},
		{key: "listen", read: rr.listen},
		{key: "pool", read: rr.onePool},
		{key: "pools", read: rr.weightedPools},
		{key: "action", read: rr.action},
	})
	if seen != nil {
		if _, ok := seen["sni"]; !ok {
			r.refuse(rr.route.Pos, "the route has no sni", `add one; sni: "" is for hellos without a name, sni: "**" for any name`)
		}
		rr.oneTarget(seen)
	}
	rr.valid = seen != nil && len(r.problems) == before
	if !rr.named && len(rr.route.Patterns) > 0 {
		rr.route.Name = cmp.Or(rr.route.Patterns[0].Text, NoName)
	}
	return rr
}

func (rr *routeReader) oneTarget(seen map[string]Position) {
	var targets []string
	for _, key := range []string{"pool", "pools", "action"} {
		if _, ok := seen[key]; ok {
			targets = append(targets, key)
		}
	}
	switch {
	case len(targets) == 0:
		rr.refuse(rr.route.Pos, "the route leads nowhere", "add pool, pools or action")
	case len(targets) > 1:
		rr.refuse(seen[targets[1]], "the route has "+strings.Join(targets, " and "), "keep one of them")
	}
}

func (rr *routeReader) sni(node ast.Node) {
	items := rr.items(node)
	if seq, ok := node.(*ast.SequenceNode); ok && len(seq.Values) == 0 {
		rr.refuse(rr.at(node), "sni is an empty list", `write "" for hellos without a name, "**" for any name`)
	}
	for _, item := range items {
		if s, ok := rr.scalar(item, "sni"); ok {
			if p, ok := rr.pattern(s); ok {
				rr.route.Patterns = append(rr.route.Patterns, p)
			}
		}
	}
}

// words reads a list of single values, of which none may stand twice.
func (rr *routeReader) words(node ast.Node, what string) []scalar {
	var words []scalar
	items := rr.items(node)
	if len(items) == 0 {
		rr.refuse(rr.at(node), what+" is an empty list, which no hello would match", "remove it, or fill it in")
	}
	seen := make(map[string]bool, len(items))
	for _, item := range items {
		s, ok := rr.scalar(item, what)
		switch {
		case !ok:
		case seen[s.text]:
			rr.refuse(s.pos, fmt.Sprintf("%s %q stands twice in the list", what, s.text), "remove one")
		default:
			seen[s.text] = true
			words = append(words, s)
		}
	}
	return words
}

func (rr *routeReader) alpn(node ast.Node) {
	for _, s := range rr.words(node, "alpn") {
		if s.text == "" || len(s.text) > maxALPN {
			rr.refuse(s.pos, fmt.Sprintf("an alpn name is 1 to %d bytes long", maxALPN), "write one such as h2 or http/1.1")
			continue
		}
		rr.route.ALPN = append(rr.route.ALPN, s.text)
	}
}

func (rr *routeReader) clients(node ast.Node) {
	for _, s := range rr.words(node, "clients") {
		if prefix, ok := rr.network(s, "clients"); ok {
			rr.route.Clients = append(rr.route.Clients, prefix)
		}
	}
}

func (rr *routeReader) listen(node ast.Node) {
	rr.listeners = rr.words(node, "listen")
}

func (rr *routeReader) onePool(node ast.Node) {
	if s, ok := rr.scalar(node, "pool"); ok {
		rr.pool = &s
	}
}

func (rr *routeReader) weightedPools(node ast.Node) {
	if _, plain := scalarText(node); plain {
		rr.refuse(rr.at(node), "pools must be a mapping of pool names to weights", "write pools: {blue: 90, green: 10}, or pool for a single one")
		return
	}
	entries, ok := rr.entries(node, "pools")
	if !ok {
		return
	}
	sum := 0
	for _, e := range entries {
		if isNull(e.value) {
			rr.refuse(e.pos, fmt.Sprintf("pool %q has no weight", e.key), "write pools: {blue: 90, green: 10}")
			sum = max(sum, 1) // One problem for one mistake.
			continue
		}
		weight, ok := rr.count(e.value, "weight of pool "+e.key, 0, MaxShare)
		if !ok {
			sum = max(sum, 1)
		}
		sum += weight
		rr.pools = append(rr.pools, share{pool: scalar{pos: e.pos, text: e.key}, weight: weight})
	}
	if sum == 0 {
		rr.refuse(rr.at(node), "no pool has a weight above zero", "give one a weight, or use action")
	}
}

func (rr *routeReader) action(node ast.Node) {
	switch rr.choice(node, "action", "reset", "alert", "drop") {
	case 0:
		rr.route.Action.Kind = Reset
	case 1:
		rr.route.Action.Kind = Alert
	case 2:
		rr.route.Action.Kind = Drop
	}
}

// resolve turns names into what they name. It reports whether all exist.
func (rr *routeReader) resolve() bool {
	ok := true
	for _, s := range rr.listeners {
		l := rr.reader.listeners[s.text]
		if l == nil {
			rr.unknownListener(s)
			ok = false
			continue
		}
		rr.route.Listeners = append(rr.route.Listeners, l)
	}
	shares := rr.pools
	if rr.pool != nil {
		shares = []share{{pool: *rr.pool, weight: 1}}
	}
	for _, share := range shares {
		pool := rr.usePool(share.pool.pos, share.pool.text)
		if pool == nil {
			ok = false
			continue
		}
		rr.route.Pools = append(rr.route.Pools, WeightedPool{Pool: pool, Weight: share.weight})
	}
	if len(rr.route.Pools) > 0 {
		rr.route.Action.Kind = ToPool
	}
	if len(rr.route.Pools) == 1 {
		rr.route.Action.Pool = rr.route.Pools[0].Pool
	}
	return ok
}

func (rr *routeReader) unknownListener(s scalar) {
	if rr.refusedListeners[s.text] {
		return
	}
	remedy := "give a listener that name"
	names := make([]string, len(rr.config.Listeners))
	for i, l := range rr.config.Listeners {
		names[i] = l.Name
	}
	if near := nearest(s.text, names); near != "" {
		remedy = fmt.Sprintf("did you mean %q?", near)
	}
	rr.refuse(s.pos, fmt.Sprintf("listener %q does not exist", s.text), remedy)
}

// uniqueRoute refuses names that are taken and routes that can never be reached
// because an earlier one is the same.
func (r *reader) uniqueRoute(rr *routeReader, names map[string]*Route, patterns map[string]Position) {
	if rr.named {
		if first := names[rr.route.Name]; first != nil {
			r.refuse(rr.route.Pos, fmt.Sprintf("route name %q is taken by line %d", rr.route.Name, first.Pos.Line), "choose another name")
		}
		names[rr.route.Name] = rr.route
	}
	conditions := conditionKey(rr.route)
	for _, p := range rr.route.Patterns {
		key := p.Text + "\n" + conditions
		if first, taken := patterns[key]; taken {
			r.refuse(p.Pos, fmt.Sprintf("pattern %q stands already on line %d under the same conditions", p.Text, first.Line),
				"remove one, or give them different alpn, clients or listen")
			continue
		}
		patterns[key] = p.Pos
	}
}

// conditionKey is equal for routes whose conditions are the same, in any order.
func conditionKey(route *Route) string {
	var parts []string
	for _, alpn := range route.ALPN {
		parts = append(parts, fmt.Sprintf("alpn %q", alpn))
	}
	for _, prefix := range route.Clients {
		parts = append(parts, "clients "+prefix.String())
	}
	for _, l := range route.Listeners {
		parts = append(parts, "listen "+l.Name)
	}
	slices.Sort(parts)
	return strings.Join(parts, "\n")
}
