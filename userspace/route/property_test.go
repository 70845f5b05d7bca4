// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"snilb/userspace/config"
)

// naive is the rule of precedence as a scan over everything, written from the
// format's description and not from the table.
func naive(c *config.Config, q Query) (*config.Route, string) {
	type rank struct{ tier, length, line int }
	var best *config.Route
	var bestText string
	var bestRank rank
	for i, r := range c.Routes {
		if !naiveHolds(r, q) {
			continue
		}
		for _, p := range r.Patterns {
			tier, ok := naiveTier(p.Text, q.ServerName)
			if !ok {
				continue
			}
			this := rank{tier, -len(p.Text), i}
			if tier >= 3 {
				this.length = 0
			}
			if best == nil || this.tier < bestRank.tier || this.tier == bestRank.tier &&
				(this.length < bestRank.length || this.length == bestRank.length && this.line < bestRank.line) {
				best, bestText, bestRank = r, p.Text, this
			}
		}
	}
	return best, bestText
}

func naiveTier(pattern, name string) (int, bool) {
	labels := strings.Split(name, ".")
	switch {
	case pattern == name:
		return 0, true
	case pattern == "" || name == "":
		return 0, false
	case pattern == "**":
		return 4, true
	case strings.HasPrefix(pattern, "~"):
		return 3, regexp.MustCompile("^(" + pattern[1:] + ")$").MatchString(name)
	case strings.HasPrefix(pattern, "**."):
		want := strings.Split(pattern, ".")[1:]
		return 2, len(labels) > len(want) && slices.Equal(labels[len(labels)-len(want):], want)
	case strings.HasPrefix(pattern, "*."):
		return 1, slices.Equal(labels[1:], strings.Split(pattern, ".")[1:])
	}
	return 0, false
}

func naiveHolds(r *config.Route, q Query) bool {
	client, alpn, listen := len(r.Clients) == 0, len(r.ALPN) == 0, len(r.Listeners) == 0
	for _, p := range r.Clients {
		client = client || p.Contains(q.Client)
	}
	for _, want := range r.ALPN {
		for _, have := range q.ALPN {
			alpn = alpn || want == have
		}
	}
	for _, l := range r.Listeners {
		listen = listen || l.Index == q.Listener
	}
	return client && alpn && listen
}

// randomConfig makes routes from a small vocabulary, so that they collide.
func randomConfig(t testing.TB, rnd *rand.Rand) *config.Config {
	var text strings.Builder
	text.WriteString("version: 1\nlisten: [\":443\", {name: b, address: \":444\"}]\npools: {p: {backends: 192.0.2.1:443}}\nroutes:\n")
	seen := map[string]bool{}
	for range 1 + rnd.IntN(12) {
		pattern := randomName(rnd, 3)
		switch rnd.IntN(7) {
		case 0:
			pattern = "*." + randomName(rnd, 2)
		case 1, 2:
			pattern = "**." + randomName(rnd, 2)
		case 3:
			pattern = "~[ab]+(\\.c)?"
		case 4:
			pattern = []string{"", "**", "~.*a"}[rnd.IntN(3)]
		}
		condition := []string{"", "alpn: h2, ", "alpn: [h2, x], ", "clients: 10.0.0.0/8, ", "listen: b, ", "listen: b, alpn: x, "}[rnd.IntN(6)]
		if seen[pattern+condition] {
			continue
		}
		seen[pattern+condition] = true
		fmt.Fprintf(&text, "  - {sni: '%s', %spool: p}\n", pattern, condition)
	}
	return parse(t, text.String())
}

func randomName(rnd *rand.Rand, most int) string {
	labels := make([]string, 1+rnd.IntN(most))
	for i := range labels {
		labels[i] = string("abc"[rnd.IntN(3)])
	}
	return strings.Join(labels, ".")
}

func randomQuery(rnd *rand.Rand) Query {
	q := Query{Listener: rnd.IntN(2), Client: netip.MustParseAddr([]string{"10.0.0.1", "192.0.2.1"}[rnd.IntN(2)])}
	if rnd.IntN(10) > 0 {
		q.ServerName = randomName(rnd, 4)
	}
	q.ALPN = [][]string{nil, {"h2"}, {"x"}, {"y", "x"}}[rnd.IntN(4)]
	return q
}

// compare checks Match and Explain against the scan.
func compare(t *testing.T, c *config.Config, table *Table, q Query) {
	t.Helper()
	want, text := naive(c, q)
	got := table.Match(q)
	if got.Route != want || got.Pattern != nil && got.Pattern.Text != text {
		t.Fatalf("%+v: route %v, pattern %+v; want %v, %q", q, got.Route, got.Pattern, want, text)
	}
	var won *config.Pattern
	for _, step := range table.Explain(q) {
		if step.Won && won != nil || step.Why == "" {
			t.Fatalf("%+v: step %+v", q, step)
		}
		if step.Won {
			won = step.Pattern
		}
	}
	if won != got.Pattern {
		t.Fatalf("%+v: Explain says %v, Match says %v", q, won, got.Pattern)
	}
}

func TestMatchIsTheNaiveScan(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		c := randomConfig(t, rnd)
		table := New(c)
		for range 50 {
			compare(t, c, table, randomQuery(rnd))
		}
	}
}

func FuzzMatch(f *testing.F) {
	c := parse(f, sites)
	table := New(c)
	f.Add("www.example.com", "h2", []byte{10, 0, 0, 1}, 0)
	f.Add("a.b.deep.example.com", "", []byte{192, 0, 2, 1}, 1)
	f.Add("..", "", []byte{}, -1)
	f.Fuzz(func(t *testing.T, name, alpn string, client []byte, listener int) {
		addr, _ := netip.AddrFromSlice(client)
		q := Query{ServerName: name, ALPN: []string{alpn}, Client: addr.Unmap(), Listener: listener}
		if canonical, err := config.CanonicalName(name); err == nil && canonical == name {
			compare(t, c, table, q)
			return
		}
		table.Match(q) // Must not panic, whatever it says.
		table.Explain(q)
	})
}
