// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"snilb/userspace/config"
	"snilb/userspace/route"
)

func demoTestServers() []demoServer {
	var servers []demoServer
	for i, name := range demoServerNames {
		n := byte(11 + i)
		servers = append(servers, demoServer{
			name: name, addr4: netip.AddrFrom4([4]byte{192, 0, 2, n}),
			addr6: netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: n + 6}), fingerprint: strings.Repeat(name, 8),
		})
	}
	return servers
}

func TestDemoTopology(t *testing.T) {
	var b bytes.Buffer
	demoPrinter{w: &b}.topology(netip.MustParseAddr("198.51.100.10"), netip.MustParseAddr("2001:db8:1::10"),
		netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:1::1"), demoTestServers())
	want := `   client               snilb                     TLS backends
  +----------------+   +---------------------+   +---------------------------+
  | 198.51.100.10  |   | 198.51.100.1:443    |   | A 192.0.2.11 2001:db8::11 |
  |                |---| eth0           eth1 |---| B 192.0.2.12 2001:db8::12 |
  | 2001:db8:1::10 |   | [2001:db8:1::1]:443 |   | C 192.0.2.13 2001:db8::13 |
  +----------------+   +---------------------+   +---------------------------+

  backend A has a key and a certificate of its own, AAAAAAAA
  backend B has a key and a certificate of its own, BBBBBBBB
  backend C has a key and a certificate of its own, CCCCCCCC
  snilb has neither.
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// TestDemoRoutes asks the router what the demo expects of the whole.
func TestDemoRoutes(t *testing.T) {
	file, err := config.Load(write(t, demoRoutes(demoTestServers())))
	if err != nil {
		t.Fatal(err)
	}
	table := route.New(file)
	for _, ask := range demoAsks {
		d := table.Match(route.Query{ServerName: ask.name, ALPN: []string{ask.alpn}})
		got := ""
		if d.Route != nil {
			got = d.Route.Pools[0].Pool.Name
		}
		if got != ask.answer {
			t.Errorf("%s %s goes to %q, want %q", ask.name, ask.alpn, got, ask.answer)
		}
	}
}

func TestDemoRequest(t *testing.T) {
	ask := demoAsk{"a.example.com", "h2", false, "A"}
	unknown := demoAsk{"nobody.example.org", "http/1.1", false, ""}
	good := demoAnswer{
		backend: "A", sni: "a.example.com", alpn: "h2", certOwner: "A", fingerprint: "0badcafe", took: 1234 * time.Microsecond,
	}
	with := func(change func(*demoAnswer)) demoAnswer {
		got := good
		change(&got)
		return got
	}
	reset := demoAnswer{err: errDemoReset, took: time.Millisecond}
	tests := []struct {
		what    string
		ask     demoAsk
		got     demoAnswer
		problem string
		line    string
	}{
		{"good", ask, good, "", "A 192.0.2.11       0badcafe A's   1.2 ms  ok"},
		{"reset", unknown, reset, "", "nobody: reset      -              1.0 ms  ok"},
		{"reset of a known name", ask, reset, "reset", "nobody: reset      -              1.0 ms  WRONG"},
		{"wrong backend", ask, with(func(a *demoAnswer) { a.backend = "B" }), "B answered, want A", "WRONG"},
		{"wrong certificate", ask, with(func(a *demoAnswer) { a.certOwner = "" }), `the certificate is ""'s, want A's`, "WRONG"},
		{"wrong name", ask, with(func(a *demoAnswer) { a.sni = "x" }), `the backend was asked for "x"`, "WRONG"},
		{"wrong ALPN", ask, with(func(a *demoAnswer) { a.alpn = "" }), `the backend speaks ""`, "WRONG"},
		{"error", ask, demoAnswer{err: io.EOF}, "EOF", "nobody "},
		{"answer to an unknown name", unknown, good, "A answered, want a reset", "WRONG"},
		{"no reset of an unknown name", unknown, demoAnswer{err: io.EOF}, "want a reset: EOF", "WRONG"},
	}
	for _, tt := range tests {
		t.Run(tt.what, func(t *testing.T) {
			problem := tt.ask.check(tt.got)
			if problem != tt.problem {
				t.Errorf("problem %q, want %q", problem, tt.problem)
			}
			var b bytes.Buffer
			demoPrinter{w: &b}.request(tt.ask, tt.got, "192.0.2.11", problem)
			first, rest, _ := strings.Cut(b.String(), "\n")
			if !strings.Contains(first, tt.line) || !strings.HasPrefix(first, "  "+tt.ask.name) {
				t.Errorf("printed %q, want %q", first, tt.line)
			}
			if problem != "" && strings.TrimSpace(rest) != problem {
				t.Errorf("the reason is printed as %q, want %q", rest, problem)
			}
		})
	}
}

func TestDemoCounters(t *testing.T) {
	c := sumDemoCounters([]interfaceStatus{
		{Role: "client", Packets: map[string]uint64{"answer/syn": 3, "drop/handshake_ack": 2, "engine/hello": 4, "forward/flow": 1000, "pass/not_tcp": 7}},
		{Role: "backend", Packets: map[string]uint64{"engine/backend": 5, "engine/unknown_flow": 1, "forward/flow": 2000000}},
		{Role: "tap", Packets: map[string]uint64{"forward/engine_output": 8, "forward/flow": 9}},
	})
	want := demoCounters{answered: 3, acks: 2, forwarded: 2001000, events: 10, sent: 17, hellos: 4, backend: 5}
	if c != want {
		t.Errorf("%+v, want %+v", c, want)
	}
	if d := c.minus(c); d != (demoCounters{}) {
		t.Errorf("difference to itself: %+v", d)
	}
	var b bytes.Buffer
	demoPrinter{w: &b}.counters(c, 4, 0)
	if want := "2,001,005 packets handled by the kernel alone, 10 events seen by user space: 2.5 per connection."; !strings.Contains(b.String(), want) {
		t.Errorf("no %q in\n%s", want, b.String())
	}
}

func TestDemoFails(t *testing.T) {
	d := &demo{servers: demoTestServers()}
	d.checkDownload(demoCounters{forwarded: 99, events: 1}, nil)
	got := errors.Join(d.failures...).Error()
	want := "download: 99 packets were forwarded by the kernel, 1 went to user space\n" +
		"snilb flows: no open flow from a.example.com to 192.0.2.11:443 among 0"
	if got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestDemoColour(t *testing.T) {
	p := demoPrinter{colour: true}
	if got, want := p.cell(demoGreen, 4, "ok"), "\x1b[32mok\x1b[0m  "; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := (demoPrinter{}).cell(demoGreen, 4, "ok"); got != "ok  " {
		t.Errorf("without colour %q", got)
	}
	file, err := os.Create(t.TempDir() + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	if demoColour(file) || demoColour(io.Discard) {
		t.Error("colour for what is no terminal")
	}
}

func TestDemoNumbers(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := demoNumber(n); got != want {
			t.Errorf("%d is printed as %s, want %s", n, got, want)
		}
	}
	for n, want := range map[uint64]string{0: "0 B", 1743: "1.7 KiB", 256 << 20: "256 MiB"} {
		if got := demoBytes(n); got != want {
			t.Errorf("%d bytes are printed as %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{1500 * time.Microsecond: "1.5 ms", 1320 * time.Millisecond: "1.32 s"} {
		if got := demoDuration(d); got != want {
			t.Errorf("%v is printed as %s, want %s", d, got, want)
		}
	}
}

func TestDemoReadyLine(t *testing.T) {
	l := newDemoLog()
	for _, part := range []string{"not ready\n", "ready for", " more\nrea", "dy"} {
		_, _ = l.Write([]byte(part))
	}
	select {
	case <-l.ready:
		t.Error("ready before the line was whole")
	default:
	}
	_, _ = l.Write([]byte("\nmore\n"))
	_, _ = l.Write([]byte("ready\n"))
	select {
	case <-l.ready:
	default:
		t.Error("the line was not seen")
	}
	if want := "not ready\nready for more\nready\nmore\nready\n"; l.String() != want {
		t.Errorf("kept %q", l.String())
	}
}

func TestDemoUsage(t *testing.T) {
	for _, tt := range []struct {
		args []string
		code int
	}{{[]string{"demo", "x"}, exitUsage}, {[]string{"demo", "--size", "0"}, exitUsage}, {[]string{"demo", "--nothing"}, exitUsage}} {
		app := newApp()
		app.Writer, app.ErrWriter = io.Discard, io.Discard
		if code := exitCode(app, app.Run(append([]string{"snilb"}, tt.args...))); code != tt.code {
			t.Errorf("%v: code %d, want %d", tt.args, code, tt.code)
		}
	}
}
