// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"fmt"
	"math"
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

	// listeners are by the ids that the kernel knows them by, which no other listener gets for a long time: what is
	// queued of one must not be taken for another's.
	listeners map[uint16]*config.Listener
	ids       map[netip.AddrPort]uint16
	lastID    uint16

	sourceClient bool // some pool has it
}

// NewPlan prepares a configuration. Backends and listeners that old has keep their
// ids; old may be nil. Returns an error if the ids run out.
func NewPlan(c *config.Config, old *Plan) (*Plan, error) {
	if old == nil {
		return newPlan(c, Known{})
	}
	return newPlan(c, Known{old.pools.Identities(), old.ids, old.lastID})
}

// FirstPlan is the first one of a daemon that comes after another. Backends and listeners that the other knew, by KnownIDs, keep their
// ids, and no others get these as long as there are enough: a daemon starts all the same, and tells flows' backends by their addresses.
func FirstPlan(c *config.Config, known Known) (*Plan, error) {
	p, err := newPlan(c, known)
	if errors.Is(err, pool.ErrNoIDs) {
		return newPlan(c, Known{})
	}
	return p, err
}

func newPlan(c *config.Config, known Known) (*Plan, error) {
	pools, err := pool.Build(c, known.backends)
	if err != nil {
		return nil, err
	}
	p := &Plan{config: c, routes: route.New(c), pools: pools}
	if err := p.numberListeners(known); err != nil {
		return nil, err
	}
	for _, some := range c.Pools {
		p.sourceClient = p.sourceClient || some.Source.Client
	}
	return p, nil
}

// numberListeners gives each listener the id that its address is known by, or one that was not in use for the longest time.
func (p *Plan) numberListeners(known Known) error {
	p.lastID = known.lastListener
	p.listeners, p.ids = make(map[uint16]*config.Listener), make(map[netip.AddrPort]uint16)
	taken := make(map[uint16]bool)
	for _, id := range known.listeners {
		taken[id] = true
	}
	for _, l := range p.config.Listeners {
		id := known.listeners[l.Addr]
		if id == 0 {
			if len(taken) >= math.MaxUint16 {
				return fmt.Errorf("number the listeners, %d at most: %w", math.MaxUint16, pool.ErrNoIDs)
			}
			for p.lastID++; p.lastID == 0 || taken[p.lastID]; p.lastID++ {
			}
			id, taken[p.lastID] = p.lastID, true
		}
		p.listeners[id], p.ids[l.Addr] = l, id
	}
	return nil
}

// ListenerID is what the kernel is to know a listener of the configuration by.
func (p *Plan) ListenerID(l *config.Listener) uint16 { return p.ids[l.Addr] }

// listenerAt is the id of the listener that an address belongs to, as the kernel would have it; 0 if there is none.
func (p *Plan) listenerAt(at netip.AddrPort) uint16 {
	for _, addr := range []netip.Addr{at.Addr(), {}, netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		if id := p.ids[netip.AddrPortFrom(addr, at.Port())]; id != 0 {
			return id
		}
	}
	return 0
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
func (p *Plan) decide(listener *config.Listener, c connection, h *hello.Hello) decision {
	d := p.routes.Match(route.Query{
		ServerName: h.ServerName,
		ALPN:       h.ALPN,
		Client:     c.client.Addr(),
		Listener:   listener.Index,
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
