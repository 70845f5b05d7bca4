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
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// bulkSize is what the transfer tests move: enough for every buffer on the way to fill and drain many times.
const bulkSize = 100 << 20

// families runs a test once per IP family. i picks the address family of a bed.
func families(t *testing.T, test func(t *testing.T, v6 bool)) {
	t.Helper()
	t.Run("ipv4", func(t *testing.T) { test(t, false) })
	t.Run("ipv6", func(t *testing.T) { test(t, true) })
}

// vip is the load balancer's address, at port 443.
func vip(bed *testbed.Bed, v6 bool) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(bed.VIP6, 443)
	}
	return netip.AddrPortFrom(bed.VIP4, 443)
}

// at is the address of backend i, counted from 1 as in the names b1, b2...
func at(bed *testbed.Bed, i int, v6 bool, port uint16) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(bed.Backends6[i-1], port)
	}
	return netip.AddrPortFrom(bed.Backends4[i-1], port)
}

// startBackends runs the HTTPS backends b1, b2... on every backend address of both families.
func startBackends(t *testing.T, bed *testbed.Bed) map[string]*testbed.Backend {
	t.Helper()
	all := map[string]*testbed.Backend{}
	for i := range bed.Backends4 {
		for _, v6 := range []bool{false, true} {
			name := fmt.Sprintf("b%d", i+1)
			b, err := testbed.StartBackend(bed.Backend, name, at(bed, i+1, v6, 443), cert)
			must(t, err)
			t.Cleanup(func() { _ = b.Close() })
			if v6 {
				name += "/v6"
			}
			all[name] = b
		}
	}
	return all
}

// startNginx runs nginx with the given server blocks in ns until the test ends, and waits until it accepts at probe.
func startNginx(t *testing.T, ns *testbed.NS, servers string, probe netip.AddrPort) (root string) {
	t.Helper()
	needTool(t, "nginx")
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "cert.pem"), cert.CertPEM, 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "key.pem"), cert.KeyPEM, 0o600))
	conf := fmt.Sprintf(`user root;
daemon off;
worker_processes 1;
pid %[1]s/nginx.pid;
error_log stderr warn;
events { worker_connections 4096; }
http {
	access_log off;
	sendfile on;
	default_type text/plain;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	ssl_certificate %[1]s/cert.pem;
	ssl_certificate_key %[1]s/key.pem;
	root %[1]s;
%[2]s
}
`, dir, servers)
	file := filepath.Join(dir, "nginx.conf")
	must(t, os.WriteFile(file, []byte(conf), 0o644))
	ctx, cancel := context.WithCancel(context.Background())
	cmd := ns.Command(ctx, "nginx", "-p", dir, "-c", file, "-e", "stderr")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// SIGKILL would orphan the worker; on SIGTERM the master ends it.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	must(t, cmd.Start())
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
		if t.Failed() && out.Len() > 0 {
			t.Logf("nginx said:\n%s", out.String())
		}
	})
	waitAccept(t, ns, probe)
	return dir
}

// nginxBackends serves b1, b2... by nginx, with the file /big of bulkSize bytes.
func nginxBackends(t *testing.T, bed *testbed.Bed) {
	t.Helper()
	var servers strings.Builder
	for i := range bed.Backends4 {
		fmt.Fprintf(&servers, "	server { listen %s ssl; listen %s ssl;\n", at(bed, i+1, false, 443), at(bed, i+1, true, 443))
		fmt.Fprintf(&servers, "		location = / { return 200 'b%d \"$ssl_server_name\" \"$ssl_alpn_protocol\" $remote_addr:$remote_port\\n'; }\n", i+1)
		fmt.Fprintf(&servers, "		location = /big { }\n	}\n")
	}
	root := startNginx(t, bed.Backend, servers.String(), at(bed, 1, true, 443))
	f, err := os.Create(filepath.Join(root, "big"))
	must(t, err)
	_, err = io.CopyN(f, testbed.Noise(1), bulkSize)
	must(t, errors.Join(err, f.Close()))
}

func waitAccept(t *testing.T, ns *testbed.NS, addr netip.AddrPort) {
	t.Helper()
	var err error
	for range 100 {
		var c net.Conn
		if c, err = ns.DialContext(t.Context(), "tcp", addr.String()); err == nil {
			_ = c.Close()
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("nobody listens at %s: %v", addr, err)
}

// serve accepts in ns and hands every connection to handle on a goroutine of its own, until the test ends.
func serve(t *testing.T, ns *testbed.NS, addr netip.AddrPort, handle func(net.Conn)) {
	t.Helper()
	l, err := ns.Listen("tcp", addr.String())
	must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	go accept(l, handle)
}

func accept(l net.Listener, handle func(net.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go handle(c)
	}
}

// serveEcho answers every byte by itself, over TLS. What each connection ended with is sent to ends, when that is not nil.
func serveEcho(t *testing.T, bed *testbed.Bed, addr netip.AddrPort, ends chan<- error) {
	t.Helper()
	config := &tls.Config{Certificates: []tls.Certificate{cert.TLS}}
	serve(t, bed.Backend, addr, func(c net.Conn) {
		defer func() { _ = c.Close() }()
		s := tls.Server(c, config)
		_, err := io.Copy(s, s)
		if ends != nil {
			ends <- err
		}
	})
}
