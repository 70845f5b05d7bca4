// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

func (r *reader) readPools(node ast.Node) {
	entries, ok := r.entries(node, "pools")
	if !ok {
		return
	}
	total := 0
	for _, e := range entries {
		before := len(r.problems)
		named := r.checkLabel(e.pos, e.key, "pool name")
		pool := r.pool(e)
		if total += len(pool.Backends); total > MaxBackends && total-len(pool.Backends) <= MaxBackends {
			r.refuse(e.pos, fmt.Sprintf("there are more than %d backends", MaxBackends), "split the sites over several instances")
		}
		if !named || len(r.problems) > before {
			r.refusedPools[e.key] = true
			continue
		}
		pool.Index = len(r.config.Pools)
		r.config.Pools = append(r.config.Pools, pool)
		r.pools[e.key] = pool
	}
}

func (r *reader) pool(e entry) *Pool {
	p := &Pool{Pos: e.pos, Name: e.key}
	what := "pool " + e.key
	if isNull(e.value) {
		r.refuse(e.pos, what+" is empty", "give it backends: [IP:port]")
		return p
	}
	var timeouts ast.Node
	seen := r.mapping(e.value, what, []field{
		{key: "balance", read: func(n ast.Node) { r.balance(n, p) }},
		{key: "hash", read: func(n ast.Node) {
			if i := r.choice(n, "hash", hashWords[:]...); i >= 0 {
				p.Hash = HashKey(i)
			}
		}},
		{key: "source", read: func(n ast.Node) { r.source(n, p) }},
		{key: "proxy_protocol", read: func(n ast.Node) {
			if i := r.choice(n, "proxy_protocol", proxyWords[:]...); i >= 0 {
				p.ProxyProtocol = ProxyProtocol(i)
			}
		}},
		{key: "on_down", read: func(n ast.Node) {
			if r.choice(n, "on_down", "keep", "reset") == 1 {
				r.built(FeatureOnDownReset, r.at(n), "on_down: reset")
			}
		}},
		{key: "slow_start", read: func(n ast.Node) { r.onlyWord(n, "slow_start", "none", FeatureSlowStart) }},
		{key: "health", read: r.health},
		{key: "no_backend", read: r.actionInto(&p.NoBackend, "no_backend")},
		{key: "timeouts", read: func(n ast.Node) { timeouts = n }},
		{key: "backends", read: func(n ast.Node) { r.backends(n, p) }, null: "list at least one IP:port"},
	})
	if seen == nil {
		return p
	}
	if pos, ok := seen["hash"]; ok && p.Balance != Maglev {
		r.refuse(pos, "hash is for balance: maglev only", "add balance: maglev, or remove hash")
	}
	if _, ok := seen["backends"]; !ok {
		r.refuse(e.pos, what+" has no backends", "list at least one IP:port")
	}
	_, own := seen["no_backend"]
	r.handDown(p, own, timeouts)
	return p
}

// handDown gives the pool what it did not set itself, once the whole file was
// read.
func (r *reader) handDown(p *Pool, ownNoBackend bool, timeouts ast.Node) {
	r.later = append(r.later, func() {
		p.Timeouts = r.config.Timeouts
		if timeouts != nil {
			r.timeouts(timeouts, &p.Timeouts, false)
		}
		// The pool that everyone falls back to has nowhere left to go.
		if !ownNoBackend && r.config.NoBackend.Pool != p {
			p.NoBackend = r.config.NoBackend
		}
	})
}

func (r *reader) balance(node ast.Node, p *Pool) {
	words := append(balanceWords[:], "least_connections", "random_two")
	features := [...]Feature{FeatureLeastConns, FeatureRandomTwo}
	switch i := r.choice(node, "balance", words...); {
	case i >= len(balanceWords):
		r.built(features[i-len(balanceWords)], r.at(node), "balance: "+words[i])
	case i >= 0:
		p.Balance = Balance(i)
	}
}

// health knows all keys, so that a typing error is told from what is to come.
func (r *reader) health(node ast.Node) {
	settings := []string{"sni", "interval", "timeout", "rise", "fall", "port", "alpn", "verify", "ca_file", "host", "path", "status"}
	checks := false
	fields := []field{{key: "type", read: func(n ast.Node) {
		if i := r.choice(n, "health type", "none", "tcp", "tls", "http"); i > 0 {
			checks = true
			r.built(FeatureHealth, r.at(n), "a health check")
		}
	}}}
	for _, key := range settings {
		fields = append(fields, field{key: key, read: func(ast.Node) {}})
	}
	seen := r.mapping(node, "health", fields)
	if seen == nil {
		return
	}
	if pos, ok := seen["type"]; ok {
		for _, key := range settings {
			if at, set := seen[key]; set && !checks && pos.Line > 0 {
				r.refuse(at, fmt.Sprintf("health %s means nothing with type none", key), "remove it")
			}
		}
		return
	}
	r.built(FeatureHealth, r.at(node), "a health check")
}

