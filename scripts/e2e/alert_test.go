// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// alertRecord is a fatal alert as it comes over the wire.
func alertRecord(description byte) []byte { return []byte{21, 3, 3, 0, 2, 2, description} }

// wantAlert reads a fatal alert and then the end of the stream: no reset, nor anything else.
func wantAlert(description byte) func(*testing.T, net.Conn) {
	return func(t *testing.T, c net.Conn) {
		t.Helper()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, alertRecord(description)) {
			t.Errorf("read %x, %v; want an alert %d and the end", got, err, description)
		}
		// Our own end is acknowledged: a close that waits for it, and a kernel that keeps quiet afterwards.
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// alertClients show what they make of an alert on stderr, or in an error.
var alertClients = []struct {
	name, tool string
	says       string // of unrecognized_name
	get        func(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) (string, error)
}{
	{"curl", "curl", "unrecognized name", curl},
	{"openssl", "openssl", "SSL alert number 112", opensslClient},
	{"gnutls", "gnutls-cli", "TLS fatal alert has been received", gnutlsClient},
	{"go", "", "tls: unrecognized name", goClient},
}

// TestAlert has every word alert, and asks in each of the ways that lead there.
func TestAlert(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	routes := siteRoutes(bed, "no_match: alert", "not_tls: alert", "no_backend: alert", "timeouts: {connect: 1s, attempt: 500ms}")
	routes = strings.Replace(routes, "pools:\n", fmt.Sprintf("pools:\n  down: {backends: [%q, %q]}\n", at(bed, 1, false, 9), at(bed, 1, true, 9)), 1)
	routes += "  - {sni: down.example.com, pool: down}\n  - {sni: no.example.com, action: alert}\n"
	d := attach(t, bed, routes)
	families(t, func(t *testing.T, v6 bool) {
		for _, c := range alertClients {
			t.Run(c.name, func(t *testing.T) {
				if c.tool != "" {
					needTool(t, c.tool)
				}
				for _, name := range []string{"unknown.example.com", "no.example.com"} {
					if got, err := c.get(t, bed, vip(bed, v6), name); err == nil || !strings.Contains(err.Error(), c.says) {
						t.Errorf("%s: answer %q, error %v; want one with %q", name, got, err, c.says)
					}
				}
				got, err := c.get(t, bed, vip(bed, v6), "a.example.com")
				wantBody(t, got, err, "b1", "a.example.com")
			})
		}
		t.Run("no-backend", func(t *testing.T) {
			if _, err := goClient(t, bed, vip(bed, v6), "down.example.com"); err == nil || !strings.Contains(err.Error(), "tls: internal error") {
				t.Errorf("error %v, want the alert internal_error", err)
			}
		})
		t.Run("not-tls", func(t *testing.T) {
			wantEnding(t, bed, vip(bed, v6), []byte("GET / HTTP/1.0\r\n\r\n"), wantAlert(10))
		})
		t.Run("pieces", func(t *testing.T) { alertInPieces(t, bed, vip(bed, v6)) })
		t.Run("same-port", func(t *testing.T) { alertSamePort(t, bed, vip(bed, v6)) })
		t.Run("lost", func(t *testing.T) { alertLost(t, bed, vip(bed, v6)) })
	})
	for _, f := range d.flows() {
		if f.SNI != "a.example.com" {
			t.Errorf("a flow without a backend: %+v", f)
		}
	}
}

// alertInPieces sends the hello byte by byte, and more than the hello: all of it is acknowledged.
func alertInPieces(t *testing.T, bed *testbed.Bed, target netip.AddrPort) {
	c, err := dialTCP(t, bed, target)
	must(t, err)
	must(t, c.SetDeadline(time.Now().Add(clientTimeout)))
	first := hello(t, classic("unknown.example.com"))
	_, err = (&splitter{Conn: c, size: 50, pause: time.Millisecond}).Write(append(first, make([]byte, 3000)...))
	must(t, err) // a reset would be one
	wantAlert(112)(t, c)
}

// alertSamePort asks again at once from the port that an alert was sent to, for a name that has a route: its cookie is the
// same, as no time has passed.
func alertSamePort(t *testing.T, bed *testbed.Bed, target netip.AddrPort) {
	for range 3 {
		c, err := dialFromPort(bed, target, 7777)
		must(t, err)
		must(t, c.SetDeadline(time.Now().Add(5*time.Second)))
		_, err = c.Write(hello(t, classic("unknown.example.com")))
		must(t, err)
		_, err = io.ReadAll(c)
		must(t, err)
		must(t, c.(*net.TCPConn).SetLinger(0)) // leaves no TIME_WAIT
		must(t, c.Close())
		c, err = dialFromPort(bed, target, 7777)
		must(t, err)
		must(t, c.SetDeadline(time.Now().Add(5*time.Second)))
		began := time.Now()
		got, err := whoami(handshake(t, c, classic("a.example.com")))
		wantBody(t, got, err, "b1", "a.example.com")
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("took %s", took)
		}
		must(t, c.(*net.TCPConn).SetLinger(0))
		must(t, c.Close())
	}
}

// alertLost takes no notice of the alert and repeats the hello, then closes and repeats that: each is answered again, and
// never by a reset.
func alertLost(t *testing.T, bed *testbed.Bed, target netip.AddrPort) {
	r, err := bed.Raw(target)
	must(t, err)
	defer func() { _ = r.Close() }()
	_, err = r.Open(testbed.LinuxSYN(r.TSVal), 3*time.Second)
	must(t, err)
	first := hello(t, classic("unknown.example.com"))
	for range 3 {
		must(t, r.Send(r.At(0, first)))
		got, err := r.Recv(3 * time.Second)
		must(t, err)
		if !got.Has(testbed.FIN|testbed.ACK) || got.Seq != r.RcvNxt || got.Ack != r.ISS+1+uint32(len(first)) || !bytes.Equal(got.Payload, alertRecord(112)) {
			t.Errorf("answer %s", got)
		}
	}
	r.SndNxt += uint32(len(first))
	r.RcvNxt += 8 // the alert and the FIN
	must(t, r.Send(r.Bare(0)))
	must(t, r.Quiet(200*time.Millisecond))
	for range 2 {
		must(t, r.Send(r.Bare(testbed.FIN)))
		got, err := r.Recv(3 * time.Second)
		must(t, err)
		if got.Flags != testbed.ACK || got.Seq != r.RcvNxt || got.Ack != r.SndNxt+1 {
			t.Errorf("answer to our FIN: %s", got)
		}
	}
}
