// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"net/netip"

	"snilb/loader"
	"snilb/userspace/config"
)

// checkHost says which backends this machine cannot reach by snilb.
func checkHost(c *config.Config) []config.Problem {
	return eachBackend(c, loader.CheckBackend)
}

// eachBackend calls try for every backend address once, and turns its errors into
// problems of the file.
func eachBackend(c *config.Config, try func(netip.AddrPort) error) config.Problems {
	var problems config.Problems
	seen := make(map[netip.AddrPort]bool)
	for _, p := range c.Pools {
		for _, b := range p.Backends {
			if seen[b.Addr] {
				continue
			}
			seen[b.Addr] = true
			if err := try(b.Addr); err != nil {
				problems = append(problems, config.Problem{Position: b.Pos, What: err.Error(), Remedy: backendRemedy(err)})
			}
		}
	}
	return problems
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
