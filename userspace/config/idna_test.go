// SPDX-License-Identifier: Apache-2.0

package config

import "testing"

func TestInternationalNames(t *testing.T) {
	for in, want := range map[string]string{
		"bücher.example":       "xn--bcher-kva.example",
		"BÜCHER.example":       "xn--bcher-kva.example",
		"faß.example":          "xn--fa-hia.example",
		"例え。テスト":               "xn--r8jz45g.xn--zckzah",
		"_sip.bücher.example.": "_sip.xn--bcher-kva.example",
	} {
		if got, err := CanonicalName(in); got != want || err != nil {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
	c := mustParse(t, "version: 1\nlisten: \":443\"\nroutes: {sni: [bücher.example, \"*.bücher.example\"], action: drop}\n")
	p := c.Routes[0].Patterns
	if c.Routes[0].Name != "xn--bcher-kva.example" || p[0].Text != "xn--bcher-kva.example" || p[1].Text != "*.xn--bcher-kva.example" {
		t.Errorf("route %s: %+v", c.Routes[0].Name, p)
	}
	// The same name in two spellings is one pattern.
	if _, err := Parse("f", []byte("version: 1\nlisten: \":443\"\nroutes: {sni: [bücher.example, xn--bcher-kva.example], action: drop}\n")); err == nil {
		t.Error("a duplicate was accepted")
	}
}
