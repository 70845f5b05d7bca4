// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"snilb/userspace/api"
	"snilb/userspace/config"
)

func configCommand() *cli.Command {
	return reader("config", "Print the configuration that the daemon works by", formatJSON,
		func(c *cli.Context, format string, client *api.Client) error {
			raw, err := client.Config(c.Context)
			if err != nil {
				return err
			}
			if format != formatTable {
				return printDocument(c.App.Writer, format, raw)
			}
			tree, err := decodeTree(raw)
			if err != nil {
				return err
			}
			w := newTable(c.App.Writer)
			writeTree(w, "", tree)
			return w.Flush()
		})
}

// The document of `snilb config`: the file with every default filled in.
type (
	configDocument struct {
		File        string            `json:"file"`
		Listeners   []listenerSummary `json:"listeners"`
		NotTLS      string            `json:"not_tls"`
		UnknownFlow string            `json:"unknown_flow"`
		Pools       []poolSummary     `json:"pools"`
		Routes      []routeSummary    `json:"routes"`
	}
	listenerSummary struct {
		Name    string `json:"name"`
		Address string `json:"address"` // ":443" is every address
		NoMatch string `json:"no_match"`

		AcceptProxy []string `json:"accept_proxy,omitempty"`
	}
	poolSummary struct {
		Name      string            `json:"name"`
		Balance   string            `json:"balance"`
		Hash      string            `json:"hash,omitempty"`
		NoBackend string            `json:"no_backend"`
		Timeouts  map[string]string `json:"timeouts"`
		Backends  []backendSummary  `json:"backends"`

		ProxyProtocol string `json:"proxy_protocol"`
	}
	backendSummary struct {
		Name    string `json:"name"`
		Address string `json:"address"`
		Weight  int    `json:"weight"`
	}
	routeSummary struct {
		Name    string         `json:"name"`
		Line    int            `json:"line"`
		SNI     []string       `json:"sni"`
		ALPN    []string       `json:"alpn,omitempty"`
		Clients []string       `json:"clients,omitempty"`
		Listen  []string       `json:"listen,omitempty"`
		Action  string         `json:"action"`
		Pools   map[string]int `json:"pools,omitempty"` // with their weights
	}
)

func summarize(c *config.Config) configDocument {
	d := configDocument{
		File: c.File, Listeners: summarizeListeners(c), NotTLS: c.NotTLS.String(), UnknownFlow: c.UnknownFlow.String(),
		Pools: summarizePools(c), Routes: []routeSummary{},
	}
	for _, r := range c.Routes {
		s := routeSummary{Name: r.Name, Line: r.Pos.Line, ALPN: r.ALPN, Action: r.Action.Kind.String()}
		for _, p := range r.Patterns {
			s.SNI = append(s.SNI, p.Text)
		}
		for _, prefix := range r.Clients {
			s.Clients = append(s.Clients, prefix.String())
		}
		for _, l := range r.Listeners {
			s.Listen = append(s.Listen, l.Name)
		}
		for _, share := range r.Pools {
			if s.Pools == nil {
				s.Pools = make(map[string]int)
			}
			s.Pools[share.Pool.Name] = share.Weight
		}
		d.Routes = append(d.Routes, s)
	}
	return d
}

func summarizeListeners(c *config.Config) []listenerSummary {
	all := []listenerSummary{}
	for _, l := range c.Listeners {
		address := l.Addr.String()
		if l.EveryAddress() {
			address = fmt.Sprintf(":%d", l.Addr.Port())
		}
		s := listenerSummary{Name: l.Name, Address: address, NoMatch: l.NoMatch.String()}
		for _, prefix := range l.AcceptProxy {
			s.AcceptProxy = append(s.AcceptProxy, prefix.String())
		}
		all = append(all, s)
	}
	return all
}

func summarizePools(c *config.Config) []poolSummary {
	all := []poolSummary{}
	for _, p := range c.Pools {
		s := poolSummary{
			Name: p.Name, Balance: p.Balance.String(), NoBackend: p.NoBackend.String(), Backends: []backendSummary{},
			ProxyProtocol: p.ProxyProtocol.String(),
			Timeouts: map[string]string{
				"hello": p.Timeouts.Hello.String(), "connect": p.Timeouts.Connect.String(), "attempt": p.Timeouts.Attempt.String(),
				"unconfirmed": p.Timeouts.Unconfirmed.String(), "idle": p.Timeouts.Idle.String(), "closing": p.Timeouts.Closing.String(),
			},
		}
		if p.Timeouts.Idle == 0 {
			s.Timeouts["idle"] = "none"
		}
		if p.Balance == config.Maglev {
			s.Hash = p.Hash.String()
		}
		for _, b := range p.Backends {
			s.Backends = append(s.Backends, backendSummary{Name: b.Name, Address: b.Addr.String(), Weight: b.Weight})
		}
		all = append(all, s)
	}
	return all
}
