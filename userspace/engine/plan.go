// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"net/netip"

	"snilb/userspace/config"
	"snilb/userspace/hello"
	"snilb/userspace/pool"
	"snilb/userspace/route"
)

// Plan is a configuration ready for use: an immutable snapshot.
type Plan struct {
	config *config.Config
	routes *route.Table
	pools  *pool.Set

	sourceClient bool // some pool has it
}

// NewPlan prepares a configuration. Backends that old has keep their ids; old may
// be nil.
func NewPlan(c *config.Config, old *Plan) (*Plan, error) {
	var known map[pool.Identity]uint16
	if old != nil {
		known = old.pools.Identities()
	}
	return newPlan(c, known)
}

func newPlan(c *config.Config, known map[pool.Identity]uint16) (*Plan, error) {
	pools, err := pool.Build(c, known)
	if err != nil {
		return nil, err
	}
	p := &Plan{config: c, routes: route.New(c), pools: pools}
	for _, some := range c.Pools {
		p.sourceClient = p.sourceClient || some.Source.Client
	}
	return p, nil
}

// Backends lists the addresses of all backends, each once.
func (p *Plan) Backends() []netip.AddrPort {
	seen := make(map[netip.AddrPort]bool)
	var all []netip.AddrPort
	for _, some := range p.pools.Pools {
		for _, b := range some.Backends {
			if !seen[b.Addr] {
				seen[b.Addr] = true
				all = append(all, b.Addr)
			}
		}
	}
	return all
}

// Why a connection is decided as it is: half of a decision's `result` label.
const (
	reasonMatched   = "matched"
	reasonNoMatch   = "no_match"
	reasonNotTLS    = "not_tls"
	reasonMalformed = "malformed"
	reasonNoBackend = "no_backend"
)

// decision is what becomes of a connection.
type decision struct {
	route  *config.Route // nil: none matched, or the bytes are no hello
	reason string        // for counting
	action config.ActionKind
	pool   *pool.Pool // with config.ToPool
	hash   uint64
}

// decide routes a hello.
func (p *Plan) decide(listener int, c connection, h *hello.Hello) decision {
	d := p.routes.Match(route.Query{
		ServerName: h.ServerName,
		ALPN:       h.ALPN,
		Client:     c.client.Addr(),
		Listener:   listener,
		Hash:       pool.Hash(config.HashFlow, c.client, c.listener, "", pool.Key{}),
	})
	out := decision{route: d.Route, reason: reasonMatched, action: d.Action.Kind}
	if d.Route == nil {
		out.reason = reasonNoMatch
	}
	chosen := d.Pool
	if chosen == nil {
		chosen = d.Action.Pool
	}
	return p.fill(out, chosen, c, h.ServerName)
}

// decideNotHello says what becomes of bytes that hello.Parse refused. Only what is
// not TLS at all may go to a pool: a broken hello never finds a backend.
func (p *Plan) decideNotHello(c connection, err error) decision {
	if errors.Is(err, hello.ErrNotTLS) {
		a := p.config.NotTLS
		return p.fill(decision{reason: reasonNotTLS, action: a.Kind}, a.Pool, c, "")
	}
	return decision{reason: reasonMalformed, action: config.Reset}
}

// decideNoBackend says what becomes of a connection whose pool has no backend that
// answers.
func (p *Plan) decideNoBackend(d decision, c connection, sni string) decision {
	a := d.pool.Config.NoBackend
	return p.fill(decision{route: d.route, reason: reasonNoBackend, action: a.Kind}, a.Pool, c, sni)
}

func (p *Plan) fill(d decision, chosen *config.Pool, c connection, sni string) decision {
	if d.action != config.ToPool {
		return d
	}
	d.pool = p.pools.Of(chosen)
	d.hash = d.pool.Hash(c.client, c.listener, sni, pool.Key{})
	return d
}

func (d *decision) routeName() string {
	if d.route == nil {
		return ""
	}
	return d.route.Name
}

func (d *decision) poolName() string {
	if d.pool == nil {
		return ""
	}
	return d.pool.Config.Name
}