func (r *reader) backends(node ast.Node, p *Pool) {
	items := r.items(node)
	if len(items) == 0 {
		r.refuse(r.at(node), fmt.Sprintf("pool %s has no backends", p.Name), "list at least one IP:port")
	}
	byAddr, byName := map[netip.AddrPort]*Backend{}, map[string]*Backend{}
	for _, item := range items {
		b, ok := r.backend(item)
		if !ok {
			continue
		}
		if first := byAddr[b.Addr]; first != nil {
			r.refuse(b.Pos, fmt.Sprintf("backend %s is in the pool already, on line %d", b.Addr, first.Pos.Line), "remove one, or give the first a weight")
			continue
		}
		if first := byName[b.Name]; first != nil {
			r.refuse(b.Pos, fmt.Sprintf("backend name %q is taken by line %d", b.Name, first.Pos.Line), "choose another name")
			continue
		}
		byAddr[b.Addr], byName[b.Name] = b, b
		b.Pool, b.Index = p, len(p.Backends)
		p.Backends = append(p.Backends, b)
	}
}

func (r *reader) backend(node ast.Node) (*Backend, bool) {
	b := &Backend{Pos: r.at(node), Weight: 1}
	before := len(r.problems)
	address := func(n ast.Node) {
		if s, ok := r.scalar(n, "a backend address"); ok {
			b.Addr = r.backendAddress(s)
		}
	}
	if _, plain := scalarText(node); plain {
		address(node)
	} else if !isAlias(node) {
		seen := r.mapping(node, "a backend", []field{
			{key: "address", read: address},
			{key: "name", read: func(n ast.Node) { b.Name = r.label(n, "backend name") }},
			{key: "weight", read: func(n ast.Node) { r.weight(n, b) }},
			{key: "max_connections", read: func(n ast.Node) { r.onlyWord(n, "max_connections", "none", FeatureMaxConnections) }},
			{key: "backup", read: func(n ast.Node) {
				if r.choice(n, "backup", "false", "true") == 1 {
					r.built(FeatureBackup, r.at(n), "backup: true")
				}
			}},
		})
		if seen != nil {
			if _, ok := seen["address"]; !ok {
				r.refuse(b.Pos, "the backend has no address", "add address: IP:port")
			}
		}
	}
	if b.Name == "" {
		b.Name = b.Addr.String()
	}
	return b, len(r.problems) == before && b.Addr.IsValid()
}

func (r *reader) weight(node ast.Node, b *Backend) {
	if text, _ := scalarText(node); text == "0" {
		r.refuse(r.at(node), "weight 0 takes no traffic", "remove the backend; to empty it while running, drain it")
		return
	}
	if v, ok := r.count(node, "weight", 1, MaxWeight); ok {
		b.Weight = v
	}
}

// backendAddress reads IP:port. Its result is invalid when it was refused.
func (r *reader) backendAddress(s scalar) netip.AddrPort {
	if strings.HasPrefix(s.text, "srv:") {
		r.built(FeatureHostNames, s.pos, fmt.Sprintf("backend %q, a DNS service,", s.text))
		return netip.AddrPort{}
	}
	host, port, ok := r.hostPort(s, "backend", "192.0.2.1:443")
	if !ok {
		return netip.AddrPort{}
	}
	addr, err := netip.ParseAddr(host)
	switch {
	case host == "":
		r.refuse(s.pos, fmt.Sprintf("backend %q has no address", s.text), "write it as 192.0.2.1:443")
	case err != nil && strings.Trim(host, "0123456789.") == "":
		r.refuse(s.pos, fmt.Sprintf("backend %q is not an IP address", s.text), "write it as 192.0.2.1:443")
	case err != nil:
		r.built(FeatureHostNames, s.pos, fmt.Sprintf("backend %q, a host name,", s.text))
	case !r.plainAddr(s, addr):
	case addr.IsUnspecified() || addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		r.refuse(s.pos, fmt.Sprintf("backend %q is not one machine's address", s.text), "use the server's own address")
	case addr == netip.IPv6Loopback():
		r.refuse(s.pos, "backend [::1] cannot be reached: the kernel takes ::1 from its own loopback device only", "use another IPv6 address of this node")
	case addr.IsLinkLocalUnicast() && addr.Is6():
		r.refuse(s.pos, fmt.Sprintf("backend %q is link-local, which needs an interface", s.text), "use a routable address")
	default:
		return netip.AddrPortFrom(addr, port)
	}
	return netip.AddrPort{}
}

// usePool returns the pool of that name, or nil after refusing the use.
func (r *reader) usePool(pos Position, name string) *Pool {
	pool := r.pools[name]
	if pool == nil {
		if r.refusedPools[name] {
			return nil
		}
		remedy := "add it under pools"
		if near := nearest(name, r.poolNames()); near != "" {
			remedy = fmt.Sprintf("did you mean %q?", near)
		}
		r.refuse(pos, fmt.Sprintf("pool %q does not exist", name), remedy)
		return nil
	}
	return pool
}

// poolNames returns the names to suggest from. After so many problems nobody
// reads suggestions, and comparing every name with every other takes minutes.
func (r *reader) poolNames() []string {
	if len(r.problems) > 100 {
		return nil
	}
	names := make([]string, len(r.config.Pools))
	for i, p := range r.config.Pools {
		names[i] = p.Name
	}
	return names
}

// inherit ends the reading: following no_backend from pool to pool must end.
func (r *reader) inherit() {
	for _, pool := range r.config.Pools {
		next := pool.NoBackend.Pool
		for range r.config.Pools {
			if next == nil || next == pool {
				break
			}
			next = next.NoBackend.Pool
		}
		if next == pool {
			r.refuse(pool.Pos, fmt.Sprintf("no_backend of pool %s leads back to itself", pool.Name), "end the chain with reset or drop")
		}
	}
}
