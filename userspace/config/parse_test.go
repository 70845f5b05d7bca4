// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// full uses every part of the format that is built.
const full = `version: 1
listen:
  - ":443"
  - {name: partners, address: "192.0.2.20:443", no_match: "pool:legacy", accept_proxy: [10.0.0.0/8, "2001:db8::/32"]}
  - {name: front, address: ":444", accept_proxy: 10.1.0.0/16}
  - "[2001:db8::20]:8443"
no_match: drop
not_tls: drop
no_backend: pool:legacy
unknown_flow: pass
timeouts: {hello: 3s, connect: 4s, attempt: 500ms, unconfirmed: 20s, idle: none, closing: 10s}
limits: {flows: 5000, hello_memory: 2MiB, hellos_per_source: none, flows_per_source: none, syns_per_source: none}
deny: []
allow: []
pools:
  blog:
    balance: maglev
    hash: sni
    source: nat
    proxy_protocol: none
    on_down: keep
    slow_start: none
    health: {type: none}
    no_backend: drop
    timeouts: {idle: 10m}
    backends:
      - 192.0.2.11:443
      - "[2001:db8::11]:443"
      - {address: "192.0.2.12:443", name: b2, weight: 3, backup: false}
  green:
    proxy_protocol: v1
    backends: 192.0.2.13:443
  legacy:
    proxy_protocol: v2
    backends: [127.0.0.1:8443]
routes:
  - {sni: Blog.example.com., pool: blog}
  - {name: shop, sni: ["*.example.com", "**.example.net"], alpn: h2, clients: ["10.0.0.0/8", "2001:db8::/32"], listen: [partners, ":443"], pool: blog}
  - {sni: canary.example.com, pools: {blog: 90, green: 10}}
  - {sni: "~cdn[0-9]+\\.example\\.org", pool: blog}
  - {sni: "**.internal.example.com", action: drop}
  - {sni: "", pool: legacy}
  - {sni: "**", action: drop}
  - {sni: xn--bcher-kva.example, pool: green}
`

func mustParse(t testing.TB, text string) *Config {
	t.Helper()
	c, err := Parse("routes.yaml", []byte(text))
	if err != nil {
		t.Fatalf("parse:\n%v", err)
	}
	checkInvariants(t, c)
	return c
}

func TestParseFull(t *testing.T) {
	c := mustParse(t, full)

	type listener struct {
		name, addr, noMatch string
		every               bool
		proxies             string
	}
	var listeners []listener
	for _, l := range c.Listeners {
		listeners = append(listeners, listener{l.Name, l.Addr.String(), l.NoMatch.String(), l.EveryAddress(), fmt.Sprint(l.AcceptProxy)})
	}
	diff(t, "listeners", listeners, []listener{
		{":443", "invalid AddrPort", "drop", true, "[]"},
		{"partners", "192.0.2.20:443", "pool:legacy", false, "[10.0.0.0/8 2001:db8::/32]"},
		{"front", "invalid AddrPort", "drop", true, "[10.1.0.0/16]"},
		{"[2001:db8::20]:8443", "[2001:db8::20]:8443", "drop", false, "[]"},
	})
	if port := c.Listeners[0].Addr.Port(); port != 443 {
		t.Errorf("port of :443 is %d", port)
	}
	diff(t, "defaults", []string{c.NoMatch.String(), c.NotTLS.String(), c.NoBackend.String(), c.UnknownFlow.String()},
		[]string{"drop", "drop", "pool:legacy", "pass"})
	diff(t, "limits", c.Limits, Limits{Flows: 5000, HelloMemory: 2 << 20})
	timeouts := Timeouts{Hello: 3 * time.Second, Connect: 4 * time.Second, Attempt: 500 * time.Millisecond,
		Unconfirmed: 20 * time.Second, Closing: 10 * time.Second}
	diff(t, "timeouts", c.Timeouts, timeouts)
	diff(t, "green's timeouts", c.Pool("green").Timeouts, timeouts)
	timeouts.Idle = 10 * time.Minute
	diff(t, "blog's timeouts", c.Pool("blog").Timeouts, timeouts)

	var pools []string
	for _, p := range c.Pools {
		pools = append(pools, strings.Join([]string{p.Name, p.Balance.String(), p.Hash.String(), p.ProxyProtocol.String(), p.NoBackend.String()}, " "))
	}
	diff(t, "pools", pools, []string{"blog maglev sni none drop", "green round_robin client v1 pool:legacy", "legacy round_robin client v2 reset"})

	type backend struct {
		name, addr string
		weight     int
		line       int
	}
	var backends []backend
	for _, b := range c.Pools[0].Backends {
		backends = append(backends, backend{b.Name, b.Addr.String(), b.Weight, b.Pos.Line})
	}
	diff(t, "backends", backends, []backend{
		{"192.0.2.11:443", "192.0.2.11:443", 1, 27},
		{"[2001:db8::11]:443", "[2001:db8::11]:443", 1, 28},
		{"b2", "192.0.2.12:443", 3, 29},
	})
	if c.Backends() != 5 {
		t.Errorf("%d backends, want 5", c.Backends())
	}
}

