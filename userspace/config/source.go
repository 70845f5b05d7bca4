// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// source reads nat, client, or a mapping with addresses and ports.
func (r *reader) source(node ast.Node, p *Pool) {
	if _, mapping := node.(*ast.MappingNode); !mapping {
		p.Source.Client = r.choice(node, "source", "nat", "client") == 1
		return
	}
	seen := r.mapping(node, "source", []field{
		{key: "addresses", read: func(n ast.Node) { r.sourceAddresses(n, p) }, null: "list addresses of this node"},
		{key: "ports", read: func(n ast.Node) { r.sourcePorts(n, p) }, null: `write a range: "10000-29999"`},
	})
	if seen != nil && len(seen) == 0 {
		r.refuse(r.at(node), "source is empty", "write nat, client, or {addresses: [IP]}")
	}
}

func (r *reader) sourceAddresses(node ast.Node, p *Pool) {
	items := r.items(node)
	if len(items) == 0 {
		r.refuse(r.at(node), "source has no addresses", "list addresses of this node")
	}
	for _, item := range items {
		s, ok := r.scalar(item, "a source address")
		if !ok {
			continue
		}
		addr, err := netip.ParseAddr(strings.Trim(s.text, "[]"))
		switch {
		case err != nil:
			r.refuse(s.pos, fmt.Sprintf("source address %q is no IP address", s.text), "write an address of this node, without a port")
		case !r.plainAddr(s, addr):
		case addr.IsUnspecified() || addr.IsMulticast() || addr.IsLoopback():
			r.refuse(s.pos, fmt.Sprintf("source address %q is not one that backends can answer", s.text), "write an address of this node")
		case slices.Contains(p.Source.Addresses, addr):
			r.refuse(s.pos, fmt.Sprintf("source address %s stands there twice", addr), "remove one")
		default:
			p.Source.Addresses = append(p.Source.Addresses, addr)
		}
	}
}

func (r *reader) sourcePorts(node ast.Node, p *Pool) {
	s, ok := r.scalar(node, "ports")
	if !ok {
		return
	}
	first, last, isRange := strings.Cut(s.text, "-")
	from, err := decimal(strings.TrimSpace(first))
	to, err2 := decimal(strings.TrimSpace(last))
	if !isRange || err != nil || err2 != nil || from < 1 || to > 65535 || from > to {
		r.refuse(s.pos, fmt.Sprintf("ports %q is no range", s.text), `write FIRST-LAST, of 1 to 65535: "10000-29999"`)
		return
	}
	p.Source.PortFirst, p.Source.PortLast = uint16(from), uint16(to)
}

// notes says what a valid file needs of the network around it.
func notes(c *Config) Problems {
	var found Problems
	for _, pool := range c.Pools {
		if pool.Source.Client {
			found = append(found, Problem{
				Position: pool.Pos,
				What:     fmt.Sprintf("pool %s has source: client: what its backends answer to clients must come back through this node", pool.Name),
				Remedy:   "make this node their gateway towards clients (default route or policy routing)",
			})
		}
	}
	return found
}
