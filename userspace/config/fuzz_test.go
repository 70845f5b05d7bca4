// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
)

func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	data, err := os.ReadFile("testdata/bad.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, block := range strings.Split(string(data), "### ")[1:] {
		_, body, _ := strings.Cut(block, "\n")
		text, _, _ := strings.Cut(body, "--->\n")
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("f", data)
		if err == nil {
			checkInvariants(t, c)
			return
		}
		var problems Problems
		if c != nil || !errors.As(err, &problems) || len(problems) == 0 {
			t.Fatalf("config %v with error %v", c, err)
		}
		for _, p := range problems {
			if p.What == "" || p.File != "f" || p.Line < 0 || p.Line > strings.Count(string(data), "\n")+strings.Count(string(data), "\r")+1 {
				t.Errorf("problem %+v", p)
			}
		}
	})
}

// TestNesting must not overflow the stack, which no recover would catch.
func TestNesting(t *testing.T) {
	for _, unit := range []string{"[", "{a: ", "- ", "? ", "!t ", "!t\n", "&a ", "&a\n", "*", "a: ", "- ? ", "[a: ", "|\n ", "%", ":", "a:"} {
		if _, err := Parse("f", []byte(strings.Repeat(unit, 100_000))); err == nil {
			t.Errorf("%q repeated is a valid file", unit)
		}
		// In a list in braces colons are looked at by our own code.
		if _, err := Parse("f", []byte("{a: [b"+strings.Repeat(unit, 100_000))); err == nil {
			t.Errorf("%q repeated in a list is a valid file", unit)
		}
	}
}

func BenchmarkParse(b *testing.B) {
	var text strings.Builder
	text.WriteString("version: 1\nlisten: \":443\"\npools: {a: {backends: 192.0.2.1:443}}\nroutes:\n")
	for i := range 10_000 {
		text.WriteString("  - {sni: h" + strings.Repeat("x", i%7) + ".n" + string(rune('a'+i%26)) + ".example" + strings.Repeat("y", i/26%20) + "-" + strconv.Itoa(i) + ", pool: a}\n")
	}
	data := []byte(text.String())
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := Parse("f", data); err != nil {
			b.Fatal(err)
		}
	}
}
