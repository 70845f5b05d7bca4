// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"snilb/userspace/config"
	"snilb/userspace/route"
)

func explainCommand() *cli.Command {
	return &cli.Command{
		Name:      "explain",
		Usage:     "Say which route a hello takes and why, and which backends it may reach",
		ArgsUsage: "[NAME]",
		Description: "NAME is the server name of the hello; without it the hello carries none.\n" +
			"Without --listen the hello comes in by the file's first listener.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "routes", Usage: "the routes `FILE`; required"},
			&cli.StringFlag{Name: "alpn", Usage: "what the client offers, as `LIST` with commas: h2,http/1.1"},
			&cli.StringFlag{Name: "client", Usage: "the client's `ADDR`"},
			&cli.StringFlag{Name: "listen", Usage: "the `ADDR` or name of the listener the hello comes in by"},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT`: table, json or jsonl", Value: "table"},
		},
		OnUsageError: usageError,
		Action:       explainAction,
	}
}

func explainAction(c *cli.Context) error {
	format := c.String("output")
	if c.NArg() > 1 {
		return cli.Exit("explain takes at most one NAME", exitUsage)
	}
	if c.String("routes") == "" {
		// A flag that urfave/cli requires would end with the code of a failed job.
		return cli.Exit("explain needs --routes FILE", exitUsage)
	}
	if !slices.Contains([]string{"table", "json", "jsonl"}, format) {
		return cli.Exit(fmt.Sprintf("-o cannot be %q: use table, json or jsonl", format), exitUsage)
	}
	q, err := explainQuery(c)
	if err != nil {
		return cli.Exit(err.Error(), exitUsage)
	}
	file, err := config.Load(c.String("routes"))
	if err != nil {
		return loadError(c.App.ErrWriter, err)
	}
	listener, err := findListener(file, c.String("listen"))
	if err != nil {
		return cli.Exit(err.Error(), exitUsage)
	}
	q.Listener = listener.Index
	return printExplanation(c.App.Writer, format, explain(file, listener, q))
}

// explainQuery reads the hello from the command line.
func explainQuery(c *cli.Context) (route.Query, error) {
	var q route.Query
	if name := c.Args().First(); name != "" {
		canonical, err := config.CanonicalName(name)
		if err != nil {
			return q, fmt.Errorf("name %q %w", name, err)
		}
		q.ServerName = canonical
	}
	for _, protocol := range strings.Split(c.String("alpn"), ",") {
		if protocol = strings.TrimSpace(protocol); protocol != "" {
			q.ALPN = append(q.ALPN, protocol)
		}
	}
	if text := c.String("client"); text != "" {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			// A client is often copied from a log, with its port.
			withPort, portErr := netip.ParseAddrPort(text)
			if portErr != nil {
				return q, fmt.Errorf("--client %q is not an IP address", text)
			}
			addr = withPort.Addr()
		}
		q.Client = addr.Unmap()
	}
	return q, nil
}

// findListener finds a listener by its name or by an address that it takes. The
// file's first is the default.
func findListener(c *config.Config, text string) (*config.Listener, error) {
	if text == "" {
		return c.Listeners[0], nil
	}
	for _, l := range c.Listeners {
		if l.Name == text {
			return l, nil
		}
	}
	addr, err := netip.ParseAddrPort(text)
	if err == nil {
		addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
		var every *config.Listener
		for _, l := range c.Listeners {
			if l.Addr == addr {
				return l, nil
			}
			if l.EveryAddress() && l.Addr.Port() == addr.Port() {
				every = l
			}
		}
		if every != nil {
			return every, nil
		}
	}
	names := make([]string, len(c.Listeners))
	for i, l := range c.Listeners {
		names[i] = l.Name
	}
	return nil, fmt.Errorf("--listen %q is no listener of the file: it has %s", text, strings.Join(names, ", "))
}

// explanation is the document of -o json.
type explanation struct {
	SNI      string           `json:"sni"`
	ALPN     []string         `json:"alpn"`
	Client   string           `json:"client"`
	Listener string           `json:"listener"`
	Route    string           `json:"route"`  // "" when none matches.
	Line     int              `json:"line"`   // Of the route's pattern; 0 when none matches.
	Reason   string           `json:"reason"` // exact, one_label and so on; no_match.
	Action   string           `json:"action"` // pool, reset, alert or drop.
	Pools    []explainedPool  `json:"pools"`
	Steps    []explainedRoute `json:"steps"`
}

type explainedPool struct {
	Pool     string             `json:"pool"`
	Share    float64            `json:"share"` // Of the hellos that take this route, 0 to 1.
	Balance  string             `json:"balance"`
	Backends []explainedBackend `json:"backends"`
}

type explainedBackend struct {
	Backend string `json:"backend"` // address:port
	Name    string `json:"name"`
	Weight  int    `json:"weight"`
}

type explainedRoute struct {
	Route   string `json:"route"`
	Line    int    `json:"line"`
	Pattern string `json:"pattern"`
	Won     bool   `json:"won"`
	Why     string `json:"why"`
}

func explain(c *config.Config, l *config.Listener, q route.Query) explanation {
	table := route.New(c)
	d := table.Match(q)
	e := explanation{
		SNI: q.ServerName, ALPN: append([]string{}, q.ALPN...), Listener: l.Name,
		Reason: d.Reason.String(), Action: d.Action.Kind.String(),
		Pools: []explainedPool{}, Steps: []explainedRoute{},
	}
	if q.Client.IsValid() {
		e.Client = q.Client.String()
	}
	for _, s := range table.Explain(q) {
		e.Steps = append(e.Steps, explainedRoute{Route: s.Route.Name, Line: s.Pattern.Pos.Line, Pattern: s.Pattern.Text, Won: s.Won, Why: s.Why})
	}
	var shares []config.WeightedPool
	switch {
	case d.Route != nil:
		e.Route, e.Line, shares = d.Route.Name, d.Pattern.Pos.Line, d.Route.Pools
	case d.Pool != nil:
		shares = []config.WeightedPool{{Pool: d.Pool, Weight: 1}}
	}
	sum := 0
	for _, s := range shares {
		sum += s.Weight
	}
	for _, s := range shares {
		if s.Weight > 0 {
			e.Pools = append(e.Pools, reachable(s.Pool, float64(s.Weight)/float64(sum), q.Client))
		}
	}
	return e
}

// reachable lists a pool's backends. A client only gets those of its own
// address family; without a client it is all of them.
func reachable(p *config.Pool, share float64, client netip.Addr) explainedPool {
	e := explainedPool{Pool: p.Name, Share: share, Balance: p.Balance.String(), Backends: []explainedBackend{}}
	for _, b := range p.Backends {
		if !client.IsValid() || client.Is4() == b.Addr.Addr().Is4() {
			e.Backends = append(e.Backends, explainedBackend{Backend: b.Addr.String(), Name: b.Name, Weight: b.Weight})
		}
	}
	return e
}

func printExplanation(out io.Writer, format string, e explanation) error {
	switch format {
	case "json":
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(e)
	case "jsonl":
		return json.NewEncoder(out).Encode(e)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(w, "name\t%s\n", orWords(e.SNI, "(none)"))
	_, _ = fmt.Fprintf(w, "listener\t%s\n", e.Listener)
	if e.Route == "" {
		_, _ = fmt.Fprintf(w, "route\tnone: no_match of the listener decides\n")
	} else {
		_, _ = fmt.Fprintf(w, "route\t%s (line %d)\n", e.Route, e.Line)
	}
	_, _ = fmt.Fprintf(w, "action\t%s\n", e.Action)
	for _, p := range e.Pools {
		_, _ = fmt.Fprintf(w, "pool\t%s, %s, %.4g %%\n", p.Pool, p.Balance, 100*p.Share)
		for _, b := range p.Backends {
			_, _ = fmt.Fprintf(w, "\t%s\tname %s\tweight %d\n", b.Backend, b.Name, b.Weight)
		}
		if len(p.Backends) == 0 {
			_, _ = fmt.Fprintf(w, "\tno backend of the client's address family\n")
		}
	}
	if len(e.Steps) > 0 {
		_, _ = fmt.Fprintf(w, "\nline\troute\tpattern\tverdict\twhy\n")
	}
	for _, s := range e.Steps {
		verdict := "lost"
		if s.Won {
			verdict = "won"
		}
		_, _ = fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\n", s.Line, s.Route, orWords(s.Pattern, `""`), verdict, s.Why)
	}
	return w.Flush()
}

func orWords(s, empty string) string {
	if s == "" {
		return empty
	}
	return s
}
