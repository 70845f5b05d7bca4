// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"snilb/scripts/testbed"
	"snilb/userspace/engine"
)

const demoRequestTimeout = 5 * time.Second

// errDemoReset is what a client sees of a refused connection.
var errDemoReset = errors.New("reset")

// demoTrust knows the backends by their certificates.
type demoTrust struct {
	pool  *x509.CertPool
	owner map[[sha256.Size]byte]string
}

func newDemoTrust() *demoTrust {
	return &demoTrust{pool: x509.NewCertPool(), owner: make(map[[sha256.Size]byte]string)}
}

// add makes a backend's certificate known and returns its short fingerprint.
func (t *demoTrust) add(name string, cert *testbed.Cert) (string, error) {
	if !t.pool.AppendCertsFromPEM(cert.CertPEM) {
		return "", fmt.Errorf("certificate of backend %s is unreadable", name)
	}
	sum := sha256.Sum256(cert.TLS.Certificate[0])
	t.owner[sum] = name
	return hex.EncodeToString(sum[:4]), nil
}

// demoAsk is a request and what must come of it.
type demoAsk struct {
	name   string
	alpn   string
	v6     bool
	answer string // the backend's name; "" is a reset
}

var demoAsks = []demoAsk{
	{"a.example.com", "http/1.1", false, "A"},
	{"b.example.com", "http/1.1", false, "B"},
	{"shoes.shop.example.com", "http/1.1", false, "C"},
	{"books.shop.example.com", "http/1.1", false, "C"},
	{"api.example.com", "http/1.1", false, "A"},
	{"api.example.com", "h2", false, "B"},
	{"a.example.com", "http/1.1", true, "A"},
	{"b.example.com", "h2", true, "B"},
	{"nobody.example.org", "http/1.1", false, ""},
}

// demoAnswer is what a client has seen.
type demoAnswer struct {
	backend     string // says the answer
	sni         string // says the backend
	alpn        string
	certOwner   string
	fingerprint string
	took        time.Duration
	err         error
}

// requests sends every request on a connection of its own.
func (d *demo) requests(ctx context.Context) {
	d.out.requestHead()
	for _, ask := range demoAsks {
		got := d.ask(ctx, ask)
		if ctx.Err() != nil {
			return
		}
		problem := ask.check(got)
		if problem != "" {
			d.fail("%s (%s): %s", ask.name, ask.alpn, problem)
		}
		d.out.request(ask, got, d.addrOf(got.backend, ask.v6), problem)
	}
	d.out.note("Every certificate is the backend's own: TLS goes from end to end.")
}

func (d *demo) vip(v6 bool) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(d.bed.VIP6, 443)
	}
	return netip.AddrPortFrom(d.bed.VIP4, 443)
}

func (d *demo) addrOf(server string, v6 bool) string {
	for _, s := range d.servers {
		if s.name == server && v6 {
			return s.addr6.String()
		} else if s.name == server {
			return s.addr4.String()
		}
	}
	return ""
}

// client makes a connection to the balancer for every request.
func (d *demo) client(name, alpn string, v6 bool) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		ForceAttemptHTTP2: alpn == "h2",
		TLSClientConfig:   &tls.Config{ServerName: name, NextProtos: []string{alpn}, RootCAs: d.trusted.pool},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.bed.Client.DialContext(ctx, "tcp", d.vip(v6).String())
		},
	}}
}

func (d *demo) ask(ctx context.Context, ask demoAsk) (got demoAnswer) {
	ctx, cancel := context.WithTimeout(ctx, demoRequestTimeout)
	defer cancel()
	d.connections++
	began := time.Now()
	resp, err := d.get(ctx, ask.name, ask.alpn, ask.v6, "/")
	got.took = time.Since(began)
	if errors.Is(err, syscall.ECONNRESET) {
		err = errDemoReset
	}
	if err != nil {
		got.err = err
		return got
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	got.took = time.Since(began)
	got.err = err
	words := strings.Fields(string(body))
	if len(words) < 2 {
		got.err = errors.Join(err, fmt.Errorf("the answer is %q", body))
		return got
	}
	got.backend, got.sni = words[0], strings.Trim(words[1], `"`)
	got.alpn = resp.TLS.NegotiatedProtocol
	sum := sha256.Sum256(resp.TLS.PeerCertificates[0].Raw)
	got.certOwner, got.fingerprint = d.trusted.owner[sum], hex.EncodeToString(sum[:4])
	return got
}

func (d *demo) get(ctx context.Context, name, alpn string, v6 bool, path string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+name+path, nil)
	if err != nil {
		return nil, err
	}
	return d.client(name, alpn, v6).Do(request)
}

