// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// eachFlag calls do for every command that users see, and its flags; hidden ones have a name that no document may have.
func eachFlag(path string, commands []*cli.Command, do func(command string, flag cli.Flag, hidden bool)) {
	for _, c := range commands {
		name := strings.TrimSpace(path + " " + c.Name)
		do(name, nil, c.Hidden)
		for _, f := range c.Flags {
			do(name, f, c.Hidden || !f.(cli.VisibleFlag).IsVisible())
		}
		eachFlag(name, c.Subcommands, do)
	}
}

// The man page and the completions have every command and flag, each below its command, and none that is hidden.
func TestDocsAreWhole(t *testing.T) {
	man := runDocs(t, "man")
	sections := make(map[string]string)
	for _, part := range strings.Split(man, "\n.SS snilb ")[1:] {
		title, body, _ := strings.Cut(part, "\n")
		for title != "" && sections[title] == "" { // also under the title without its arguments
			sections[title] = body
			title, _, _ = cutLast(title, " ")
		}
	}
	bash, fish := runDocs(t, "bash"), runDocs(t, "fish")
	flags := 0
	eachFlag("", newApp().Commands, func(command string, flag cli.Flag, hidden bool) {
		if flag == nil {
			last := command[strings.LastIndex(command, " ")+1:]
			for what, has := range map[string]bool{
				"man":  sections[command] != "",
				"bash": strings.Contains(bash, fmt.Sprintf("\n\t%q) words=", command)),
				"fish": strings.Contains(fish, " -a "+last+" "),
			} {
				if has == hidden {
					t.Errorf("%s has %s: %t, and it is hidden: %t", what, command, has, hidden)
				}
			}
			return
		}
		flags++
		for _, name := range flag.Names() {
			dashes, fishFlag := "--", " -l "+name+" "
			if len(name) == 1 {
				dashes, fishFlag = "-", " -s "+name+" "
			}
			_, words, _ := strings.Cut(bash, fmt.Sprintf("\n\t%q) words=\"", command))
			words, _, _ = strings.Cut(words, "\"")
			fishLine := slices.ContainsFunc(strings.Split(fish, "\n"), func(line string) bool {
				last := command[strings.LastIndex(command, " ")+1:]
				return strings.Contains(line, "__fish_seen_subcommand_from "+last+"'") && strings.Contains(line, fishFlag)
			})
			for what, has := range map[string]bool{
				"man":  strings.Contains(sections[command], roff(dashes+name)),
				"bash": slices.Contains(strings.Fields(words), dashes+name),
				"fish": fishLine,
			} {
				if has == hidden {
					t.Errorf("%s: %s has %s: %t, and it is hidden: %t", command, what, dashes+name, has, hidden)
				}
			}
		}
	})
	if flags < 50 {
		t.Errorf("%d flags: the test has lost some", flags)
	}
}

func cutLast(s, separator string) (before, after string, found bool) {
	i := strings.LastIndex(s, separator)
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+len(separator):], true
}

// runApp runs a command line of the whole program.
func runApp(args ...string) (out, errOut string, code int) {
	var o, e bytes.Buffer
	app := newApp()
	app.Writer, app.ErrWriter = &o, &e
	code = exitCode(app, app.Run(append([]string{"snilb"}, args...)))
	return o.String(), e.String(), code
}

func runDocs(t *testing.T, args ...string) string {
	t.Helper()
	out, errOut, code := runApp(append([]string{"docs"}, args...)...)
	if code != 0 || errOut != "" {
		t.Fatalf("docs %q ends with %d: %s", args, code, errOut)
	}
	return out
}

func TestDocsUsage(t *testing.T) {
	for _, args := range [][]string{{"docs"}, {"docs", "html"}, {"docs", "man", "bash"}} {
		if _, errOut, code := runApp(args...); code != exitUsage || !strings.Contains(errOut, "bash, fish, man") {
			t.Errorf("%q ends with %d: %s", args, code, errOut)
		}
	}
}

func TestChoices(t *testing.T) {
	for usage, want := range map[string][]string{
		"`FORMAT`: table, json or jsonl":                  {"table", "json", "jsonl"},
		"the `PLACE` among other programs: first or last": {"first", "last"},
		"`WHAT` to do: detach":                            {"detach"},
		"the `ADDR` of it":                                nil,
		"as `LIST` with commas: h2,http/1.1":              nil,
		"by `MODE`: tc, or xdp (in the driver)":           nil,
	} {
		if got := choices(usage); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", usage, got, want)
		}
	}
}

// What troff would take for something else is written so that it does not.
func TestRoff(t *testing.T) {
	for text, want := range map[string]string{
		"--on-exit":    `\-\-on\-exit`,
		".hidden":      `\&.hidden`,
		"'a'":          `\(aqa\(aq`,
		`C:\x`:         `C:\(rsx`,
		" with room  ": "with room",
	} {
		if got := roff(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
