// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// clientTimeout is far above what any single exchange here takes.
const clientTimeout = 20 * time.Second

// A client fetches / from target, asking for name (none when it is empty), and returns the body.
type client struct {
	name string
	tool string // the program it needs, if any
	get  func(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) (string, error)
}

// clients are real ones of four TLS libraries.
var clients = []client{
	{"curl", "curl", curl},
	{"openssl", "openssl", opensslClient},
	{"gnutls", "gnutls-cli", gnutlsClient},
	{"go", "", goClient},
}

func curl(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) (string, error) {
	return curlPath(t, bed, target, name, "/")
}

func curlPath(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name, path string, args ...string) (string, error) {
	t.Helper()
	if name == "" {
		return "", errors.New("curl always sends the name of the URL")
	}
	args = append([]string{
		"-sS", "--max-time", "60", "--cacert", caFile,
		"--resolve", fmt.Sprintf("%s:%d:%s", name, target.Port(), target.Addr()),
		fmt.Sprintf("https://%s:%d%s", name, target.Port(), path),
	}, args...)
	return output(t, bed, "", "curl", args...)
}

func opensslClient(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) (string, error) {
	args := []string{"s_client", "-connect", target.String(), "-CAfile", caFile, "-verify_return_error", "-quiet", "-noservername"}
	if name != "" {
		args = append(args[:len(args)-1], "-servername", name)
	}
	return output(t, bed, "GET / HTTP/1.0\r\n\r\n", "openssl", args...)
}

func gnutlsClient(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) (string, error) {
	args := []string{"--x509cafile", caFile, "--port", fmt.Sprint(target.Port()), target.Addr().String()}
	if name == "" {
		args = append([]string{"--disable-sni", "--verify-hostname", certNames[0]}, args...)
	} else {
		args = append([]string{"--sni-hostname", name, "--verify-hostname", name}, args...)
	}
	return output(t, bed, "GET / HTTP/1.0\r\n\r\n", "gnutls-cli", args...)
}

// output runs a client program and returns the last line of what it prints: the body.
func output(t *testing.T, bed *testbed.Bed, stdin, program string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := bed.Client.Command(ctx, program, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	in, err := cmd.StdinPipe() // stays open: both s_client and gnutls-cli hang up when their input ends
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	_, _ = io.WriteString(in, stdin) // a client that cannot connect does not read it
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", program, strings.Join(args, " "), err, errOut.String())
	}
	for _, line := range strings.Split(out.String(), "\n") {
		if isBody(line) {
			return line, nil
		}
	}
	return strings.TrimSpace(out.String()), nil
}

// isBody knows the line in which a backend says who it is among what a client says itself.
func isBody(line string) bool {
	return len(line) > 4 && line[0] == 'b' && strings.HasPrefix(line[2:], ` "`)
}

func goClient(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) (string, error) {
	return get(t, bed, target, "/", &tls.Config{ServerName: name})
}

// get is the Go client with a TLS configuration of one's own.
func get(t *testing.T, bed *testbed.Bed, target netip.AddrPort, path string, config *tls.Config) (string, error) {
	t.Helper()
	resp, err := httpClient(bed, target, config).Get("https://backend" + path)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return strings.TrimSpace(string(body)), err
}

// httpClient connects every request anew and to target, whatever the URL says.
func httpClient(bed *testbed.Bed, target netip.AddrPort, config *tls.Config) *http.Client {
	config = trusting(config)
	return &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   config,
		ForceAttemptHTTP2: len(config.NextProtos) > 0 && config.NextProtos[0] == "h2",
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return bed.Client.DialContext(ctx, "tcp", target.String())
		},
	}}
}

// trusting completes a configuration. Without a name the hello carries none and the certificate is checked for the first.
func trusting(config *tls.Config) *tls.Config {
	config = config.Clone()
	config.RootCAs = cert.Pool
	if config.ServerName != "" {
		return config
	}
	config.ServerName = "192.0.2.99" // crypto/tls wants something: an address is never sent as SNI
	config.InsecureSkipVerify = true // and then fails the check, which is done by hand
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		return cs.PeerCertificates[0].VerifyHostname(certNames[0])
	}
	return config
}

