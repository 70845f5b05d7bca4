// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"
	"testing"

	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/token"
)

// TestColons has lists in braces, where the lexer cuts values at their colons.
func TestColons(t *testing.T) {
	c := mustParse(t, `version: 1
listen: {name: a, address: 192.0.2.1:443}
pools: {a: {backends: [192.0.2.1:443, 192.0.2.2:443,192.0.2.3:443 ]}}
routes: [{sni: a.example, clients: [2001:db8::/32, 2001:db8:1::/48], alpn: [a:b:c, x], pool: a}]
`)
	var got []string
	for _, b := range c.Pools[0].Backends {
		got = append(got, b.Addr.String())
	}
	for _, p := range c.Routes[0].Clients {
		got = append(got, p.String())
	}
	got = append(got, c.Routes[0].ALPN...)
	diff(t, "values", got, strings.Fields("192.0.2.1:443 192.0.2.2:443 192.0.2.3:443 2001:db8::/32 2001:db8:1::/48 a:b:c x"))
}

func TestJoinColons(t *testing.T) {
	for text, want := range map[string]string{
		"{a: [b:1, c]}":     "{ a : [ b:1 , c ] }",
		"{a: [b: 1]}":       "{ a : [ b : 1 ] }",
		"{a: [b:, c:]}":     "{ a : [ b : , c : ] }",
		"{a: [\"b\":1]}":    "{ a : [ b : 1 ] }",
		"{a: [{b:1}, c:2]}": "{ a : [ { b : 1 } , c:2 ] }",
		"{a: [b::1]}":       "{ a : [ b::1 ] }",
		"{a: [b:\nc]}":      "{ a : [ b : c ] }",
		"{a: [ü:1]}":        "{ a : [ ü:1 ] }",
	} {
		var got []string
		var before *token.Token
		for _, tk := range joinColons(lexer.Tokenize(text)) {
			if tk.Prev != before || before != nil && before.Next != tk {
				t.Errorf("%s: %q is not linked to its neighbours", text, tk.Value)
			}
			before = tk
			got = append(got, tk.Value)
		}
		diff(t, text, strings.Join(got, " "), want)
	}
}
