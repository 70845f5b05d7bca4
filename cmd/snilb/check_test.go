// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"snilb/userspace/config"
)

const routesFile = `version: 1
listen: [":443", {name: partners, address: "192.0.2.20:443", no_match: "pool:b", accept_proxy: 192.0.2.128/25}]
pools:
  a: {backends: [192.0.2.1:443, "[2001:db8::1]:443"]}
  b: {balance: maglev, proxy_protocol: v2, backends: {address: "192.0.2.2:443", name: b1, weight: 3}}
routes:
  - {name: h2, sni: www.example.com, alpn: h2, pool: b}
  - {sni: "*.example.com", pool: a}
  - {sni: canary.example.net, pools: {a: 3, b: 1}}
  - {sni: "", pool: b}
  - {sni: xn--bcher-kva.example, action: drop}
`

// run gives a command line to the two commands and returns what they print and
// the exit code.
func run(t *testing.T, args ...string) (out, errOut string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	app := &cli.App{
		Name: "snilb", Commands: []*cli.Command{checkCommand(), explainCommand()},
		Writer: &o, ErrWriter: &e,
		ExitErrHandler: func(*cli.Context, error) {},
	}
	err := app.Run(flagsAnywhere(app, append([]string{"snilb"}, args...)))
	if err != nil {
		code = 1
		var exit cli.ExitCoder
		if errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		if err.Error() != "" {
			e.WriteString(err.Error() + "\n")
		}
	}
	return o.String(), e.String(), code
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "routes.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCheck(t *testing.T) {
	good := write(t, strings.Replace(routesFile, "www.example.com", "www.example.org", 1))
	warned := write(t, routesFile)
	bad := write(t, "version: 2\nlisten: \":0\"\n")
	warning := `:8:5: %"*.example.com" spans pools: "www.example.com" on line 7 goes to another one, and a browser may reuse one HTTP/2 connection for both names; let the backends answer 421 to names that are not theirs` + "\n"
	const ok = "ok: 2 listeners, 2 pools, 3 backends, 5 routes\n"
	tests := []struct {
		what        string
		args        []string
		out, errOut string
		code        int
	}{
		{"good", []string{"check", good}, ok, "", 0},
		{"warning", []string{"check", warned}, ok, warned + strings.Replace(warning, "%", "warning: ", 1), 0},
		{"strict", []string{"check", "--strict", warned}, "", warned + strings.Replace(warning, "%", "", 1), 1},
		{"flag behind", []string{"check", warned, "--strict"}, "", warned + strings.Replace(warning, "%", "", 1), 1},
		{"strict and good", []string{"check", good, "--strict"}, ok, "", 0},
		{"bad", []string{"check", bad}, "", bad + ":1:10: version \"2\" is not known; this snilb reads version 1\n" +
			bad + ":2:9: listen address \":0\" has no valid port; a port is a number from 1 to 65535\n", 1},
		{"no file", []string{"check"}, "", "check takes one FILE: snilb check routes.yaml\n", 2},
		{"two files", []string{"check", good, bad}, "", "check takes one FILE: snilb check routes.yaml\n", 2},
		{"unknown flag", []string{"check", good, "--nonsense"}, "", "flag provided but not defined: -nonsense\n", 2},
		{"missing", []string{"check", good + "x"}, "", "read routes: open " + good + "x: no such file or directory\n", 1},
		{"no host check", []string{"check", good, "--host"}, "", "--host is not supported by this build\n", 1},
	}
	for _, tt := range tests {
		t.Run(tt.what, func(t *testing.T) {
			out, errOut, code := run(t, tt.args...)
			if d := cmp.Diff([]any{tt.out, tt.errOut, tt.code}, []any{out, errOut, code}); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

func TestCheckHost(t *testing.T) {
	t.Cleanup(func() { hostCheck = nil })
	hostCheck = func(c *config.Config) []config.Problem {
		b := c.Pools[0].Backends[0]
		return []config.Problem{{Position: b.Pos, What: "no route to " + b.Addr.String(), Remedy: "add one"}}
	}
	path := write(t, strings.Replace(routesFile, "www.example.com", "www.example.org", 1))
	out, errOut, code := run(t, "check", path, "--host")
	if out != "" || errOut != path+":4:18: no route to 192.0.2.1:443; add one\n" || code != 1 {
		t.Errorf("%q, %q, %d", out, errOut, code)
	}
	if _, _, code := run(t, "check", path); code != 0 {
		t.Error("the machine was looked at without --host")
	}
}

func TestExplainTable(t *testing.T) {
	path := write(t, routesFile)
	out, errOut, code := run(t, "explain", "WWW.Example.com.", "--routes", path, "--alpn", "http/1.1", "--client", "192.0.2.99")
	want := `name      www.example.com
listener  :443
route     *.example.com (line 8)
action    pool
pool      a, round_robin, 100 %
          192.0.2.1:443  name 192.0.2.1:443  weight 1

line  route          pattern          verdict  why
7     h2             www.example.com  lost     alpn: the client offers http/1.1, not h2
8     *.example.com  *.example.com    won      one label in front
`
	if d := cmp.Diff(want, out); d != "" || errOut != "" || code != 0 {
		t.Errorf("%q, %d, -want +got:\n%s", errOut, code, d)
	}
}

func TestExplainJSON(t *testing.T) {
	path := write(t, routesFile)
	tests := []struct {
		what, args, route, action, pools, listener string
	}{
		{"no name", "", "no_name", "pool", "b:1 192.0.2.2:443", ":443"},
		{"shares", "canary.example.net", "canary.example.net", "pool", "a:0.75 192.0.2.1:443 [2001:db8::1]:443,b:0.25 192.0.2.2:443", ":443"},
		{"IPv6 client", "canary.example.net --client 2001:db8::9", "canary.example.net", "pool", "a:0.75 [2001:db8::1]:443,b:0.25", ":443"},
		{"client with port", "x.example.com --client 192.0.2.9:5", "*.example.com", "pool", "a:1 192.0.2.1:443", ":443"},
		{"upper case", "XN--Bcher-kva.Example.", "xn--bcher-kva.example", "drop", "", ":443"},
		{"no match", "example.invalid", "", "reset", "", ":443"},
		{"the listener's no_match", "example.invalid --listen partners", "", "pool", "b:1 192.0.2.2:443", "partners"},
		{"listener by address", "example.invalid --listen 192.0.2.20:443", "", "pool", "b:1 192.0.2.2:443", "partners"},
		{"listener of every address", "example.invalid --listen 192.0.2.21:443", "", "reset", "", ":443"},
	}
	for _, tt := range tests {
		t.Run(tt.what, func(t *testing.T) {
			args := append([]string{"explain"}, strings.Fields(tt.args)...)
			out, errOut, code := run(t, append(args, "--routes", path, "-o", "json")...)
			var e explanation
			if err := json.Unmarshal([]byte(out), &e); err != nil || code != 0 {
				t.Fatalf("%v, %d, %s", err, code, errOut)
			}
			var pools []string
			for _, p := range e.Pools {
				words := []string{p.Pool + ":" + strings.TrimRight(strings.TrimRight(jsonNumber(p.Share), "0"), ".")}
				for _, b := range p.Backends {
					words = append(words, b.Backend)
				}
				pools = append(pools, strings.Join(words, " "))
			}
			got := []string{e.Route, e.Action, strings.Join(pools, ","), e.Listener}
			if d := cmp.Diff([]string{tt.route, tt.action, tt.pools, tt.listener}, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if lines, _, _ := run(t, append(args, "--routes", path, "-o", "jsonl")...); strings.Count(lines, "\n") != 1 {
				t.Errorf("jsonl has several lines:\n%s", lines)
			}
		})
	}
}

func jsonNumber(f float64) string {
	b, _ := json.Marshal(f)
	return string(b)
}

func TestExplainUsage(t *testing.T) {
	path := write(t, routesFile)
	tests := []struct {
		args, errOut string
		code         int
	}{
		{"a b --routes " + path, "explain takes at most one NAME\n", 2},
		{"a --routes " + path + " -o xml", "-o cannot be \"xml\": use table, json or jsonl\n", 2},
		{"a", "explain needs --routes FILE\n", 2},
		{"a..b --routes " + path, "name \"a..b\" has an empty label\n", 2},
		{"a --client x --routes " + path, "--client \"x\" is not an IP address\n", 2},
		{"a --listen :80 --routes " + path, "--listen \":80\" is no listener of the file: it has :443, partners\n", 2},
		{"a --routes " + path + "x", "read routes: open " + path + "x: no such file or directory\n", 1},
	}
	for _, tt := range tests {
		_, errOut, code := run(t, append([]string{"explain"}, strings.Fields(tt.args)...)...)
		if errOut != tt.errOut || code != tt.code {
			t.Errorf("%s: %d, %q, want %d, %q", tt.args, code, errOut, tt.code, tt.errOut)
		}
	}
}

func TestFlagsAnywhere(t *testing.T) {
	app := &cli.App{
		Flags: []cli.Flag{&cli.StringFlag{Name: "level"}, &cli.BoolFlag{Name: "quiet"}},
		Commands: []*cli.Command{{
			Name:  "do",
			Flags: []cli.Flag{&cli.StringFlag{Name: "out", Aliases: []string{"o"}}, &cli.BoolFlag{Name: "fast"}},
		}, {
			Name:        "many",
			Subcommands: []*cli.Command{{Name: "one", Flags: []cli.Flag{&cli.StringFlag{Name: "out"}}}},
		}},
	}
	for in, want := range map[string]string{
		"p do x --fast -o y z":    "p do --fast -o y x z",
		"p --level 3 do x --fast": "p --level 3 do --fast x",
		"p --quiet do x --out=y":  "p --quiet do --out=y x",
		"p do x -- --fast":        "p do x -- --fast",
		"p do - --fast":           "p do --fast -",
		"p do x --unknown y":      "p do --unknown x y",
		"p do x --out":            "p do --out x",
		"p other x --fast":        "p other x --fast",
		"p many one x --out y z":  "p many one --out y x z",
		"p many two x --out y z":  "p many two x --out y z",
		"p many":                  "p many",
		"p":                       "p",
		"p --quiet":               "p --quiet",
	} {
		if got := strings.Join(flagsAnywhere(app, strings.Fields(in)), " "); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}