// dialTLS connects to target and shakes hands; the connection is closed with the test.
func dialTLS(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) *tls.Conn {
	t.Helper()
	raw, err := dialTCP(t, bed, target)
	must(t, err)
	return handshake(t, raw, &tls.Config{ServerName: name})
}

func dialTCP(t *testing.T, bed *testbed.Bed, target netip.AddrPort) (*net.TCPConn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), clientTimeout)
	defer cancel()
	c, err := bed.Client.DialContext(ctx, "tcp", target.String())
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*net.TCPConn), nil
}

// handshake speaks TLS over a connection.
func handshake(t *testing.T, raw net.Conn, config *tls.Config) *tls.Conn {
	t.Helper()
	must(t, raw.SetDeadline(time.Now().Add(clientTimeout)))
	c := tls.Client(raw, trusting(config))
	if err := c.Handshake(); err != nil {
		t.Fatalf("TLS handshake with %s for %q: %v", raw.RemoteAddr(), config.ServerName, err)
	}
	must(t, raw.SetDeadline(time.Time{}))
	return c
}

// ping sends a line through an echo backend and wants it back.
func ping(c net.Conn, text string) error {
	if err := c.SetDeadline(time.Now().Add(clientTimeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("echo: %w", err)
	}
	if string(got) != text {
		return fmt.Errorf("echo of %q is %q", text, got)
	}
	return nil
}

// whoami asks an HTTPS backend over an existing TLS connection, and keeps that connection.
func whoami(c net.Conn) (string, error) {
	if err := c.SetDeadline(time.Now().Add(clientTimeout)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: backend\r\n\r\n"); err != nil {
		return "", err
	}
	buf := make([]byte, 16<<10)
	for n := 0; ; {
		m, err := c.Read(buf[n:])
		if err != nil {
			return "", err
		}
		n += m
		_, body, ok := strings.Cut(string(buf[:n]), "\r\n\r\n")
		if ok && strings.HasSuffix(body, "\n") {
			return strings.TrimSpace(body), nil
		}
	}
}

// hello is the ClientHello record that Go sends under a configuration.
func hello(t *testing.T, config *tls.Config) []byte {
	t.Helper()
	rec := &recorder{}
	_ = tls.Client(rec, trusting(config)).Handshake() // fails at the first read, the hello is out by then
	if len(rec.sent) == 0 {
		t.Fatal("crypto/tls sent no hello")
	}
	return rec.sent
}

// recorder is a connection to nobody.
type recorder struct {
	net.Conn
	sent []byte
}

func (r *recorder) Write(p []byte) (int, error) { r.sent = append(r.sent, p...); return len(p), nil }
func (r *recorder) Read([]byte) (int, error)    { return 0, io.EOF }
func (r *recorder) Close() error                { return nil }

// splitter writes at most size bytes at a time, with a pause between, so that each goes out as a segment of its own
// (Go turns Nagle's algorithm off).
type splitter struct {
	net.Conn
	size  int
	pause time.Duration
	// between is called once behind the first piece. Optional.
	between func()
}

func (s *splitter) Write(p []byte) (int, error) {
	for off := 0; off < len(p); off += s.size {
		if n, err := s.Conn.Write(p[off:min(off+s.size, len(p))]); err != nil {
			return off + n, err
		}
		time.Sleep(s.pause)
		if s.between != nil {
			s.between()
			s.between = nil
		}
	}
	return len(p), nil
}

// counter counts the bytes that pass a connection: below TLS, these are TCP's payload.
type counter struct {
	net.Conn
	in, out atomic.Uint64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.in.Add(uint64(n))
	return n, err
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.out.Add(uint64(n))
	return n, err
}

// wantBody checks who has answered, and for which name.
func wantBody(t *testing.T, got string, err error, backend, name string) {
	t.Helper()
	if err != nil {
		t.Errorf("ask for %q: %v", name, err)
		return
	}
	if want := fmt.Sprintf("%s %q ", backend, name); !strings.HasPrefix(got, want) {
		t.Errorf("answer %q, want %q...", got, want)
	}
}
