// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// openings are what clients of other protocols say first.
var openings = map[string]string{
	"http":     "GET / HTTP/1.1\r\nHost: a.example.com\r\n\r\n",
	"ssh":      "SSH-2.0-OpenSSH_9.9\r\n",
	"smtp":     "EHLO a.example.com\r\n",
	"starttls": "STARTTLS\r\n",
	"postgres": "\x00\x00\x00\x08\x04\xd2\x16\x2f",
	"binary":   "\x01\x02\x03\x04\x05\x06\x07\x08",
	"typed":    "GET",
}

// TestNotTLSProtocols speaks them under each not_tls, by hand and by real clients. No backend of a TLS pool sees any.
func TestNotTLSProtocols(t *testing.T) {
	needTool(t, "curl", "ssh", "openssl")
	bed := newBed(t, testbed.Options{})
	backends := startBackends(t, bed)
	heard := make(chan string, 100)
	for _, v6 := range []bool{false, true} {
		serve(t, bed.Backend, at(bed, 3, v6, 80), func(c net.Conn) { hear(c, heard) })
	}
	plain := fmt.Sprintf("  plain: {backends: [%q, %q]}\n", at(bed, 3, false, 80), at(bed, 3, true, 80))
	for _, word := range []string{"reset", "drop", "pool:plain"} {
		t.Run(word, func(t *testing.T) {
			routes := strings.Replace(siteRoutes(bed, fmt.Sprintf("not_tls: %q", word), "timeouts: {hello: 2s}"), "pools:\n", "pools:\n"+plain, 1)
			d := attach(t, bed, routes)
			families(t, func(t *testing.T, v6 bool) {
				var all sync.WaitGroup
				for name, first := range openings {
					all.Go(func() { speak(t, bed, v6, word, name, first) })
				}
				all.Go(func() { starttls(t, bed, v6) })
				if word != "drop" { // in which they would only wait
					all.Go(func() { realClients(t, bed, v6, word) })
				}
				all.Wait()
				if word == "pool:plain" {
					wantHeard(t, heard)
				}
				d.waitCounters("no half-open connection", 10*time.Second, func(c *counters) bool { return c.Engine.HalfOpen == 0 })
			})
		})
	}
	for name, b := range backends {
		if n := b.Conns.Load(); n != 0 {
			t.Errorf("%d connections of other protocols reached the TLS backend %s", n, name)
		}
	}
}

// hear answers as a web server would, once three bytes are there, and says what they were.
func hear(c net.Conn, heard chan<- string) {
	defer func() { _ = c.Close() }()
	buf := make([]byte, 1000)
	n, err := io.ReadAtLeast(c, buf, 3)
	if err != nil {
		return
	}
	heard <- string(buf[:n])
	_, _ = io.WriteString(c, "HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nplain\n")
}

// speak sends the first words of a protocol and looks that what not_tls says becomes of them.
func speak(t *testing.T, bed *testbed.Bed, v6 bool, word, name, first string) {
	c, err := dialFor(t, bed, vip(bed, v6))
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	defer func() { _ = c.Close() }()
	if name == "typed" {
		for _, key := range first {
			_, _ = c.Write([]byte{byte(key)})
			time.Sleep(150 * time.Millisecond)
		}
	} else {
		_, _ = io.WriteString(c, first)
	}
	if ending := endings[word]; ending != nil {
		ending(t, c)
		return
	}
	answer, err := io.ReadAll(c)
	if err != nil || !strings.HasSuffix(string(answer), "plain\n") {
		t.Errorf("%s: answer %q, %v", name, answer, err)
	}
}

// dialFor is a connection with a deadline, made outside of the test's own goroutine.
func dialFor(t *testing.T, bed *testbed.Bed, target netip.AddrPort) (net.Conn, error) {
	c, err := bed.Client.DialWith(t.Context(), &net.Dialer{Timeout: clientTimeout}, "tcp", target.String())
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(clientTimeout))
}

// starttls is a client that waits for the server's greeting: it says nothing, so nothing is decided, and nothing stored.
func starttls(t *testing.T, bed *testbed.Bed, v6 bool) {
	out, err := bed.Client.Command(t.Context(), "timeout", "1", "openssl", "s_client", "-connect", vip(bed, v6).String(), "-starttls", "smtp").CombinedOutput()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 124 { // timeout(1) had to end it
		t.Errorf("starttls: %v\n%s", err, out)
	}
}

