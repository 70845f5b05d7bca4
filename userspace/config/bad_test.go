// SPDX-License-Identifier: Apache-2.0

package config

import (
	"flag"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestBad holds testdata/bad.txt, a list of "### name", YAML, "--->" and the
// exact problems.
func TestBad(t *testing.T) {
	const path = "testdata/bad.txt"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var golden strings.Builder
	names := map[string]bool{}
	for _, block := range strings.Split(string(data), "### ")[1:] {
		name, body, _ := strings.Cut(block, "\n")
		text, want, _ := strings.Cut(body, "--->\n")
		if names[name] {
			t.Errorf("two cases are called %q", name)
		}
		names[name] = true
		got := "no problem\n"
		if _, err := Parse("f", []byte(text)); err != nil {
			got = err.Error() + "\n"
		}
		golden.WriteString("### " + name + "\n" + text + "--->\n" + got)
		if *update {
			continue
		}
		t.Run(name, func(t *testing.T) {
			diff(t, "problems", strings.Split(got, "\n"), strings.Split(want, "\n"))
		})
	}
	if *update {
		if err := os.WriteFile(path, []byte(golden.String()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if len(names) < 50 {
		t.Errorf("only %d cases", len(names))
	}
}
