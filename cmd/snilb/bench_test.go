// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"snilb/userspace/bench"
)

// runBench runs `snilb bench ...` in the test's process.
func runBench(t *testing.T, line string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errOut bytes.Buffer
	app := newApp()
	app.Writer, app.ErrWriter = &out, &errOut
	args := append([]string{"snilb", "bench"}, strings.Fields(line)...)
	code = exitCode(app, app.Run(flagsAnywhere(app, args)))
	return out.String(), errOut.String(), code
}

// benchServer answers hellos until the test ends.
func benchServer(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- bench.Serve(ctx, 1, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func TestBenchCommands(t *testing.T) {
	target := benchServer(t)
	plot := filepath.Join(t.TempDir(), "run.svg")
	for _, line := range []string{
		"connections " + target + " --sni a.example.com --warmup 0s --duration 200ms --plot " + plot,
		"connections " + target + " --sni site-#.example.com --names 50 --zipf 1.1 --layout chrome --alpn h2 --record-bytes 100 --warmup 0s --duration 200ms --close rst",
		"connections " + target + " --no-sni 1 --segment-bytes 200 --rate 200 --warmup 0s --duration 200ms --from 127.0.0.2",
		"requests " + target + " --sni a --warmup 0s --duration 200ms --size 3000",
		"bulk " + target + " --sni a --size 3000000",
		"bulk " + target + " --sni a --size 3000000 --upload --concurrency 2",
		"idle " + target + " --sni a --concurrency 50 --hold 10ms",
	} {
		stdout, stderr, code := runBench(t, line+" -o json")
		var res bench.Result
		if err := json.Unmarshal([]byte(stdout), &res); err != nil || code != 0 {
			t.Fatalf("%s: code %d, %v\n%s%s", line, code, err, stdout, stderr)
		}
		if kind, _, _ := strings.Cut(line, " "); res.Kind != kind || res.Successes == 0 || res.Failed() != 0 {
			t.Errorf("%s: %s", line, stdout)
		}
		if strings.HasPrefix(line, "idle") != strings.Contains(stderr, "holding 50\n") {
			t.Errorf("%s: stderr %q", line, stderr)
		}
	}
	if _, err := os.Stat(plot); err != nil {
		t.Error(err)
	}
	stdout, _, code := runBench(t, "connections "+target+" --sni a --warmup 0s --duration 100ms")
	for _, want := range []string{"connections  to " + target, "succeeded", "p99.99"} {
		if code != 0 || !strings.Contains(stdout, want) {
			t.Errorf("code %d, no %q in\n%s", code, want, stdout)
		}
	}
}

func TestBenchErrors(t *testing.T) {
	for line, want := range map[string]struct {
		code int
		text string
	}{
		"connections 127.0.0.1:1 --sni a --warmup 0s --duration 50ms": {exitFailed, "nothing succeeded"},
		"connections --sni a":                                                       {exitUsage, "takes one ADDR:PORT"},
		"connections 127.0.0.1:1":                                                   {exitUsage, "--sni NAME"},
		"connections nowhere --sni a":                                               {exitUsage, "target"},
		"connections 127.0.0.1:1 --sni a --layout lynx":                             {exitUsage, "no layout"},
		"connections 127.0.0.1:1 --sni a --names 5":                                 {exitUsage, "no #"},
		"connections 127.0.0.1:1 --sni a --close maybe":                             {exitUsage, "--close"},
		"connections 127.0.0.1:1 --sni a --from here":                               {exitUsage, "--from"},
		"connections 127.0.0.1:1 --sni a --plot x.pdf":                              {exitUsage, "--plot"},
		"connections 127.0.0.1:1 --sni a -o xml":                                    {exitUsage, "-o cannot be"},
		"connections 127.0.0.1:1 --sni a --rate -5":                                 {exitUsage, "rate"},
		"requests 127.0.0.1:1 --sni a --size 0":                                     {exitUsage, "answers of 0"},
		"bulk 127.0.0.1:1 --sni a --size 0":                                         {exitUsage, "transfer of 0"},
		"connections 192.0.2.1:1 --sni a --packets":                                 {exitUsage, "--interface"},
		"connections 192.0.2.1:1 --sni a --packets --interface lo --sources here":   {exitUsage, "--sources"},
		"connections 192.0.2.1:1 --sni a --packets --interface lo0 --sources ::/64": {exitUsage, "lo0"},
		"flood 192.0.2.1:1 --interface lo":                                          {exitUsage, "--sources"},
		"flood 192.0.2.1:1 --interface lo --sources 10.0.0.0/8 --kind tea":          {exitUsage, "no flood of kind"},
		"serve 192.0.2.1:1 --packets":                                               {exitUsage, "--interface"},
		"serve here --packets --interface lo":                                       {exitUsage, "no ADDR:PORT"},
		"serve":                                                                     {exitUsage, "needs an ADDR:PORT"},
		"serve 192.0.2.1:1":                                                         {exitFailed, "cannot assign"},
		"fly":                                                                       {exitUsage, "no command"},
	} {
		_, stderr, code := runBench(t, line)
		if code != want.code || !strings.Contains(stderr, want.text) {
			t.Errorf("%s: code %d, %q; want %d, %q", line, code, stderr, want.code, want.text)
		}
	}
}
