// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"slices"
	"testing"
)

func TestWarnings(t *testing.T) {
	const head = `version: 1
listen: ":443"
pools: {a: {backends: 192.0.2.1:443}, b: {backends: 192.0.2.2:443}}
routes:
`
	tests := []struct {
		name, routes string
		want         []string
	}{
		{"none", `  - {sni: a.example.com, pool: a}
  - {sni: b.example.com, pool: b}`, nil},
		{"unused pool", `  - {sni: a.example.com, pool: a}`,
			[]string{`f:3:39: pool b is not used; name it in a route, or remove it`}},
		{"no pool in use", `  - {sni: a.example.com, action: drop}`,
			[]string{`f: nothing leads to a backend: every hello is refused; add a pool and a route`,
				`f:3:9: pool a is not used; name it in a route, or remove it`,
				`f:3:39: pool b is not used; name it in a route, or remove it`}},
		{"wildcard over an exact name", `  - {sni: "*.example.com", pool: a}
  - {sni: b.example.com, pool: b}
  - {sni: c.example.com, pool: b}`,
			[]string{`f:5:5: "*.example.com" spans pools: "b.example.com" on line 6 goes to another one, and a browser may reuse one HTTP/2 connection for both names; let the backends answer 421 to names that are not theirs`}},
		{"wildcard over a wildcard", `  - {sni: "*.x.example.com", pool: a}
  - {sni: "**.example.com", pool: b}`,
			[]string{`f:6:5: "**.example.com" spans pools: "*.x.example.com" on line 5 goes to another one, and a browser may reuse one HTTP/2 connection for both names; let the backends answer 421 to names that are not theirs`}},
		{"wildcard and the name above it", `  - {sni: "*.example.com", pool: a}
  - {sni: [example.com, a.b.example.com], pool: b}`, nil},
		{"wildcard without HTTP/2", `  - {sni: "*.example.com", pool: a, alpn: http/1.1}
  - {sni: b.example.com, pool: b}`, nil},
		{"wildcard to the same pools", `  - {sni: "*.example.com", pools: {a: 1, b: 1}}
  - {sni: b.example.com, pools: {b: 2, a: 1}}`, nil},
		{"any name", `  - {sni: "**", pool: a}
  - {sni: b.example.com, pool: b}`, nil},
		{"never reached", `  - {sni: a.example.com, pool: a}
  - {sni: a.example.com, pool: b, alpn: h2}`,
			[]string{`f:6:11: pattern "a.example.com" is never reached: line 5 takes it without conditions; move this route above that one`}},
		{"conditions first", `  - {sni: a.example.com, pool: b, alpn: h2}
  - {sni: a.example.com, pool: a}`, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Parse("f", []byte(head+tt.routes+"\n"))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, w := range c.Warnings {
				got = append(got, w.String())
			}
			diff(t, "warnings", got, tt.want)
		})
	}
}

func TestWarnTimeouts(t *testing.T) {
	c := mustParse(t, "version: 1\nlisten: \":443\"\nno_match: pool:a\npools:\n  a: {timeouts: {attempt: 6s}, backends: 192.0.2.1:443}\n")
	want := "routes.yaml:5:3: pool a waits 6s for one backend and 5s for all: a second is never tried; make timeout attempt shorter than connect"
	if len(c.Warnings) != 1 || c.Warnings[0].String() != want {
		t.Errorf("warnings: %v", c.Warnings)
	}
}

// TestSwitch shows that what is not built is refused by one line of notBuilt.
func TestSwitch(t *testing.T) {
	const text = "version: 1\nlisten: \":443\"\nno_match: pool:a\npools: {a: {on_down: reset, backends: 192.0.2.1:443}}\n"
	if _, err := Parse("f", []byte(text)); err == nil {
		t.Fatal("on_down: reset is accepted")
	}
	if !slices.Contains(NotBuilt(), FeatureOnDownReset) {
		t.Error("NotBuilt does not list it")
	}
	remedy := notBuilt[FeatureOnDownReset]
	delete(notBuilt, FeatureOnDownReset)
	t.Cleanup(func() { notBuilt[FeatureOnDownReset] = remedy })
	mustParse(t, text)
}

// TestSource reads the three forms, and notes what the network must do for one.
func TestSource(t *testing.T) {
	c := mustParse(t, "version: 1\nlisten: \":443\"\nno_match: pool:a\npools:\n  a: {source: client, backends: 192.0.2.1:443}\n"+
		"  b: {source: {addresses: [192.0.2.5, \"2001:db8::5\"], ports: \"20000-20999\"}, backends: 192.0.2.1:443}\n  c: {source: nat, backends: 192.0.2.1:443}\n")
	addr := netip.MustParseAddr
	for i, want := range []Source{
		{Client: true},
		{Addresses: []netip.Addr{addr("192.0.2.5"), addr("2001:db8::5")}, PortFirst: 20000, PortLast: 20999},
		{},
	} {
		diff(t, c.Pools[i].Name, c.Pools[i].Source, want)
	}
	diff(t, "addresses of a family", c.Pools[1].Source.Of(false), []netip.Addr{addr("2001:db8::5")})
	want := "routes.yaml:5:3: pool a has source: client: what its backends answer to clients must come back through this node; " +
		"make this node their gateway towards clients (default route or policy routing)"
	if len(c.Notes) != 1 || c.Notes[0].String() != want {
		t.Errorf("notes: %v", c.Notes)
	}
}

// TestAlert reads the word wherever it may stand.
func TestAlert(t *testing.T) {
	c := mustParse(t, "version: 1\nlisten: {address: \":443\", no_match: alert}\nno_match: alert\nnot_tls: alert\nno_backend: alert\n"+
		"pools: {a: {backends: 192.0.2.1:443, no_backend: alert}}\nroutes: [{sni: a.example.com, pool: a}, {sni: b.example.com, action: alert}]\n")
	for what, got := range map[string]Action{
		"no_match": c.NoMatch, "not_tls": c.NotTLS, "no_backend": c.NoBackend, "listener": c.Listeners[0].NoMatch,
		"pool": c.Pools[0].NoBackend, "route": c.Routes[1].Action,
	} {
		if got.Kind != Alert {
			t.Errorf("%s is %s", what, got)
		}
	}
}

func TestCanonicalName(t *testing.T) {
	tests := []struct{ in, want, err string }{
		{"WWW.Example.COM.", "www.example.com", ""},
		{"_dmarc.example.com", "_dmarc.example.com", ""},
		{"", "", "is empty"},
		{"example.com..", "", "has an empty label"},
		{"192.0.2.1", "", "is an IP address, which clients never send as a name"},
		{"[2001:db8::1]", "", "is an IP address, which clients never send as a name"},
		{"a\x00b", "", "has a character that no host name holds"},
	}
	for _, tt := range tests {
		got, err := CanonicalName(tt.in)
		text := ""
		if err != nil {
			text = err.Error()
		}
		if got != tt.want || text != tt.err {
			t.Errorf("%q: %q, %q; want %q, %q", tt.in, got, text, tt.want, tt.err)
		}
	}
}