// check says what is wrong with an answer, "" if nothing.
func (ask demoAsk) check(got demoAnswer) string {
	switch {
	case ask.answer == "" && got.err == nil:
		return fmt.Sprintf("%s answered, want a reset", got.backend)
	case ask.answer == "" && !errors.Is(got.err, errDemoReset):
		return fmt.Sprintf("want a reset: %v", got.err)
	case ask.answer == "":
		return ""
	case got.err != nil:
		return got.err.Error()
	case got.backend != ask.answer:
		return fmt.Sprintf("%s answered, want %s", got.backend, ask.answer)
	case got.certOwner != ask.answer:
		return fmt.Sprintf("the certificate is %q's, want %s's", got.certOwner, ask.answer)
	case got.sni != ask.name:
		return fmt.Sprintf("the backend was asked for %q", got.sni)
	case got.alpn != ask.alpn:
		return fmt.Sprintf("the backend speaks %q", got.alpn)
	}
	return ""
}

// download fetches much in one connection, and looks half-way at the flow table.
func (d *demo) download(ctx context.Context) error {
	before, err := d.count(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	d.connections++
	began := time.Now()
	resp, err := d.get(ctx, "a.example.com", "http/1.1", false, fmt.Sprintf("/big?n=%d", d.size))
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	hash := sha256.New()
	if _, err := io.CopyN(hash, resp.Body, d.size/2); err != nil {
		return fmt.Errorf("download: %w", err)
	}
	pause := time.Now()
	flows, err := d.flows(ctx)
	if err != nil {
		return err
	}
	paused := time.Since(pause)
	if _, err := io.Copy(hash, resp.Body); err != nil {
		return fmt.Errorf("download: %w", err)
	}
	took := time.Since(began) - paused
	if sum := hex.EncodeToString(hash.Sum(nil)); sum != resp.Trailer.Get("X-Sha256") {
		d.fail("download: the bytes are not those that were sent")
	}
	after, err := d.count(ctx)
	if err != nil {
		return err
	}
	d.out.download(d.size, took, after.minus(before), flows)
	d.checkDownload(after.minus(before), flows)
	return nil
}

func (d *demo) checkDownload(c demoCounters, flows []engine.Flow) {
	if c.forwarded < 100*max(c.events, 1) {
		d.fail("download: %d packets were forwarded by the kernel, %d went to user space", c.forwarded, c.events)
	}
	want := netip.AddrPortFrom(d.servers[0].addr4, 443).String()
	for _, f := range flows {
		if f.State == "open" && f.SNI == "a.example.com" && f.Backend == want {
			return
		}
	}
	d.fail("snilb flows: no open flow from a.example.com to %s among %d", want, len(flows))
}

// flows is `snilb flows`.
func (d *demo) flows(ctx context.Context) ([]engine.Flow, error) {
	out, err := demoOutput(ctx, d.bed.LB, "flows", "--name", d.name, "-o", "json")
	if err != nil {
		return nil, err
	}
	var flows []engine.Flow
	if err := json.Unmarshal(out, &flows); err != nil {
		return nil, fmt.Errorf("snilb flows: %w", err)
	}
	return flows, nil
}

// counters shows what was counted since the start.
func (d *demo) counters(ctx context.Context) error {
	c, err := d.count(ctx)
	if err != nil {
		return err
	}
	sockets, err := demoSockets(d.bed.LB)
	if err != nil {
		return err
	}
	d.out.counters(c, d.connections, sockets)
	if sockets > 0 {
		d.fail("the balancer has %d TCP sockets, want none", sockets)
	}
	return nil
}

// count is `snilb status`.
func (d *demo) count(ctx context.Context) (demoCounters, error) {
	out, err := demoOutput(ctx, d.bed.LB, "status", "--name", d.name, "-o", "json")
	if err != nil {
		return demoCounters{}, err
	}
	var s statusDocument
	if err := json.Unmarshal(out, &s); err != nil {
		return demoCounters{}, fmt.Errorf("snilb status: %w", err)
	}
	return sumDemoCounters(s.Interfaces), nil
}

// demoSockets counts the TCP sockets of a namespace.
func demoSockets(ns *testbed.NS) (n int, err error) {
	err = ns.Do(func() error {
		for _, file := range []string{"tcp", "tcp6"} {
			text, err := os.ReadFile("/proc/thread-self/net/" + file)
			if errors.Is(err, os.ErrNotExist) {
				continue // A kernel without IPv6.
			}
			if err != nil {
				return err
			}
			n += bytes.Count(text, []byte("\n")) - 1 // The first line is a heading.
		}
		return nil
	})
	return n, err
}
