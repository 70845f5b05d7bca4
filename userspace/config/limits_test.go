// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestLongName(t *testing.T) {
	longest := strings.Repeat("a.", 127) + "a"
	if _, err := CanonicalName(longest + "."); err != nil {
		t.Errorf("%d bytes: %v", len(longest), err)
	}
	if _, err := CanonicalName(longest + "a"); !errors.Is(err, errLongName) {
		t.Errorf("%d bytes: %v", len(longest)+1, err)
	}
}

// TestRegexCase: names are lower case, so an upper-case letter would never
// match.
func TestRegexCase(t *testing.T) {
	c := mustParse(t, "version: 1\nlisten: \":443\"\nroutes: {sni: \"~CDN[A-C]\", action: drop}\n")
	if !c.Routes[0].Patterns[0].Regexp.MatchString("cdnb") {
		t.Error("an upper-case pattern does not match a lower-case name")
	}
}

func TestNotText(t *testing.T) {
	for _, text := range []string{"version: 1\n#\xff", "version: 1\n#\x00"} {
		_, err := Parse("f", []byte(text))
		if want := "f:2:2: the file is not UTF-8 text; save it as UTF-8"; err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

func TestTooManyBackends(t *testing.T) {
	var text strings.Builder
	text.WriteString("version: 1\nlisten: \":443\"\nno_match: pool:a\npools:\n  a:\n    backends:\n")
	for i := range MaxBackends {
		fmt.Fprintf(&text, "      - 10.0.%d.%d:443\n", i>>8, i&255)
	}
	if c := mustParse(t, text.String()); c.Backends() != MaxBackends {
		t.Errorf("%d backends", c.Backends())
	}
	text.WriteString("  b: {backends: 192.0.2.1:443}\n  c: {backends: 192.0.2.1:443}\n")
	_, err := Parse("f", []byte(text.String()))
	if want := fmt.Sprintf("f:%d:3: there are more than 65535 backends; split the sites over several instances", MaxBackends+7); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