func TestParseRoutes(t *testing.T) {
	c := mustParse(t, full)
	type route struct {
		name, patterns, kinds, action string
	}
	var routes []route
	for _, r := range c.Routes {
		var patterns, kinds []string
		for _, p := range r.Patterns {
			patterns = append(patterns, p.Text+"|"+p.Name)
			kinds = append(kinds, p.Kind.String())
		}
		routes = append(routes, route{r.Name, strings.Join(patterns, " "), strings.Join(kinds, " "), r.Action.String()})
	}
	diff(t, "routes", routes, []route{
		{"blog.example.com", "blog.example.com|blog.example.com", "exact", "pool:blog"},
		{"shop", "*.example.com|example.com **.example.net|example.net", "one_label any_labels", "pool:blog"},
		{"canary.example.com", "canary.example.com|canary.example.com", "exact", "pool"},
		{`~cdn[0-9]+\.example\.org`, `~cdn[0-9]+\.example\.org|`, "regex", "pool:blog"},
		{"**.internal.example.com", "**.internal.example.com|internal.example.com", "any_labels", "drop"},
		{"no_name", "|", "no_name", "pool:legacy"},
		{"**", "**|", "any_name", "drop"},
		{"xn--bcher-kva.example", "xn--bcher-kva.example|xn--bcher-kva.example", "exact", "pool:green"},
	})

	shop := c.Routes[1]
	diff(t, "alpn", shop.ALPN, []string{"h2"})
	var clients, listeners, shares []string
	for _, p := range shop.Clients {
		clients = append(clients, p.String())
	}
	for _, l := range shop.Listeners {
		listeners = append(listeners, l.Name)
	}
	for _, s := range c.Routes[2].Pools {
		shares = append(shares, s.Pool.Name)
	}
	diff(t, "clients", clients, []string{"10.0.0.0/8", "2001:db8::/32"})
	diff(t, "listen", listeners, []string{"partners", ":443"})
	diff(t, "pools", shares, []string{"blog", "green"})
	if c.Routes[2].Action.Pool != nil {
		t.Error("a route over two pools has one pool as its action")
	}
	for _, tt := range []struct {
		name string
		want bool
	}{{"cdn1.example.org", true}, {"cdn12.example.org", true}, {"xcdn1.example.org", false}, {"cdn1.example.orgx", false}} {
		if got := c.Routes[3].Patterns[0].Regexp.MatchString(tt.name); got != tt.want {
			t.Errorf("regex on %s: %v", tt.name, got)
		}
	}
}

func TestTakesProxy(t *testing.T) {
	l := mustParse(t, full).Listeners[1]
	for addr, want := range map[string]bool{
		"10.255.0.1": true, "11.0.0.1": false, "2001:db8:ffff::1": true, "2001:db9::": false,
	} {
		if got := l.TakesProxy(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %v, want %v", addr, got, want)
		}
	}
}

func TestTakes(t *testing.T) {
	c := mustParse(t, "version: 1\nlisten: [\":443\", \"192.0.2.9:8443\", \"[fe80::1]:8443\"]\npools: {a: {backends: 192.0.2.1:443}}\nroutes: {sni: example.com, pool: a}\n")
	for to, want := range map[string]int{
		"198.51.100.1:443": 0, "[2001:db8::1]:443": 0, "192.0.2.9:8443": 1, "[fe80::1]:8443": 2, "192.0.2.8:8443": -1, "192.0.2.9:80": -1,
	} {
		for i, l := range c.Listeners {
			if got := l.Takes(netip.MustParseAddrPort(to)); got != (i == want) {
				t.Errorf("listener %d takes %s: %v", i, to, got)
			}
		}
	}
}

