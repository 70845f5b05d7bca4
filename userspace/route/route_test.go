// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"snilb/userspace/config"
)

const sites = `version: 1
listen: [":443", {name: partners, address: "192.0.2.20:443", no_match: "pool:legacy"}]
no_match: drop
pools:
  blog: {backends: 192.0.2.1:443}
  shop: {backends: 192.0.2.2:443}
  blue: {backends: 192.0.2.3:443}
  green: {backends: 192.0.2.4:443}
  legacy: {backends: 192.0.2.5:443}
routes:
  - {name: h2, sni: www.example.com, alpn: h2, pool: shop}
  - {name: www, sni: www.example.com, clients: ["10.0.0.0/8", "2001:db8::/32"], pool: blog}
  - {name: one, sni: "*.example.com", listen: partners, pool: shop}
  - {name: many, sni: ["**.example.com", "**.deep.example.com"], pool: blog}
  - {name: re1, sni: "~cdn[0-9]+\\.example\\.org", pool: shop}
  - {name: re2, sni: "~.*\\.example\\.org", pool: blog}
  - {name: split, sni: canary.example.net, pools: {blue: 90, green: 10}}
  - {name: end, sni: "**.example.net", action: reset}
  - {name: any, sni: "**", clients: "198.51.100.0/24", pool: blog}
  - {name: nameless, sni: "", pool: legacy}
`

func parse(t testing.TB, text string) *config.Config {
	t.Helper()
	c, err := config.Parse("f", []byte(text))
	if err != nil {
		t.Fatalf("parse:\n%v", err)
	}
	return c
}

func TestMatch(t *testing.T) {
	table := New(parse(t, sites))
	tests := []struct {
		what, name, alpn, client string
		listener                 int
		want                     string
	}{
		{"exact, first in the file", "www.example.com", "http/1.1 h2", "10.1.1.1", 0, "h2 pool:shop exact"},
		{"exact, alpn does not hold", "www.example.com", "http/1.1", "10.1.1.1", 0, "www pool:blog exact"},
		{"clients by IPv6", "www.example.com", "", "2001:db8::1", 0, "www pool:blog exact"},
		{"clients by IPv4 in IPv6", "www.example.com", "", "::ffff:10.1.1.1", 0, "www pool:blog exact"},
		{"no exact holds, one label does", "www.example.com", "", "192.0.2.1", 1, "one pool:shop one_label"},
		{"no exact, no listener: many labels", "www.example.com", "", "192.0.2.1", 0, "many pool:blog any_labels"},
		{"one label before many", "a.example.com", "", "192.0.2.1", 1, "one pool:shop one_label"},
		{"two labels", "a.b.example.com", "", "192.0.2.1", 1, "many pool:blog any_labels"},
		{"the longest of many", "a.deep.example.com", "", "192.0.2.1", 1, "many pool:blog any_labels"},
		{"a wildcard needs a label", "example.com", "", "192.0.2.1", 1, "- pool:legacy no_match"},
		{"the first regex", "cdn1.example.org", "", "192.0.2.1", 0, "re1 pool:shop regex"},
		{"the second regex", "cdn.example.org", "", "192.0.2.1", 0, "re2 pool:blog regex"},
		{"an action", "x.example.net", "", "192.0.2.1", 0, "end reset any_labels"},
		{"any name", "whatever", "", "198.51.100.7", 0, "any pool:blog any_name"},
		{"any name is not first", "cdn1.example.org", "", "198.51.100.7", 0, "re1 pool:shop regex"},
		{"no name", "", "", "198.51.100.7", 0, "nameless pool:legacy no_name"},
		{"nothing", "example.invalid", "", "192.0.2.1", 0, "- drop no_match"},
		{"nothing, with the listener's no_match", "example.invalid", "", "192.0.2.1", 1, "- pool:legacy no_match"},
		{"an unknown listener", "example.invalid", "", "192.0.2.1", 7, "- drop no_match"},
		{"no client address", "www.example.com", "", "", 0, "many pool:blog any_labels"},
	}
	for _, tt := range tests {
		t.Run(tt.what, func(t *testing.T) {
			q := Query{ServerName: tt.name, ALPN: strings.Fields(tt.alpn), Listener: tt.listener}
			if tt.client != "" {
				q.Client = netip.MustParseAddr(tt.client)
			}
			if got := describe(table.Match(q)); got != tt.want {
				t.Errorf("%+v: %s, want %s", q, got, tt.want)
			}
		})
	}
}

func describe(d Decision) string {
	name := "-"
	if d.Route != nil {
		name = d.Route.Name
	}
	if (d.Route == nil) != (d.Pattern == nil) || d.Pool != d.Action.Pool || (d.Pool != nil) != (d.Action.Kind == config.ToPool) {
		return fmt.Sprintf("inconsistent %+v", d)
	}
	return fmt.Sprintf("%s %s %s", name, d.Action, d.Reason)
}

