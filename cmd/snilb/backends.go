// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net/netip"

	"snilb/loader"
	"snilb/userspace/config"
)

// checkHost says which backends this machine cannot reach by snilb, and which source
// addresses it does not have.
func checkHost(c *config.Config) []config.Problem {
	problems := eachBackend(c, func(addr netip.AddrPort, _ []netip.Addr) error { return loader.CheckBackend(addr) })
	return append(problems, checkSources(c)...)
}

func checkSources(c *config.Config) config.Problems {
	var problems config.Problems
	for _, p := range c.Pools {
		for _, addr := range p.Source.Addresses {
			if err := loader.CheckSource(addr); err != nil {
				problems = append(problems, config.Problem{
					Position: p.Pos, What: fmt.Sprintf("source of pool %s: %v", p.Name, err),
					Remedy: "add it to an interface or to lo, or take it out of the file",
				})
			}
		}
	}
	return problems
}

// eachBackend calls try for every backend of every pool, with the pool's source
// addresses of its family, and turns its errors into problems of the file, one an
// address.
func eachBackend(c *config.Config, try func(netip.AddrPort, []netip.Addr) error) config.Problems {
	var problems config.Problems
	failed := make(map[netip.AddrPort]bool)
	for _, p := range c.Pools {
		for _, b := range p.Backends {
			err := try(b.Addr, p.Source.Of(b.Addr.Addr().Is4()))
			if err != nil && !failed[b.Addr] {
				failed[b.Addr] = true
				problems = append(problems, config.Problem{Position: b.Pos, What: err.Error(), Remedy: backendRemedy(err)})
			}
		}
	}
	return problems
}

// sourcePorts is the range that holds those of all pools; own is what a pool without
// one uses.
func sourcePorts(c *config.Config, own [2]uint16) [2]uint16 {
	var all [2]uint16
	for _, p := range c.Pools {
		some := [2]uint16{p.Source.PortFirst, p.Source.PortLast}
		if some[0] == 0 {
			some = own
		}
		if all[0] == 0 {
			all = some
		}
		all = [2]uint16{min(all[0], some[0]), max(all[1], some[1])}
	}
	if all[0] == 0 {
		return own
	}
	return all
}

func backendRemedy(err error) string {
	switch {
	case errors.Is(err, loader.ErrLocal):
		return "give an address of another machine or container"
	case errors.Is(err, loader.ErrUnreachable):
		return "add a route to it, or take the backend out of the file"
	}
	return ""
}
