// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"snilb/scripts/testbed"
)

// startHAProxy runs HAProxy with the given sections in ns until the test ends, and waits until it accepts at probe. The
// certificate is the file CERT.
func startHAProxy(t *testing.T, ns *testbed.NS, sections string, probe netip.AddrPort) {
	t.Helper()
	needTool(t, "haproxy")
	dir := t.TempDir()
	pem := filepath.Join(dir, "cert.pem")
	must(t, os.WriteFile(pem, slices.Concat(cert.CertPEM, cert.KeyPEM), 0o600))
	conf := "defaults\n	timeout connect 20s\n	timeout client 60s\n	timeout server 60s\n" + strings.ReplaceAll(sections, "CERT", pem)
	file := filepath.Join(dir, "haproxy.cfg")
	must(t, os.WriteFile(file, []byte(conf), 0o644))
	cmd := ns.Command(context.Background(), "haproxy", "-db", "-f", file)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // without -W there is one process
		_ = cmd.Wait()
		if t.Failed() && out.Len() > 0 {
			t.Logf("haproxy said:\n%s", out.String())
		}
	})
	waitAccept(t, ns, probe)
}

// proxyReceivers serves b1 and b2 by nginx and b3 by HAProxy, all of which want a PROXY header and tell what it said:
//
//	NAME "SNI" "AUTHORITY" ADDRESS PORT LISTENER-ADDRESS LISTENER-PORT
func proxyReceivers(t *testing.T, bed *testbed.Bed) {
	t.Helper()
	var servers strings.Builder
	for i := 1; i <= 2; i++ {
		fmt.Fprintf(&servers, "	server { listen %s ssl proxy_protocol; listen %s ssl proxy_protocol;\n", at(bed, i, false, 443), at(bed, i, true, 443))
		fmt.Fprintf(&servers, "		location / { return 200 'b%d \"$ssl_server_name\" \"\" $proxy_protocol_addr $proxy_protocol_port "+
			"$proxy_protocol_server_addr $proxy_protocol_server_port\\n'; }\n	}\n", i)
	}
	startNginx(t, bed.Backend, servers.String(), at(bed, 2, true, 443))
	startHAProxy(t, bed.Backend, fmt.Sprintf(`
frontend b3
	mode http
	bind %s accept-proxy ssl crt CERT
	bind %s accept-proxy ssl crt CERT
	http-request return status 200 content-type text/plain lf-string "b3 \"%%[ssl_fc_sni]\" \"%%[fc_pp_authority]\" %%[src] %%[src_port] %%[dst] %%[dst_port]\n"
`, at(bed, 3, false, 443), at(bed, 3, true, 443)), at(bed, 3, true, 443))
}

// proxyRoutes leads a to nginx by v1, b to nginx by v2 and the wildcard to HAProxy by v2.
func proxyRoutes(bed *testbed.Bed) string {
	return `version: 1
listen: [":443"]
pools:
` + pool(bed, "one", "proxy_protocol: v1", 1) + pool(bed, "two", "proxy_protocol: v2", 2) + pool(bed, "three", "proxy_protocol: v2", 3) + `routes:
  - {sni: a.example.com, pool: one}
  - {sni: b.example.com, pool: two}
  - {sni: "*.w.example.com", pool: three}
`
}

// proxySites are the names of proxyRoutes, and what a receiver answers before the addresses.
var proxySites = map[string]string{
	"a.example.com":   `b1 "a.example.com" ""`,
	"b.example.com":   `b2 "b.example.com" ""`,
	"x.w.example.com": `b3 "x.w.example.com" "x.w.example.com"`,
}

// told is how a receiver tells of a connection.
func told(site string, client, listener netip.AddrPort) string {
	return fmt.Sprintf("%s %s %d %s %d", proxySites[site], client.Addr(), client.Port(), listener.Addr(), listener.Port())
}

// addrOf is the address of one end of a connection.
func addrOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// client0 is an address of the client with a port of its own for each call.
func client0(bed *testbed.Bed, v6 bool) netip.AddrPort {
	clientPorts++
	if v6 {
		return netip.AddrPortFrom(bed.Clients6[0], clientPorts)
	}
	return netip.AddrPortFrom(bed.Clients4[0], clientPorts)
}

var clientPorts uint16 = 20000 // below what the kernel gives out

// TestProxyOut asks nginx and HAProxy what they were told of a client.
func TestProxyOut(t *testing.T) {
	needTool(t, "curl", "openssl")
	bed := newBed(t, testbed.Options{})
	proxyReceivers(t, bed)
	attach(t, bed, proxyRoutes(bed))
	families(t, func(t *testing.T, v6 bool) {
		for site := range proxySites {
			t.Run(site, func(t *testing.T) { proxyOut(t, bed, v6, site) })
		}
	})
}

func proxyOut(t *testing.T, bed *testbed.Bed, v6 bool, site string) {
	target, from := vip(bed, v6), client0(bed, v6)
	got, err := curlPath(t, bed, target, site, "/", "--interface", from.Addr().String(), "--local-port", fmt.Sprint(from.Port()))
	wantTold(t, "curl", got, err, told(site, from, target))

	from = client0(bed, v6)
	got, err = output(t, bed, "GET / HTTP/1.0\r\n\r\n", "openssl", "s_client", "-connect", target.String(), "-bind", from.String(),
		"-CAfile", caFile, "-verify_return_error", "-quiet", "-servername", site)
	wantTold(t, "openssl", got, err, told(site, from, target))

	raw, err := dialTCP(t, bed, target)
	must(t, err)
	got, err = whoami(handshake(t, raw, &tls.Config{ServerName: site}))
	wantTold(t, "go", got, err, told(site, addrOf(raw.LocalAddr()), target))
}

func wantTold(t *testing.T, client, got string, err error, want string) {
	t.Helper()
	if err != nil || got != want {
		t.Errorf("%s: answer %q, %v, want %q", client, got, err, want)
	}
}
