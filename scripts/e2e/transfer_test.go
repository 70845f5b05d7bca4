// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// download fetches bulkSize bytes and checks them against the digest that the backend took of what it sent.
func download(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) {
	t.Helper()
	downloadSize(t, bed, target, name, bulkSize)
}

func downloadSize(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string, size int64) {
	t.Helper()
	downloadBy(t, httpClient(bed, target, &tls.Config{ServerName: name}), size)
}

func downloadBy(t *testing.T, client *http.Client, size int64) {
	t.Helper()
	resp, err := client.Get(fmt.Sprintf("https://backend/big?n=%d", size))
	must(t, err)
	defer func() { _ = resp.Body.Close() }()
	hash := sha256.New()
	n, err := io.Copy(hash, resp.Body)
	must(t, err)
	if got, want := hex.EncodeToString(hash.Sum(nil)), resp.Trailer.Get("X-Sha256"); n != size || got != want {
		t.Errorf("download: %d bytes with SHA-256 %s, backend sent %d with %s", n, got, size, want)
	}
}

// upload sends bulkSize bytes, of which the backend says count and digest.
func upload(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) {
	t.Helper()
	uploadSize(t, bed, target, name, bulkSize)
}

func uploadSize(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string, size int64) {
	t.Helper()
	uploadBy(t, httpClient(bed, target, &tls.Config{ServerName: name}), size)
}

func uploadBy(t *testing.T, client *http.Client, size int64) {
	t.Helper()
	hash := sha256.New()
	body := io.TeeReader(io.LimitReader(testbed.Noise(7), size), hash)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "https://backend/upload", body)
	must(t, err)
	resp, err := client.Do(req)
	must(t, err)
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	must(t, err)
	if want := fmt.Sprintf("%d %x", size, hash.Sum(nil)); strings.TrimSpace(string(answer)) != want {
		t.Errorf("upload: backend got %s, want %s", answer, want)
	}
}

// TestBulk moves 100 MB each way, with the offloads of a veth and without.
func TestBulk(t *testing.T) {
	for name, opts := range map[string]testbed.Options{
		"offloads": {}, "no-offloads": {NoOffload: true}, "one-armed": {Topology: testbed.OneArmed},
	} {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, opts)
			startBackends(t, bed)
			attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) {
				t.Run("download", func(t *testing.T) { download(t, bed, vip(bed, v6), "a.example.com") })
				t.Run("upload", func(t *testing.T) { upload(t, bed, vip(bed, v6), "a.example.com") })
			})
		})
	}
}

// TestBulkNginx downloads a file that nginx sends by sendfile, with curl.
func TestBulkNginx(t *testing.T) {
	needTool(t, "curl", "nginx")
	bed := newBed(t, testbed.Options{})
	nginxBackends(t, bed)
	attach(t, bed, siteRoutes(bed))
	want := sha256.New()
	_, err := io.CopyN(want, testbed.Noise(1), bulkSize)
	must(t, err)
	families(t, func(t *testing.T, v6 bool) {
		out := t.TempDir() + "/big"
		_, err := curlPath(t, bed, vip(bed, v6), "a.example.com", "/big", "-o", out)
		must(t, err)
		if got := fileSum(t, out); got != hex.EncodeToString(want.Sum(nil)) {
			t.Errorf("SHA-256 of the download is %s", got)
		}
	})
}

// TestMTU crosses legs of different MTUs with offloads off: the MSS must be clamped, both ways.
func TestMTU(t *testing.T) {
	for name, opts := range map[string]testbed.Options{
		"small-client":  {ClientMTU: 1280, BackendMTU: 1500, NoOffload: true},
		"small-backend": {ClientMTU: 1500, BackendMTU: 1280, NoOffload: true},
		"jumbo-client":  {ClientMTU: 9000, BackendMTU: 1500, NoOffload: true},
	} {
		t.Run(name, func(t *testing.T) {
			bed := newBed(t, opts)
			startBackends(t, bed)
			attach(t, bed, siteRoutes(bed))
			families(t, func(t *testing.T, v6 bool) {
				download(t, bed, vip(bed, v6), "a.example.com")
				upload(t, bed, vip(bed, v6), "a.example.com")
			})
		})
	}
}