// realClients are programs that people have.
func realClients(t *testing.T, bed *testbed.Bed, v6 bool, word string) {
	target := vip(bed, v6)
	out, err := bed.Client.Command(t.Context(), "curl", "-sS", "--max-time", "15", "http://"+target.String()).CombinedOutput()
	got := strings.TrimSpace(string(out))
	if word == "reset" && !strings.Contains(got, "reset by peer") || word != "reset" && (err != nil || got != "plain") {
		t.Errorf("curl: %v, %s", err, got)
	}
	out, err = bed.Client.Command(t.Context(), "ssh", "-F", "none", "-o", "ConnectTimeout=15", "-o", "BatchMode=yes", "-p", fmt.Sprint(target.Port()), "nobody@"+target.Addr().String()).CombinedOutput()
	if err == nil || word == "reset" && !strings.Contains(string(out), "reset") {
		t.Errorf("ssh: %v, %s", err, out)
	}
}

// wantHeard asks for each opening as it was sent: those above, curl's and ssh's.
func wantHeard(t *testing.T, heard <-chan string) {
	t.Helper()
	var all []string
	for range len(openings) + 2 {
		select {
		case first := <-heard:
			all = append(all, first)
		case <-time.After(5 * time.Second):
			t.Fatalf("the plain backend has heard only %q", all)
		}
	}
	for name, want := range openings {
		found := false
		for _, first := range all {
			found = found || first == want
		}
		if !found {
			t.Errorf("%s is not among what the plain backend has heard: %q", name, all)
		}
	}
	if text := strings.Join(all, "|"); strings.Count(text, "GET /") != 2 || strings.Count(text, "SSH-2.0-") != 2 {
		t.Errorf("curl or ssh is not among %q", all)
	}
}

// TestProbeBeforeHello probes the idle connection by a garbage byte below the first real one, as some stacks do: that is
// acknowledged, and is no part of the stream that follows.
func TestProbeBeforeHello(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	attach(t, bed, siteRoutes(bed, "timeouts: {hello: 2s}"))
	families(t, func(t *testing.T, v6 bool) {
		for _, probes := range []int{1, 2} {
			t.Run(fmt.Sprintf("answered-%d", probes-1), func(t *testing.T) {
				r, err := bed.Raw(vip(bed, v6))
				must(t, err)
				defer func() { _ = r.Close() }()
				_, err = r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
				must(t, err)
				must(t, r.Send(r.At(-1, []byte{0})))
				for range probes - 1 { // without one the hello follows at once
					wantACK(t, r, 1)
					must(t, r.Send(r.At(-1, []byte{0})))
					wantACK(t, r, 1)
				}
				got, err := whoami(handshake(t, r, trusting(classic("b.example.com"))))
				wantBody(t, got, err, "b2", "b.example.com")
				must(t, r.Send(r.Bare(testbed.RST)))
			})
		}
		t.Run("nothing-follows", func(t *testing.T) {
			wantEnding(t, bed, vip(bed, v6), []byte{0}, endings["reset"])
		})
	})
}

// TestKeepaliveBeforeHello is a kernel client that probes by segments without data before it speaks.
func TestKeepaliveBeforeHello(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	var all sync.WaitGroup
	before := d.counters()
	for _, v6 := range []bool{false, true} {
		all.Go(func() {
			dialer := net.Dialer{Timeout: clientTimeout, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 9}}
			c, err := bed.Client.DialWith(t.Context(), &dialer, "tcp", vip(bed, v6).String())
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = c.Close() }()
			time.Sleep(3500 * time.Millisecond)
			_, err = c.Write(hello(t, classic("a.example.com")))
			if err := errors.Join(err, c.SetReadDeadline(time.Now().Add(clientTimeout))); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
				t.Errorf("IPv6 %t: no answer of the backend: %v", v6, err)
			}
		})
	}
	all.Wait()
	after := d.counters()
	if n := after.packets("drop/handshake_ack") - before.packets("drop/handshake_ack"); n < 6 {
		t.Errorf("%d bare ACKs were seen, want two handshakes' and at least four probes", n)
	}
}