func TestDefaults(t *testing.T) {
	c := mustParse(t, "version: 1\nlisten: \":443\"\npools: {a: {backends: 192.0.2.1:443}}\nroutes: {sni: example.com, pool: a}\n")
	diff(t, "timeouts", c.Pools[0].Timeouts, DefaultTimeouts)
	diff(t, "limits", c.Limits, DefaultLimits)
	diff(t, "actions", []Action{c.NoMatch, c.NotTLS, c.NoBackend, c.Listeners[0].NoMatch, c.Pools[0].NoBackend}, make([]Action, 5))
	if c.UnknownFlow != Reset || len(c.Warnings) != 0 {
		t.Errorf("unknown_flow %s, warnings %v", c.UnknownFlow, c.Warnings)
	}
	diff(t, "position", c.Routes[0].Pos, Position{File: "routes.yaml", Line: 4, Column: 9})
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "routes.yaml")
	if err := os.WriteFile(path, []byte("\ufeff"+strings.ReplaceAll(full, "\n", "\r\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err != nil {
		t.Errorf("a file with BOM and CRLF: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "none")); !os.IsNotExist(unwrapAll(err)) {
		t.Errorf("a missing file: %v", err)
	}
	_, err := Load(dir)
	if want := dir + ": a directory of routes is not supported yet; name one file"; err == nil || err.Error() != want {
		t.Errorf("a directory: %v, want %s", err, want)
	}
	big := make([]byte, MaxFileSize+1)
	if err := os.WriteFile(path, big, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "larger than 16 MiB") {
		t.Errorf("a large file: %v", err)
	}
}

func unwrapAll(err error) error {
	for {
		inner, ok := err.(interface{ Unwrap() error })
		if !ok {
			return err
		}
		err = inner.Unwrap()
	}
}

func diff(t *testing.T, what string, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got, cmp.Exporter(func(reflect.Type) bool { return true }), cmpopts.EquateEmpty()); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

// checkInvariants asserts what users of a Config rely on.
func checkInvariants(t testing.TB, c *Config) {
	t.Helper()
	if len(c.Listeners) == 0 {
		t.Error("no listener")
	}
	for i, l := range c.Listeners {
		if l.Index != i || l.Addr.Port() == 0 || l.Name == "" || l.Pos.Line == 0 {
			t.Errorf("listener %d: %+v", i, l)
		}
		checkAction(t, c, l.NoMatch)
	}
	for i, p := range c.Pools {
		if p.Index != i || len(p.Backends) == 0 || c.Pool(p.Name) != p || p.Pos.Line == 0 {
			t.Errorf("pool %d: %+v", i, p)
		}
		checkAction(t, c, p.NoBackend)
		checkTimeouts(t, p.Timeouts)
		steps := 0
		for next := p; next != nil; next = next.NoBackend.Pool {
			if steps++; steps > len(c.Pools) {
				t.Fatalf("no_backend of %s has no end", p.Name)
			}
		}
		seen := map[netip.AddrPort]bool{}
		for j, b := range p.Backends {
			if b.Index != j || b.Pool != p || b.Name == "" || b.Weight < 1 || b.Weight > MaxWeight ||
				!b.Addr.IsValid() || b.Addr.Port() == 0 || b.Addr.Addr().Zone() != "" || b.Addr.Addr().Is4In6() || seen[b.Addr] {
				t.Errorf("backend %d of %s: %+v", j, p.Name, b)
			}
			seen[b.Addr] = true
		}
	}
	for i, r := range c.Routes {
		checkRoute(t, c, i, r)
	}
	checkTimeouts(t, c.Timeouts)
	if c.Limits.Flows < 1 || c.Limits.HelloMemory < 1 || c.Limits.HellosPerSource < 0 {
		t.Errorf("limits %+v", c.Limits)
	}
}

func checkRoute(t testing.TB, c *Config, i int, r *Route) {
	t.Helper()
	if r.Index != i || r.Name == "" || len(r.Patterns) == 0 || (r.Action.Kind == ToPool) != (len(r.Pools) > 0) {
		t.Errorf("route %d: %+v", i, r)
	}
	if (len(r.Pools) == 1) != (r.Action.Pool != nil) {
		t.Errorf("route %d: pools %v but action %v", i, r.Pools, r.Action)
	}
	sum := 0
	for _, s := range r.Pools {
		sum += s.Weight
		if c.Pool(s.Pool.Name) != s.Pool {
			t.Errorf("route %d: a pool from nowhere", i)
		}
	}
	if len(r.Pools) > 0 && sum == 0 {
		t.Errorf("route %d: no weight", i)
	}
	for _, p := range r.Patterns {
		hasName := p.Kind == Exact || p.Kind == OneLabel || p.Kind == AnyLabels
		if hasName != (p.Name != "") || (p.Kind == Regex) != (p.Regexp != nil) {
			t.Errorf("route %d: pattern %+v", i, p)
		}
		if name, err := CanonicalName(p.Name); hasName && (err != nil || name != p.Name) {
			t.Errorf("route %d: %q is not canonical: %q, %v", i, p.Name, name, err)
		}
	}
}

func checkAction(t testing.TB, c *Config, a Action) {
	t.Helper()
	if (a.Kind == ToPool) != (a.Pool != nil) || a.Kind == Pass {
		t.Errorf("action %v with pool %v", a.Kind, a.Pool)
	}
	if a.Pool != nil && c.Pool(a.Pool.Name) != a.Pool {
		t.Error("an action with a pool from nowhere")
	}
}

func checkTimeouts(t testing.TB, x Timeouts) {
	t.Helper()
	if min(x.Hello, x.Connect, x.Attempt, x.Unconfirmed, x.Closing) <= 0 || x.Idle < 0 {
		t.Errorf("timeouts %+v", x)
	}
}
