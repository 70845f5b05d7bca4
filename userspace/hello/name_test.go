// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"errors"
	"strings"
	"testing"
)

func TestCanonical(t *testing.T) {
	label63 := strings.Repeat("a", 63)
	longest := strings.Join([]string{label63, label63, label63, label63}, ".") // 255
	for in, want := range map[string]string{
		"example.com":             "example.com",
		"EXAMPLE.com":             "example.com",
		"AZ.az09":                 "az.az09",
		"example.com.":            "example.com",
		"localhost":               "localhost",
		"xn--bcher-kva.example":   "xn--bcher-kva.example",
		"_dmarc.my_host.example":  "_dmarc.my_host.example",
		"-a-.b--":                 "-a-.b--",
		"1":                       "1",
		"1.2.3":                   "1.2.3",
		"1.2.3.4.5":               "1.2.3.4.5",
		"1.2.3.256":               "1.2.3.256",
		"4.3.2.1.in-addr.arpa":    "4.3.2.1.in-addr.arpa",
		"cafe":                    "cafe",
		label63 + ".x":            label63 + ".x",
		longest:                   longest,
		longest[:254] + ".":       longest[:254],
		"192.0.2.1":               "",
		"192.0.2.1.":              "",
		"[192.0.2.1]":             "",
		"::":                      "",
		"2001:DB8::1":             "",
		"2001:db8::1.":            "",
		"[2001:db8::1]":           "",
		"::ffff:192.0.2.1":        "",
		"fe80::1%eth0":            "",
		"[fe80::1%eth0.100]":      "",
		"2001:db8:0:0:0:0:0:abcd": "",
	} {
		if got, err := canonical([]byte(in)); err != nil || got != want {
			t.Errorf("%q gives %q, %v, want %q", in, got, err, want)
		}
	}
}

func TestCanonicalRejects(t *testing.T) {
	for _, in := range []string{
		".", "..", ".a", "a..", "a..b", ".a.", "a...",
		"a\x00", "\x00", "a b", " a", "a\n", "a\t.b", "a\x7f", "b\xc3\xbccher.example", "\xff",
		"*.example.com", "a/b", "a:443", "a@b", "a%b", "a,b", "a\\b", "~a", "a;b", "`a", "{a", "a^", "'a", "a+b",
		"[", "]", "[]", "[a]", "[1.2.3.4", "1.2.3.4]", "[[::1]]", "1.2.3.4:443", "[::1]:443", ":::", "1.2.3.4%eth0",
		"::1%", "fe80::1%\x00", "fe80::1%a b", "fe80::1%\xff",
		strings.Repeat("a", 64), "x." + strings.Repeat("a", 64) + ".y",
		strings.Repeat("a.", 127) + "bc", // 256
		strings.Repeat("a.", 128),        // 256 with the dot
	} {
		if got, err := canonical([]byte(in)); !errors.Is(err, ErrMalformed) || got != "" {
			t.Errorf("%q gives %q, %v", in, got, err)
		}
	}
}

// TestCanonicalBytes tries every byte inside a name.
func TestCanonicalBytes(t *testing.T) {
	const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
	for c := range 256 {
		in := []byte{'a', byte(c), 'b'}
		got, err := canonical(in)
		switch {
		case strings.IndexByte(allowed, byte(c)) < 0:
			if err == nil {
				t.Errorf("%q is taken", in)
			}
		case err != nil || got != strings.ToLower(string(in)):
			t.Errorf("%q gives %q, %v", in, got, err)
		}
	}
}