// TestManyAtOnce holds 200 connections open together.
func TestManyAtOnce(t *testing.T) {
	const many = 200
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	conns, errs := make([]net.Conn, many), make([]error, many)
	var wg sync.WaitGroup
	for i := range many {
		wg.Go(func() {
			conns[i], errs[i] = tryTLS(t, bed, vip(bed, i%2 == 1), []string{"a", "b"}[i/2%2]+".example.com")
		})
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	d.waitFlows(fmt.Sprint(many), 5*time.Second, func(f []flow) bool { return len(f) == many })
	for i := range many {
		wg.Go(func() {
			got, err := whoami(conns[i])
			wantBody(t, got, err, []string{"b1", "b2"}[i/2%2], []string{"a", "b"}[i/2%2]+".example.com")
			_ = conns[i].Close()
		})
	}
	wg.Wait()
	d.noFlows(15 * time.Second)
}

// tryTLS is dialTLS for goroutines other than the test's.
func tryTLS(t *testing.T, bed *testbed.Bed, target netip.AddrPort, name string) (net.Conn, error) {
	raw, err := dialTCP(t, bed, target)
	if err != nil {
		return nil, err
	}
	if err := raw.SetDeadline(time.Now().Add(clientTimeout)); err != nil {
		return nil, err
	}
	c := tls.Client(raw, trusting(&tls.Config{ServerName: name}))
	return c, c.Handshake()
}

// TestSilentClient opens and closes without a word, like the TCP check of another balancer: it wants its FIN answered.
func TestSilentClient(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	backends := startBackends(t, bed)
	d := attach(t, bed, siteRoutes(bed))
	before := backends["b1"].Conns.Load()
	families(t, func(t *testing.T, v6 bool) {
		for range 20 {
			c, err := dialTCP(t, bed, vip(bed, v6))
			must(t, err)
			must(t, c.CloseWrite())
			must(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
			if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				t.Fatalf("after FIN: %d bytes, %v, want EOF", n, err)
			}
			must(t, c.Close())
		}
	})
	d.noFlows(time.Second)
	if n := backends["b1"].Conns.Load() - before; n > 10 { // a health check or two may come between
		t.Errorf("%d connections reached a backend", n)
	}
}

// TestHalfClose sends FIN and then still receives, for as long as the backend takes.
func TestHalfClose(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	for _, v6 := range []bool{false, true} {
		serve(t, bed.Backend, at(bed, 1, v6, 443), answerAtEOF)
	}
	d := attach(t, bed, siteRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		raw, err := dialTCP(t, bed, vip(bed, v6))
		must(t, err)
		c := handshake(t, raw, classic("a.example.com"))
		must(t, c.SetDeadline(time.Now().Add(clientTimeout)))
		_, err = io.CopyN(c, testbed.Noise(3), 1<<20)
		must(t, err)
		must(t, c.CloseWrite())
		must(t, raw.CloseWrite())
		got, err := io.ReadAll(c)
		must(t, err)
		if len(got) != 4<<20 {
			t.Errorf("after our FIN came %d bytes, want %d", len(got), 4<<20)
		}
	})
	d.noFlows(15 * time.Second)
}

// answerAtEOF reads all, waits, and then sends 4 MB.
func answerAtEOF(raw net.Conn) {
	defer func() { _ = raw.Close() }()
	c := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{cert.TLS}})
	n, err := io.Copy(io.Discard, c)
	if err != nil || n != 1<<20 {
		return // the client sees too few bytes
	}
	time.Sleep(3 * time.Second)
	_, _ = io.CopyN(c, testbed.Noise(4), 4<<20)
	_ = c.Close()
}

func fileSum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer func() { _ = f.Close() }()
	hash := sha256.New()
	_, err = io.Copy(hash, f)
	must(t, err)
	return hex.EncodeToString(hash.Sum(nil))
}