// TestLongest tells the patterns of one route apart.
func TestLongest(t *testing.T) {
	table := New(parse(t, sites))
	for name, want := range map[string]string{
		"a.deep.example.com":   "**.deep.example.com",
		"a.b.deep.example.com": "**.deep.example.com",
		"deep.example.com":     "**.example.com",
		"x.deep2.example.com":  "**.example.com",
	} {
		if got := table.Match(Query{ServerName: name}).Pattern; got.Text != want {
			t.Errorf("%s: %s, want %s", name, got.Text, want)
		}
	}
}

func TestWeights(t *testing.T) {
	table := New(parse(t, sites))
	counts := map[string]int{}
	const n = 100_000
	for i := range uint64(n) {
		q := Query{ServerName: "canary.example.net", Hash: i}
		pool := table.Match(q).Pool
		if again := table.Match(q).Pool; again != pool {
			t.Fatal("the same hash went to another pool")
		}
		counts[pool.Name]++
	}
	// 90 % with a standard deviation of 0.1 %.
	if blue := counts["blue"]; blue < 89_500 || blue > 90_500 || counts["green"] != n-blue {
		t.Errorf("%v", counts)
	}

	zero := New(parse(t, strings.Replace(sites, "green: 10", "green: 0", 1)))
	for i := range uint64(1000) {
		if pool := zero.Match(Query{ServerName: "canary.example.net", Hash: i}).Pool; pool.Name != "blue" {
			t.Fatalf("a pool of weight 0 was picked: %s", pool.Name)
		}
	}
}

func TestExplain(t *testing.T) {
	table := New(parse(t, sites))
	steps := table.Explain(Query{ServerName: "www.example.com", ALPN: []string{"http/1.1"}, Client: netip.MustParseAddr("192.0.2.1")})
	var got []string
	for _, s := range steps {
		got = append(got, fmt.Sprintf("%s %s %v: %s", s.Route.Name, s.Pattern.Text, s.Won, s.Why))
	}
	want := []string{
		"h2 www.example.com false: alpn: the client offers http/1.1, not h2",
		"www www.example.com false: clients: 192.0.2.1 is not in 10.0.0.0/8 or 2001:db8::/32",
		"one *.example.com false: listen: it came in by :443, not by partners",
		"many **.example.com true: one or more labels in front",
		"any ** false: clients: 192.0.2.1 is not in 198.51.100.0/24",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}

	losers := map[string]string{ // name: why its second step lost
		"a.deep.example.com": `"**.deep.example.com" is longer`,
		"cdn1.example.org":   "the regular expression on line 15 stands first",
		"canary.example.net": "exact goes before any_labels",
	}
	for name, want := range losers {
		steps := table.Explain(Query{ServerName: name, Client: netip.MustParseAddr("198.51.100.1")})
		if len(steps) < 2 || !steps[0].Won || steps[1].Why != want {
			t.Errorf("%s: %+v", name, steps)
		}
	}
	same := New(parse(t, strings.Replace(sites, ", alpn: h2", "", 1))).Explain(Query{ServerName: "www.example.com", Client: netip.MustParseAddr("10.0.0.1")})
	if want := "line 11 has the same pattern and stands first"; same[1].Why != want {
		t.Errorf("%q, want %q", same[1].Why, want)
	}
}

func TestNoAllocation(t *testing.T) {
	table := New(parse(t, sites))
	for _, name := range []string{"www.example.com", "a.example.com", "a.b.c.d.e.example.com", "canary.example.net", ""} {
		q := Query{ServerName: name, ALPN: []string{"http/1.1"}, Client: netip.MustParseAddr("10.0.0.1"), Listener: 1}
		if n := testing.AllocsPerRun(100, func() { table.Match(q) }); n != 0 {
			t.Errorf("%q: %v allocations", name, n)
		}
	}
}

func BenchmarkMatch(b *testing.B) {
	var text strings.Builder
	text.WriteString("version: 1\nlisten: \":443\"\npools: {a: {backends: 192.0.2.1:443}}\nroutes:\n")
	for i := range 10_000 {
		fmt.Fprintf(&text, "  - {sni: [h%d.example.com, \"*.w%d.example.com\", \"**.d%d.example.com\"], pool: a}\n", i, i, i)
	}
	text.WriteString("  - {sni: \"~r[0-9]+\\\\.example\\\\.org\", pool: a}\n")
	table := New(parse(b, text.String()))
	for _, bb := range []struct{ what, name string }{
		{"exact", "h5000.example.com"},
		{"one label", "x.w5000.example.com"},
		{"many labels", "a.b.c.d5000.example.com"},
		{"regex", "r5000.example.org"},
		{"nothing", "a.b.c.example.invalid"},
	} {
		b.Run(bb.what, func(b *testing.B) {
			b.ReportAllocs()
			q := Query{ServerName: bb.name}
			for b.Loop() {
				table.Match(q)
			}
		})
	}
}
